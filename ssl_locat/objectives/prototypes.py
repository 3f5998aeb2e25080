"""What `dino` and `ibot` share: scores over prototypes, a sharpened teacher, and prototypes that stand still at first."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ssl_locat.errors import UserError
from ssl_locat.objectives import Progress
from ssl_locat.objectives.targets import check_targets
from ssl_locat.optim.schedules import stepwise, straight

DEFAULT_BLOCK = 8192  # scores of 640 rows (64 images, 10 views) in float32: 21 MB


class PrototypeObjective(nn.Module):
    """Options and schedules of an objective that compares distributions over prototypes.

    Args:
        num_prototypes: K, outputs of the head.
        hidden_dim, bottleneck_dim, num_layers, norm_last_layer: of the head (heads.DINOHead).
        student_temp: temperature of the student's softmax.
        teacher_temp: [at the start, after the warm-up]; the warm-up is linear from epoch to epoch. A third one is reached at the end of the decay
            of optim.schedule wsd or decay; without it the second stays.
        teacher_temp_warmup_epochs: whole epochs.
        center_momentum: of the running mean of teacher scores that is taken off them.
        frozen_last_layer_epochs: prototypes do not move in these first epochs: ones that move too early collapse the targets.
        targets: `centering` (DINO) or `sinkhorn` (DINOv2): how teacher scores become targets. Sinkhorn balances the prototypes within a
            micro-batch, over all ranks and both views.
        prototype_block: scores of so many prototypes exist at a time (blocks.py); 0: of all. The same loss and gradients within rounding, with memory
            that does not grow with K; the last layer is computed half again as often (with `sinkhorn`, once more for each of its rounds).
        active_prototypes: [[share of the run, K], ...]: from each share on (by samples seen; the first is 0), so many of the prototypes are used, the
            first ones. The others are neither computed nor trained; where `prototype_block` is 0 it is taken to be 8192.
        min_images: with `sinkhorn`, refuse to run with fewer images per micro-batch on all ranks.
    """

    def __init__(
        self,
        name: str,
        *,
        teacher_temp: tuple[float, ...],
        teacher_temp_warmup_epochs: int,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        norm_last_layer: bool = True,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        frozen_last_layer_epochs: float = 1,
        targets: Literal["centering", "sinkhorn"] = "centering",
        min_images: int = 64,
        prototype_block: int = 0,
        active_prototypes: tuple[tuple[float, int], ...] = (),
    ):
        super().__init__()
        check_targets(name, targets)
        if prototype_block < 0:
            raise UserError(f"{name}: prototype_block is {prototype_block}; expected a number of prototypes, or 0: all at once.")
        self.stages = check_stages(name, active_prototypes, num_prototypes)
        self.head_options: dict[str, Any] = {
            "num_prototypes": num_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "num_layers": num_layers,
            "norm_last_layer": norm_last_layer,
            # a prefix of the prototypes is multiplied by the loss, which knows how far the run is; the head does not
            "prototype_block": prototype_block or (DEFAULT_BLOCK if self.stages else 0),
        }
        self.num_prototypes = num_prototypes
        self.student_temp = student_temp
        if len(teacher_temp) not in (2, 3):
            raise UserError(
                f"{name}: teacher_temp is {list(teacher_temp)}; expected [start, after the warm-up], and a third at the end of a decay."
            )
        self.teacher_temp = (teacher_temp[0], teacher_temp[1])  # a list, where it comes from a YAML
        self.decayed_temp = teacher_temp[2] if len(teacher_temp) == 3 else None
        self.teacher_temp_warmup_epochs = teacher_temp_warmup_epochs
        self.center_momentum = center_momentum
        self.frozen_last_layer_epochs = frozen_last_layer_epochs
        self.targets = targets
        # Sinkhorn spreads the images of a batch evenly over prototypes: a handful cannot fill them. A centre is a mean over many steps
        self.min_images = min_images if targets == "sinkhorn" else 1

    def temperature(self, progress: Progress) -> float:
        """The teacher's, which sharpens its targets: it rises by whole epochs, as in the reference, and stays, but for a decay."""
        stable = stepwise(int(progress.epoch), *self.teacher_temp, self.teacher_temp_warmup_epochs)
        return stable if self.decayed_temp is None else straight(progress.decayed, stable, self.decayed_temp)

    def active(self, progress: Progress) -> int:
        """How many of the prototypes are used at this point: the first ones."""
        return active_at(self.stages, progress.epoch / progress.total_epochs) if self.stages else self.num_prototypes

    def shown(self, active: int, loss: Tensor) -> dict[str, Tensor]:
        """What the metrics say of it, where it changes."""
        return {"active_prototypes": loss.new_full((), float(active))} if self.stages else {}

    @property
    def mean_active(self) -> float:
        """Over the whole run; what its operations go by."""
        ends = [*(begin for begin, _ in self.stages[1:]), 1.0]
        lengths = (end - begin for (begin, _), end in zip(self.stages, ends, strict=True))
        return (
            sum(length * count for length, (_, count) in zip(lengths, self.stages, strict=True))
            if self.stages
            else self.num_prototypes
        )

    def freezes_prototypes(self, progress: Progress) -> bool:
        """Whether the last layer must not move at this point of the run."""
        return progress.epoch < self.frozen_last_layer_epochs


def check_stages(name: str, stages: Sequence[Sequence[float]], num_prototypes: int) -> list[tuple[float, int]]:
    """[(share of the run, prototypes)] as `active_prototypes` gives them; UserError where they cannot be meant."""
    found = [(float(begin), int(count)) for begin, count in stages]
    begins = [begin for begin, _ in found]
    in_order = begins == sorted(set(begins)) and begins[:1] in ([], [0.0]) and all(begin < 1 for begin in begins)
    if not in_order or not all(0 < count <= num_prototypes for _, count in found):
        raise UserError(
            f"{name}: active_prototypes is {[list(stage) for stage in stages]}; expected [[share of the run, prototypes], ...], shares rising from 0 to below 1 "
            f"and 1 to {num_prototypes} prototypes, as in [[0, {max(1, num_prototypes // 4)}], [0.5, {num_prototypes}]]."
        )
    return found


def active_at(stages: Sequence[tuple[float, int]], share: float) -> int:
    return [count for begin, count in stages if begin <= share][-1]
