"""Quality of a backbone without labels: DSE for dense tasks, and the measures of global features, on a few hundred fixed images.

    ssl-locat evaluate unlabelled MODEL data.test=IMAGES

All compare checkpoints of one run on the same images; none compares networks of different widths. What each says, and where it misleads:
docs/label-free.md. The measures themselves are in ssl_locat/label_free/, one file each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_locat.evaluation.shared.features import check_image_size, default_resize
from ssl_locat.evaluation.shared.image_views import centre_view, normalisation, training_view
from ssl_locat.evaluation.shared.options import Count, LabelledData, Whole
from ssl_locat.evaluation.shared.pictures import pictures
from ssl_locat.label_free.alpha_req import alpha_req
from ssl_locat.label_free.dse import dse
from ssl_locat.label_free.lidar import lidar
from ssl_locat.label_free.norm_outliers import norm_outlier_share
from ssl_locat.label_free.rankme import rankme
from ssl_locat.label_free.uniformity import alignment, uniformity, unit
from ssl_locat.models.tokens import class_token, features, forward_tokens, refine
from ssl_locat.runs.distributed import all_gather_cat, broadcast_object, is_main
from ssl_locat.runs.log import progress
from ssl_locat.seeds import mix64

CROP_SCALE = (0.25, 1.0)  # of the image's area: about the global crops that DINO and DINOv2 (0.32) call the same image


@torch.no_grad()
def evaluate(
    backbone: nn.Module,
    *,
    data: LabelledData,
    images: Count = 256,
    views: Count = 4,
    patches: Count = 256,
    image_size: Count | None = None,
    resize_size: Count | None = None,
    batch_size: Count = 64,
    workers: Whole | None = None,
    seed: Whole = 0,
) -> dict[str, float]:
    """-> dse, dse_inter, dse_intra_1, dse_intra_8, dse_dim, norm_outliers (raw patches of the last block); rankme, alpha_req, alpha_req_r2,
    uniformity (what a head sees: final norm, PRR, class token); lidar, alignment (the same, of random crops).

    images: how many of data.test (data.train where there is none), evenly over the set. views: random crops of each, for LiDAR and alignment; below
    two there are neither. patches: at most so many of an image, drawn once for all: memory stays bounded on large images.
    """
    backbone.eval()
    device = next(backbone.parameters()).device
    size = check_image_size(backbone, image_size)
    mean, std = normalisation(backbone)
    centre = partial(centre_view, size=size, resize=resize_size or default_resize(size), mean=mean, std=std)
    crop = partial(training_view, size=size, mean=mean, std=std, scale=CROP_SCALE)
    views = views if views > 1 else 0

    stack = partial(centre_and_crops, centre=centre, crop=crop, views=views, seed=seed)
    section = data if data.get("test") else {**data, "test": data.get("train")}
    options: dict[str, Any] = {
        "limit": images,
        "image_size": size,
        "batch_size": max(1, batch_size // (1 + views)),
        "workers": workers,
    }
    found: dict[str, list[Tensor]] = {"patches": [], "classes": [], "crops": []}
    with progress("label-free measures", total=images, unit="images") as bar:
        for batch in pictures(backbone, section, **options, spread=True, view=stack):
            shown = batch.images.to(device)  # [B, 1 + V, C, H, W]
            tokens = forward_tokens(backbone, shown[:, 0])
            place = chosen_patches(tokens.patches.shape[1], patches, seed)
            rows = {"patches": tokens.patches[:, place], "classes": class_token(backbone, refine(backbone, tokens))}
            rows["crops"] = features(backbone, shown[:, 1:].flatten(0, 1)).unflatten(0, (-1, views)) if views else rows["classes"]
            # repeats are dropped after gathering, which wants equal shapes
            valid = all_gather_cat(batch.valid.to(device))
            for name, values in rows.items():
                found[name].append(all_gather_cat(values.float())[valid].cpu())
            bar.update(int(valid.sum()))
    # the same on every rank; computed once
    patches_, classes, crops = (torch.cat(parts) for parts in found.values())
    return broadcast_object(measure(patches_, classes, crops, views, seed) if is_main() else None)


def centre_and_crops(image: np.ndarray, index: int, *, centre: Callable, crop: Callable, views: int, seed: int) -> Tensor:
    """[1 + V, C, H, W]: the centre, then random crops that are a function of (seed, place in the set, number)."""
    return torch.stack([centre(image, 0), *(crop(image, mix64(seed, index, view)) for view in range(views))])


def chosen_patches(total: int, count: int, seed: int) -> Tensor:
    """int64 [min(total, count)], ascending: the same places in every image."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(mix64(seed, total) >> 1))
    return order[:count].sort().values


def measure(patches: Tensor, classes: Tensor, crops: Tensor, views: int, seed: int) -> dict[str, float]:
    """patches [n, N, D], classes [n, D], crops [n, V, D] -> all measures."""
    structure = dse(patches, seed)
    spectrum = alpha_req(classes)
    scores = {
        "dse": structure.dse,
        "dse_inter": structure.inter,
        "dse_intra_1": structure.intra_1,
        "dse_intra_8": structure.intra_8,
        "dse_dim": structure.dim,
        "rankme": float(rankme(classes)),
        "alpha_req": spectrum.alpha,
        "alpha_req_r2": spectrum.r2,
        "uniformity": float(uniformity(unit(classes))),
        "norm_outliers": float(norm_outlier_share(patches)),
    }
    if views:
        scores["lidar"] = float(lidar(crops.flatten(0, 1), views))
        scores["alignment"] = float(alignment(unit(crops[:, 0]), unit(crops[:, 1])))
    return scores
