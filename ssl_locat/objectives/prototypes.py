"""What `dino` and `ibot` share: scores over prototypes, a sharpened teacher, and prototypes that stand still at first."""

from typing import Any, Literal

from torch import nn

from ssl_locat.errors import UserError
from ssl_locat.objectives import Progress
from ssl_locat.objectives.targets import check_targets
from ssl_locat.optim.schedules import stepwise, straight


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
    ):
        super().__init__()
        check_targets(name, targets)
        self.head_options: dict[str, Any] = {
            "num_prototypes": num_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "num_layers": num_layers,
            "norm_last_layer": norm_last_layer,
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

    def freezes_prototypes(self, progress: Progress) -> bool:
        """Whether the last layer must not move at this point of the run."""
        return progress.epoch < self.frozen_last_layer_epochs
