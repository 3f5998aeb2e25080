"""Attention over sequences of several lengths laid end to end, each within itself: multi-crops of two sizes in one call.

    out = packed_attention(q, k, v, [Run(128, 197), Run(512, 37)])      # q, k, v [S, heads, d], S = 128 * 197 + 512 * 37

Without a bias. On CUDA one kernel does it: PyTorch's own for variable lengths (`torch.nn.attention.varlen`, half precision), or xformers' (the
`gpu` extra). Elsewhere, and as what both are compared with, each run of equal lengths is one call of PyTorch's fused attention: the blocks of
the block-diagonal mask, one by one. Packing with LocAt's bias is in packing.py.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_locat.errors import UserError, did_you_mean

BACKENDS = ("auto", "blocks", "varlen", "xformers", "dense")


class Run(NamedTuple):
    """So many sequences of one length, one after the other."""

    batch: int
    tokens: int


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence: q, k, v [S, heads, d] -> [S, heads, d].

    backend: "blocks", a call for each run; "varlen" and "xformers", one kernel; "dense", all tokens at once under the mask itself (S x S: for
    tests). Raises UserError for one that is unknown or cannot serve; "auto" always serves."""
    if backend not in BACKENDS:
        raise UserError(
            f"packed attention backend is {backend!r}; known: {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )
    q, k, v = as_autocast(q, k, v)
    if backend == "auto":
        backend = next(name for name in ("varlen", "xformers", "blocks") if not unsupported_reason(name, q))
    elif reason := unsupported_reason(backend, q):
        raise UserError(f"packed attention backend {backend!r} {reason}; use 'auto' or 'blocks'")
    if backend == "blocks":
        sizes = [run.batch * run.tokens for run in runs]
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), runs, strict=True)
        return torch.cat([_block(q_run, k_run, v_run, run, scale) for q_run, k_run, v_run, run in parts])
    if backend == "dense":
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # [heads, S, d]
        mask = block_diagonal(runs, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)
    return (_by_varlen if backend == "varlen" else _by_xformers)(q, k, v, runs, scale)


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In autocast's dtype where it is on, as PyTorch does for its own fused attention."""
    if q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def block_diagonal(runs: Sequence[Run], device: torch.device | None = None) -> Tensor:
    """[S, S] bool: whether two tokens are of one sequence."""
    number = sequence_of_token(runs, device)
    return number[:, None] == number[None, :]


def sequence_of_token(runs: Sequence[Run], device: torch.device | None = None) -> Tensor:
    """[S] int64: the number of each token's sequence."""
    return _sequence_of_token(tuple(runs), device)


def lengths_of(runs: Sequence[Run]) -> list[int]:
    """One for each sequence."""
    return [run.tokens for run in runs for _ in range(run.batch)]


def unsupported_reason(backend: str, q: Tensor) -> str | None:
    """Why `backend` cannot serve tensors like `q`; None if it can."""
    if backend in ("blocks", "dense"):
        return None
    if q.device.type != "cuda":
        return f"runs on CUDA devices, and these tensors are on {q.device.type!r}"
    if backend == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "needs a newer PyTorch (torch.nn.attention.varlen)"
    if backend == "varlen" and q.dtype not in (torch.float16, torch.bfloat16):
        return f"serves float16 and bfloat16, not {q.dtype}"
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        return "is not installed (pip install 'ssl_locat[gpu]')"
    return _broken(backend, q.dtype, q.shape[-1])


@cache
def _broken(backend: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Tries two sequences, both ways: binaries built for another PyTorch or GPU fail in many ways, some of them only when called."""
    with torch.enable_grad(), torch.autocast("cuda", enabled=False):
        q = torch.zeros(3, 1, head_dim, device="cuda", dtype=dtype, requires_grad=True)
        try:
            out = (_by_varlen if backend == "varlen" else _by_xformers)(q, q, q, [Run(1, 2), Run(1, 1)], None)
            torch.autograd.grad(out.sum(), q)
        except (ImportError, OSError, RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
            return f"does not work here ({str(error).splitlines()[0]})"
    return None


def _block(q: Tensor, k: Tensor, v: Tensor, run: Run, scale: float | None) -> Tensor:
    """[batch * tokens, heads, d] -> [batch, heads, tokens, d], attention, and back."""
    q, k, v = (t.unflatten(0, run).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)


def _by_varlen(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts = _starts(tuple(runs), q.device)
    longest = max(run.tokens for run in runs)
    out: Any = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale)  # alone, as nothing else is asked for
    return out


def _by_xformers(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scale: float | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    mask = _xformers_mask(tuple(runs), q.device)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]


# these three are made once for each mix of sizes, as they copy to the device, which waits for it
@cache
def _sequence_of_token(runs: tuple[Run, ...], device: torch.device | None) -> Tensor:
    lengths = lengths_of(runs)
    with torch.inference_mode(False):  # kept for passes that are trained through
        return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)


@cache
def _starts(runs: tuple[Run, ...], device: torch.device) -> Tensor:
    """int32 [sequences + 1]: where each begins, and the end."""
    lengths = torch.tensor([0, *lengths_of(runs)])
    return lengths.cumsum(0).to(device, torch.int32)


@cache
def _xformers_mask(runs: tuple[Run, ...], device: torch.device):
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(lengths_of(runs), device=device)
