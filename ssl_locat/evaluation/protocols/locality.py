"""How local a ViT's patches are, layer by layer, and how wide GAug became (LocAtViT, arXiv:2603.04892, appendices F and G).

    ssl-locat evaluate locality MODEL data.test=IMAGES out=FOLDER

Writes FOLDER/locality.json (all numbers) and FOLDER/locality.png. The statistics of sigma and alpha are taken by hooks that exist during
this protocol only, so that training never waits for them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.evaluation.shared.options import Count, LabelledData, Text, Whole
from ssl_locat.evaluation.shared.pictures import pictures
from ssl_locat.models.attention import Gaussian
from ssl_locat.models.backbone import load_backbone
from ssl_locat.models.gaug import GAug
from ssl_locat.models.tokens import Tokens, last_blocks
from ssl_locat.runs.distributed import all_reduce_sum_, is_main
from ssl_locat.runs.log import progress

PERCENTILES = (5, 25, 50, 75, 95)
EDGES = torch.logspace(
    -6, 3, 9001
)  # bins 0.23 % apart (10^0.001) of sigma (in patches) and alpha: percentiles without keeping every value


def locality_score(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B]: cosine similarity of each patch with its neighbours (8, fewer at the border), mean over those, then over patches.

    patches [B, N, D] row-major over grid (rows, cols). A single patch has no neighbour: NaN."""
    unit = F.normalize(patches.float(), dim=-1).unflatten(1, grid)  # [B, rows, cols, D]
    total, count = unit.new_zeros(unit.shape[:3]), unit.new_zeros(grid)
    rows, cols = grid
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if dx == dy == 0:
                continue
            # two shifted views of one grid: each patch in `here` beside the one at (-dy, -dx) of it in `there`
            here = (slice(max(dy, 0), rows + min(dy, 0)), slice(max(dx, 0), cols + min(dx, 0)))
            there = (slice(max(-dy, 0), rows + min(-dy, 0)), slice(max(-dx, 0), cols + min(-dx, 0)))
            total[:, *here] += (unit[:, *here] * unit[:, *there]).sum(-1)  # cosine, as rows have length 1
            count[here] += 1
    return (total / count).flatten(1).mean(1)


def patch_cls_similarity(tokens: Tokens) -> Tensor:
    """[B]: cosine similarity of the class token with each patch, mean over patches."""
    return F.cosine_similarity(tokens.prefix[:, :1].float(), tokens.patches.float(), dim=-1).mean(1)


class Spread:
    """Mean and percentiles of a stream of positive values, in constant memory."""

    def __init__(self, device: torch.device):
        # float64: beyond 2^24 values in a bin float32 would lose some
        self.counts = torch.zeros(len(EDGES) + 1, dtype=torch.float64, device=device)
        self.total = torch.zeros(1, dtype=torch.float64, device=device)
        self.edges = EDGES.to(device)

    def add(self, values: Tensor) -> None:
        self.counts += torch.bincount(torch.bucketize(values.flatten().float(), self.edges), minlength=len(self.counts))
        self.total += values.sum(dtype=torch.float64)

    def summary(self) -> dict[str, float]:
        """{"mean", "p5", ..., "p95"} over all processes."""
        counts, total = all_reduce_sum_(self.counts).cpu(), all_reduce_sum_(self.total).cpu()
        # share of the values up to each edge; the first edge beyond a percentile is off by one bin at most
        below = counts.cumsum(0) / counts.sum()
        found = {"mean": (total / counts.sum()).item()}
        for percent in PERCENTILES:
            bin_number = int(torch.searchsorted(below, torch.tensor(percent / 100, dtype=below.dtype)))
            found[f"p{percent}"] = EDGES[min(bin_number, len(EDGES) - 1)].item()
        return found


