"""iBOT's masked patch loss (arXiv:2111.07832, eq. 2; with DINOv2's settings, arXiv:2304.07193): the student sees the global crops with
patches hidden and predicts, in their places, the teacher's distribution over prototypes of the same patches seen.

Under LocAt a hidden patch keeps its place in the grid: the mask token takes the place of its embedding, positions are added as ever,
and its query, made from the neighbours it attends to, predicts its own Gaussian. PRR comes before the class head always; the patch
head reads the tokens before it, or after it with `refined`.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_locat.errors import ConfigError
from ssl_locat.objectives import Needs, Progress, Views, required
from ssl_locat.objectives.blocks import BlockScores, centered_by_blocks, masked_loss_by_blocks, sinkhorn_by_blocks
from ssl_locat.objectives.heads import DINOHead
from ssl_locat.objectives.masking import Masking
from ssl_locat.objectives.prototypes import PrototypeObjective
from ssl_locat.objectives.targets import Center, centered, sinkhorn


class PatchScores(nn.Module):
    """A head on the hidden patches alone: [T, B, N, D] -> [M, K], so that it costs what they do.

    Args:
        head: of tokens [M, D], its own; or None, to use another objective's, put in by `share`.
    """

    def __init__(self, head: nn.Module | None, refined: bool):
        super().__init__()
        self.head = head
        self.refined = refined

    def share(self, head: nn.Module) -> None:
        """Score by this head of class tokens; in a tuple, so that its parameters are registered, saved and sharded once."""
        self.shared = (head,)

    @torch.compiler.disable  # the number of hidden patches changes from batch to batch
    def forward(self, views: Views) -> tuple[Tensor | BlockScores, Tensor]:
        """-> scores [M, K], and each hidden patch's weight [M]: 1 / (hidden patches of its crop * crops)."""
        patches, masked = required(views.refined_patches if self.refined else views.patches), required(views.masked)
        hidden = patches.flatten(0, 2).index_select(0, masked)  # [M, D] of T*B*N
        scores = self.head(hidden) if self.head is not None else self.shared[0](Views(hidden))
        masks = required(views.masks).flatten(0, 1)  # [T*B, N]
        # each masked crop weighs the same, however much of it is hidden
        weights = (masks / (masks.sum(-1, keepdim=True).clamp(min=1) * len(masks))).flatten()
        return scores, weights.index_select(0, masked)


