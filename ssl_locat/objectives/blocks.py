"""Losses over prototypes, a block of them at a time: of K = 131072 prototypes, no more than `prototype_block` columns of scores exist at once.

The head hands on what scores are made of (BlockScores), and the loss makes them block by block, once for each logarithm of a sum that it needs and
once more in the backward pass. Values and gradients are those of targets.py within rounding: a logarithm of a sum over K is made of those over
blocks (`logaddexp`), and Sinkhorn-Knopp needs one number for each row and one for each prototype, not the matrix. Called by dino.py and ibot.py.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_locat.runs.distributed import all_gather_cat


class BlockScores(NamedTuple):
    """Scores [..., K] that are not computed yet."""

    tokens: Tensor  # [..., b] of unit length; in the type that the head's layer would have multiplied in
    prototypes: Tensor  # [K, b]
    block: int  # prototypes at a time

    def whole(self) -> Tensor:
        """[..., K], all at once: for what only counts or compares."""
        return F.linear(self.tokens, self.prototypes)

    def first(self, count: int) -> "BlockScores":
        """Over the first `count` prototypes alone."""
        return self._replace(prototypes=self.prototypes[:count])

    def rows(self) -> "BlockScores":
        """[n, K]: views and images in one dimension."""
        return self._replace(tokens=self.tokens.flatten(0, -2))

    def spans(self) -> Iterator[slice]:
        for begin in range(0, len(self.prototypes), self.block):
            yield slice(begin, begin + self.block)

    def part(self, span: slice) -> Tensor:
        """[..., span] in float32."""
        with torch.autocast(
            self.tokens.device.type, enabled=False
        ):  # the type was chosen by the head, and backward has no autocast
            return F.linear(self.tokens, self.prototypes[span]).float()


class BlockTargets(NamedTuple):
    """log q_ik = s_ik / temperature - shift_k - log_norm_i, a block at a time: what both kinds of targets are made of."""

    scores: BlockScores  # of the teacher, [n, K]
    temperature: float
    shift: Tensor  # [K]: the centre over the temperature, or Sinkhorn's prototypes
    log_norm: Tensor  # [n]

    def part(self, span: slice) -> Tensor:
        """Log-probabilities [n, span]."""
        return self.scores.part(span).div_(self.temperature).sub_(self.shift[span]).sub_(self.log_norm[:, None])


@torch.no_grad()
def centered_by_blocks(scores: BlockScores, center: Tensor, temperature: float) -> tuple[BlockTargets, Tensor]:
    """targets.centered of scores [n, K], center [1, K]; and the sum of the scores of each prototype, [K], from which the centre moves."""
    shift = center[0] / temperature
    log_norm = _nothing(scores)
    sums = torch.empty_like(shift)
    for span in scores.spans():
        block = scores.part(span)
        sums[span] = block.sum(0)
        log_norm = torch.logaddexp(log_norm, block.div_(temperature).sub_(shift[span]).logsumexp(-1))
    return BlockTargets(scores, temperature, shift, log_norm), sums


@torch.no_grad()
def sinkhorn_by_blocks(scores: BlockScores, temperature: float, iterations: int = 3) -> BlockTargets:
    """targets.sinkhorn of scores [n, K], which are made anew in each round: three more products of the teacher's tokens and prototypes.

    A round is alternating normalisations; of both only their logarithms are kept. A prototype's needs its own column alone, of all ranks, so
    that a block has both at hand: one pass for a round. All ranks must call, also those without rows.
    """
    shift = torch.zeros(len(scores.prototypes), device=scores.tokens.device)
    log_norm = torch.zeros(len(scores.tokens), device=scores.tokens.device)
    for _ in range(iterations):
        rows = _nothing(scores)
        for span in scores.spans():
            block = scores.part(span).div_(temperature)
            mass = (block - log_norm[:, None]).logsumexp(0, keepdim=True)  # [1, span]
            shift[span] = all_gather_cat(mass).logsumexp(0)
            rows = torch.logaddexp(rows, block.sub_(shift[span]).logsumexp(-1))
        log_norm = rows
    return BlockTargets(scores, temperature, shift, log_norm)


def pair_loss_by_blocks(student: BlockScores, targets: BlockTargets, temperature: float) -> tuple[Tensor, Tensor]:
    """targets.pair_loss of a student's scores [S, B, K] and targets of T*B rows, view-major; and the targets' mean entropy []."""
    views, images = student.tokens.shape[:2]
    teachers = len(targets.log_norm) // images
    others = views - teachers
    # how many teachers a view is compared with: all but itself
    counts = torch.tensor([teachers - 1] * teachers + [teachers] * others, dtype=torch.float32, device=student.tokens.device)

    def partners(q: Tensor) -> Tensor:
        """[T*B, k] of the teachers -> [S*B, k]: the sum of those that a view is compared with."""
        q = q.unflatten(0, (teachers, images))
        everyone = q.sum(0, keepdim=True)  # [1, B, k]
        return torch.cat([everyone - q, everyone.expand(others, -1, -1)]).flatten(0, 1)

    pairs = teachers * (views - 1)
    total, entropy = _BlockLoss.apply(
        *student.rows(), temperature, targets, counts.repeat_interleave(images), partners
    )  # fmt: skip
    return total / (pairs * images), entropy / len(targets.log_norm)


def masked_loss_by_blocks(
    student: BlockScores, targets: BlockTargets, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """ibot.masked_loss of scores [M, K] and weights [M]; and the targets' mean entropy [], 0 without any row."""
    total, entropy = _BlockLoss.apply(*student, temperature, targets, weights, lambda q: q * weights[:, None])
    return total, entropy / max(1, len(targets.log_norm))


