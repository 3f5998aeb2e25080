"""Gaussian attention whose backward recomputes the bias: nothing N x N is kept between forward and backward.

For CPUs. PyTorch's fused attention there has no gradient for a mask: a mask that needs one falls back to the unfused path, which
keeps the weights. Here both passes work on tiles of logits that stay in the cache; only the forward pass in 16 bits is PyTorch's. Tiles are [heads, keys, queries]: with the queries
last, both the bias and the sums of its gradient along rows and columns of the grid run over contiguous memory, which takes a third of
the time that they take in the other order (docs/performance.md). A call costs 5 to 10 us whatever it does, hence few, large ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_locat.models.grid import bounded_exp, squared_distances

TILE = 1 << 18  # logits of one tile (fp32: 1 MB): smaller ones pay for calls, larger ones for cache misses
QUERIES = 192  # of one head at least: narrower tiles waste more on matrix products than the cache gives back
ALIGNED = 16  # queries: matrix products are a tenth faster where rows begin at multiples of a cache line


def tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coeff: Any,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
    dropout_p: float,
    extra_bias: Tensor | None,
) -> Tensor:
    """coeff: attention.Gaussian. One tile is some queries of one head, or several whole heads (of several images), over all keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = [t.flatten(0, 1) for t in (q, k, v, *coeff[:3])]
    with torch.autocast(q.device.type, enabled=False):
        where = Where(coeff, grid, q.shape[1])
        return _Tiled.apply(*tensors, where, num_prefix_tokens, scale).unflatten(0, q.shape[:2])


class Where:
    """Where the patches lie: squared distances of queries to columns [N, cols] and rows [N, rows], and rows and columns of the keys.

    Kept patches differ from image to image: all get a first dimension M, heads of any images."""

    def __init__(self, coeff: Any, grid: tuple[int, int], heads: int):
        self.grid, self.kept = grid, coeff.kept
        dx2, dy2 = squared_distances(grid, coeff.clamp, coeff.pool, coeff.alpha.device, coeff.kept)
        if coeff.kept is not None:
            dx2, dy2 = (d2.expand(-1, heads, -1, -1).flatten(0, 1) for d2 in (dx2, dy2))
            kept = coeff.kept.repeat_interleave(heads, 0)[..., None]  # [M, n, 1]
            self.rows, self.cols = kept // grid[1], kept % grid[1]
        self.distances = dx2, dy2


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bump: "Bump", heights: Tensor, scale: float, out: Tensor, logsumexp: Tensor
) -> None:
    """Writes `out` [M, T, d] and `logsumexp` [M, 1, T] of float32 inputs."""
    cut = Cut(q)
    (buffer,) = cut.buffers(1)
    given = cut(q, 1), cut(k), cut(v), cut(bump.x, 2), cut(bump.y * heights, 2), bump.keys(cut)
    for q_tile, k_tile, v_tile, x, y, keys, out_tile, logsumexp_tile in zip(*given, cut(out, 1), cut(logsumexp, 2), strict=True):
        weights, _ = bump.write(buffer, x, y, keys)
        weights.baddbmm_(k_tile, q_tile.mT, alpha=scale)
        highest = weights.amax(1, keepdim=True)
        total = weights.sub_(highest).exp_().sum(1, keepdim=True)
        torch.add(highest, total.log(), out=logsumexp_tile)
        # divided after the product: d numbers of a query instead of T
        torch.bmm(weights.mT, v_tile, out=out_tile).div_(total.mT)


def _forward_low(
    q: Tensor, k: Tensor, v: Tensor, bump: "Bump", heights: Tensor, scale: float, out: Tensor, logsumexp: Tensor
) -> None:
    """The same in 16 bits, by PyTorch's fused kernel with the bias as its mask: it alone multiplies 16-bit matrices into float32 logits."""
    cut = Cut(q)
    (buffer,) = cut.buffers(1)
    # outer products along keys: dearer than along queries, which is less than the kernel saves
    given = cut(q, 1), cut(k), cut(v), cut(bump.x.mT.contiguous(), 1), cut((bump.y * heights).mT.contiguous(), 1), bump.keys(cut)
    for q_tile, k_tile, v_tile, x, y, keys, out_tile, logsumexp_tile in zip(*given, cut(out, 1), cut(logsumexp, 2), strict=True):
        mask = bump.write_mask(buffer, x, y, keys)
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_tile[None], k_tile[None], v_tile[None], attn_mask=mask[None], scale=scale
        )
        out_tile.copy_(result[0][0])
        logsumexp_tile.copy_(result[1][0, :, None])


