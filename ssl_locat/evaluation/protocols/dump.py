"""Class and patch tokens of a set of images, written as files: `ssl-locat features MODEL DATA OUT`.

OUT holds features-RANK-NUMBER files, each of `rows` images in the data's order, and features.json that says what is in them. Labels
are written where samples have them. Each process writes the files of its own share.
"""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ssl_locat.data.images.bands import Bands, how_many
from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.stream.ordered import read_in_order
from ssl_locat.data.stream.workers import choose_workers
from ssl_locat.errors import ConfigError, CorruptSample, DataError, UserError, did_you_mean
from ssl_locat.evaluation.shared.features import check_image_size, default_resize
from ssl_locat.evaluation.shared.image_views import centre_view, channels_of, normalisation
from ssl_locat.evaluation.shared.options import Count, Flag, Probability, Shards, Text, Whole
from ssl_locat.evaluation.shared.samples import NO_LABEL, StackReadable, open_spec, share
from ssl_locat.models.grid import Grid
from ssl_locat.models.tokens import class_token, forward_tokens, refine
from ssl_locat.runs.distributed import all_reduce_sum_, barrier, is_main, rank, world_size
from ssl_locat.runs.folder import save_tensors
from ssl_locat.runs.log import progress
from ssl_locat.text.shown import to_json

log = logging.getLogger(__name__)

FORMATS = ("safetensors", "npy", "parquet")


class _Image:
    """(tensor, key, label or -1) of a sample."""

    def __init__(
        self, view: Callable[[np.ndarray, int], Tensor], image_key: str | None, label_key: str | None, channels: Bands | int
    ):
        self.view, self.image_key, self.label_key, self.channels = view, image_key, label_key, channels

    def __call__(self, raw: RawSample, index: int) -> tuple[Tensor, str, int]:
        image = self.view(decode_image(find_image(raw.members, self.image_key), channels=self.channels), 0)
        try:
            label = find_label(raw.members, self.label_key)
        except CorruptSample:
            label = NO_LABEL
        return image, raw.key, label

    def blank(self) -> tuple[Tensor, str, int]:
        return self.view(np.zeros((64, 64, how_many(self.channels)), np.uint8), 0), "", NO_LABEL


def check_out(out: str) -> Path:
    """The folder to write into. UserError if it cannot be one, or holds features already."""
    folder = Path(out)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"OUT is {out}, but {existing} is a file. Give a new or an empty folder.")
    if any(folder.glob("features*")):
        raise UserError(f"{folder} already holds features. Give an empty folder, or delete them.")
    return folder


