"""Student and teacher: two copies of backbone + heads, who sees which crops, the momentum update; frozen anchors. Knows no loss."""

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.errors import ConfigError, UserError
from ssl_locat.models.packing import allow_packing, packed_tokens
from ssl_locat.models.tokens import (
    Grid,
    Tokens,
    at_places,
    class_token,
    forward_tokens,
    input_grid,
    normalise,
    patch_width,
    refine,
)
from ssl_locat.objectives import Masks, Needs, Views
from ssl_locat.objectives.masking import Keep
from ssl_locat.runs.distributed import copy_whole
from ssl_locat.seeds import mix64

KEPT = 1  # tells the seeds of kept patches from those of masks, of which they are made


class Network(nn.Module):
    """A backbone and one head per objective; where one of them needs masks, also a learned token [D] in the place of hidden patches.

    `hides` says whether masks keep patches from the backbone (the student's) or only tell the heads which tokens to read (the teacher's).
    """

    hides = True
    packs = False  # crops of both sizes go through the backbone in one pass

    def __init__(self, backbone: nn.Module, heads: nn.ModuleDict, needs: Needs):
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.needs = needs
        # [D], zero at first, as iBOT's and DINOv2's
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim)) if needs.masks else None

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        num_global: int,
        masks: Masks | None = None,
        with_tokens: bool = False,
    ) -> dict[str, Any] | tuple[dict[str, Any], Tokens]:
        """Outputs of every head, by name.

        Args:
            global_crops: [T*B, 3, H, W], view-major.
            local_crops: [n*B, 3, h, w], view-major, or None (the teacher never sees them).
            num_global: T.
            masks: of the global crops, where an objective needs them, or where the student gets some of the patches alone.
            with_tokens: also the global crops' tokens after the last block, for diagnosis.
        """
        batch = len(global_crops) // num_global
        seen: dict[str, Any] = {"mask_token": self.mask_token}
        if masks is not None and self.hides:
            seen |= {"masks": masks.on_grid(), "kept": masks.kept}
        raw_local: Tokens | None = None
        # one pass for both sizes, or one for each, as their numbers of tokens differ; prefix [T*B, R, D], patches [T*B, N, D]
        if self.packs and local_crops is not None:
            raw, raw_local = packed_tokens(self.backbone, [global_crops, local_crops], **seen)
        else:
            raw = forward_tokens(self.backbone, global_crops, **seen)
        tokens = refine(self.backbone, raw)
        cls = class_token(self.backbone, tokens)  # [T*B, D]; Jumbo's J tokens side by side: [T*B, J*D]
        if local_crops is not None:
            raw_local = raw_local or forward_tokens(self.backbone, local_crops)
            local = refine(self.backbone, raw_local)
            cls = torch.cat([cls, class_token(self.backbone, local)])  # [(T + n) * B, D]
        views = Views(cls.unflatten(0, (-1, batch)))  # [T + n, B, D]
        if self.needs.patches:
            # [T, B, N, D], before PRR: it mixes tokens of all places, and a loss on patches wants each by itself
            views = views._replace(patches=normalise(self.backbone, raw).patches.unflatten(0, (num_global, batch)))
        if self.needs.refined_patches:
            views = views._replace(refined_patches=tokens.patches.unflatten(0, (num_global, batch)))
        if masks is not None and not self.hides:
            views = at_kept(views, masks.kept)
        if masks is not None and masks.hidden is not None:
            views = views._replace(masks=masks.hidden.unflatten(0, (num_global, batch)), masked=masks.index)
        outputs = {name: head(views) for name, head in self.heads.items()}
        return (outputs, raw) if with_tokens else outputs


def at_kept(views: Views, kept: Tensor | None) -> Views:
    """Views of a network that saw all patches, with those that the student got alone: kept [T*B, n], so that losses compare the same places."""
    if kept is None:
        return views

    def taken(patches: Tensor | None) -> Tensor | None:
        return None if patches is None else at_places(patches.flatten(0, 1), kept).unflatten(0, patches.shape[:2])

    return views._replace(patches=taken(views.patches), refined_patches=taken(views.refined_patches))


