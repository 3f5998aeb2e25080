"""Frozen features of labelled images: the part that every protocol on global features shares.

`extract` runs a backbone over a finite set once, on all processes together, and gives every process the same table in the data's order.
What is read is what the head saw in pretraining: final norm, PRR where attached, then the class token (models/tokens.py).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_locat.data.shards.selections import Chosen, Joined
from ssl_locat.errors import ConfigError, DataError, UserError, did_you_mean
from ssl_locat.evaluation.shared.heads import open_progress
from ssl_locat.evaluation.shared.image_views import centre_view, channels_of, normalisation
from ssl_locat.evaluation.shared.options import LabelledData
from ssl_locat.evaluation.shared.samples import NO_LABEL, LabelledImage, Pass, check_damage, open_split, read_labels, set_name
from ssl_locat.evaluation.shared.stopping import asked_to_stop, stopped
from ssl_locat.evaluation.shared.training_data import MAX_BAD
from ssl_locat.models.tokens import features as class_features
from ssl_locat.runs.distributed import all_gather_cat, barrier, is_main
from ssl_locat.runs.log import progress
from ssl_locat.seeds import mix64

DATA_KEYS = tuple(get_type_hints(LabelledData))


class Features(NamedTuple):
    values: Tensor  # [N, D] float32, on the CPU
    labels: Tensor  # [N] int64


class Tables:
    """What an interrupted command has extracted: a table for each set, kept in one file when it is asked to stop, and only then.

    Rows that are missing have no label; they, and damaged images, are read when the same command resumes, at any number of processes.
    purpose: of heads.purpose_of. Raises CheckpointError for a file of other settings, data or weights.
    """

    def __init__(self, path: str | Path | None = None, purpose: dict[str, Any] | None = None):
        self.path, self.purpose = path, purpose or {}
        self.tables: dict[str, Features] = {}
        if path is not None and Path(path).exists():
            _, tensors = open_progress(path, self.purpose)
            names = {name.partition(".")[0] for name in tensors}
            self.tables = {name: Features(tensors[f"{name}.values"], tensors[f"{name}.labels"]) for name in names}

    def save(self) -> None:
        """Rank 0 writes, beside and renamed; float32 as in memory: 2 GB for ImageNet's training set at width 384."""
        if self.path is not None and is_main():
            tensors = {f"{name}.{part}": value for name, rows in self.tables.items() for part, value in rows._asdict().items()}
            path = Path(self.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            save_file(tensors, part, metadata={"step": "0", "purpose": json.dumps(self.purpose)})
            part.replace(path)
        # nobody leaves, and takes the job with it, before the file is whole
        barrier()


def split(data: Mapping[str, Any], name: str, known: tuple[str, ...] = DATA_KEYS) -> str | list:
    """The DATA spec of `data.train` or `data.test`, after a check of the section's keys."""
    for key in data:
        if key not in known:
            raise ConfigError(f"unknown key 'data.{key}'.{did_you_mean(key, known)} Known here: {', '.join(known)}.")
    if not data.get(name):
        raise ConfigError(
            f"data.{name} is missing: labelled images, as shards, a folder of class folders or a list of {{shards, weight}}."
        )
    return data[name]


def patch_size(backbone: nn.Module) -> tuple[int, int]:
    """(height, width) in pixels of what one patch of the *first* layer covers."""
    size = backbone.patch_embed.patch_size
    return (size, size) if isinstance(size, int) else tuple(size)


def stride(backbone: nn.Module) -> int:
    """Pixels from one of the last block's tokens to the next: a ViT's patch size, 32 for Swin."""
    try:
        # not patch_embed's: Swin merges patches between stages
        return int(backbone.feature_info[-1]["reduction"])
    except (AttributeError, IndexError, KeyError, TypeError):
        raise UserError(
            f"{type(backbone).__name__} does not say how its tokens lie in the image (timm's feature_info); choose a timm model that has patch tokens."
        ) from None


def model_image_size(backbone: nn.Module) -> int:
    """The size, in pixels, that the backbone was built for."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or backbone.pretrained_cfg["input_size"][1:]
    return int(size[-1])


def check_image_size(backbone: nn.Module, image_size: int | None) -> int:
    """`image_size`, or the backbone's own where None. Raises UserError unless it is a whole number of tokens."""
    image_size = image_size or model_image_size(backbone)
    patch = stride(backbone)
    if image_size % patch:
        below = image_size // patch * patch
        nearest = " or ".join(str(size) for size in (below, below + patch) if size)
        raise UserError(f"image_size {image_size} is not a multiple of the backbone's patch size {patch}. Nearest: {nearest}.")
    return image_size


def check_depth(backbone: nn.Module, name: str, value: int) -> None:
    """Raises ConfigError if the option `name` reaches farther back than the backbone has blocks (stages, for Swin)."""
    depth = len(backbone.feature_info)
    if abs(value) > depth:
        raise ConfigError(f"{name} is {value}, but {type(backbone).__name__} has {depth} blocks or stages to read from.")


def default_resize(image_size: int) -> int:
    """Shorter side before the centre crop: DINO's 256 for 224, in proportion; images of under 96 px are shown whole."""
    return image_size if image_size < 96 else round(image_size * 256 / 224)


def labelled_images(
    backbone: nn.Module,
    data: Mapping[str, Any],
    name: str,
    *,
    image_size: int,
    resize_size: int | None,
    batch_size: int,
    workers: int | None,
    train_fraction: float = 1.0,
    seed: int = 0,
    label: Callable[[dict[str, bytes]], int] | None = None,
    metadata: bool = False,
) -> Pass:
    """data.train or data.test (`name`), resized and centre-cropped, normalised as the backbone was trained; this process reads its share.

    train_fraction: of each class's images that are read. label: of a sample's members, in place of their class. metadata: the other columns of
    Parquet are among these, too.
    """
    split(data, name)
    mean, std = normalisation(backbone)
    view = partial(centre_view, size=image_size, resize=resize_size or default_resize(image_size), mean=mean, std=std)
    dataset = open_split(data, name, metadata)
    positions = None
    if train_fraction < 1:
        positions = label_subset(read_labels(dataset, data, workers), train_fraction, seed)
    prepare = LabelledImage(view, data, channels_of(backbone), label=label)
    return Pass(dataset, prepare, positions, batch_size=batch_size, workers=workers, max_bad=data.get("max_bad") or 0.0)


@contextmanager
def reading(device: torch.device, precision: str | None) -> Iterator[None]:
    """Around a frozen backbone's forward pass: no gradients; on a GPU bf16, or TF32 where fp32 is asked for; on a CPU fp32 unless bf16 is.

    precision: bf16, fp32, or None for bf16 on a GPU.
    """
    before = torch.get_float32_matmul_precision()
    half = precision == "bf16" or (precision is None and device.type == "cuda")
    try:
        # "high" is TF32, and a setting of the process: put back below, as training continues after a probe
        torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def extract(
    backbone: nn.Module,
    images: Pass,
    read: Callable[[nn.Module, Tensor], Tensor] = class_features,
    precision: str | None = None,
    what: str = "features",
    kept: Tables | None = None,
) -> Features:
    """All features of a labelled set, in its order, the same on every process.

    `read(backbone, images [B, 3, H, W]) -> [B, D]`. The backbone is put into eval mode. Rows of damaged images are left out where
    data.max_bad allows it. precision: of `reading`. `what` it is called on the progress bar, and in `kept`, where a command that is asked
    to stop saves what it has, and from where it resumes.
    """
    backbone.eval()
    device = next(backbone.parameters()).device
    kept = kept or Tables()
    total = len(images)
    values, labels = kept.tables.get(what, (None, torch.full((total,), NO_LABEL)))
    missing = (labels == NO_LABEL).nonzero().squeeze(1)
    if values is not None:
        images = images.only(missing)
    with progress(f"{what} of {set_name(images.dataset)}", total=total, unit="images", start=total - len(missing)) as bar:
        for batch in images if len(missing) else ():
            with reading(device, precision):
                rows = read(backbone, batch.images.to(device, non_blocking=True)).float()
            # gathered batch by batch: one process never holds more than the table and a batch
            index = missing[all_gather_cat(batch.index.to(device)).cpu()]
            valid = all_gather_cat(batch.valid.to(device)).cpu()
            rows, truth = all_gather_cat(rows).cpu(), all_gather_cat(batch.labels.to(device)).cpu()
            if values is None:
                values = torch.zeros(total, rows.shape[1])
            values[index[valid]], labels[index[valid]] = rows[valid], truth[valid]
            bar.update(int(valid.sum()))
            if asked_to_stop():
                kept.tables[what] = Features(values, labels)
                kept.save()
                raise stopped(what)
    seen = labels != NO_LABEL
    if values is None or not seen.any():
        raise DataError(f"none of the {total} images can be used. The first: {images.first_damage}")
    check_damage(int((~seen).sum()), total, images.max_bad, images.first_damage)
    if kept.path is not None:
        kept.tables[what] = Features(values, labels)
    return Features(values, labels) if seen.all() else Features(values[seen], labels[seen])


def near(table: Tensor, device: torch.device) -> Tensor:
    """A table that is read again and again, where it is computed with: moved once, if it takes no more than half of what is free there.

    Else as it is, on the CPU, from where each reading moves its part."""
    if device.type != "cuda" or table.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return table
    return table.to(device)


def check_classes(train_labels: Tensor, test_labels: Tensor, num_classes: int | None = None) -> int:
    """Number of classes. Raises DataError when the test set has a class that training does not, or an id is out of range."""
    highest = int(max(train_labels.max(), test_labels.max())) + 1
    if num_classes is not None and highest > num_classes:
        raise DataError(f"a label is {highest - 1}, but data.num_classes is {num_classes}: labels must be 0..{num_classes - 1}.")
    unknown = sorted(set(test_labels.tolist()) - set(train_labels.tolist()) - {NO_LABEL})
    if unknown:
        shown = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        raise DataError(
            f"{len(unknown)} classes of data.test are not in data.train: {shown}. Both must number their classes alike "
            "(class folders are numbered in sorted order: do both splits have all of them?)."
        )
    return num_classes or highest


def labelled_for_training(
    train: Joined | Chosen, test: Joined | Chosen, data: Mapping[str, Any], train_fraction: float, seed: int, workers: int | None
) -> tuple[Joined | Chosen, int]:
    """(the part of `train` to train on, number of classes).

    Where the whole set is used and data.num_classes is given, no label need be known beforehand, and none is read: a pass over a large
    set costs as much as an epoch's reading. Raises DataError for classes of `test` that `train` lacks.
    """
    # labels beyond num_classes are refused one by one, while training reads them (LabelledImage)
    if data.get("num_classes") and train_fraction == 1:
        return train, data["num_classes"]
    labels = read_labels(train, {**data, "max_bad": MAX_BAD if data.get("max_bad") is None else data["max_bad"]}, workers)
    num_classes = check_classes(labels, read_labels(test, data, workers), data.get("num_classes"))
    if train_fraction == 1:
        return train, num_classes
    return Chosen(train, label_subset(labels, train_fraction, seed).numpy()), num_classes


def label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """int64 indices, ascending, of `fraction` of each class (at least one image each): the 1 % and 10 % of few-shot protocols."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"train_fraction is {fraction}; expected a share of the labels in (0, 1], such as 0.01.")
    chosen = []
    for label in labels[labels != NO_LABEL].unique().tolist():
        members = (labels == label).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(mix64(seed, label) >> 1)
        # a generator for each class: which images it keeps does not depend on the other classes
        chosen.append(members[torch.randperm(len(members), generator=generator)[: max(1, round(fraction * len(members)))]])
    return torch.cat(chosen).sort().values
