"""The rows of a comparison: from a network, or raw pixels, to what each test image adds to each column (intervals.Tally).

Features are read once; every column is a head on them: neighbours, least squares, or the patches' neighbours where images have masks.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.evaluation.protocols import hummingbird, knn
from ssl_locat.evaluation.shared.dense import dense_images, last_patches
from ssl_locat.evaluation.shared.features import Features, check_classes, check_image_size, extract, labelled_images
from ssl_locat.evaluation.shared.image_views import channels_of, normalisation
from ssl_locat.evaluation.shared.least_squares import classify
from ssl_locat.evaluation.shared.metrics import VOID
from ssl_locat.evaluation.shared.samples import same_classes
from ssl_locat.intervals.paired import Tally
from ssl_locat.runs.distributed import all_reduce_sum_, rank
from ssl_locat.seeds import mix64

POOLED = 16  # pixels of a side that a linear classifier of raw pixels reads: 768 numbers, as many as a ViT-B's


class Column(NamedTuple):
    protocol: str
    fraction: float  # of the labels

    @property
    def name(self) -> str:
        return f"{self.protocol} {100 * self.fraction:g} %"


class FeatureSets(NamedTuple):
    """Kept features of both sets. linear: what the linear classifier reads, where that is not the same."""

    train: Features
    test: Features
    linear: tuple[Tensor, Tensor] | None = None


def read_tables(backbone: nn.Module, data: Mapping[str, Any], settings: Mapping[str, Any], precision: str | None) -> FeatureSets:
    """One forward pass over both sets."""
    settings = {**settings, "image_size": check_image_size(backbone, settings["image_size"])}
    train, test = (labelled_images(backbone, data, name, **settings) for name in ("train", "test"))
    same_classes(train.dataset, test.dataset)
    return FeatureSets(*(extract(backbone, images, precision=precision) for images in (train, test)))


def read_pixels(backbone: nn.Module, data: Mapping[str, Any], workers: int | None) -> FeatureSets:
    """32 x 32 pixels, of the channels that the backbone reads, for the neighbours, standardised per channel as in the k-NN probe; for the
    linear classifier means of 2 x 2 of them."""
    channels = len(normalisation(backbone)[0])
    pixels = knn._Pixels(channels, backbone.pretrained_cfg.get("channels"))
    settings: dict[str, Any] = {"image_size": 32, "resize_size": 32, "batch_size": 512, "workers": workers}
    tables = [
        extract(
            pixels,
            labelled_images(pixels, data, name, **settings),
            read=lambda _, images: images.flatten(1),
            precision="fp32",
            what="pixels",
        )
        for name in ("train", "test")
    ]
    colours = tables[0].values.unflatten(1, (channels, -1))  # [N, C, 32 * 32]
    mean, std = colours.mean((0, 2))[:, None], colours.std((0, 2))[:, None]
    for table in tables:  # in place: these tables are the memory that is needed
        table.values.unflatten(1, (channels, -1)).sub_(mean).div_(std)
    small = [F.adaptive_avg_pool2d(table.values.unflatten(1, (channels, 32, 32)), POOLED).flatten(1) for table in tables]
    return FeatureSets(tables[0], tables[1], (small[0], small[1]))


@torch.no_grad()
def untrained(backbone: nn.Module, seed: int) -> nn.Module:
    """A copy with fresh random weights: each layer as its kind begins, what no layer resets as ViT's positions do (std 0.02)."""
    fresh = copy.deepcopy(backbone)
    before = {name: value.clone() for name, value in fresh.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        if callable(begin := getattr(fresh, "init_weights", None)):
            begin()
        for name, value in fresh.named_parameters():
            if value.ndim > 1 and torch.equal(value, before[name]):
                nn.init.trunc_normal_(value, std=0.02)
    return fresh.eval()


def draws_of(labels: Tensor, fraction: float, draws: int, seed: int) -> Iterator[Tensor]:
    """int64 [n] rows, ascending, of each draw: as many of every class (at least one, at most what it has); all of them, once, at 1.

    Of one draw, a smaller share lies within a larger one: columns differ by how many labels there are, not by which.
    """
    if fraction == 1:
        yield torch.arange(len(labels))
        return
    classes = labels.unique().tolist()
    of_each = max(1, round(fraction * len(labels) / len(classes)))
    for draw in range(draws):
        chosen = []
        for label in classes:
            members = (labels == label).nonzero().squeeze(1)
            generator = torch.Generator().manual_seed(mix64(seed, draw, label) >> 1)
            chosen.append(members[torch.randperm(len(members), generator=generator)[:of_each]])
        yield torch.cat(chosen).sort().values


def global_tallies(
    tables: FeatureSets, columns: Sequence[Column], *, k: int, temperature: float, draws: int, seed: int, device: torch.device,
    num_classes: int | None,
) -> dict[str, Tally]:  # fmt: skip
    """Column -> hits [R, N, 1] of the test images."""
    train, test = tables.train, tables.test
    classes = check_classes(train.labels, test.labels, num_classes)
    bank, queries = (table.to(device) for table in tables.linear or (train.values, test.values))
    found = {}
    for column in columns:
        hits = []
        for rows in draws_of(train.labels, column.fraction, draws, seed):
            if column.protocol == "knn":
                guesses = torch.zeros_like(test.labels)
                some = Features(train.values[rows], train.labels[rows])
                knn.score(some, test, [min(k, len(rows))], [temperature], classes, device, guesses)
            else:
                guesses = classify(bank[rows.to(device)], train.labels[rows].to(device), queries, classes).cpu()
            hits.append((guesses == test.labels).numpy())
        found[column.name] = Tally.of_hits(np.stack(hits))
    return found


@torch.no_grad()
def dense_tallies(
    backbone: nn.Module, data: Mapping[str, Any], columns: Sequence[Column], settings: Mapping[str, Any], *, draws: int, seed: int
) -> dict[str, Tally]:
    """Column -> pixels in the intersection and the union of each class [R, N, C], of the test scenes. Hummingbird as its YAML has it: the
    memory holds a share of the training scenes."""
    device = next(backbone.parameters()).device
    mean, std = normalisation(backbone)
    size = check_image_size(backbone, settings["image_size"])
    options: dict[str, Any] = {"image_size": size, "mean": mean, "std": std, "batch_size": 16, "workers": settings["workers"]}
    options["channels"] = channels_of(backbone)
    train, test = (dense_images(data, name, **options) for name in ("train", "test"))
    classes = train.num_classes
    memory, votes = hummingbird.build_memory(
        backbone.eval(), train, classes, read=last_patches, per_image=None, void_class=None, seed=seed
    )
    # the rows of one scene lie side by side; each process has its own scenes
    per_scene = _per_scene(backbone, size, len(mean), device)
    count = len(memory) // per_scene
    chosen = [(column, rows) for column in columns for rows in _scene_draws(count, column.fraction, draws, seed)]
    hits = np.zeros((len(chosen), len(test), classes))
    unions = np.zeros_like(hits)
    for batch in test:
        tokens = last_patches(backbone, batch.images.to(device))
        queries = tokens.patches.float().flatten(0, 1)
        for number, (_, rows) in enumerate(chosen):
            some = memory.unflatten(0, (count, per_scene))[rows].flatten(0, 1)
            some_votes = votes.unflatten(0, (count, per_scene))[rows].flatten(0, 1)
            soft = hummingbird.retrieve(some, some_votes, queries, 30, 0.02)
            painted = hummingbird.paint(soft.unflatten(0, tokens.patches.shape[:2]), tokens.grid, batch.masks.shape[1:]).cpu()
            for place in batch.valid.nonzero().squeeze(1).tolist():
                at = int(batch.index[place])
                hits[number, at], unions[number, at] = _overlaps(painted[place], batch.masks[place], classes)
    hits, unions = (all_reduce_sum_(torch.from_numpy(part).to(device)).cpu().numpy() for part in (hits, unions))
    found = {}
    for column in columns:
        own = [number for number, (other, _) in enumerate(chosen) if other == column]
        found[column.name] = Tally(hits[own], unions[own])
    return found


def _per_scene(backbone: nn.Module, size: int, channels: int, device: torch.device) -> int:
    """Patches of one scene."""
    return last_patches(backbone, torch.zeros(1, channels, size, size, device=device)).patches.shape[1]


def _scene_draws(count: int, fraction: float, draws: int, seed: int) -> Iterator[Tensor]:
    """int64 [n]: scenes of this process that the memory holds. Scenes hold many classes: they are drawn at random, not by class."""
    if fraction == 1:
        yield torch.arange(count)
        return
    for draw in range(draws):
        generator = torch.Generator().manual_seed(mix64(seed, draw, rank()) >> 1)
        yield torch.randperm(count, generator=generator)[: max(1, round(fraction * count))].sort().values


def _overlaps(painted: Tensor, truth: Tensor, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixels of the intersection [C], of the union [C])."""
    valid = truth != VOID
    painted, truth = painted[valid], truth[valid]
    both = torch.bincount(truth[painted == truth], minlength=classes)
    either = torch.bincount(truth, minlength=classes) + torch.bincount(painted, minlength=classes) - both
    return both.numpy(), either.numpy()