@contextmanager
def gaug_statistics(backbone: nn.Module) -> Iterator[list[dict[str, Spread]]]:
    """While inside, every GAug's standard deviations and alphas are counted: one {"sigma", "alpha"} per attention, in order.

    Values of repeated images are counted too where processes' shares are uneven: at most one image per process.
    """
    device = next(backbone.parameters()).device
    modules = [module for module in backbone.modules() if isinstance(module, GAug)]
    spreads = [{"sigma": Spread(device), "alpha": Spread(device)} for _ in modules]

    def count(module: GAug, _inputs: Any, coefficients: Gaussian, *, into: dict[str, Spread]) -> None:
        into["sigma"].add(torch.stack(module.deviation(coefficients)))
        into["alpha"].add(coefficients.alpha)

    handles = [
        module.register_forward_hook(lambda m, i, o, into=into: count(m, i, o, into=into))
        for module, into in zip(modules, spreads, strict=True)
    ]
    try:
        yield spreads
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def evaluate(
    backbone: nn.Module,
    *,
    data: LabelledData,
    images: Count | None = None,
    image_size: Count | None = None,
    resize_size: Count | None = None,
    beside: Text | None = None,
    batch_size: Count = 64,
    workers: Whole | None = None,
    out: Text | None = "locality",
) -> dict[str, float]:
    """-> locality_layer1, ..., patch_cls_layer1, ..., and locality, patch_cls of the last layer; sigma_layer1, alpha_layer1, ... (means).

    Layers count from 1: blocks, or Swin's stages (sigma and alpha: its attentions). images: how many of data.test (null: all, as published).
    beside: another MODEL, on the same images and in the same figure; its metrics end in `_beside`.
    out: folder for locality.json and locality.png, null for none.
    """
    device = next(backbone.parameters()).device
    models = {"model": backbone.eval()}
    if beside is not None:
        models["beside"] = load_backbone(beside).to(device)
    views: dict[str, Any] = {
        "limit": images,
        "image_size": image_size,
        "resize_size": resize_size,
        "batch_size": batch_size,
        "workers": workers,
    }
    found = {name: look(model, data, views) for name, model in models.items()}
    if out is not None and is_main():
        write(Path(out), found)
    metrics: dict[str, float] = {}
    for name, result in found.items():
        metrics |= {f"{key}{'' if name == 'model' else '_beside'}": value for key, value in metrics_of(result).items()}
    return metrics


def look(backbone: nn.Module, data: LabelledData, views: dict[str, Any]) -> dict[str, Any]:
    """One model's {"images", "locality", "patch_cls" (with a class token), "gaug"}; lists have one entry for each layer."""
    device = next(backbone.parameters()).device
    # a ViT has blocks, Swin stages
    depth = len(getattr(backbone, "blocks", getattr(backbone, "layers", ())))
    sums = torch.zeros(3, depth, dtype=torch.float64, device=device)  # locality, patch to class token, images
    has_class_token = False
    with gaug_statistics(backbone) as spreads, progress("locality", total=views["limit"], unit="images") as bar:
        for batch in pictures(backbone, data, **views):
            valid = batch.valid.to(device)
            # one forward pass gives the raw tokens of every layer
            for layer, tokens in enumerate(last_blocks(backbone, batch.images.to(device), depth)):
                has_class_token = tokens.prefix.shape[1] > 0
                sums[0, layer] += locality_score(tokens.patches, tokens.grid)[valid].sum()
                if has_class_token:
                    sums[1, layer] += patch_cls_similarity(tokens)[valid].sum()
                sums[2, layer] += valid.sum()
            bar.update(int(batch.valid.sum()))
        gaug = [{name: spread.summary() for name, spread in each.items()} for each in spreads]
    locality, similarity, count = all_reduce_sum_(sums).cpu()
    result = {"images": int(count[0]), "locality": (locality / count).tolist(), "gaug": gaug}
    if has_class_token:
        result["patch_cls"] = (similarity / count).tolist()
    return result


def metrics_of(result: dict[str, Any]) -> dict[str, float]:
    metrics: dict[str, float] = {"images": result["images"]}
    for name in ("locality", "patch_cls"):
        if name in result:
            metrics[name] = result[name][-1]
            metrics |= {f"{name}_layer{layer}": value for layer, value in enumerate(result[name], 1)}
    for name in ("sigma", "alpha"):
        metrics |= {f"{name}_layer{layer}": each[name]["mean"] for layer, each in enumerate(result["gaug"], 1)}
    return metrics


def write(folder: Path, found: dict[str, dict]) -> None:
    """locality.json (the model's numbers, the other's under "beside") and locality.png with the curves of both in the same panels."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    content = {**found["model"], **({"beside": found["beside"]} if "beside" in found else {})}
    (folder / "locality.json").write_text(json.dumps(content, indent=1) + "\n")
    panels = [("locality", "cosine with the 8 neighbours", ""), ("patch_cls", "cosine of patch and class token", "")]
    panels = [panel for panel in panels if any(panel[0] in result for result in found.values())]
    if any(result["gaug"] for result in found.values()):
        panels += [
            (name, f"GAug's {name}: mean, 25-75 %, 5-95 %", unit) for name, unit in (("sigma", "patches"), ("alpha", "logits"))
        ]
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axis, (name, title, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (label, result) in enumerate(found.items()):
            values = [each[name] for each in result["gaug"]] if unit else result.get(name, [])
            layers, colour = range(1, len(values) + 1), f"C{number}"
            if unit:
                for low, high, opacity in (("p5", "p95", 0.15), ("p25", "p75", 0.3)):
                    lower, upper = ([each[part] for each in values] for part in (low, high))
                    axis.fill_between(layers, lower, upper, alpha=opacity, color=colour, linewidth=0)
                values = [each["mean"] for each in values]
            if values:
                axis.plot(layers, values, marker="o", color=colour, label=label)
        axis.set(title=title, xlabel="attention" if unit else "layer", ylabel=unit)
        if len(found) > 1:
            axis.legend()
    figure.savefig(folder / "locality.png", dpi=120)
