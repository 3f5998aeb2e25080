"""The fused Gaussian attention on packed sequences, each with its own patch grid: one launch for crops of several sizes.

The kernels are those of attention_triton.py; a table tells each of their programs which sequence it serves. Imported only where a CUDA device is to be
served.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_locat.models.attention import Gaussian
from ssl_locat.models.attention_packed import Run
from ssl_locat.models.attention_triton import forward_kernel, key_grad_kernel, launch_options, query_grad_kernel, strides


def packed_triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeffs: Sequence[Gaussian],
    runs: Sequence[Run],
    grids: Sequence[tuple[int, int]],
    prefix: int,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + S) v within each sequence: q, k, v [S, heads, d] -> [S, heads, d]. coeffs: of each run, [B_i, heads, N_i]; whole grids."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    # prefix tokens get a place of their own, so that one offset finds what belongs to a token: [heads, S]
    gaussian = [
        torch.cat([F.pad(t.float(), (prefix, 0)).transpose(0, 1).flatten(1) for t in tensors], dim=1)
        for tensors in zip(*((coeff.ax, coeff.ay, coeff.alpha) for coeff in coeffs), strict=True)
    ]
    clamp = min(coeffs[0].clamp, float(max(max(grid) for grid in grids)) ** 2)  # an infinite clamp never acts; nor does this one
    block = launch_options(forward_kernel, q.shape[-1], q.dtype)["BLOCK_M"]  # of kept tokens, the same in all three kernels
    table = block_table(tuple(runs), tuple(cols for _, cols in grids), block, q.device)
    return attend_packed(q, k, v, *gaussian, table, clamp, coeffs[0].pool, prefix, q.shape[-1] ** -0.5)[0]


@cache
def block_table(runs: tuple[Run, ...], cols: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """int32 [blocks, 4]: the first token of its sequence, that one's length and columns, and which of its blocks it is."""
    rows, first = [], 0
    for run, width in zip(runs, cols, strict=True):
        for _ in range(run.batch):
            rows += [(first, run.tokens, width, number) for number in range(-(-run.tokens // block))]
            first += run.tokens
    return torch.tensor(rows, dtype=torch.int32).to(device)


def layout(tensor: Tensor) -> Tensor:
    """[S, heads, d] as the kernels count: [1, heads, S, d]."""
    return tensor.transpose(0, 1)[None]


@torch.library.custom_op("ssl_locat::packed_gaussian_attention", mutates_args=())
def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, ax: Tensor, ay: Tensor, alpha: Tensor, table: Tensor,
    clamp: float, pool: int, num_prefix_tokens: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [S, heads, d], and the rows' log-sum-exp in base 2 [heads, S] for the backward."""
    s, h, _ = q.shape
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(h, s, dtype=torch.float32)
    options = launch_options(forward_kernel, q.shape[-1], q.dtype)
    with torch.cuda.device_of(q):
        forward_kernel[(len(table) * h,)](
            q, k, v, ax, ay, alpha, None, out, lse,
            *strides(*map(layout, (q, k, v, out))), table, 0, s, 0, s, h, 0, num_prefix_tokens, 1, scale, clamp, POOL=pool, **options,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("ssl_locat::packed_gaussian_attention_backward", mutates_args=())
def attend_packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, ax: Tensor, ay: Tensor, alpha: Tensor, table: Tensor, out: Tensor, lse: Tensor,
    clamp: float, pool: int, num_prefix_tokens: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    s, h, _ = q.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dax, day, dalpha = (torch.zeros_like(x) for x in (ax, ay, alpha))  # prefix tokens' places are not written
    delta = torch.empty_like(lse)
    sizes = table, 0, s, 0, s, h, 0, num_prefix_tokens, 1, scale, clamp
    with torch.cuda.device_of(q):
        options = launch_options(query_grad_kernel, q.shape[-1], q.dtype)
        query_grad_kernel[(len(table) * h,)](
            q, k, v, ax, ay, alpha, None, out, dout, lse, delta, dq, dax, day, dalpha,
            *strides(*map(layout, (q, k, v, out, dout, dq))), *sizes, POOL=pool, **options,
        )  # fmt: skip
        options = launch_options(key_grad_kernel, q.shape[-1], q.dtype)
        key_grad_kernel[(len(table) * h,)](
            q, k, v, ax, ay, alpha, None, dout, lse, delta, dk, dv,
            *strides(*map(layout, (q, k, v, dout, dk, dv))), *sizes, POOL=pool, **options,
        )  # fmt: skip
    return dq, dk, dv, dax, day, dalpha


@attend_packed.register_fake
def _(q, k, v, ax, ay, alpha, table, clamp, pool, num_prefix_tokens, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@attend_packed_backward.register_fake
def _(dout, q, k, v, ax, ay, alpha, table, out, lse, clamp, pool, num_prefix_tokens, scale):
    heads_like = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *heads_like, *(torch.empty_like(x) for x in (ax, ay, alpha))


def save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, clamp, pool, num_prefix_tokens, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = clamp, pool, num_prefix_tokens, scale


def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *attend_packed_backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


attend_packed.register_autograd(backward, setup_context=save_for_backward)