@torch.no_grad()
def dump(
    backbone: nn.Module,
    *,
    data: Shards,
    out: Text,
    format: Literal["safetensors", "npy", "parquet"] = "safetensors",
    patches: Flag = True,
    norm: Flag = True,
    rows: Count = 10_000,
    image_size: Count | None = None,
    resize_size: Count | None = None,
    image_key: Text | None = None,
    label_key: Text | None = None,
    batch_size: Count = 64,
    workers: Whole | None = None,
    max_bad: Probability = 0.0,
) -> None:
    """Write `class` [n, C], `patches` [n, N, D] (float16), `key` and `label` of every image of a DATA spec into the folder `out`.

    Args:
        format: safetensors and npy keep arrays, with keys and labels in a .json beside; parquet (extra `parquet`) has a row for each image.
        patches: patch tokens too. norm: tokens after final norm and PRR; false: the last block's raw patches.
        rows: images in one file.
        max_bad: share of corrupt images that may be left out; names and reasons go to left_out-RANK.txt. DataError above it.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; known: {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    folder = check_out(out)
    size = check_image_size(backbone, image_size)
    mean, std = normalisation(backbone)
    view = partial(centre_view, size=size, resize=resize_size or default_resize(size), mean=mean, std=std)
    dataset = open_spec(data)
    barrier()  # every process has looked before one writes
    folder.mkdir(parents=True, exist_ok=True)
    device = next(backbone.eval().parameters()).device
    # repeats, which make shares equally long, are dropped here: nothing is gathered, so that processes need not keep step
    indices, valid = share(len(dataset), rank(), world_size())
    indices, prepare = indices[valid], _Image(view, image_key, label_key, channels_of(backbone))
    table: dict[str, list] = {"class": [], "patches": [], "key": [], "label": []}
    left_out: list[str] = []
    number, width, grid = 0, 0, Grid(0, 0)

    def flush() -> None:
        nonlocal number
        if table["key"]:
            arrays = {"class": torch.cat(table["class"])} | ({"patches": torch.cat(table["patches"])} if patches else {})
            write_part(folder / f"features-{rank():03d}-{number:05d}", arrays, table["key"], table["label"], format)
            number += 1
            for column in table.values():
                column.clear()

    options: dict[str, Any] = {"batch_size": batch_size, "workers": choose_workers(workers)}
    with progress("features", total=len(dataset), unit="images") as bar:
        for (images, names, labels), damaged in read_in_order(dataset, indices, prepare, StackReadable(prepare), **options):
            if damaged and not max_bad:
                raise DataError(f"{damaged[0]} To leave out up to one image in a hundred: max_bad=0.01.")
            left_out += map(str, damaged)
            if len(left_out) > max_bad * len(dataset):
                raise DataError(
                    f"{len(left_out)} of {len(dataset)} images cannot be read, more than max_bad = {max_bad:g} allows. The first: {left_out[0]} "
                    f"Replace or remove them, or allow more. What was written to {folder} is of no use."
                )
            bar.update(len(names) * world_size())
            # only the stand-in of a damaged image has no key
            if not all(names):
                kept = [place for place, name in enumerate(names) if name]
                images, names, labels = images[kept], [names[place] for place in kept], labels[kept]
            if not names:
                continue
            raw = forward_tokens(backbone, images.to(device))
            refined = refine(backbone, raw)
            table["class"].append(class_token(backbone, refined).float().cpu())
            # half precision: 196 patches of 384 numbers are 0.15 MB an image so, and 0.3 MB in full
            table["patches"].append((refined if norm else raw).patches.half().cpu() if patches else torch.empty(0))
            table["key"] += names
            table["label"] += labels.tolist()
            width, grid = raw.patches.shape[2], raw.grid
            if len(table["key"]) >= rows:
                flush()
    flush()
    if left_out:
        names_file = folder / f"left_out-{rank():03d}.txt"
        names_file.write_text("".join(f"{line}\n" for line in left_out), encoding="utf-8")
        log.warning("%d images could not be read and are left out; why: %s", len(left_out), names_file)
    total = int(all_reduce_sum_(torch.tensor(len(left_out), device=device)))
    if is_main():
        about = {
            "images": len(dataset) - total,
            "left_out": total,
            "image_size": size,
            "grid": grid,
            "width": width,
            "patches": patches,
            "norm": norm,
            "format": format,
        }
        (folder / "features.json").write_text(to_json(about, indent=1) + "\n", encoding="utf-8")
    barrier()


def write_part(stem: Path, arrays: dict[str, Tensor], keys: list[str], labels: list[int], format: str) -> None:
    """One file of each kind that the format has, in the order of the images."""
    if format == "parquet":
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise UserError("format parquet needs pyarrow: pip install 'ssl_locat[parquet]'.") from None
        # a row is an image: [n, N, D] becomes n lists of N * D numbers
        columns = {"key": keys, "label": labels} | {name: list(array.flatten(1).numpy()) for name, array in arrays.items()}
        pq.write_table(pa.table(columns), f"{stem}.parquet")
        return
    if format == "npy":
        for name, array in arrays.items():
            np.save(f"{stem}.{name}.npy", array.numpy())
    else:
        save_tensors(arrays, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps({"key": keys, "label": labels}) + "\n", encoding="utf-8")
