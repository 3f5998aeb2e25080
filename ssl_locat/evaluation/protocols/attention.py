"""What the class token and chosen patches attend to (LocAtViT, arXiv:2603.04892, figures 1 and 4).

    ssl-locat evaluate attention MODEL data.test=IMAGES beside=VANILLA_MODEL out=FOLDER

Writes FOLDER/attention.png, one row per image and model, and FOLDER/attention.json with the maps. Weights are averaged over heads.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ssl_locat.data.images.tiles import as_colours
from ssl_locat.errors import ConfigError
from ssl_locat.evaluation.shared.features import patch_size
from ssl_locat.evaluation.shared.image_views import normalisation
from ssl_locat.evaluation.shared.options import BelowOne, Count, Integer, LabelledData, Text
from ssl_locat.evaluation.shared.pictures import pictures
from ssl_locat.models.backbone import load_backbone
from ssl_locat.models.grid import patch_distances
from ssl_locat.models.maps import attention_maps
from ssl_locat.runs.distributed import is_main


@torch.no_grad()
def evaluate(
    backbone: nn.Module,
    *,
    data: LabelledData,
    images: Count = 4,
    image_size: Count | None = None,
    patches: Sequence[tuple[BelowOne, BelowOne]] = ((0.5, 0.5), (0.25, 0.25)),
    layer: Integer = -1,
    beside: Text | None = None,
    out: Text | None = "attention",
) -> dict[str, float]:
    """-> patch_distance (mean distance of what patches attend to, in patches) and cls_entropy (bits), for `beside` too with that suffix.

    images: how many of data.test; patches: (row, column) as fractions of the image; layer: which block, -1 is the last;
    beside: a MODEL of the same patch size to show next to this one; out: folder of the PNG and the JSON, null for none.
    """
    for place in patches:
        if len(place) != 2 or not all(0 <= part < 1 for part in place):
            raise ConfigError(f"patches has {place!r}; expected (row, column), each a fraction of the image in [0, 1).")
    device = next(backbone.parameters()).device
    models = {"model": backbone.eval()}
    if beside is not None:
        models["beside"] = load_backbone(beside).to(device)
    found = {}
    for name, model in models.items():
        (batch,) = pictures(model, data, limit=images, image_size=image_size, batch_size=images, workers=0)
        found[name] = (batch.images, *maps_and_metrics(model, batch.images.to(device), layer, patches))
    if out is not None and is_main():
        write(Path(out), models, found, patches, layer)
    metrics: dict[str, float] = {}
    for name, (_, _, scores) in found.items():
        metrics |= {f"{key}{'' if name == 'model' else '_beside'}": value for key, value in scores.items()}
    return metrics


def maps_and_metrics(
    backbone: nn.Module, images: Tensor, layer: int, patches: Sequence[tuple[float, float]]
) -> tuple[Tensor, dict[str, float]]:
    """-> maps [B, Q, rows, cols], one for the class token (if there is one) and one per chosen patch; the two numbers."""
    (weights,) = attention_maps(backbone, images, [layer])
    # [B, heads, R + N, R + N], rows are queries -> [B, R + N, R + N]
    weights, prefix = weights.mean(1).cpu(), backbone.num_prefix_tokens
    height, width = patch_size(backbone)
    rows, cols = images.shape[2] // height, images.shape[3] // width
    to_patches = weights[:, :, prefix:]  # [B, R + N, N]
    queries = [prefix + int(row * rows) * cols + int(col * cols) for row, col in patches]
    scores = {}
    dx, dy = patch_distances((rows, cols))
    # [B, N, N]; what goes to prefix tokens has no distance, so the rest is made to sum to 1
    local = to_patches[:, prefix:] / to_patches[:, prefix:].sum(-1, keepdim=True)
    scores["patch_distance"] = (local * (dx.square() + dy.square()).sqrt()).sum(-1).mean().item()
    maps = to_patches[:, queries]
    if has_class_token(backbone):
        # [B, 1, N]: the mean of Jumbo's class tokens
        cls = to_patches[:, : num_class_tokens(backbone)].mean(1, keepdim=True)
        share = cls / cls.sum(-1, keepdim=True)
        scores["cls_entropy"] = -(share * share.clamp(min=1e-30).log2()).sum(-1).mean().item()  # 0 log 0 is 0
        maps = torch.cat([cls, maps], dim=1)
    return maps.unflatten(-1, (rows, cols)), scores


def has_class_token(backbone: nn.Module) -> bool:
    return getattr(backbone, "cls_token", None) is not None


def num_class_tokens(backbone: nn.Module) -> int:
    """One, or Jumbo's J."""
    return backbone.cls_token.shape[1]


def write(folder: Path, models: dict[str, nn.Module], found: dict, patches: Sequence[tuple[float, float]], layer: int) -> None:
    """attention.json and attention.png."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    content = {
        name: {
            "queries": [*(["class token"] if has_class_token(models[name]) else []), *map(list, patches)],
            "maps": maps.tolist(),  # [image][query][row][column]
            **scores,
        }
        for name, (_, maps, scores) in found.items()
    }
    (folder / "attention.json").write_text(json.dumps({"layer": layer, **content}) + "\n")
    count = len(next(iter(found.values()))[0])
    columns = 1 + max(maps.shape[1] for _, maps, _ in found.values())
    figure = Figure(figsize=(2.2 * columns, 2.3 * count * len(found)), layout="constrained")
    axes = figure.subplots(count * len(found), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, (name, (images, maps, _)) in enumerate(found.items()):
        shown = as_colours(images, *normalisation(models[name]), (models[name].pretrained_cfg.get("channels") or {}).get("show"))
        for image in range(count):
            line = axes[image * len(found) + number]
            line[0].imshow(shown[image])
            line[0].set_title(name if len(found) > 1 else "image", fontsize=9)
            size = images.shape[2:]
            for row, col in patches:
                line[0].plot(col * size[1], row * size[0], "r+", markersize=10)
            for axis, heat, query in zip(line[1:], maps[image], content[name]["queries"], strict=False):
                axis.imshow(heat.numpy(), cmap="viridis")
                axis.set_title(query if isinstance(query, str) else f"patch at {query[0]:g}, {query[1]:g}", fontsize=9)
    figure.savefig(folder / "attention.png", dpi=110)
