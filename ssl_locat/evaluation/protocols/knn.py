"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, as DINO's eval_knn.py).

ssl-locat evaluate knn MODEL data.train=... data.test=...
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.errors import ConfigError
from ssl_locat.evaluation.shared.features import (
    Features,
    Tables,
    check_classes,
    check_image_size,
    extract,
    labelled_images,
    split,
)
from ssl_locat.evaluation.shared.heads import purpose_of
from ssl_locat.evaluation.shared.metrics import top_hits
from ssl_locat.evaluation.shared.options import Count, Counts, Folds, LabelledData, Positive, Positives, Share, Text, Whole
from ssl_locat.evaluation.shared.samples import same_classes
from ssl_locat.runs.distributed import all_reduce_sum_, is_main, rank, world_size
from ssl_locat.runs.durable import write_atomically
from ssl_locat.text.shown import to_json

QUERIES, BANK = 1024, 65536  # rows compared at a time: 256 MiB of similarities
MOST_CLASSES, MOST_CONFUSIONS = 1000, 100  # in a per_class file: 60 kB


def nearest(bank: Tensor, queries: Tensor, k: int, bank_rows: int = BANK, query_rows: int = QUERIES) -> tuple[Tensor, Tensor]:
    """(similarity, index) of the k bank rows with the largest inner product, best first, each [Q, k]. bank [N, D], queries [Q, D].

    The bank passes through the queries' device once, in pieces, each against one block of queries after the other; the result does not
    depend on either size.
    """
    blocks = queries.split(query_rows)
    found = [
        (block.new_empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64, device=block.device)) for block in blocks
    ]
    for start in range(0, len(bank), bank_rows):
        piece = bank[start : start + bank_rows].to(queries.device, non_blocking=True)  # [b, D]
        found = [_better(piece, start, block, k, *best) for block, best in zip(blocks, found, strict=True)]
    return torch.cat([similarity for similarity, _ in found]), torch.cat([where for _, where in found])


