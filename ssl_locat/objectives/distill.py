"""Distillation from a frozen, larger backbone into the student: class and patch tokens (in the loop of DINOv2, arXiv:2304.07193, section 5,
and DINOv3: the anchor takes the momentum teacher's place, the momentum copy of the student is what is kept).

Those distil through their own pretrained heads, which released backbones come without; here small projections of the student's
tokens are compared with the frozen tokens themselves, so that any timm model can teach.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.errors import ConfigError
from ssl_locat.objectives import Needs, Progress, Views, required


class Projections(nn.Module):
    """One MLP for class tokens, one for patch tokens, into the anchor's space.

    Args:
        cls, patches: widths of student and anchor.
        hidden_dim: of the layer between.
    """

    def __init__(self, cls: tuple[int, int], patches: tuple[int, int], hidden_dim: int, refined: bool):
        super().__init__()
        self.cls, self.patches = (
            nn.Sequential(nn.Linear(own, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, anchors))
            for own, anchors in (cls, patches)
        )
        self.refined = refined

    def forward(self, views: Views) -> tuple[Tensor, Tensor]:
        """-> [V, B, D'], [T, B, N, D']."""
        return self.cls(views.cls), self.patches(views.refined_patches if self.refined else views.patches)


class Tokens(nn.Module):
    """No projections: the tokens themselves."""

    def __init__(self, refined: bool):
        super().__init__()
        self.refined = refined

    def forward(self, views: Views) -> tuple[Tensor, Tensor]:
        """-> [V, B, D], [T, B, N, D]."""
        return views.cls, required(views.refined_patches if self.refined else views.patches)


class Distill(nn.Module):
    """1 - cosine between projected tokens of the student and those of the frozen anchor.

    Global crops answer to the anchor's tokens of the same crop; local crops' class tokens to those of both.

    Args:
        anchor: MODEL of the frozen backbone: timm:NAME?pretrained, an export folder, a run, ...; or `start`: that of backbone.init.
        patch_weight: of the patch tokens beside the class tokens' 1.
        hidden_dim: of the projections.
        anchor_scale: the anchor sees the crops at a size where it has this many patches, per side, for each of the student's.
        refined: compare patch tokens after PRR (each network's, if it has one) instead of after the final norm alone.
        project: without (false) the student's own tokens are compared, which must be as wide as the anchor's: a pull to it, where projections
            would let the features turn and stretch.
        local_crops: without (false) only each global crop with itself: at the anchor's own weights the loss is 0 then.
    """

    anchor_every_steps = None

    def __init__(
        self,
        anchor: str,
        patch_weight: float = 1.0,
        hidden_dim: int = 2048,
        anchor_scale: float = 1.0,
        refined: bool = False,
        project: bool = True,
        local_crops: bool = True,
    ):
        super().__init__()
        self.project, self.local_crops = project, local_crops
        self.anchor, self.anchor_scale = anchor, anchor_scale
        self.patch_weight, self.hidden_dim, self.refined = patch_weight, hidden_dim, refined
        self.needs = Needs(patches=not refined, refined_patches=refined)

    def make_head(self, embed_dim: int, anchor_dim: int, patch_dim: int, anchor_patch_dim: int) -> nn.Module:
        widths = (embed_dim, anchor_dim), (patch_dim, anchor_patch_dim)
        if self.project:
            return Projections(*widths, self.hidden_dim, self.refined)
        for own, anchors in widths:
            if own != anchors:
                raise ConfigError(
                    f"distill: project is false, but the student's tokens have {own} numbers and the anchor's {anchors}. Leave project out."
                )
        return Tokens(self.refined)

    def forward(self, student: tuple[Tensor, Tensor], anchor: Views, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Projected class tokens [S, B, D'] and patch tokens [T, B, N, D'], the anchor's views of the global crops -> loss [], metrics."""
        cls, patches = (F.normalize(tokens.float(), dim=-1) for tokens in student)  # unit length: [S, B, D'] and [T, B, N, D']
        target = F.normalize(anchor.cls.float(), dim=-1)
        same = (cls[: len(target)] * target).sum(-1).flatten()  # [T*B] cosines of each global crop with itself
        # [L*T*B]: each local crop with both global ones
        across = torch.einsum("sbd,tbd->stb", cls[len(target) :], target).flatten()
        cls_loss = 1 - (torch.cat([same, across]) if self.local_crops else same).mean()
        target = F.normalize(required(anchor.refined_patches if self.refined else anchor.patches).float(), dim=-1)
        patch_loss = 1 - (patches * target).sum(-1).mean()  # local crops have no patches of the anchor to compare with
        return cls_loss + self.patch_weight * patch_loss, {"cls": cls_loss.detach(), "patches": patch_loss.detach()}

    def finish_step(self) -> dict[str, Tensor]:
        return {}

    def frozen(self, head: nn.Module, progress: Progress) -> list[nn.Parameter]:
        return []
