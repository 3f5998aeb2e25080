"""What cheaper steps bring (docs/cheaper.md): a DINO step of smaller crops, or with fewer patches for the student, beside the whole one, in time
and by count.

ssl-locat bench step
"""

from functools import partial
from typing import Any

import torch

from ssl_locat.benchmarks.timing import device, make_rows, side_by_side, time_rows
from ssl_locat.config.schema import Config, load
from ssl_locat.objectives import Progress
from ssl_locat.pretraining.operations import operations_of_stages
from ssl_locat.pretraining.parts import build_model, mask_seeds, total_loss
from ssl_locat.pretraining.stages import keep_on_average

# a network that a CPU steps in a tenth of a second, whose blocks are most of its work
SMALL = [
    "backbone.embed_dim=192",
    "backbone.depth=6",
    "backbone.num_heads=3",
    "backbone.patch_size=8",
    "backbone.drop_path_rate=0.0",
]
SMALL += ["objective={name: dino, num_prototypes: 1024, hidden_dim: 256, bottleneck_dim: 64}"]
SMALL += ["crops.global_size=96", "crops.local_size=48", "crops.num_local=2"]
VARIANTS = {
    "whole crops": [],
    "half the resolution": ["crops.global_size=48", "crops.local_size=24"],
    "half of the patches": ["crops.keep_patches=0.5"],
    "a quarter of the patches, a block": ["crops.keep_patches=0.25", "crops.keep_shape=block"],
    "half the resolution, half of the patches": ["crops.global_size=48", "crops.local_size=24", "crops.keep_patches=0.5"],
}


def rows(repeats: int) -> list[dict]:
    images = 64 if device().type == "cuda" else 2
    result = []
    for recipe in ("dino_vit_s16", "dino_locatvit_s16"):
        configs = {name: load(recipe, [*SMALL, "backbone.img_size=96", *options]) for name, options in VARIANTS.items()}
        model, losses = build_model(configs["whole crops"], device())
        steps = {name: partial(one_step, config, model, losses, *some_crops(config, images)) for name, config in configs.items()}
        case = f"{recipe} made small, {images} images fp32"
        result += time_rows("step", case, side_by_side(steps, repeats), "whole crops")
        counted = {name: operations_of_stages(config).stages[0] / 1e9 for name, config in configs.items()}
        result += make_rows("step", case, "counted", "GFLOP/image", counted, "whole crops")
    return result


def some_crops(config: Config, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = ((2, config.crops.global_size), (config.crops.num_local, config.crops.local_size))
    large, small = (torch.randn(views * images, 3, side, side, device=device()) for views, side in sizes)
    return large, small


def one_step(config: Config, model: Any, losses: Any, large: torch.Tensor, small: torch.Tensor) -> None:
    """Both networks, loss and gradients; the optimiser costs the same in each."""
    masks = model.make_masks(losses, mask_seeds(config, range(len(large) // 2)), large, keep_on_average(config.crops))
    targets, _ = model.targets(large, 2, masks)
    views = model.student(large, small, 2, masks)
    loss, _ = total_loss(losses, config, views, targets, Progress(0, 0.0, 1.0))
    loss.backward()
    model.student.zero_grad(set_to_none=True)
