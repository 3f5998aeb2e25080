"""Gaussian attention whose backward recomputes the bias: nothing N x N is kept between forward and backward.

For training on CPUs. PyTorch's fused attention there has no gradient for a mask: a mask that needs one falls back to the
unfused path, which keeps the weights. Here both passes work on tiles of logits that stay in the cache: about as fast as plain
attention, with no more memory (docs/performance.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_locat.models.grid import bounded_exp, squared_distances

TILE = 1 << 18  # logits of one tile (fp32: 1 MB): smaller ones pay for calls, larger ones for cache misses


def tiled(q, k, v, coeff, grid, num_prefix_tokens, scale, dropout_p, extra_bias) -> Tensor:
    """One tile is some queries of one head, or several whole heads (of several images), over all keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = [t.flatten(0, 1) for t in (q, k, v, *coeff[:3])]
    with torch.autocast(q.device.type, enabled=False):
        return _Tiled.apply(*tensors, coeff.clamp, coeff.pool, grid, num_prefix_tokens, scale).unflatten(0, q.shape[:2])


class _Tiled(torch.autograd.Function):
    """q, k, v [M, T, d] and ax, ay, alpha [M, N], M heads of any images; logits and sums in float32, products in q's dtype."""

    @staticmethod
    def forward(ctx, q, k, v, ax, ay, alpha, clamp, pool, grid, num_prefix_tokens, scale):
        ctx.save_for_backward(q, k, v, ax, ay, alpha)
        ctx.options = clamp, pool, grid, num_prefix_tokens, scale
        out = torch.empty_like(q)
        head_step, query_step = tile_size(q)
        buffer, low_buffer = make_buffers(q, 1)
        for heads in slices(q.shape[0], head_step):
            bump = Bump(ax[heads], ay[heads], clamp, pool, grid, num_prefix_tokens)
            bump.factor_y *= F.pad(alpha[heads], (num_prefix_tokens, 0))[..., None]
            keys = k[heads].float().transpose(1, 2)
            for queries in slices(q.shape[1], query_step):
                logits = bump.write(buffer, queries).baddbmm_(q[heads, queries].float(), keys, alpha=scale)
                weights = copy_to(low_buffer, torch.softmax(logits, -1, out=logits))
                out[heads, queries] = torch.bmm(weights, v[heads])
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, ax, ay, alpha = saved = ctx.saved_tensors  # once: activation checkpointing recomputes on access
        clamp, pool, grid, r, scale = ctx.options
        dq, dk, dv, dax, day, dalpha = (torch.empty_like(t) for t in saved)
        head_step, query_step = tile_size(q)
        *buffers, low_buffer = make_buffers(q, 3)
        for heads in slices(q.shape[0], head_step):
            bump = Bump(ax[heads], ay[heads], clamp, pool, grid, r)
            heights = F.pad(alpha[heads], (r, 0))[..., None]
            keys = k[heads].float().transpose(1, 2)
            dk_sum, dv_sum = (torch.zeros(t.shape, device=t.device) for t in (k[heads], v[heads]))
            over_x, over_y = torch.empty_like(bump.factor_y), torch.empty_like(bump.factor_x)
            for queries in slices(q.shape[1], query_step):
                q_tile, dout_tile = q[heads, queries], dout[heads, queries]
                gauss = bump.write(buffers[0], queries)
                logits, weights = (view(buffer, gauss.shape) for buffer in buffers[1:])
                torch.mul(gauss, heights[:, queries], out=logits).baddbmm_(q_tile.float(), keys, alpha=scale)
                torch.softmax(logits, -1, out=weights)
                dv_sum += torch.bmm(copy_to(low_buffer, weights).transpose(1, 2), dout_tile)
                dweights = torch.bmm(dout_tile, v[heads].transpose(1, 2), out=view(low_buffer, gauss.shape))
                dweights = copy_to(buffers[1], dweights)
                dlogits = torch.ops.aten._softmax_backward_data.out(dweights, weights, -1, torch.float32, grad_input=logits)
                dlogits_low = copy_to(low_buffer, dlogits)
                dq[heads, queries] = torch.bmm(dlogits_low, k[heads]).mul_(scale)
                dk_sum += torch.bmm(dlogits_low.transpose(1, 2), q_tile)
                patches = torch.mul(dlogits, gauss, out=weights)[..., r:].unflatten(-1, grid)
                over_x[:, queries], over_y[:, queries] = patches.sum(-1), patches.sum(-2)
            dk[heads], dv[heads] = dk_sum.mul_(scale), dv_sum
            dalpha[heads] = over_x[:, r:].sum(-1)
            dax[heads] = (over_y[:, r:] * bump.dx2).sum(-1) * -alpha[heads]
            day[heads] = (over_x[:, r:] * bump.dy2).sum(-1) * -alpha[heads]
        return dq, dk, dv, dax, day, dalpha, None, None, None, None, None


class Bump:
    """exp(-ax dx^2 - ay dy^2) of some heads, kept as one factor per axis; `write` multiplies them out for some queries."""

    def __init__(self, ax: Tensor, ay: Tensor, clamp: float, pool: int, grid: tuple[int, int], num_prefix_tokens: int):
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.dx2, self.dy2 = squared_distances(grid, clamp, pool, ax.device)
        rows_above = (0, 0, num_prefix_tokens, 0)  # prefix tokens as queries: zeros
        self.factor_x = F.pad(bounded_exp(self.dx2 * -ax[..., None]), rows_above)  # [heads, T, cols]
        self.factor_y = F.pad(bounded_exp(self.dy2 * -ay[..., None]), rows_above)  # [heads, T, rows]

    def write(self, buffer: Tensor, queries: slice) -> Tensor:
        """[heads, queries, T] in `buffer`, columns of prefix tokens zero."""
        y, x = self.factor_y[:, queries, :, None], self.factor_x[:, queries, None, :]
        tile = view(buffer, (*x.shape[:2], self.factor_x.shape[1]))
        tile[..., : self.num_prefix_tokens] = 0
        torch.mul(y, x, out=tile[..., self.num_prefix_tokens :].unflatten(-1, self.grid))
        return tile


def tile_size(q: Tensor) -> tuple[int, int]:
    """How many heads and how many of their queries make one tile."""
    heads, tokens = q.shape[:2]
    queries = -(-tokens // -(-tokens * tokens // TILE))  # cut evenly: a last tile of five rows would cost as much as a full one
    return min(heads, max(1, TILE // (tokens * queries))), queries


def make_buffers(q: Tensor, count: int) -> list[Tensor]:
    """`count` float32 tiles and one in q's dtype, reused throughout: fresh ones would page-fault every time."""
    heads, queries = tile_size(q)
    size = heads * queries * q.shape[1]
    return [torch.empty(size, device=q.device) for _ in range(count)] + [q.new_empty(size)]


def view(buffer: Tensor, shape) -> Tensor:
    return buffer[: shape[0] * shape[1] * shape[2]].view(shape)


def copy_to(buffer: Tensor, tile: Tensor) -> Tensor:
    """The tile in the buffer's dtype: itself, or a copy in the buffer."""
    return tile if tile.dtype == buffer.dtype else view(buffer, tile.shape).copy_(tile)


def slices(length: int, step: int):
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