class _Tiled(torch.autograd.Function):
    """q, k, v [M, T, d] and ax, ay, alpha [M, N], M heads of any images; logits and sums in float32, products in q's dtype."""

    @staticmethod
    def forward(ctx, q, k, v, ax, ay, alpha, where, num_prefix_tokens, scale):
        bump = Bump(ax, ay, where, num_prefix_tokens)
        heights = F.pad(alpha[:, None], (num_prefix_tokens, 0))
        out, logsumexp = torch.empty_like(q), torch.empty_like(heights)
        forward = _forward if q.dtype == torch.float32 else _forward_low
        forward(q, k, v, bump, heights, scale, out, logsumexp)
        ctx.save_for_backward(q, k, v, ax, ay, alpha, logsumexp)
        ctx.options = where, num_prefix_tokens, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, ax, ay, alpha, logsumexp = ctx.saved_tensors  # once: activation checkpointing recomputes on access
        where, r, scale = ctx.options
        bump, heights = Bump(ax, ay, where, r), F.pad(alpha[:, None], (r, 0))
        along_x, along_y = torch.empty_like(bump.y), torch.empty_like(bump.x)
        cut = Cut(q)
        # keys gather from all tiles of queries: their sums begin at zero, in float32
        make = torch.empty if cut.parts == 1 else torch.zeros
        dq, dk, dv = torch.empty_like(q), *(make(t.shape, device=t.device) for t in (k, v))
        buffers = cut.buffers(3)
        (low_buffer,) = buffers[2:] if q.dtype == torch.float32 else cut.buffers(1, q.dtype)
        tiles_in = zip(cut(q, 1), cut(q.float(), 1), cut(k), cut(k.float()), cut(v), cut(dout, 1), strict=True)
        tiles_bias = zip(cut(bump.x, 2), cut(bump.y, 2), bump.keys(cut), cut(heights, 2), cut(-logsumexp, 2), strict=True)
        tiles_out = zip(cut(dq, 1), cut(dk), cut(dv), cut(along_x, 2), cut(along_y, 2), strict=True)
        for tile_in, (x, y, keys, height, shift), tile_out in zip(tiles_in, tiles_bias, tiles_out, strict=True):
            q_low, q_tile, k_low, k_tile, v_tile, dout_tile = tile_in
            dq_tile, dk_tile, dv_tile, sum_x, sum_y = tile_out
            gauss, patches = bump.write(buffers[0], x, y, keys)
            weights, dlogits = (view(buffer, gauss.shape) for buffer in buffers[1:])
            torch.addcmul(shift, gauss, height, out=weights).baddbmm_(k_tile, q_tile.mT, alpha=scale).exp_()
            add_product(dv_tile, copy_to(low_buffer, weights), dout_tile, cut.parts)
            if q.dtype == torch.float32:
                torch.bmm(v_tile, dout_tile.mT, out=dlogits)
            else:
                dlogits.copy_(torch.bmm(v_tile, dout_tile.mT, out=view(low_buffer, gauss.shape)))
            # softmax's backward: w * (dw - sum(w * dw)); dlogits holds w * dw before. FlashAttention's sum(dout * out) is no quicker here, and keeps `out`
            dlogits.mul_(weights)
            dlogits.addcmul_(weights, dlogits.sum(1, keepdim=True), value=-1)
            dlogits_low = copy_to(low_buffer, dlogits)
            dq_tile.baddbmm_(dlogits_low.mT, k_low, beta=0, alpha=scale)
            add_product(dk_tile, dlogits_low, q_low, cut.parts, scale)
            # dS times the Gaussian; summed along rows, columns or both it gives all three coefficients' gradients
            gauss.mul_(dlogits)
            if keys is None:
                torch.sum(patches, 2, out=sum_x)
                torch.sum(patches, 1, out=sum_y)
            else:
                for total, key in zip((sum_x, sum_y), keys, strict=True):
                    total.zero_().scatter_add_(1, key.expand(-1, -1, patches.shape[2]), patches)
        along_x, along_y = along_x[..., r:], along_y[..., r:]
        dx2, dy2 = where.distances
        dax = (along_y * dx2.mT).sum(1) * -alpha
        day = (along_x * dy2.mT).sum(1) * -alpha
        return dq, dk.to(k.dtype), dv.to(v.dtype), dax, day, along_x.sum(1), None, None, None


