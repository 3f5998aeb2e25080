"""Plain attention (no bias) over crops of several sizes in one call: vanilla multi-crops packed end to end.

xformers (the `gpu` extra) does it in one kernel; elsewhere each size is one call of PyTorch's fused attention, which measured no
slower on CPUs. The Gaussian bias has no place here: xformers takes a bias as a dense tensor or a block mask, not both.
"""

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_locat.errors import UserError

BACKENDS = ("auto", "sdpa", "xformers")


def packed_attention(
    groups: list[tuple[Tensor, Tensor, Tensor]], *, scale: float | None = None, backend: str = "auto"
) -> list[Tensor]:
    """softmax(q k^T * scale) v within each sequence of each group: q, k, v [B_i, heads, T_i, d] -> [B_i, heads, T_i, d].

    Groups share heads, d, dtype and device. Raises UserError if xformers is asked for and cannot serve."""
    if backend not in BACKENDS:
        raise UserError(f"packed attention backend is {backend!r}; known: {', '.join(BACKENDS)}")
    reason = xformers_unsupported_reason(groups[0][0])
    if backend == "xformers" and reason:
        raise UserError(f"packed attention backend 'xformers' {reason}; use 'auto' or 'sdpa'")
    if backend == "sdpa" or reason:
        return [F.scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in groups]
    return packed_by_xformers(groups, scale)


def xformers_unsupported_reason(q: Tensor) -> str | None:
    """Why xformers cannot serve tensors like `q`; None if it can."""
    if q.device.type != "cuda":
        return f"runs on CUDA devices, and these tensors are on {q.device.type!r}"
    if importlib.util.find_spec("xformers") is None:
        return "is not installed (pip install 'ssl_locat[gpu]')"
    return broken_binaries(q.dtype, q.shape[-1])


@cache
def broken_binaries(dtype: torch.dtype, head_dim: int) -> str | None:
    """Tries two tokens: binaries built for another PyTorch or GPU fail in many ways, some of them only when called."""
    q = torch.zeros(1, 2, 1, head_dim, device="cuda", dtype=dtype)
    try:
        from xformers.ops import memory_efficient_attention

        memory_efficient_attention(q, q, q)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        return f"does not work here ({str(error).splitlines()[0]})"
    return None


def packed_by_xformers(groups: list[tuple[Tensor, Tensor, Tensor]], scale: float | None) -> list[Tensor]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import BlockDiagonalMask

    sizes = [q.shape for q, _, _ in groups]
    # one for each sequence: the block mask keeps them apart
    lengths = [tokens for batch, _, tokens, _ in sizes for _ in range(batch)]
    # each [B_i, heads, T_i, d] -> [B_i * T_i, heads, d]; joined [1, sum B_i * T_i, heads, d]
    q, k, v = ([t.transpose(1, 2).flatten(0, 1) for t in tensors] for tensors in zip(*groups, strict=True))
    out = memory_efficient_attention(
        *(torch.cat(t).unsqueeze(0) for t in (q, k, v)), attn_bias=BlockDiagonalMask.from_seqlens(lengths), scale=scale
    )[0]
    parts = out.split([batch * tokens for batch, _, tokens, _ in sizes])
    return [part.unflatten(0, (batch, tokens)).transpose(1, 2) for part, (batch, _, tokens, _) in zip(parts, sizes, strict=True)]
