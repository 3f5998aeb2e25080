"""Attention with LocAt's Gaussian bias (arXiv:2603.04892, eq. 4-10), behind one function.

    out = gaussian_attention(q, k, v, Gaussian(ax, ay, alpha, clamp), grid=(14, 14), num_prefix_tokens=1)

Every backend computes softmax(q k^T * scale + S) v with the same S; `BACKENDS` lists them, `backend="auto"` chooses.
The Gaussian is separable: it is the product of one factor per axis, so W + H exponentials per query make all W * H values.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_locat.errors import UserError, did_you_mean
from ssl_locat.models.attention_tiled import tiled
from ssl_locat.models.grid import bounded_exp, patch_distances, squared_distances


class Gaussian(NamedTuple):
    """What the bias needs of each query: S[p, t] = alpha_p * exp(-ax_p * min(dx^2, clamp) - ay_p * min(dy^2, clamp)).

    `dx`, `dy` count columns and rows of the patch grid between patch p (the query) and patch t (the key).
    """

    ax: Tensor  # [B, heads, N] float32 (float64 where q is): 1 / (2 * variance) along a row, so for differences of columns
    ay: Tensor  # [B, heads, N]: the same for differences of rows
    alpha: Tensor  # [B, heads, N]: height of the bump
    clamp: float = float("inf")  # largest squared distance per axis; farther patches count as that far
    pool: int = 1  # cells of pool x pool patches share the coordinates of their first one (the paper's fast path has 2)
    kept: Tensor | None = None  # [B, n] numbers of the patches that are there (row-major over the grid), N = n; None: all of them


def gaussian_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Gaussian,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    extra_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T * scale + S + extra_bias) v; S is zero in the rows and columns of prefix tokens.

    Args:
        q, k, v: [B, heads, R + N, d], prefix tokens first, then patches row-major over `grid` (rows, cols), or those of `coeff.kept`.
        scale: of the logits; 1 / sqrt(d) by default.
        extra_bias: broadcastable to [B, heads, R + N, R + N] (Swin's relative positions and window masks).

    Raises UserError if a named backend is unknown or cannot serve these inputs; "auto" always serves.
    """
    rows, cols = grid
    patches = rows * cols if coeff.kept is None else coeff.kept.shape[1]
    if q.shape[-2] != num_prefix_tokens + patches or coeff.alpha.shape[-1] != patches:
        what = f"a {rows} x {cols} grid" if coeff.kept is None else f"{patches} kept patches"
        raise UserError(
            f"attention got {q.shape[-2]} tokens and coefficients of {coeff.alpha.shape[-1]} patches, "
            f"but {num_prefix_tokens} prefix tokens and {what} make {num_prefix_tokens + patches}; "
            "pass the grid of this very input"
        )
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):  # as PyTorch does for its own fused attention
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    if backend == "auto":
        backend = _forced
    plain = dropout_p == 0 and extra_bias is None
    if backend == "auto":
        backend = choose(q, coeff, plain)
    elif backend == "xformers":
        raise UserError("attention backend 'xformers' has no Gaussian bias (attention_packed.py uses it without one); use 'auto'")
    elif backend not in BACKENDS:
        raise UserError(f"attention backend is {backend!r}; known: auto, {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}")
    elif reason := unsupported_reason(backend, q, plain):
        raise UserError(f"attention backend {backend!r} {reason}; use 'auto' or 'sdpa'")
    return BACKENDS[backend](q, k, v, coeff, grid, num_prefix_tokens, scale, dropout_p, extra_bias)


def dense_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    num_prefix_tokens: int,
    dropout_p: float = 0.0,
    extra_bias: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + zero-pad(bias) + extra_bias) v for any `bias` [B, heads, N, M] between patches (Laplace, pooled queries, ...)."""
    mask = F.pad(bias, [num_prefix_tokens, 0, num_prefix_tokens, 0]).to(q.dtype)
    if extra_bias is not None:
        mask = mask + extra_bias
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def gaussian_bias(coeff: Gaussian, grid: tuple[int, int]) -> Tensor:
    """The bias S between patches by the paper's formula, [B, heads, N, N] float32: slow, for tests, figures and comparison."""
    dx, dy = patch_distances(grid, coeff.alpha.device, coeff.pool, coeff.kept)
    exponent = coeff.ax[..., None] * dx.square().clamp(max=coeff.clamp) + coeff.ay[..., None] * dy.square().clamp(max=coeff.clamp)
    return coeff.alpha[..., None] * torch.exp(-exponent)