class Bump:
    """exp(-ax dx^2 - ay dy^2), kept as one factor per axis."""

    def __init__(self, ax: Tensor, ay: Tensor, where: Where, num_prefix_tokens: int):
        """ax, ay [M, N]."""
        left = (num_prefix_tokens, 0)  # prefix tokens as queries: zeros
        self.num_prefix_tokens, self.where = num_prefix_tokens, where
        self.x, self.y = (  # [M, cols, T] and [M, rows, T]
            F.pad(bounded_exp(d2.mT.contiguous() * -a[:, None]), left) for a, d2 in zip((ax, ay), where.distances, strict=True)
        )

    def keys(self, cut: "Cut") -> list[tuple[Tensor, Tensor] | None]:
        """For each tile: rows and columns of its heads' keys [heads, n, 1]; None where the whole grid is there."""
        rows_cols = None if self.where.kept is None else (self.where.rows, self.where.cols)
        if rows_cols is None:
            return [None] * len(cut(self.x, 2))
        return list(zip(*map(cut, rows_cols), strict=True))

    def write(self, buffer: Tensor, x: Tensor, y: Tensor, keys: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The product of x [heads, cols, queries] and y [heads, rows, queries] in `buffer`, [heads, T, queries], zero for prefix tokens as keys;
        and its view without them, [heads, rows, cols, queries], or [heads, n, queries] of kept patches."""
        tile = view(buffer, (x.shape[0], self.x.shape[2], x.shape[2]))
        patches = tile[:, self.num_prefix_tokens :]
        tile[:, : self.num_prefix_tokens] = 0
        if keys is None:
            patches = patches.unflatten(1, (y.shape[1], x.shape[1]))
            torch.mul(y[:, :, None], x[:, None], out=patches)
        else:
            row, col = (key.expand(-1, -1, x.shape[2]) for key in keys)
            torch.mul(y.gather(1, row), x.gather(1, col), out=patches)
        return tile, patches

    def write_mask(self, buffer: Tensor, x: Tensor, y: Tensor, keys: tuple[Tensor, Tensor] | None) -> Tensor:
        """The same product of x [heads, queries, cols] and y [heads, queries, rows], as [heads, queries, T]."""
        tile = view(buffer, (*x.shape[:2], self.x.shape[2]))
        patches = tile[..., self.num_prefix_tokens :]
        tile[..., : self.num_prefix_tokens] = 0
        if keys is None:
            torch.mul(y[..., None], x[..., None, :], out=patches.unflatten(2, (y.shape[2], x.shape[2])))
        else:
            row, col = (key.mT.expand(-1, x.shape[1], -1) for key in keys)
            torch.mul(y.gather(2, row), x.gather(2, col), out=patches)
        return tile


class Cut:
    """Cuts tensors into what each tile needs of them."""

    def __init__(self, q: Tensor):
        heads, tokens = q.shape[:2]
        # cut evenly: a last tile of five queries would cost as much as a full one
        parts = min(-(-tokens * tokens // TILE), -(-tokens // QUERIES))
        self.queries = tokens if parts == 1 else min(tokens, -(-tokens // (ALIGNED * parts)) * ALIGNED)
        self.heads = min(heads, max(1, TILE // (tokens * self.queries)))
        self.parts = -(-tokens // self.queries)
        self.q = q

    def __call__(self, tensor: Tensor, dim: int | None = None) -> list[Tensor]:
        """Views of `tensor` [M, ...], one for each tile: its heads and, where `dim` counts queries, its queries."""
        by_heads = tensor.split(self.heads)
        if dim is None or self.parts == 1:
            return [heads for heads in by_heads for _ in range(self.parts)]
        return [piece for heads in by_heads for piece in heads.split(self.queries, dim)]

    def buffers(self, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """`count` tiles, reused throughout as fresh ones would page-fault every time."""
        return [torch.empty(self.heads, self.q.shape[1], self.queries, dtype=dtype, device=self.q.device) for _ in range(count)]


def add_product(total: Tensor, a: Tensor, b: Tensor, parts: int, scale: float = 1.0) -> None:
    """total (float32) += scale * a @ b; of one part it becomes the product, whatever it was."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b, beta=int(parts > 1), alpha=scale)
        return
    # cast first: operators on mixed types are three times slower
    product = torch.bmm(a, b).float()
    if parts > 1:
        total.add_(product, alpha=scale)
    else:
        torch.mul(product, scale, out=total)


def view(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The buffer, or its beginning for a smaller last tile."""
    return buffer if buffer.shape == shape else buffer.flatten()[: shape[0] * shape[1] * shape[2]].view(shape)


def copy_to(buffer: Tensor, tile: Tensor) -> Tensor:
    """The tile in the buffer's dtype: itself, or a copy in the buffer."""
    return tile if tile.dtype == buffer.dtype else view(buffer, tile.shape).copy_(tile)
