"""One labelled set, judged by itself: each image by the labels of the others. What `adapt` compares its checkpoints with the start by.

    ssl-locat evaluate held_out MODEL data.test=VALIDATION

In folds, so that one small set with labels is enough and no training label is needed: neighbours and least squares where images have a
label, the patches' neighbours (Hummingbird) where they have masks. Folds and memory are drawn from the seed, so that two networks are judged
alike, image by image: `tallies` keeps what each image added, for a paired interval (ssl_locat/intervals/paired.py).
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.data.images.decode import find_label, find_mask
from ssl_locat.errors import CorruptSample, DataError
from ssl_locat.evaluation.protocols import knn
from ssl_locat.evaluation.protocols.hummingbird import paint, patch_frequencies, sample_patches
from ssl_locat.evaluation.shared.dense import dense_images, last_patches
from ssl_locat.evaluation.shared.features import DATA_KEYS, Features, check_image_size, extract, labelled_images
from ssl_locat.evaluation.shared.image_views import channels_of, normalisation
from ssl_locat.evaluation.shared.least_squares import classify
from ssl_locat.evaluation.shared.metrics import VOID
from ssl_locat.evaluation.shared.options import Count, Folds, HeldOutData, Positive, SceneData, Text, Whole
from ssl_locat.evaluation.shared.samples import Members, open_store
from ssl_locat.evaluation.shared.seg_datasets import DATA_KEYS as SCENE_KEYS
from ssl_locat.evaluation.shared.tallies import write_tallies
from ssl_locat.intervals.paired import Tally
from ssl_locat.runs.distributed import all_gather_cat, all_reduce_sum_, is_main
from ssl_locat.runs.log import progress
from ssl_locat.seeds import mix64

NEIGHBOURS, BETA = 30, 0.02  # of Hummingbird's attention, as published
FEWEST = 20  # images that a set must have: below, no interval of any use


def kinds_of(data: Mapping[str, Any]) -> tuple[str, ...]:
    """('labels', 'masks'), or one of them: what the first image of the set has beside it. DataError for neither.

    data: as of `evaluate`; a published layout, or a folder of images/ and masks/, holds masks."""
    given = {key: value for key, value in data.items() if value is not None}
    source = given[split_of(given)]
    if given.get("layout") or (isinstance(source, str) and (Path(source) / "images").is_dir()):
        return ("masks",)
    members = Members(source, open_store(given))
    if len(members) < FEWEST:
        raise DataError(f"{source} holds {len(members)} images: too few to judge by. Give at least {FEWEST}, better a thousand.")
    found, sample = [], members[0].members
    with suppress(CorruptSample):
        find_label(sample, given.get("label_key"))
        found.append("labels")
    with suppress(CorruptSample):
        find_mask(sample, given.get("mask_key"))
        found.append("masks")
    if found == ["masks"] and not given.get("mask_classes", given.get("num_classes")):
        raise DataError(f"{source} holds masks: say how many classes they have, data.num_classes=N.")
    if len(found) == 2 and not given.get("mask_classes"):
        found.remove("masks")  # labels are enough; num_classes is theirs
    if not found:
        raise DataError(
            f"{source} holds neither labels (class folders, or a .cls beside each image in shards) nor masks (.seg.png): nothing to judge by."
        )
    return tuple(found)


def split_of(data: Mapping[str, Any]) -> str:
    """'test', or 'train' where only that is given."""
    return "test" if data.get("test") else "train"


@torch.no_grad()
def evaluate(
    backbone: nn.Module,
    *,
    data: HeldOutData,
    folds: Folds = 10,
    k: Count = 20,
    temperature: Positive = 0.07,
    memory_size: Count = 20000,
    image_size: Count | None = None,
    resize_size: Count | None = None,
    batch_size: Count = 64,
    workers: Whole | None = None,
    tallies: Text | None = None,
    seed: Whole = 0,
) -> dict[str, float]:
    """-> knn and linear (top-1) where images have labels, miou where they have masks, in percent; score: their mean; test_images.

    Args:
        data: test: images with labels, or with masks and num_classes, or with both and mask_classes; test_images: how many, chosen by their keys.
        folds: each is judged by the labels of all others.
        k, temperature: of the neighbours' vote.
        memory_size: most patches that Hummingbird remembers, over all images.
        tallies: a file (.npz) for what each image added to each figure.
    """
    kinds, name = kinds_of(data), split_of(data)
    size = check_image_size(backbone, image_size)
    settings: dict[str, Any] = {"image_size": size, "batch_size": batch_size, "workers": workers}
    found: dict[str, Tally] = {}
    if "labels" in kinds:
        own: Any = {key: value for key, value in data.items() if key in DATA_KEYS}
        images = labelled_images(backbone, own, name, resize_size=resize_size, **settings)
        found |= judge_labels(extract(backbone, images), folds, k, temperature, seed, next(backbone.parameters()).device)
    if "masks" in kinds:
        own = {key: value for key, value in data.items() if key in SCENE_KEYS}
        own["num_classes"] = data.get("mask_classes") or data.get("num_classes")
        found["miou"] = judge_scenes(backbone, own, name, folds, memory_size, seed, **settings)
    if tallies is not None and is_main():
        write_tallies(tallies, found)
    scores = {column: float(tally.figures().mean()) for column, tally in found.items()}
    images_seen = next(iter(found.values())).hits.shape[1]
    return {**scores, "score": sum(scores.values()) / len(scores), "test_images": images_seen}


def fold_of(count: int, folds: int, seed: int) -> Tensor:
    """int64 [count]: the fold of each image; folds differ by one image at most."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mix64(seed, count) >> 1))
    found = torch.empty_like(order)
    found[order] = torch.arange(count) % min(folds, count)
    return found


