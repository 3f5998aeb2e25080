"""What an image costs a pretraining in FLOP, stage by stage: counted on the real model by torch's own counter, on tensors without memory ("meta").

A multiply-accumulate counts as two operations. Not counted: decoding, crops, losses, the optimiser.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_locat.config.crops_section import Crops
from ssl_locat.config.schema import Config
from ssl_locat.models.attention import forced_backend
from ssl_locat.objectives.blocks import BlockScores
from ssl_locat.pretraining.parts import build_model, mask_seeds

_IMAGES = 8  # as many masks are drawn: what patch losses score differs from image to image


def operations_of_stages(config: Config) -> list[float]:
    """FLOP of one image in each stage: the teacher on two global crops, the student forward and backward on all crops, with their heads."""
    without_start = config.model_copy(update={"backbone": config.backbone.model_copy(update={"init": None, "trainable": "full"})})
    with torch.device("meta"):
        model, losses = build_model(without_start, torch.device("meta"))
    found: dict[str, float] = {}
    for _, crops, _ in config.crops.resolved():
        key = repr(_what_counts(crops))
        if key not in found:
            found[key] = _operations(config, crops, model, losses)
    return [found[repr(_what_counts(crops))] for _, crops, _ in config.crops.resolved()]


def operations_of_run(config: Config) -> float:
    """FLOP of one image, the mean over the run."""
    found, begins = 0.0, 0.0
    for stage, of_an_image in zip(config.crops.resolved(), operations_of_stages(config), strict=True):
        found, begins = found + (stage.until - begins) * of_an_image, stage.until
    return found


def _what_counts(crops: Crops) -> tuple:
    return crops.global_size, crops.local_size, crops.num_local


def _operations(config: Config, crops: Crops, model: Any, losses: Any) -> float:
    channels, side, small = len(crops.mean), crops.global_size, crops.local_size
    large = torch.empty(2 * _IMAGES, channels, side, side, device="meta")
    local = torch.empty(crops.num_local * _IMAGES, channels, small, small, device="meta") if crops.num_local else None
    anchor = (
        torch.empty(2 * _IMAGES, channels, crops.anchor_size, crops.anchor_size, device="meta") if crops.anchor_size else None
    )
    masks = model.make_masks(losses, mask_seeds(config, range(_IMAGES)), large)
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
