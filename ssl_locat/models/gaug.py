"""GAug: each patch's query predicts how wide and how strong a Gaussian around it is added to its attention logits.

    coefficients = gaug(queries, grid)                          # a few float32 numbers per query
    out = gaug.attend(q, k, v, coefficients, grid, num_prefix_tokens)

LocAtViT, arXiv:2603.04892, eq. 4-10 and its ablations (eq. 12-21). Where paper and released code differ, the code is followed:
0.1 or more is added to every variance (`eps`), distances beyond the training grid are clamped, and at another resolution the variance
is multiplied by the ratio of the grids' shorter sides (linear, although it is a variance).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ssl_locat.errors import UserError, did_you_mean
from ssl_locat.models.attention import Gaussian, dense_bias_attention, gaussian_attention, patch_distances
from ssl_locat.models.grid import bounded_exp

FAST_GRID = 32  # from this many rows on, the reference pools queries 2 x 2 in training
SMALL_ALPHA = -12.0  # softplus of it is 6e-6: invisible in the output, yet its gradient is far above Adam's epsilon
CHOICES = {
    "source": ("query", "input"),
    "alpha": ("learned", "one", "auto"),
    "kernel": ("gaussian", "laplace", "inverse"),
    "fast": ("off", "reference"),
}


class Constants(NamedTuple):
    """What GAug derives from the grid that its weights were trained at."""

    coef: float  # upper limit of a variance: the squared longer side
    shift: float  # makes the variance 1 where the projection gives 0
    eps: float  # added to every variance
    clamp: float  # largest squared distance per axis


def constants(initial_grid: tuple[int, int]) -> Constants:
    """Constants of the reference for weights trained on `initial_grid` (rows, cols); its half-precision limits shaped eps and clamp."""
    side = max(initial_grid)
    coef = float(side**2)
    eps = 0.1  # patches^2: a Gaussian is never narrower than a third of a patch
    while 0.5 * (side - 1) ** 2 / eps**2 > 32500:  # so that the exponent stays finite in float16
        eps *= 2
    # f(0) = coef * sigmoid(-log(coef - 1)) = 1: every Gaussian starts with a variance of one patch
    return Constants(coef, math.log(coef - 1) if coef > 2 else 0.0, eps, float(min((side - 1) ** 2, 2 * 6550)))


class GAug(nn.Module):
    """Predicts the bump around each patch from its query, shared by all heads of one attention.

    Args:
        head_dim, dim, num_heads: of the attention it belongs to.
        initial_grid: (rows, cols) of patches that its weights are trained at; never changes when the model is opened at another size.
        source: "query" (eq. 5), or "input": variances from the attention's input, one pair per head ("Gaussian from x").
        isotropic: one variance for both axes (eq. 12).
        sigma: a constant standard deviation in patches for everybody, nothing predicted ("fixed width").
        alpha: "learned" (eq. 9); "one": no scaling; "auto": from the norms of queries and keys (eq. 13-19).
        kernel: "gaussian"; "laplace" exp(-r / lambda) (eq. 20); "inverse" 1 / (1 + r / lambda), our reading of the paper's "inverse distance"
            (eq. 21, whose form the text that we have does not print); r is the Euclidean distance in patches, and lambda is predicted like a
            variance, but bounded by the grid's side, as it is a length.
        disable_clamp: distances beyond the training grid count as they are.
        fast: "reference" pools queries 2 x 2 in training from 32 rows on, as the release does (training and evaluation then differ).
        small_start: start with alpha near 0, so that a pretrained vanilla model is not disturbed at first.
    """

    def __init__(
        self,
        head_dim: int,
        dim: int,
        num_heads: int,
        initial_grid: tuple[int, int],
        *,
        source: str = "query",
        isotropic: bool = False,
        sigma: float | None = None,
        alpha: str = "learned",
        kernel: str = "gaussian",
        fast: str = "off",
        disable_clamp: bool = False,
        small_start: bool = False,
    ):
        super().__init__()
        for name, value in {"source": source, "alpha": alpha, "kernel": kernel, "fast": fast}.items():
            if value not in CHOICES[name]:
                known = ", ".join(CHOICES[name])
                raise UserError(f"gaug.{name} is {value!r}; known: {known}.{did_you_mean(value, CHOICES[name])}")
        if sigma is not None and not sigma > 0:
            raise UserError(f"gaug.sigma is {sigma!r}; expected a standard deviation in patches, above 0")
        if small_start and alpha != "learned":
            raise UserError(f"gaug.small_start needs a learned alpha, but gaug.alpha is {alpha!r}; leave one of the two out")
        self.num_heads = num_heads
        self.source, self.sigma, self.alpha, self.kernel, self.fast = source, sigma, alpha, kernel, fast
        self.small_start, self.disable_clamp = small_start, disable_clamp
        self.fixed_width = 0.0 if sigma is None else sigma**2 if kernel == "gaussian" else sigma  # a variance, or a length
        self.set_initial_grid(initial_grid)
        self.num_widths = 1 if isotropic or kernel != "gaussian" else 2  # columns and rows; a single radius has no axes
        self.log_var = self.log_alpha = None  # the release's names; neither is a logarithm
        if sigma is None and source == "query":
            # shared by all heads, as in the release: 2 * head_dim + 2 numbers a block
            self.log_var = nn.Linear(head_dim, self.num_widths)
        elif sigma is None:
            self.log_var = nn.Linear(dim, self.num_widths * num_heads)
        if alpha == "learned":
            self.log_alpha = nn.Linear(head_dim, 1)
        self.init_weights()

    def set_initial_grid(self, grid: tuple[int, int]) -> None:
        """Tell which grid (rows, cols) the weights were trained at."""
        self.initial_grid = (int(grid[0]), int(grid[1]))
        self.constants = constants(self.initial_grid)
        if self.disable_clamp:
            self.constants = self.constants._replace(clamp=math.inf)
        self.training_pool = 2 if self.fast == "reference" and self.initial_grid[0] >= FAST_GRID else 1
        # as plain numbers: TorchScript keeps no named tuple
        self.coef, self.shift, self.eps, self.clamp = self.constants
        if self.kernel != "gaussian":
            self.coef = self.coef**0.5
            self.shift = math.log(self.coef - 1) if self.coef > 1 else 0.0

    def init_weights(self) -> None:
        for layer in (self.log_var, self.log_alpha):
            if layer is not None:
                trunc_normal_(layer.weight, std=0.02)  # timm's for every other linear layer
                nn.init.zeros_(layer.bias)
        if self.small_start:
            assert self.log_alpha is not None  # alpha is learned then
            nn.init.zeros_(self.log_alpha.weight)
            nn.init.constant_(self.log_alpha.bias, SMALL_ALPHA)

    def forward(
        self,
        q: Tensor,
        grid: tuple[int, int],
        k: Tensor | None = None,
        x: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Gaussian:
        """Patches' queries [B, heads, N, head_dim], unscaled, normalised, not rotated -> coefficients, all [B, heads, N] float32.

        k: the patches' keys, read only by alpha="auto"; x: the attention's input [B, N, D], read only by source="input";
        kept: [B, N] numbers of these patches where not all of the grid are there.
        """
        if torch.jit.is_scripting():
            return self.coefficients(q, grid, k, x, kept)
        else:  # a compiler of TorchScript must not see what is below
            with torch.autocast(
                "cpu" if q.is_meta else q.device.type, enabled=False
            ):  # half precision rounds a bias of 6 by 0.02
                return self.coefficients(q, grid, k, x, kept)

    def coefficients(self, q: Tensor, grid: tuple[int, int], k: Tensor | None, x: Tensor | None, kept: Tensor | None) -> Gaussian:
        """`forward` without its autocast."""
        pool = self.training_pool if self.training else 1
        if pool > 1:
            if kept is not None:
                raise UserError("gaug.fast=reference pools cells of the whole grid, but patches were dropped; use fast=off")
            q = pool_cells(q, grid, pool)
            if x is not None:
                x = pool_cells(x[:, None], grid, pool)[:, 0]
        width, alpha = self.predict(exact(q), x)
        width = width * (shorter_side(grid) / min(self.initial_grid[0], self.initial_grid[1]))
        if self.kernel == "gaussian":
            ax, ay = 0.5 / (width[..., -1] + self.eps), 0.5 / (width[..., 0] + self.eps)
        else:
            ax = 1 / (width[..., 0] + self.eps)
            ay = ax
        if self.alpha == "auto" and k is not None:
            alpha = exact(q).norm(2, dim=-1) * exact(k).norm(2, dim=-1).mean(-1, keepdim=True) * q.shape[-1] ** -0.5
        if pool > 1:
            ax, ay, alpha = spread_cells(ax, grid, pool), spread_cells(ay, grid, pool), spread_cells(alpha, grid, pool)
        return Gaussian(ax, ay, alpha, self.clamp, pool, kept)

    def predict(self, q: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """Width [B, heads, N, 1 or 2] (rows, cols) before rescaling, alpha [B, heads, N]."""
        log_var, log_alpha = self.log_var, self.log_alpha
        if log_var is not None and log_alpha is not None and self.source == "query":
            # both projections in one product: they read the same queries
            weight = torch.cat([log_var.weight, log_alpha.weight]).to(q.dtype)
            bias = torch.cat([log_var.bias, log_alpha.bias]).to(q.dtype)
            raw = F.linear(q, weight, bias)
            return self.scaled_sigmoid(raw[..., : self.num_widths]), F.softplus(raw[..., self.num_widths])
        if log_var is None:
            width = torch.full_like(q[..., :1], self.fixed_width)
        elif self.source == "input" and x is not None:
            raw = F.linear(x.to(q.dtype), log_var.weight.to(q.dtype), log_var.bias.to(q.dtype))  # [B, N, heads * widths]
            width = self.scaled_sigmoid(raw.unflatten(-1, [self.num_heads, self.num_widths]).transpose(1, 2))
        else:
            width = self.scaled_sigmoid(F.linear(q, log_var.weight.to(q.dtype), log_var.bias.to(q.dtype)))
        if log_alpha is not None:
            alpha = F.softplus(F.linear(q, log_alpha.weight.to(q.dtype), log_alpha.bias.to(q.dtype))[..., 0])
        else:
            alpha = torch.ones_like(q[..., 0])
        return width, alpha

    def scaled_sigmoid(self, raw: Tensor) -> Tensor:
        """f of eq. 5: f(0) = 1, and no more than `coef` (its root for a kernel whose width is a length)."""
        return self.coef * torch.sigmoid(raw - self.shift)

    def bias(self, coefficients: Gaussian, grid: tuple[int, int]) -> Tensor:
        """The bias between patches, [B, heads, N, N] float32, whatever the kernel; slow for large grids."""
        dx, dy = patch_distances(grid, coefficients.alpha.device, coefficients.pool, coefficients.kept)
        return self.bias_between(coefficients, dx, dy)

    def bias_between(self, coefficients: Gaussian, dx: Tensor, dy: Tensor) -> Tensor:
        """The bias for keys that lie dx columns and dy rows from the queries, each [N, M] (or with [B, 1] before) -> [B, heads, N, M]."""
        dx2, dy2 = dx.square().clamp(max=coefficients.clamp), dy.square().clamp(max=coefficients.clamp)
        ax, ay, alpha = coefficients.ax[..., None], coefficients.ay[..., None], coefficients.alpha[..., None]
        if self.kernel == "gaussian":
            return alpha * bounded_exp(-(ax * dx2 + ay * dy2))
        reach = ax * (dx2 + dy2).sqrt()  # [B, heads, N, 1] * [N, M]: row i is query i's
        return alpha * (torch.exp(-reach) if self.kernel == "laplace" else 1 / (1 + reach))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        coefficients: Gaussian,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        *,
        dropout_p: float = 0.0,
        extra_bias: Tensor | None = None,
    ) -> Tensor:
        """softmax(q k^T / sqrt(d) + bias + extra_bias) v, the bias being 0 for prefix tokens (eq. 4, 10).

        q, k, v [B, heads, R + N, head_dim], rotated if the model rotates; extra_bias broadcastable to [B, heads, R + N, R + N]."""
        if self.kernel == "gaussian":
            return gaussian_attention(q, k, v, coefficients, grid, num_prefix_tokens, dropout_p=dropout_p, extra_bias=extra_bias)
        bias = self.bias(coefficients, grid)
        return dense_bias_attention(q, k, v, bias, num_prefix_tokens, dropout_p=dropout_p, extra_bias=extra_bias)

    def deviation(self, coefficients: Gaussian) -> tuple[Tensor, Tensor]:
        """Learned standard deviations (or lambdas) in patches, along columns and along rows, each [B, heads, N]."""
        eps = self.constants.eps
        if self.kernel != "gaussian":
            same = 1 / coefficients.ax - eps
            return same, same
        along_x, along_y = ((0.5 / a - eps).clamp(min=0).sqrt() for a in coefficients[:2])
        return along_x, along_y

    def extra_repr(self) -> str:
        chosen = {n: getattr(self, n) for n in CHOICES} | {"sigma": self.sigma}
        return f"initial_grid={self.initial_grid}, " + ", ".join(f"{n}={v}" for n, v in chosen.items() if v is not None)


def shorter_side(grid: tuple[int, int]):
    """min(grid); while torch.jit.trace records, sides are tensors, of which min would record only which is smaller here."""
    if torch.jit.is_scripting():
        return min(grid[0], grid[1])
    else:
        return torch.minimum(*grid) if isinstance(grid[0], Tensor) else min(grid)


def exact(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def pool_cells(x: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    """[B, heads, rows * cols, d] -> the mean of each pool x pool cell, [B, heads, N / pool^2, d]."""
    rows, cols = grid
    if rows % pool or cols % pool:
        raise UserError(
            f"gaug.fast=reference pools {pool} x {pool} patches, but the grid is {rows} x {cols}; use even sides or fast=off"
        )
    cells = x.unflatten(2, [rows // pool, pool, cols // pool, pool])
    return cells.mean(dim=[3, 5]).flatten(2, 3)


def spread_cells(x: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    """[B, heads, N / pool^2] -> every patch has its cell's value, [B, heads, N]."""
    rows, cols = grid
    cells = x.unflatten(2, [rows // pool, cols // pool])
    return cells.repeat_interleave(pool, dim=2).repeat_interleave(pool, dim=3).flatten(2)