def judge_labels(table: Features, folds: int, k: int, temperature: float, seed: int, device: torch.device) -> dict[str, Tally]:
    """knn and linear: which images [1, N, 1] are classified rightly by the others."""
    count, classes = len(table.labels), int(table.labels.max()) + 1
    fold, values = fold_of(count, folds, seed), table.values.to(device)
    guesses = {name: torch.zeros(count, dtype=torch.int64) for name in ("knn", "linear")}
    for number in range(int(fold.max()) + 1):
        inside = fold == number
        bank, queries = (Features(table.values[rows], table.labels[rows]) for rows in (~inside, inside))
        own = torch.zeros(len(queries.labels), dtype=torch.int64)
        knn.score(bank, queries, [min(k, len(bank.labels))], [temperature], classes, device, own)
        guesses["knn"][inside] = own
        there = inside.to(device)
        guesses["linear"][inside] = classify(values[~there], bank.labels.to(device), values[there], classes).cpu()
    return {name: Tally.of_hits((guess == table.labels).numpy()) for name, guess in guesses.items()}


def judge_scenes(
    backbone: nn.Module, data: SceneData, name: str, folds: int, memory_size: int, seed: int, **settings: Any
) -> Tally:
    """Pixels in the intersection and the union of each class [1, N, C]: each scene painted by the patches of scenes of other folds.

    Every process keeps the remembered patches of all scenes (memory_size x D numbers) and the masks of its own."""
    backbone.eval()
    device = next(backbone.parameters()).device
    mean, std = normalisation(backbone)
    images = dense_images(data, name, mean=mean, std=std, channels=channels_of(backbone), **settings)
    count, classes = len(images), images.num_classes
    per_image = max(1, memory_size // count)
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # of each batch: features, votes, numbers of scenes, whether readable
    scenes = []  # (number, patches [N, D], grid, mask) of this process
    with progress("scenes", total=count, unit="images") as bar:
        for batch in images:
            tokens = last_patches(backbone, batch.images.to(device))
            votes = patch_frequencies(batch.masks.to(device), tokens.grid, classes)  # [B, N, C]
            patches = F.normalize(tokens.patches.float(), dim=2)  # [B, N, D]
            draws = torch.stack([_draws(seed, int(index), patches.shape[1]) for index in batch.index]).to(device)
            chosen = sample_patches(votes, draws, per_image)[..., None]  # [B, per_image, 1]
            rows = (patches.take_along_dim(chosen, 1), votes.take_along_dim(chosen, 1))
            gathered = [all_gather_cat(part.contiguous()).cpu() for part in rows]
            places = [all_gather_cat(part.to(device)).cpu() for part in (batch.index, batch.valid)]
            kept.append((gathered[0], gathered[1], places[0], places[1]))
            for place in batch.valid.nonzero().squeeze(1).tolist():
                mask = batch.masks[place].to(torch.uint8)  # class ids and 255
                scenes.append((int(batch.index[place]), patches[place].cpu(), tokens.grid, mask))
            bar.update(len(batch.index))
    memory, votes, numbers, valid = (torch.cat(parts) for parts in zip(*kept, strict=True))
    memory, votes, numbers = memory[valid], votes[valid], numbers[valid]  # repeats and damaged pairs go
    fold = fold_of(count, folds, seed)
    hits, unions = torch.zeros(count, classes, dtype=torch.float64), torch.zeros(count, classes, dtype=torch.float64)
    for number in range(int(fold.max()) + 1):
        others = fold[numbers] != number
        bank, bank_votes = memory[others].flatten(0, 1).to(device), votes[others].flatten(0, 1)
        for index, patches, grid, mask in scenes:
            if fold[index] != number:
                continue
            painted = paint(_answers(bank, bank_votes, patches.to(device))[None], grid, mask.shape)[0].cpu()
            hits[index], unions[index] = _overlaps(painted, mask.long(), classes)
    hits, unions = (all_reduce_sum_(part.to(device)).cpu() for part in (hits, unions))
    return Tally(hits.numpy()[None], unions.numpy()[None])


def _answers(bank: Tensor, votes: Tensor, queries: Tensor) -> Tensor:
    """Soft labels [Q, C] of patches [Q, D] by the nearest of bank [M, D] and their votes [M, C], as hummingbird.retrieve on one process."""
    similarity, where = knn.nearest(bank, queries, NEIGHBOURS)  # [Q, k]
    return torch.einsum("qk,qkc->qc", (similarity / BETA).softmax(1), votes[where.cpu()].to(queries.device))


def _draws(seed: int, index: int, count: int) -> Tensor:
    """U(0, 1) draws that belong to the scene, whatever process reads it."""
    return torch.rand(count, generator=torch.Generator().manual_seed(mix64(seed, index) >> 1))


def _overlaps(painted: Tensor, truth: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(pixels of the intersection [C], of the union [C])."""
    painted, truth = painted[truth != VOID], truth[truth != VOID]
    both = torch.bincount(truth[painted == truth], minlength=classes)
    either = torch.bincount(truth, minlength=classes) + torch.bincount(painted, minlength=classes) - both
    return both.double(), either.double()
