"""The attention core, forward + backward: every backend beside plain fused attention without a bias.

On a GPU the kernels' time and the CPU's time for launching them are rows of their own: at these sizes launching takes longer, and what a
model pays of it depends on what else it queues."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from ssl_locat.benchmarks.timing import (
    device,
    host_times,
    kernel_times,
    make_rows,
    peak_bytes,
    precisions,
    side_by_side,
    time_rows,
)
from ssl_locat.models.attention import BACKENDS, Gaussian, gaussian_attention, unsupported_reason
from ssl_locat.models.attention_packed import Run, packed_attention
from ssl_locat.models.attention_packed import unsupported_reason as packing_unsupported

HEADS, HEAD_DIM, PREFIX = 6, 64, 1  # ViT-S


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    on_gpu = device().type == "cuda"
    batches = {14: 64, 32: 64, 64: 8} if on_gpu else {14: 4} if quick else {6: 16, 14: 4, 32: 1}
    repeats = 5 if quick else 15
    for side, batch in batches.items():
        for precision, dtype in precisions().items():
            yield f"{side}x{side} {precision}", partial(measure, side, batch, precision, dtype, repeats)
    yield "vanilla multi-crop", partial(packed_rows, repeats)


def packed_rows(repeats: int) -> list[dict]:
    """Attention without a bias over 2 x 224 + 8 x 96 px crops laid end to end: a call for each size, or one for both where there is one."""
    images = 64 if device().type == "cuda" else 2
    dtype = list(precisions().values())[-1]
    runs = [Run(2 * images, 196 + PREFIX), Run(8 * images, 36 + PREFIX)]
    tokens = sum(run.batch * run.tokens for run in runs)
    q, k, v = (torch.randn(tokens, HEADS, HEAD_DIM, device=device(), dtype=dtype, requires_grad=True) for _ in range(3))
    cotangent = torch.randn_like(q)  # a loss would add its own time

    def both(backend: str) -> object:
        return torch.autograd.grad(packed_attention(q, k, v, runs, backend=backend), [q, k, v], cotangent)

    backends = {"a call for each size": "blocks", "varlen_attn": "varlen", "xformers": "xformers"}
    variants = {name: partial(both, backend) for name, backend in backends.items() if not packing_unsupported(backend, q)}
    timings = side_by_side(variants, repeats)
    return time_rows("attention", f"vanilla multi-crop, {images} images, {dtype}", timings, "a call for each size")


def measure(side: int, batch: int, precision: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    tokens, patches = side * side + PREFIX, side * side
    q, k, v = (torch.randn(batch, HEADS, tokens, HEAD_DIM, device=device(), dtype=dtype, requires_grad=True) for _ in range(3))
    # positive, as GAug's coefficients are; fp32 under any precision, as in the model
    ax, ay, alpha = (torch.rand(batch, HEADS, patches, device=device(), requires_grad=True) for _ in range(3))
    cotangent = torch.randn_like(q)

    def gaussian(backend: str) -> object:
        out = gaussian_attention(q, k, v, Gaussian(ax, ay, alpha, (side - 1.0) ** 2), (side, side), PREFIX, backend=backend)
        # returned, not accumulated into .grad: adding up would be timed, too
        return torch.autograd.grad(out, [q, k, v, ax, ay, alpha], cotangent)

    def plain() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), [q, k, v], cotangent)

    variants: dict[str, Callable[[], object]] = {"plain": plain}
    served = [name for name in BACKENDS if not unsupported_reason(name, q, plain=True)]
    if q.is_cuda:
        served.remove("tiled")  # hundreds of small launches, made for the caches of a CPU
    variants |= {name: partial(gaussian, name) for name in served}
    case = f"{side}x{side} {precision}"
    if q.is_cuda:
        result = time_rows("attention", case, kernel_times(variants, repeats), "plain", "kernel time")
        result += time_rows("attention", case, host_times(variants, repeats), "plain", "host time")
    else:
        result = time_rows("attention", case, side_by_side(variants, repeats), "plain")
    memory = {name: peak_bytes(call) / 2**20 for name, call in variants.items()}
    return result + make_rows("attention", case, "peak memory", "MiB", memory, "plain")