class _BlockLoss(torch.autograd.Function):
    """sum_i w_i * logsumexp_k z_ik - sum_ik Q_ik z_ik, z = scores / temperature, and the summed entropy of the targets, without gradient.

    weights [n]; combine: targets of a block [m, k] -> Q [n, k], linear and with sum_k Q_ik = w_i, so that d/dz = w_i p - Q. Beside a block of
    scores, targets and their difference it holds gradients of tokens and prototypes in float32.
    """

    @staticmethod
    def forward(
        ctx,
        tokens: Tensor,
        prototypes: Tensor,
        block: int,
        temperature: float,
        targets: BlockTargets,
        weights: Tensor,
        combine: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        scores = BlockScores(tokens, prototypes, block)
        log_norm, agreement = _nothing(scores), tokens.new_zeros((), dtype=torch.float32)
        entropy = torch.zeros_like(agreement)
        for span in scores.spans():
            z = scores.part(span).div_(temperature)
            log_norm = torch.logaddexp(log_norm, z.logsumexp(-1))
            log_q = targets.part(span)
            q = log_q.exp()
            entropy -= log_q.mul_(q).sum()
            agreement += z.mul_(combine(q)).sum()
        ctx.block, ctx.temperature, ctx.combine = block, temperature, combine
        ctx.target_settings = targets.scores.block, targets.temperature
        ctx.save_for_backward(
            tokens,
            prototypes,
            weights,
            log_norm,
            targets.scores.tokens,
            targets.scores.prototypes,
            targets.shift,
            targets.log_norm,
        )
        ctx.mark_non_differentiable(entropy)
        return (weights * log_norm).sum() - agreement, entropy

    @staticmethod
    def backward(ctx, gradient: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        tokens, prototypes, weights, log_norm, teacher_tokens, teacher_prototypes, shift, teacher_norm = ctx.saved_tensors
        block, teacher_temperature = ctx.target_settings
        targets = BlockTargets(BlockScores(teacher_tokens, teacher_prototypes, block), teacher_temperature, shift, teacher_norm)
        scores = BlockScores(tokens, prototypes, ctx.block)
        # blocks are added up in float32, whatever type they are multiplied in
        to_tokens = torch.zeros_like(tokens, dtype=torch.float32)
        to_prototypes = torch.empty_like(prototypes) if ctx.needs_input_grad[1] else None
        for span in scores.spans():
            p = scores.part(span).div_(ctx.temperature).sub_(log_norm[:, None]).exp_().mul_(weights[:, None])
            difference = p.sub_(ctx.combine(targets.part(span).exp_())).mul_(gradient / ctx.temperature).to(tokens.dtype)
            to_tokens += difference @ prototypes[span]
            if to_prototypes is not None:
                to_prototypes[span] = difference.mT @ tokens
        return to_tokens.to(tokens.dtype), to_prototypes, None, None, None, None, None


def _nothing(scores: BlockScores) -> Tensor:
    """The logarithm of an empty sum for each row: [n]."""
    return torch.full((len(scores.tokens),), -torch.inf, device=scores.tokens.device)
