"""What was written gives the same features as what was trained: both outputs compared, at several sizes."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ssl_locat.errors import CheckpointError
from ssl_locat.models.tokens import class_token, forward_tokens, refine

TOLERANCE = {"timm": 1e-6, "pt2": 1e-4, "onnx": 1e-4}  # greatest difference of features, relative to their largest value


class BothTokens(nn.Module):
    """images [B, 3, H, W] -> (class_token [B, D] as a head sees it, patch_tokens [B, N, D] as dense probes read them)."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raw = forward_tokens(self.backbone, images)
        return class_token(self.backbone, refine(self.backbone, raw)), raw.patches


def shapes_of(backbone: nn.Module) -> list[tuple[int, int, int]]:
    """(batch, height, width) to compare at: the size it was trained at, and two others where the model takes any."""
    _, height, width = backbone.pretrained_cfg["input_size"]
    patch = backbone.patch_embed.patch_size
    rows, cols = (patch, patch) if isinstance(patch, int) else patch
    if not getattr(backbone, "dynamic_img_size", False):
        return [(1, height, width), (3, height, width)]
    # another batch, and grids that are not square: a graph with a size built in fails at one of them
    return [(1, height, width), (3, height + rows, width + 3 * cols), (2, max(rows, height // 2 // rows * rows), width)]


@torch.inference_mode()
def compare(backbone: nn.Module, outputs: Callable, shapes: list[tuple[int, int, int]], tolerance: float) -> float:
    """Greatest difference between the backbone's two outputs and `outputs(images)`, relative to their largest value.

    Raises CheckpointError above `tolerance`."""
    module = BothTokens(backbone.eval())
    # noise, not images: it reaches all weights, and needs no data
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, height, width in shapes:
        images = torch.randn(batch, backbone.pretrained_cfg["input_size"][0], height, width, generator=generator)
        for name, expected, given in zip(("class token", "patch tokens"), module(images), outputs(images), strict=True):
            difference = ((given - expected).abs().max() / expected.abs().max()).item()
            # so that NaN fails, too
            if not difference <= tolerance:
                raise CheckpointError(
                    f"the exported {name} at {batch} x {height} x {width} differs by {difference:.1e} from the trained model's "
                    f"(allowed: {tolerance:.0e}). Nothing was written. Please report this with the config."
                )
            worst = max(worst, difference)
    return worst


def outputs_of_timm(folder: Path) -> Callable:
    return BothTokens(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