def _better(piece: Tensor, start: int, queries: Tensor, k: int, best: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """The k best so far, [q, <= k], against those of one more piece [b, D], whose first row is the bank's row `start`."""
    similarity = queries @ piece.T  # [q, b]
    values, indices = similarity.topk(min(k, similarity.shape[1]), dim=1)
    # [q, 2k] -> [q, k]
    best, order = torch.cat([best, values], dim=1).topk(min(k, best.shape[1] + values.shape[1]), dim=1)
    return best, torch.cat([where, indices + start], dim=1).gather(1, order)


def class_scores(similarity: Tensor, votes: Tensor, k: Sequence[int], temperature: float, num_classes: int) -> dict[int, Tensor]:
    """k -> scores [Q, C]: exp(similarity / temperature) summed over the k nearest neighbours of each class.

    similarity [Q, K] of L2-normalised features, best first, K >= max(k); votes [Q, K]: the neighbours' class ids. Scores are relative to the
    nearest neighbour's weight, exp(-best / temperature) times the reference's, so that a small temperature does not overflow; a class with no
    neighbour has 0.
    """
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    empty = similarity.new_zeros(len(similarity), num_classes)  # [Q, C]
    return {count: empty.scatter_add(1, votes[:, :count], weights[:, :count]) for count in k}


def score(
    bank: Features,
    queries: Features,
    k: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int,
    device: torch.device | str = "cpu",
    guesses: Tensor | None = None,
) -> dict[str, float]:
    """top1_k20, top5_k20, ... in percent (top1_k20_t0.1 where several temperatures are asked for); each process takes its share of the queries.

    guesses: int64 [Q], which is filled with the class that the first k at the first temperature finds for each query."""
    too_many = [count for count in k if count > len(bank.labels)]
    if too_many:
        raise ConfigError(
            f"k = {too_many[0]} is more than the {len(bank.labels)} images of the bank (data.train). Give a smaller k."
        )
    own = queries.values[rank() :: world_size()].to(device)
    similarity, where = nearest(F.normalize(bank.values, dim=1), F.normalize(own, dim=1), max(k))
    votes = bank.labels.to(device)[where]  # [Q, K]
    labels = queries.labels[rank() :: world_size()].to(device)
    hits: dict[str, Tensor] = {}
    chosen = []  # [q] each, of this process's queries
    for temperature in temperatures:
        suffix = f"_t{temperature:g}" if len(temperatures) > 1 else ""
        # in blocks: the scores of all queries for 1000 classes would be larger than the bank
        for block in zip(similarity.split(QUERIES), votes.split(QUERIES), labels.split(QUERIES), strict=True):
            for count, scores in class_scores(*block[:2], k, temperature, num_classes).items():
                if (count, temperature) == (k[0], temperatures[0]):
                    chosen.append(scores.argmax(1))
                for top in (1, 5):
                    name = f"top{top}_k{count}{suffix}"
                    # stays on the device: an .item() for each would wait for it
                    hits[name] = hits.get(name, 0) + top_hits(scores, block[2], top).sum()
    names = [
        f"top{top}_k{count}" + (f"_t{t:g}" if len(temperatures) > 1 else "")
        for t in temperatures
        for count in k
        for top in (1, 5)
    ]
    # every process has every name, a process without queries too: the sum needs equal shapes
    local = torch.stack([torch.as_tensor(hits.get(name, 0), device=device) for name in names])
    total = all_reduce_sum_(local)
    if guesses is not None:
        everyone = torch.zeros_like(guesses, device=device)
        everyone[rank() :: world_size()] = torch.cat(chosen)
        guesses.copy_(all_reduce_sum_(everyone))
    return {name: 100 * count.item() / len(queries.labels) for name, count in zip(names, total, strict=True)}


def evaluate(
    backbone: nn.Module,
    *,
    data: LabelledData,
    # k and temperature as DINO's eval_knn.py has them
    k: Count | Counts = (10, 20, 100, 200),
    temperature: Positive | Positives = 0.07,
    image_size: Count | None = None,
    resize_size: Count | None = None,
    train_fraction: Share = 1.0,
    folds: Folds | None = None,
    precision: Literal["bf16", "fp32"] | None = None,
    batch_size: Count = 256,
    workers: Whole | None = None,
    seed: Whole = 0,
    per_class: Text | None = None,
    resume_file: Text | None = None,
) -> dict[str, float]:
    """top1_kK and top5_kK in percent for each k: the test images classified by their neighbours among the training images.

    Args:
        data: train, test (labelled; DATA specs), optionally train_images and test_images (how many of them, chosen by their keys),
            num_classes, image_key, label_key, max_bad, cache. With `folds`, only train.
        k: neighbours that vote. temperature: of the vote's weights exp(cosine / T); with several, names end in _tT.
        image_size: pixels; None: the backbone's own. resize_size: shorter side before the centre crop; None: DINO's 256 / 224.
        train_fraction: share of each class that keeps its labels (0.01, 0.1: few-shot); the rest is not read.
        folds: cross-validation within data.train instead of a test set; the mean over folds.
        precision: of the features: bf16, or fp32 (TF32 on a GPU); None: bf16 on a GPU, fp32 on a CPU.
        workers: loader processes of each rank; None: chosen from the cores.
        per_class: a file (.json) for the top-1 of each class and the confusions, by the first k and temperature; not with folds.
        resume_file: asked to stop, features are kept there, and the same command resumes from it.
    """
    kept = Tables(resume_file, purpose_of("knn", locals()) if resume_file else None)
    ks, temperatures = _listed(k), _listed(temperature)
    image_size = check_image_size(backbone, image_size)
    device = next(backbone.parameters()).device

    settings: dict[str, Any] = {
        "image_size": image_size,
        "resize_size": resize_size,
        "batch_size": batch_size,
        "workers": workers,
    }
    if folds and per_class:
        raise ConfigError("per_class tells of one split into training and test images; leave it or folds out.")
    if folds:
        train = labelled_images(backbone, data, "train", **settings)
        return _cross_validate(extract(backbone, train, precision=precision, kept=kept), folds, ks, temperatures, seed, device)
    split(data, "test")
    train = labelled_images(backbone, data, "train", **settings, train_fraction=train_fraction, seed=seed)
    test = labelled_images(backbone, data, "test", **settings)
    same_classes(train.dataset, test.dataset)
    sets = {"training features": train, "test features": test}
    bank, queries = (extract(backbone, images, precision=precision, what=what, kept=kept) for what, images in sets.items())
    num_classes = check_classes(bank.labels, queries.labels, data.get("num_classes"))
    guesses = torch.zeros_like(queries.labels) if per_class else None
    scores = score(bank, queries, ks, temperatures, num_classes, device, guesses)
    if per_class and guesses is not None and is_main():
        found = by_class(queries.labels, guesses, getattr(test.dataset, "classes", []))
        Path(per_class).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(per_class), to_json({"k": ks[0], **found}))
    return scores | _counts(bank, queries)


