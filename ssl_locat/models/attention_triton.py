"""Gaussian attention as fused Triton kernels: the bias is made where it is used, nothing N x N reaches memory.

Three numbers per query come in, three gradients per query go out. No atomics, and tile sizes fixed by head dimension alone, so
results repeat bit for bit: the query kernel walks the keys of its queries, which gives dQ and the coefficients' sums; the key kernel
walks the queries of its keys and makes the bias again. Layout as in FlashAttention-2 (arXiv:2307.08691). Exponents are in base 2.

Runs without a GPU under TRITON_INTERPRET=1 (tests). Imported only where a CUDA device is to be served.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, coeff: Any, grid: tuple[int, int], num_prefix_tokens: int, scale: float | None
) -> Tensor:
    """softmax(q k^T * scale + S) v; see attention.gaussian_attention. Head dimension at most 128."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    clamp = min(coeff.clamp, float(max(grid)) ** 2)  # an infinite clamp never acts; nor does this one
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    gaussian = [t.float().contiguous() for t in coeff[:3]]
    kept = None if coeff.kept is None else coeff.kept.to(torch.int32).contiguous()
    return attend(q, k, v, *gaussian, kept, clamp, coeff.pool, *grid, num_prefix_tokens, scale)[0]


@triton.jit
def place(TABLE, H, T, COLS, BLOCK: tl.constexpr):
    """This program's image and head, the first token of its sequence, that one's length and columns, and the program's tokens in it [BLOCK]. One
    axis of the launch for all, as CUDA's others end at 65535.

    Without TABLE all sequences have T tokens, and a head's blocks are neighbours, which share its keys in the cache. Packed, they lie end to end:
    a row of TABLE, int32 [blocks, 4], says of each block where its sequence begins, its length, its columns, and which of its blocks it is."""
    program = tl.program_id(0)
    if TABLE is None:
        blocks = tl.cdiv(T, BLOCK)
        head = (program // blocks).to(tl.int64)  # offsets are products with it, which pass 32 bits at 2**31 elements
        b, h = head // H, head % H
        first = head * 0
        block = program % blocks
    else:
        row = TABLE + program // H * 4
        h = (program % H).to(tl.int64)
        b = h * 0
        first = tl.load(row).to(tl.int64)
        T = tl.load(row + 1)
        COLS = tl.load(row + 2)
        block = tl.load(row + 3)
    return b, h, first, T, COLS, block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def starts(TABLE, b, h, first, rows_image, rows_head, bump_image, bump_head, R):
    """Where the sequence's own begin: of numbers for each token ([B, heads, T]; packed [heads, S]), and of the coefficients, which only patches
    have ([B, heads, T - R]), but for packed ones, where prefix tokens have a place, too ([heads, S])."""
    rows = b * rows_image + h * rows_head + first
    bumps = b * bump_image + h * bump_head + first
    if TABLE is None:
        bumps = bumps - R
    return rows, bumps


@triton.jit
def coordinates(KEPT, b, tokens, R, T, COLS, POOL: tl.constexpr):
    """Column and row of each token of image b on the grid; meaningless for prefix tokens (masked by the callers)."""
    patches = tokens - R
    if KEPT is not None:  # numbers of the patches that are there, [B, T - R]
        patches = tl.load(KEPT + b * (T - R) + patches, mask=(tokens >= R) & (tokens < T), other=0)
    x, y = patches % COLS, patches // COLS
    return (x // POOL * POOL).to(tl.float32), (y // POOL * POOL).to(tl.float32)


@triton.jit
def gauss_tile(xm, ym, axm, aym, xn, yn, clamp):
    """exp2(-ax dx^2 - ay dy^2) of broadcastable queries and keys, with the two squared distances."""
    dx, dy = xm - xn, ym - yn  # [M, N] by broadcasting, in patches
    dx2, dy2 = tl.minimum(dx * dx, clamp), tl.minimum(dy * dy, clamp)
    return tl.exp2(-axm * dx2 - aym * dy2), dx2, dy2


@triton.jit
def load_rows(base, tokens, stride, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, BLOCK_D] of one head, zero beyond T tokens and D channels."""
    channels = tl.arange(0, BLOCK_D)
    mask = (tokens[:, None] < T) & (channels[None, :] < D)
    return tl.load(base + tokens[:, None] * stride + channels[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, tokens, stride, T, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    channels = tl.arange(0, BLOCK_D)
    mask = (tokens[:, None] < T) & (channels[None, :] < D)
    tl.store(base + tokens[:, None] * stride + channels[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_gaussian(AX, AY, ALPHA, start, tokens, R, T):
    """Coefficients of these queries in base 2, `start` being where a token 0 would have its own; alpha is 0 for prefix tokens, which takes their bias
    away."""
    mask = (tokens >= R) & (tokens < T)
    at = start + tokens
    ax = tl.load(AX + at, mask=mask, other=0.0) * LOG2E
    ay = tl.load(AY + at, mask=mask, other=0.0) * LOG2E
    return ax, ay, tl.load(ALPHA + at, mask=mask, other=0.0) * LOG2E


@triton.jit
def load_queries(
    base, stride, AX, AY, ALPHA, KEPT, start, b, tokens, T, R, COLS, D: tl.constexpr, POOL: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows [tokens, BLOCK_D] of queries, their places on the grid, and their Gaussians' three coefficients [tokens] each."""
    x, y = coordinates(KEPT, b, tokens, R, T, COLS, POOL)
    ax, ay, alpha = load_gaussian(AX, AY, ALPHA, start, tokens, R, T)
    return load_rows(base, tokens, stride, T, D, BLOCK_D), x, y, ax, ay, alpha


@triton.jit
def load_keys(
    key_base,
    key_stride,
    value_base,
    value_stride,
    KEPT,
    b,
    tokens,
    T,
    R,
    COLS,
    D: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows [tokens, BLOCK_D] of keys and of values, and their places on the grid."""
    x, y = coordinates(KEPT, b, tokens, R, T, COLS, POOL)
    return (
        load_rows(key_base, tokens, key_stride, T, D, BLOCK_D),
        load_rows(value_base, tokens, value_stride, T, D, BLOCK_D),
        x,
        y,
    )


@triton.jit
def forward_kernel(
    Q, K, V, AX, AY, ALPHA, KEPT, OUT, LSE,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    TABLE, rows_image, rows_head, bump_image, bump_head, H, T, R, COLS, scale, clamp,
    D: tl.constexpr, POOL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, h, first, T, COLS, m = place(TABLE, H, T, COLS, BLOCK_M)
    rows, bumps = starts(TABLE, b, h, first, rows_image, rows_head, bump_image, bump_head, R)
    q, xm, ym, ax, ay, alpha = load_queries(
        Q + b * q_b + h * q_h + first * q_t, q_t, AX, AY, ALPHA, KEPT, bumps, b, m, T, R, COLS, D, POOL, BLOCK_D
    )
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, T, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = load_rows(K + b * k_b + h * k_h + first * k_t, n, k_t, T, D, BLOCK_D)
        xn, yn = coordinates(KEPT, b, n, R, T, COLS, POOL)
        gauss, _, _ = gauss_tile(xm[:, None], ym[:, None], ax[:, None], ay[:, None], xn[None, :], yn[None, :], clamp)
        bias = tl.where(n[None, :] >= R, alpha[:, None] * gauss, 0.0)  # prefix tokens as keys get no bias
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        # the last tile of keys runs over the end; their weight must be 0, not exp2(0)
        logits = tl.where(n[None, :] < T, logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))  # online softmax: sums so far shrink to the new maximum
        weights = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)  # 0 in the first tile, where highest is -inf
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(V + b * v_b + h * v_h + first * v_t, n, v_t, T, D, BLOCK_D)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        highest = new_highest
    store_rows(OUT + b * o_b + h * o_h + first * o_t, m, o_t, T, out / total[:, None], D, BLOCK_D)
    tl.store(LSE + rows + m, highest + tl.log2(total), mask=m < T)  # base 2, like the logits


@triton.jit
def query_grad_kernel(
    Q, K, V, AX, AY, ALPHA, KEPT, OUT, DOUT, LSE, DELTA, DQ, DAX, DAY, DALPHA,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    TABLE, rows_image, rows_head, bump_image, bump_head, H, T, R, COLS, scale, clamp,
    D: tl.constexpr, POOL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and the coefficients' gradients of a block of queries; leaves `DELTA`, the rows' sum of out * dout, for the key kernel."""
    b, h, first, T, COLS, m = place(TABLE, H, T, COLS, BLOCK_M)
    rows, bumps = starts(TABLE, b, h, first, rows_image, rows_head, bump_image, bump_head, R)
    q, xm, ym, ax, ay, alpha = load_queries(
        Q + b * q_b + h * q_h + first * q_t, q_t, AX, AY, ALPHA, KEPT, bumps, b, m, T, R, COLS, D, POOL, BLOCK_D
    )
    dout = load_rows(DOUT + b * do_b + h * do_h + first * do_t, m, do_t, T, D, BLOCK_D)
    out = load_rows(OUT + b * o_b + h * o_h + first * o_t, m, o_t, T, D, BLOCK_D)
    # sum_j w_ij dw_ij, without the weights (FlashAttention-2)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(DELTA + rows + m, delta, mask=m < T)
    lse = tl.load(LSE + rows + m, mask=m < T, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dax = tl.zeros([BLOCK_M], tl.float32)
    day = tl.zeros([BLOCK_M], tl.float32)
    dalpha = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, T, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k, v, xn, yn = load_keys(
            K + b * k_b + h * k_h + first * k_t,
            k_t,
            V + b * v_b + h * v_h + first * v_t,
            v_t,
            KEPT,
            b,
            n,
            T,
            R,
            COLS,
            D,
            POOL,
            BLOCK_D,
        )
        gauss, dx2, dy2 = gauss_tile(xm[:, None], ym[:, None], ax[:, None], ay[:, None], xn[None, :], yn[None, :], clamp)
        gauss = tl.where(n[None, :] >= R, gauss, 0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + alpha[:, None] * gauss
        weights = tl.where(n[None, :] < T, tl.exp2(logits - lse[:, None]), 0.0)  # made again from the saved log-sum-exp: [M, N]
        dlogits = weights * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq += tl.dot(dlogits.to(k.dtype), k, input_precision=PRECISION)  # [M, N] @ [N, D]
        product = dlogits * gauss
        dalpha += tl.sum(product, 1)
        dax += tl.sum(product * dx2, 1)
        day += tl.sum(product * dy2, 1)
    store_rows(DQ + b * dq_b + h * dq_h + first * dq_t, m, dq_t, T, dq * scale, D, BLOCK_D)
    patches, at = (m >= R) & (m < T), bumps + m
    height = alpha / LOG2E  # out of base 2 again: the stored gradients are those of the coefficients given
    tl.store(DALPHA + at, dalpha, mask=patches)
    tl.store(DAX + at, -height * dax, mask=patches)
    tl.store(DAY + at, -height * day, mask=patches)


@triton.jit
def key_grad_kernel(
    Q, K, V, AX, AY, ALPHA, KEPT, DOUT, LSE, DELTA, DK, DV,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    TABLE, rows_image, rows_head, bump_image, bump_head, H, T, R, COLS, scale, clamp,
    D: tl.constexpr, POOL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys; tiles are transposed, [keys, queries]."""
    b, h, first, T, COLS, n = place(TABLE, H, T, COLS, BLOCK_N)
    rows, bumps = starts(TABLE, b, h, first, rows_image, rows_head, bump_image, bump_head, R)
    k, v, xn, yn = load_keys(
        K + b * k_b + h * k_h + first * k_t,
        k_t,
        V + b * v_b + h * v_h + first * v_t,
        v_t,
        KEPT,
        b,
        n,
        T,
        R,
        COLS,
        D,
        POOL,
        BLOCK_D,
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, T, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q, xm, ym, ax, ay, alpha = load_queries(
            Q + b * q_b + h * q_h + first * q_t, q_t, AX, AY, ALPHA, KEPT, bumps, b, m, T, R, COLS, D, POOL, BLOCK_D
        )
        dout = load_rows(DOUT + b * do_b + h * do_h + first * do_t, m, do_t, T, D, BLOCK_D)
        lse = tl.load(LSE + rows + m, mask=m < T, other=0.0)
        delta = tl.load(DELTA + rows + m, mask=m < T, other=0.0)
        gauss, _, _ = gauss_tile(xm[None, :], ym[None, :], ax[None, :], ay[None, :], xn[:, None], yn[:, None], clamp)
        bias = tl.where(n[:, None] >= R, alpha[None, :] * gauss, 0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + bias
        # queries beyond T have zeros for q, dout and delta: their weights add nothing below
        weights = tl.exp2(logits - lse[None, :])
        dv += tl.dot(weights.to(dout.dtype), dout, input_precision=PRECISION)  # [N, M] @ [M, D]
        dlogits = weights * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
        dk += tl.dot(dlogits.to(q.dtype), q, input_precision=PRECISION)  # [N, M] @ [M, D]
    store_rows(DK + b * dk_b + h * dk_h + first * dk_t, n, dk_t, T, dk * scale, D, BLOCK_D)
    store_rows(DV + b * dv_b + h * dv_h + first * dv_t, n, dv_t, T, dv, D, BLOCK_D)


def launch_options(kernel: Any, head_dim: int, dtype: torch.dtype) -> dict:
    """Tile sizes and warps, a function of head dimension and dtype alone: tuning at run time would change the rounding.

    A program keeps `kept` tokens (queries, or the key kernel's keys) and walks over the others. No register spills in bfloat16, nor
    (but for 32 bytes on sm_80) in float32, whose exact products take their operands from registers: more warps share them."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    exact = dtype == torch.float32
    small = block_d <= 64 and not exact
    kept, walked = 64 if small else 32, 64 if small and kernel is forward_kernel else 16 if exact and block_d > 64 else 32
    return {
        "D": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": walked if kernel is key_grad_kernel else kept,
        "BLOCK_N": kept if kernel is key_grad_kernel else walked,
        # like PyTorch's own matmuls: exact float32 unless the user allowed TensorFloat32, by its old setter or its new one (of which
        # torch.get_float32_matmul_precision wants to hear nothing)
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": 8 if exact else 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def token_major(like: Tensor) -> Tensor:
    """Empty [B, heads, T, d] laid out as [B, T, heads, d], so that joining the heads afterwards copies nothing."""
    b, h, t, d = like.shape
    return like.new_empty(b, t, h, d).transpose(1, 2)


def steps(heads: int, tokens: int, num_prefix_tokens: int) -> tuple[int, int, int, int]:
    """From image to image and from head to head: of one number for each token, and for each patch."""
    patches = tokens - num_prefix_tokens
    return heads * tokens, tokens, heads * patches, patches


def strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


@torch.library.custom_op("ssl_locat::gaussian_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, ax: Tensor, ay: Tensor, alpha: Tensor, kept: Tensor | None,
    clamp: float, pool: int, rows: int, cols: int, num_prefix_tokens: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the rows' log-sum-exp in base 2 for the backward."""
    b, h, t, _ = q.shape
    out, lse = token_major(q), q.new_empty(b, h, t, dtype=torch.float32)
    options = launch_options(forward_kernel, q.shape[-1], q.dtype)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors' is
        forward_kernel[(triton.cdiv(t, options["BLOCK_M"]) * b * h,)](
            q, k, v, ax, ay, alpha, kept, out, lse,
            *strides(q, k, v, out), None, *steps(h, t, num_prefix_tokens), h, t, num_prefix_tokens, cols, scale, clamp, POOL=pool, **options,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("ssl_locat::gaussian_attention_backward", mutates_args=())
def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, ax: Tensor, ay: Tensor, alpha: Tensor, kept: Tensor | None, out: Tensor, lse: Tensor,
    clamp: float, pool: int, cols: int, num_prefix_tokens: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    b, h, t, _ = q.shape
    dq, dk, dv = (token_major(x) for x in (q, k, v))
    dax, day, dalpha = (torch.empty_like(x) for x in (ax, ay, alpha))
    delta = torch.empty_like(lse)
    sizes = None, *steps(h, t, num_prefix_tokens), h, t, num_prefix_tokens, cols, scale, clamp
    with torch.cuda.device_of(q):
        options = launch_options(query_grad_kernel, q.shape[-1], q.dtype)
        query_grad_kernel[(triton.cdiv(t, options["BLOCK_M"]) * b * h,)](
            q, k, v, ax, ay, alpha, kept, out, dout, lse, delta, dq, dax, day, dalpha,
            *strides(q, k, v, out, dout, dq), *sizes, POOL=pool, **options,
        )  # fmt: skip
        options = launch_options(key_grad_kernel, q.shape[-1], q.dtype)
        key_grad_kernel[(triton.cdiv(t, options["BLOCK_N"]) * b * h,)](
            q, k, v, ax, ay, alpha, kept, dout, lse, delta, dk, dv, *strides(q, k, v, dout, dk, dv), *sizes, POOL=pool, **options
        )
    return dq, dk, dv, dax, day, dalpha


@attend.register_fake
def _(q, k, v, ax, ay, alpha, kept, clamp, pool, rows, cols, num_prefix_tokens, scale):
    return token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attend_backward.register_fake
def _(dout, q, k, v, ax, ay, alpha, kept, out, lse, clamp, pool, cols, num_prefix_tokens, scale):
    return *(token_major(x) for x in (q, k, v)), *(torch.empty_like(x) for x in (ax, ay, alpha))


def save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, clamp, pool, _, cols, num_prefix_tokens, scale = inputs  # the last of the tensors may be None
    ctx.save_for_backward(*tensors, *output)
    ctx.options = clamp, pool, cols, num_prefix_tokens, scale


def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *attend_backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None, None


attend.register_autograd(backward, setup_context=save_for_backward)