class Anchor(nn.Module):
    """A frozen third network, whose tokens of the global crops an objective compares the student's with.

    Args:
        scale: it has this many patches, per side, for each of the student's, whatever its patch size: `size` is what it sees.
        mean, std: that the crops were normalised with; undone where the backbone was trained with others.
    """

    def __init__(self, backbone: nn.Module, scale: float, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.backbone, self.scale = backbone.eval().requires_grad_(False), scale
        own = backbone.pretrained_cfg
        # crops * std + mean is the image in 0..1, and (image - own mean) / own std what this backbone was trained on; not saved
        self.register_buffer("gain", _channels(std) / _channels(own["std"]), persistent=False)
        self.register_buffer("shift", (_channels(mean) - _channels(own["mean"])) / _channels(own["std"]), persistent=False)

    def train(self, mode: bool = True) -> "Anchor":
        return super().train(False)  # `model.train()` reaches every module

    def size(self, grid: Grid) -> tuple[int, int]:
        """(height, width) in pixels of the crops that it sees, for the student's grid of patches, whose sides may differ."""
        height, width = self.backbone.patch_embed.patch_size
        return round(grid.rows * self.scale) * height, round(grid.cols * self.scale) * width

    def forward(self, images: Tensor, num_global: int, grid: Grid, larger: Tensor | None = None) -> Views:
        """images [T*B, 3, H, W], grid of the student's patches -> class tokens, patches before and after PRR, on that grid.

        larger: the same crops, cut from the images with more pixels, for an anchor that sees more than H x W."""
        size = self.size(grid)
        if larger is not None and max(size) > max(images.shape[-2:]):
            images = larger
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        raw = forward_tokens(self.backbone, images * self.gain + self.shift)
        refined = refine(self.backbone, raw)
        views = (class_token(self.backbone, refined), _on(grid, normalise(self.backbone, raw)), _on(grid, refined))
        return Views(*(tokens.unflatten(0, (num_global, -1)) for tokens in views))


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def _on(grid: Grid, tokens: Tokens) -> Tensor:
    """Patch tokens [B, N, D] brought to another grid; bicubic without antialiasing, as DINOv3 does."""
    if tokens.grid == grid:
        return tokens.patches
    maps = tokens.patches.mT.unflatten(2, tokens.grid).float()  # [B, D, rows, cols]
    return F.interpolate(maps, grid, mode="bicubic").flatten(2).mT  # [B, D, N] -> [B, N, D]


class StudentTeacher(nn.Module):
    """The pair. The teacher starts as the student's copy, without stochastic depth, and follows it by momentum.

    The teacher stays in training mode (its BatchNorm, if any, uses its own batch's statistics, as DINO's does) and takes no gradient.

    Args:
        anchors: frozen backbones of the objectives (by name) that compare with one from outside; those whose `anchor` is "teacher" get a
            copy of this teacher, kept in `snapshots`, which are state of the run and saved with it.
        pack_crops: the student's crops of both sizes go through in one pass (models/packing.py); the teacher sees one size only.
        share_frozen: what does not move of the backbone is one tensor in memory for student, teacher and snapshots.
        mask_token_moves: else it stays 0, so that no gradient goes through frozen blocks for its sake.
        metadata: name -> number of values of each field of data.metadata, for objectives that read them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        objectives: nn.ModuleDict,
        anchors: dict[str, nn.Module] | None = None,
        pack_crops: bool = False,
        share_frozen: bool = False,
        mask_token_moves: bool = True,
        metadata: dict[str, int] | None = None,
    ):
        super().__init__()
        anchors = anchors or {}
        # what any of the objectives reads is computed, once for all of them
        needs = Needs(*(any(flags) for flags in zip(*(objective.needs for objective in objectives.values()), strict=True)))
        if needs.masks and not hasattr(backbone, "blocks"):
            raise UserError(
                f"{type(backbone).__name__} merges its patches from stage to stage, so that masked ones cannot be told apart at its end; "
                "losses on masked patches (ibot) need a ViT"
            )
        heads = make_heads(backbone, objectives, anchors, metadata)
        self.read_metadata = [name for name, objective in objectives.items() if objective.needs.metadata]
        self.student = Network(backbone, heads, needs)
        if self.student.mask_token is not None:
            self.student.mask_token.requires_grad_(mask_token_moves)
        # deepcopy takes what its memo holds as copied already
        shared: dict[int, Any] = {id(p): p for p in backbone.parameters() if not p.requires_grad} if share_frozen else {}
        self.teacher = copy.deepcopy(self.student, {**shared})
        if pack_crops:
            allow_packing(backbone)
            self.student.packs = True
        self.teacher.hides = False
        self.teacher.requires_grad_(False)
        for module in self.teacher.modules():
            # timm's DropPath: targets with blocks left out would be noise
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        self.anchors, self.snapshots = nn.ModuleDict(), nn.ModuleDict()
        for name, objective in objectives.items():
            if getattr(objective, "anchor", None):
                frozen = anchors[name] if name in anchors else copy.deepcopy(self.teacher.backbone, {**shared})
                # checkpoints hold snapshots; anchors from outside are loaded from where they lie
                place = self.anchors if name in anchors else self.snapshots
                # objectives that compare with one network at one size share its pass, too
                same: Any = (a for a in place.values() if a.backbone is frozen and a.scale == objective.anchor_scale)
                place[name] = next(same, None) or Anchor(
                    frozen, objective.anchor_scale, backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"]
                )

    @torch.no_grad()
    def targets(
        self,
        global_crops: Tensor,
        num_global: int,
        masks: Masks | None = None,
        anchor_crops: Tensor | None = None,
        metadata: Tensor | None = None,
    ) -> tuple[dict[str, Any], Tokens]:
        """What each objective compares the student with: the teacher's head's output, its anchor's views, or metadata; and the teacher's tokens.

        anchor_crops: the global crops with more pixels, for anchors that see them so. metadata: int64 [B, M], of the images."""
        outputs, tokens = self.teacher(global_crops, None, num_global, masks, with_tokens=True)
        seen: dict[int, Views] = {}
        for name, anchor in (*self.anchors.items(), *self.snapshots.items()):
            if id(anchor) not in seen:
                views = anchor(global_crops, num_global, tokens.grid, anchor_crops)
                seen[id(anchor)] = at_kept(views, masks.kept) if masks is not None else views
            outputs[name] = seen[id(anchor)]
        outputs |= dict.fromkeys(self.read_metadata, metadata)
        return outputs, tokens

    def make_masks(
        self, objectives: nn.ModuleDict, seeds: list[int], global_crops: Tensor, keep: Keep | None = None
    ) -> Masks | None:
        """What the student does not see of a micro-batch, one seed per image: the patches that the first objective which needs masks hides, and
        those that are not kept; None if there are neither."""
        grid, views = input_grid(self.student.backbone, global_crops), len(global_crops) // len(seeds)
        kept = keep.draw([mix64(seed, KEPT) for seed in seeds], views, grid) if keep else None
        masking = next((objective for objective in objectives.values() if objective.needs.masks), None)
        hidden = masking.make_masks(seeds, views, grid) if masking is not None else None
        return None if hidden is None and kept is None else Masks.of(hidden, global_crops.device, kept, grid.rows * grid.cols)

    def renew_snapshots(self, objectives: nn.ModuleDict, step: int) -> None:
        """Copy the teacher anew into the anchors that are due; all ranks call it."""
        for name, anchor in self.snapshots.items():
            every = objectives[name].anchor_every_steps
            # a copy of the teacher of this very step, in all ranks at once: FSDP gathers its parts for it
            if every and step % every == 0:
                copy_whole(self.teacher.backbone, anchor.backbone)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, over parameters; buffers are each network's own."""
        pairs = [(t, s) for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True) if t is not s]
        # one call for all tensors: a launch for each of hundreds would take longer than its work
        torch._foreach_lerp_([teacher for teacher, _ in pairs], [student for _, student in pairs], 1 - momentum)