def by_class(labels: Tensor, guesses: Tensor, names: Sequence[str] = ()) -> dict[str, list[dict]]:
    """labels, guesses [Q] -> {"classes": [{class, images, top1 in percent}], "confusions": [{class, taken_for, images}]}, the commonest first.

    Bounded for any number of classes and images: of classes those with most images. names: of classes; else their numbers are."""

    def name(label: int) -> str:
        return names[label] if label < len(names) else str(label)

    truth, counts = labels.unique(return_counts=True)
    hits = labels[labels == guesses].bincount(minlength=int(labels.max()) + 1)[truth]
    order = counts.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values
    rows = zip(truth[order].tolist(), counts[order].tolist(), hits[order].tolist(), strict=True)
    classes = [{"class": name(label), "images": count, "top1": round(100 * hit / count, 2)} for label, count, hit in rows]
    wrong = labels != guesses
    pairs, times = torch.stack([labels[wrong], guesses[wrong]]).unique(dim=1, return_counts=True)
    worst = times.argsort(descending=True, stable=True)[:MOST_CONFUSIONS]
    confused = zip(pairs[:, worst].T.tolist(), times[worst].tolist(), strict=True)
    confusions = [{"class": name(true), "taken_for": name(guess), "images": count} for (true, guess), count in confused]
    return {"classes": classes, "confusions": confusions}


def raw_pixel_knn(
    *,
    data: dict,
    k: int | Sequence[int] = 20,
    channels: int = 3,
    bands: dict | None = None,
    workers: int | None = None,
    most_images: int | None = None,
) -> dict[str, float]:
    """The same vote on pixels: images resized to 32 x 32, standardised per channel, flattened. What learned features must beat.

    bands: a config's data.channels. most_images: of each set, chosen by their keys. 10,000 and 10,000 take 0.25 GB as they are read and 0.4 GB at most.
    """
    pixels = _Pixels(channels, bands)
    data = data | {f"{name}_images": _least(data.get(f"{name}_images"), most_images) for name in ("train", "test")}
    settings: dict[str, Any] = {"image_size": 32, "resize_size": 32, "batch_size": 512, "workers": workers}
    bank, queries = (
        extract(
            pixels,
            labelled_images(pixels, data, name, **settings),
            read=lambda _, images: images.flatten(1),
            precision="fp32",
            what="pixels",
        )
        for name in ("train", "test")
    )
    colours = bank.values.unflatten(1, (channels, -1))  # [N, C, 32 * 32]
    mean, std = colours.mean((0, 2))[:, None], colours.std((0, 2))[:, None]
    for table in (bank, queries):  # in place: these tables are the memory that is needed
        table.values.unflatten(1, (channels, -1)).sub_(mean).div_(std)
    num_classes = check_classes(bank.labels, queries.labels, data.get("num_classes"))
    return score(bank, queries, _listed(k), [0.07], num_classes) | _counts(bank, queries)


def _counts(bank: Features, queries: Features) -> dict[str, int]:
    """What a score was measured on: it is stated beside the number."""
    return {"train_images": len(bank.labels), "test_images": len(queries.labels)}


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


class _Pixels(nn.Module):
    """Stands where a backbone would: pixels in 0..1, on the CPU."""

    def __init__(self, channels: int, bands: dict | None = None):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.0,) * channels, "std": (1.0,) * channels, "channels": bands}
        self.device_of = nn.Parameter(torch.zeros(()), requires_grad=False)


def _listed(value: float | Sequence) -> list:
    return list(value) if isinstance(value, Sequence) else [value]


def _cross_validate(
    table: Features, folds: int, ks: list[int], temperatures: list[float], seed: int, device: torch.device
) -> dict[str, float]:
    """Mean over folds; each fold is classified by the others."""
    order = torch.randperm(len(table.labels), generator=torch.Generator().manual_seed(seed))
    fold_of = torch.empty_like(order)
    # folds differ by one image at most
    fold_of[order] = torch.arange(len(order)) % folds
    num_classes = int(table.labels.max()) + 1
    results = []
    for fold in range(folds):
        inside = fold_of == fold
        bank, queries = (Features(table.values[rows], table.labels[rows]) for rows in (~inside, inside))
        results.append(score(bank, queries, ks, temperatures, num_classes, device))
    return {name: sum(result[name] for result in results) / folds for name in results[0]}
