"""What an image costs a pretraining in FLOP, stage by stage: counted on the real model by torch's own counter, on tensors without memory ("meta").

A multiply-accumulate counts as two operations. Not counted: decoding, crops, losses, the optimiser.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_locat.config.crops_section import Crops
from ssl_locat.config.schema import Config
from ssl_locat.models.attention import forced_backend
from ssl_locat.objectives.blocks import BlockScores
from ssl_locat.objectives.masking import Keep
from ssl_locat.pretraining.parts import build_model, mask_seeds

_IMAGES = 8  # as many masks are drawn: what patch losses score differs from image to image


class Counted(NamedTuple):
    """FLOP of one image."""

    stages: list[float]  # in each
    whole: float  # of the last stage's crops, where the student gets all of their patches


def operations_of_stages(config: Config) -> Counted:
    """Counted: the teacher on two global crops, the student forward and backward on all crops (or kept patches), with their heads."""
    without_start = config.model_copy(update={"backbone": config.backbone.model_copy(update={"init": None, "trainable": "full"})})
    with torch.device("meta"):
        model, losses = build_model(without_start, torch.device("meta"))
    found: dict[tuple, float] = {}

    def of(crops: Crops, share: float) -> float:
        key = crops.global_size, crops.local_size, crops.num_local, share
        if key not in found:
            found[key] = _operations(config, crops, model, losses, share)
        return found[key]

    stages = []
    for _, crops, _ in config.crops.resolved():
        first, last = crops.keeps
        # Simpson's rule: exact, since a block costs a square of its tokens at most
        parts = {first: 1} if first == last else {first: 1, (first + last) / 2: 4, last: 1}
        stages.append(sum(weight * of(crops, share) for share, weight in parts.items()) / sum(parts.values()))
    return Counted(stages, of(crops, 1.0))


def operations_of_run(config: Config) -> float:
    """FLOP of one image, the mean over the run."""
    found, begins = 0.0, 0.0
    for stage, of_an_image in zip(config.crops.resolved(), operations_of_stages(config).stages, strict=True):
        found, begins = found + (stage.until - begins) * of_an_image, stage.until
    return found


def _operations(config: Config, crops: Crops, model: Any, losses: Any, share: float) -> float:
    channels, side, small = len(crops.mean), crops.global_size, crops.local_size
    large = torch.empty(2 * _IMAGES, channels, side, side, device="meta")
    local = torch.empty(crops.num_local * _IMAGES, channels, small, small, device="meta") if crops.num_local else None
    anchor = (
        torch.empty(2 * _IMAGES, channels, crops.anchor_size, crops.anchor_size, device="meta") if crops.anchor_size else None
    )
    masks = model.make_masks(losses, mask_seeds(config, range(_IMAGES)), large, Keep(share))
    # attention as products of matrices, which the counter sees, with no kernel of ours, which it does not know
    with FlopCounterMode(display=False) as counter, forced_backend("sdpa"), sdpa_kernel(SDPBackend.MATH):
        targets, _ = model.targets(large, 2, masks, anchor)
        views = model.student(large, local, 2, masks)
        for name, objective in losses.items():  # what the loss would multiply, with the prototypes that are in use on average
            targets[name], views[name] = (multiplied(outputs[name], objective) for outputs in (targets, views))
        torch.stack([value.sum() for value in tensors_of(views)]).sum().backward()
    model.student.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / _IMAGES


def multiplied(output: Any, objective: Any) -> Any:
    """A head's output with the scores that it leaves to the loss (objectives/blocks.py); once, as if no block were computed again."""
    if isinstance(output, BlockScores):
        return output.first(round(objective.mean_active)).whole()
    if isinstance(output, tuple) and isinstance(output[0], BlockScores):
        return multiplied(output[0], objective), *output[1:]
    return output


def tensors_of(views: Any) -> list[Tensor]:
    """Every tensor with a gradient in what the student's heads give: tensors, or tuples and mappings of such."""
    if isinstance(views, Tensor):
        return [views] if views.requires_grad else []
    if isinstance(views, dict):
        views = list(views.values())
    return [tensor for item in views for tensor in tensors_of(item)] if isinstance(views, list | tuple) else []