class IBOT(PrototypeObjective):
    """Masked patch distillation. Sum it with `dino` (published weights: 1 and 1).

    Args:
        shared_head: use the head of the objective `dino` for patches too (iBOT's best; DINOv2 keeps them separate at scale); the options of
            the head are then its.
        refined: patch tokens after PRR instead of after the final norm alone.
        mask_shape: `block` or `random`.
        mask_probability: share of the global crops that are masked at all.
        mask_ratio: [smallest, largest] share of a masked crop's patches, drawn evenly (iBOT's 0.3 +- 0.2).
        prototypes: the options of PrototypeObjective.
    """

    def __init__(
        self,
        shared_head: bool = False,
        refined: bool = False,
        mask_shape: Literal["block", "random"] = "block",
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        teacher_temp: tuple[float, ...] = (0.04, 0.07),
        teacher_temp_warmup_epochs: int = 30,
        **prototypes: Any,
    ):
        super().__init__("ibot", teacher_temp=teacher_temp, teacher_temp_warmup_epochs=teacher_temp_warmup_epochs, **prototypes)
        self.shares_head_of = "dino" if shared_head else None
        self._given = {name: value for name, value in prototypes.items() if name in self.head_options}
        self._given_stages = self.stages
        self.refined = refined
        self.needs = Needs(patches=not refined, refined_patches=refined, masks=True)
        self.masking = Masking.of("ibot", mask_shape, mask_probability, mask_ratio)
        # counts its rows, other than DINO's: each rank and micro-batch hides another number of patches
        self.center = Center(self.num_prototypes, self.center_momentum) if self.targets == "centering" else None

    def follow(self, owner: PrototypeObjective) -> None:
        """Take the options of the head that it shares. Raises ConfigError for one that was given and is another."""
        for name, value in self._given.items():
            if value != owner.head_options[name]:
                raise ConfigError(
                    f"ibot: {name} is {value}, but with shared_head it uses the head of {self.shares_head_of!r}, where it is "
                    f"{owner.head_options[name]}. Leave it out, or set shared_head: false."
                )
        if self._given_stages and self._given_stages != owner.stages:
            raise ConfigError(
                f"ibot: active_prototypes with shared_head are those of {self.shares_head_of!r}. Leave them out, or set shared_head: false."
            )
        self.head_options, self.num_prototypes, self.stages = owner.head_options, owner.num_prototypes, owner.stages
        if self.center is not None:
            self.center = Center(self.num_prototypes, self.center_momentum)

    def make_head(self, embed_dim: int, patch_dim: int | None = None) -> PatchScores:
        return PatchScores(None if self.shares_head_of else DINOHead(patch_dim or embed_dim, **self.head_options), self.refined)

    @property
    def hidden_share(self) -> float:
        """Of the global crops' patches, on average."""
        return self.masking.hidden_share

    def make_masks(self, seeds: list[int], views: int, grid: tuple[int, int]) -> Tensor:
        """One seed per image -> bool [views * B, N], on the CPU."""
        return self.masking.draw(seeds, views, grid)

    def forward(
        self, student: tuple[Tensor | BlockScores, Tensor], teacher: tuple[Tensor | BlockScores, Tensor], progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [M, K] and weights [M] of the hidden patches, by both networks -> loss [], metrics.

        Each crop's mean over its hidden patches, averaged over all crops, also those of which nothing is hidden (as iBOT and DINOv2 do: how
        often crops are masked scales the loss). Nothing hidden at all: 0.
        """
        (scores, weights), (teacher_scores, _) = student, teacher
        temperature = self.temperature(progress)
        if isinstance(scores, BlockScores) and isinstance(teacher_scores, BlockScores):
            return self._by_blocks(scores, teacher_scores, weights, temperature, self.active(progress))
        assert isinstance(scores, Tensor) and isinstance(teacher_scores, Tensor)  # the networks' heads are of one kind
        if self.center is None:
            log_targets = sinkhorn(teacher_scores, temperature)
        else:
            log_targets = centered(teacher_scores, self.center.center, temperature)
            self.center.add(teacher_scores)
        targets = log_targets.exp()
        loss = masked_loss(scores.float() / self.student_temp, targets, weights)
        with torch.no_grad():
            entropy = -(targets * log_targets).sum() / max(1, len(targets))  # mean over the M hidden patches; 0 for none
        return loss, {"patch_entropy": entropy}

    def _by_blocks(
        self, student: BlockScores, teacher: BlockScores, weights: Tensor, temperature: float, active: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same over the first `active` prototypes, of which a block exists at a time."""
        teacher = teacher.first(active)
        if self.center is None:
            targets = sinkhorn_by_blocks(teacher, temperature)
        else:
            targets, sums = centered_by_blocks(teacher, self.center.center[:, :active], temperature)
            self.center.add_sums(sums, len(teacher.tokens))
        loss, entropy = masked_loss_by_blocks(student.first(active), targets, weights, self.student_temp)
        return loss, {"patch_entropy": entropy, **self.shown(active, loss)}

    def finish_step(self) -> dict[str, Tensor]:
        """Move the centre by the mean over all hidden patches of the step: every micro-batch, every rank."""
        if self.center is None:
            return {}
        self.center.finish_step()
        return {"patch_center_norm": self.center.center.norm()}

    def frozen(self, head: PatchScores, progress: Progress) -> list[nn.Parameter]:
        """The prototypes, in the first epochs; a shared head is its owner's business."""
        if head.head is None or not self.freezes_prototypes(progress):
            return []
        return list(head.head.last_layer.parameters())


def masked_loss(scaled: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i * -sum_k q_ik log p_ik over hidden patches i; scaled [M, K] student scores over their temperature, targets [M, K],
    weights [M] -> loss []."""
    return ((scaled.logsumexp(-1) - (targets * scaled).sum(-1)) * weights).sum()