def make_heads(
    backbone: nn.Module, objectives: nn.ModuleDict, anchors: dict[str, nn.Module], metadata: dict[str, int] | None = None
) -> nn.ModuleDict:
    """One head per objective, by name; those that share another's are given it."""
    heads = nn.ModuleDict()
    for name, objective in objectives.items():
        # an anchor from outside may be wider than the student
        anchor = anchors.get(name, backbone)
        widths = (anchor.num_features,) if getattr(objective, "anchor", None) else ()
        # patches may be narrower than the class token (Jumbo's is as wide as six): told to those that ask
        told = {"patch_dim": patch_width(backbone), "anchor_patch_dim": patch_width(anchor), "metadata": metadata or {}}
        asked = inspect.signature(objective.make_head).parameters
        heads[name] = objective.make_head(backbone.num_features, *widths, **{k: told[k] for k in told if k in asked})
    for name, objective in objectives.items():
        owner = getattr(objective, "shares_head_of", None)
        if owner and owner not in heads:
            raise ConfigError(
                f"{name} shares the head of {owner!r}, which is not among the objectives: {', '.join(heads)}. Add it."
            )
        if owner and patch_width(backbone) != backbone.num_features:
            raise ConfigError(
                f"{name} shares the head of {owner!r}, which reads class tokens of {backbone.num_features} numbers, but patches of this "
                f"{type(backbone).__name__} have {patch_width(backbone)}; leave shared_head out."
            )
        if owner:
            heads[name].share(heads[owner])
    return heads