def separable_bias(coeff: Gaussian, grid: tuple[int, int], num_prefix_tokens: int, dtype: torch.dtype) -> Tensor:
    """S with its zero rows and columns, [B, heads, R + N, R + N] of `dtype`, from one factor per axis."""
    # exp(-(a + b)) = exp(-a) exp(-b): rows + cols exponentials per query instead of rows * cols
    factor_x, factor_y = factors(coeff, grid)
    factor_y = coeff.alpha[..., None] * factor_y
    if coeff.kept is None:
        patches = (factor_y[..., :, None] * factor_x[..., None, :]).flatten(-2)
    else:  # each kept key takes the factors of its row and column, [B, heads, n, n]
        row, col = (index[:, None, None] for index in (coeff.kept // grid[1], coeff.kept % grid[1]))
        patches = torch.take_along_dim(factor_y, row, -1) * torch.take_along_dim(factor_x, col, -1)
    return F.pad(patches.to(dtype), (num_prefix_tokens, 0, num_prefix_tokens, 0))


def factors(coeff: Gaussian, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """exp(-ax * dx^2) [B, heads, N, cols] and exp(-ay * dy^2) [B, heads, N, rows]."""
    dx2, dy2 = squared_distances(grid, coeff.clamp, coeff.pool, coeff.alpha.device, coeff.kept)
    return bounded_exp(-coeff.ax[..., None] * dx2), bounded_exp(-coeff.ay[..., None] * dy2)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Gaussian,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
    dropout_p: float,
    extra_bias: Tensor | None,
) -> Tensor:
    """The formula step by step, nothing fused: what the other backends are tested against."""
    r = num_prefix_tokens
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, heads, T, T], T = R + N
    logits = logits + F.pad(gaussian_bias(coeff, grid), (r, 0, r, 0))
    if extra_bias is not None:
        logits = logits + extra_bias
    weights = F.dropout(logits.softmax(-1), dropout_p)
    return weights.to(v.dtype) @ v


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Gaussian,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
    dropout_p: float,
    extra_bias: Tensor | None,
) -> Tensor:
    """PyTorch's fused attention with S as its mask; any device, any dtype, dropout, torch.compile and export."""
    bias = separable_bias(coeff, grid, num_prefix_tokens, q.dtype)
    if extra_bias is not None:
        bias = bias + extra_bias
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Gaussian,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
    dropout_p: float,
    extra_bias: Tensor | None,
) -> Tensor:
    """One fused kernel each way, nothing N x N in memory."""
    from ssl_locat.models.attention_triton import triton_attention  # imports triton, which not every machine has

    return triton_attention(q, k, v, coeff, grid, num_prefix_tokens, scale)


BACKENDS = {"reference": reference, "sdpa": sdpa, "tiled": tiled, "triton": triton}

HAS_TRITON = importlib.util.find_spec("triton") is not None  # a constant: torch 2.11's compiler breaks the graph at the search
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = 32  # tokens; up to here one unfused call on a CPU is faster than tiles
SMALL_BIAS = 1 << 24  # elements of the N x N bias below which inference on a CPU may as well write it out


def unsupported_reason(backend: str, q: Tensor, plain: bool) -> str | None:
    """Why `backend` cannot serve these inputs; None if it can. `plain`: no dropout and no extra bias."""
    if backend in ("tiled", "triton") and not plain:
        return "has neither dropout nor an extra bias"
    if backend == "tiled" and q.dtype == torch.float64:
        return "computes in float32"
    if backend == "tiled" and q.device.type != "cpu":
        return f"runs on CPUs, and these tensors are on {q.device.type!r}"
    if backend == "triton":
        if not HAS_TRITON:
            return "needs the triton package (it comes with PyTorch's CUDA builds; pip install triton)"
        if q.device.type != "cuda":
            return f"runs on CUDA devices, and these tensors are on {q.device.type!r}"
        if q.dtype not in TRITON_DTYPES or q.shape[-1] > 128:
            return f"serves float32, bfloat16 and float16 with head dimensions up to 128, not {q.dtype} with {q.shape[-1]}"
    return None


def choose(q: Tensor, coeff: Gaussian, plain: bool) -> str:
    """The fastest backend for this device, dtype and size; measured in docs/performance.md."""
    # torch.func's transforms (vmap, grad) and traces know none of our kernels
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing() or q.is_meta:
        return "sdpa"
    if q.device.type == "cuda":
        return "sdpa" if unsupported_reason("triton", q, plain) else "triton"
    if not plain or torch.compiler.is_compiling():  # a compiler would unroll the tiles
        return "sdpa"
    if q.shape[2] <= SHORT or unsupported_reason("tiled", q, plain):
        return "sdpa"
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, *coeff[:3]))
    return "tiled" if needs_grad or q[..., 0].numel() * q.shape[2] > SMALL_BIAS else "sdpa"  # B * heads * T * T elements


_forced = "auto"  # a plain global: torch.compile of torch 2.11 cannot read a ContextVar


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """All Gaussian attention inside takes this backend (comparisons, tests, a suspected kernel)."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
