"""Folders and archives of images -> WebDataset shards: plain tars whose members of one sample stand side by side.

    ssl-locat shards pack FOLDER OUT [resize=256 max_shard_mb=... workers=... labels=... masks=... max_pixels=...]

Reads a folder of images or of class folders, tars, tars of tars (ImageNet as shipped), compressed tars, shards to be repacked; Parquet files and zip
archives; and all of these on a store or the Hugging Face hub, which are copied to OUT/.unpacked first.
Samples are shuffled once, so that class folders do not become shards of one class. Every shard appears only when it is whole, so an
interrupted packing started again resumes behind its last shard.
"""

import csv
import json
import logging
import multiprocessing
import os
import shutil
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from ssl_locat.config.yaml_files import read_value
from ssl_locat.data.images.bands import needs_bands
from ssl_locat.data.images.decode import IMAGE_EXTENSIONS, MAX_PIXELS, decode_image, decode_mask, find_label
from ssl_locat.data.images.eight_bits import image_orientation
from ssl_locat.data.shards.pack_sources import Listing, Place, Source, has_labels, list_source, plan_shards
from ssl_locat.data.shards.write import write_shard
from ssl_locat.errors import CorruptSample, DataError, UserError, did_you_mean
from ssl_locat.runs.log import next_steps, progress
from ssl_locat.seeds import mix64
from ssl_locat.text.shown import shown

log = logging.getLogger(__name__)

_INFO = "pack.json"
_ORIGINS = "files.tsv"
_JPEG_QUALITY = 95
_PADDING = 1024  # header and padding of a tar member, at most


def _without_torch() -> None:
    """In a process that only packs: webdataset imports torch where it finds it, 3 s and 200 MB of each worker for nothing."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("torch", None)  # what import takes for a package that is not there


def pack_command(source: str, out: str, overrides: list[str]) -> None:
    """`ssl-locat shards pack`: the overrides are the keyword arguments of `pack`."""
    known = ("max_shard_mb", "workers", "labels", "masks", "resize", "max_pixels", "seed", "split")
    options: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in known:
            raise UserError(
                f"{override!r} is not an option of shards pack.{did_you_mean(key, known)} Known: {'=, '.join(known)}="
            )
        options[key] = (
            value if key in ("labels", "masks", "split") else read_value(value)
        )  # paths stay as they are: 5, null, none
    result = pack(source, out, **options)
    log.info("packed %(samples)d samples into %(shards)d shards under %(out)s", result)
    next_steps(f"ssl-locat shards show '{result['out']}/*.tar'", f"ssl-locat init {result['out']}")


def pack(
    source: str,
    out: str | Path,
    *,
    max_shard_mb: float = 256,
    workers: int | None = None,
    labels: str = "auto",
    masks: str | None = None,
    resize: int | None = None,
    max_pixels: int = MAX_PIXELS,
    seed: int = 0,
    split: str | None = None,
) -> dict:
    """Write shards `OUT/shard-000000.tar`, ..., `OUT/pack.json` (settings, class names, counts) and `OUT/files.tsv` (key -> file).

    Args:
        source: folder of images or class folders, a tar (of images, of class folders, of tars), or a glob of tars; Parquet files or zip archives,
            of which all members are kept, and of Parquet the other columns; or a URL of any of these.
        max_shard_mb: largest shard, in 10^6 bytes.
        workers: processes; default: one per core.
        labels: "auto": class folders (or inner tars) in sorted order become member `cls`, unless samples carry labels; "none";
            or a CSV file of name,class (file name with or without extension; ids from 0, or names that are then sorted).
        masks: folder that mirrors the images' paths with .png files, which become member `seg.png`.
        resize: shorter side in pixels; larger images are reduced (and re-encoded, upright, as JPEG), masks by nearest neighbour.
        max_pixels: with `resize`, an image with more is refused before it is decoded, and left out.
        seed: of the shuffle.
        split: 'train' or 'test', of a folder or repository that holds several.

    Returns {"samples", "shards", "classes", "ignored", "skipped", "out"}. Raises DataError or UserError for what cannot be packed.
    """
    max_shard_mb = _number("max_shard_mb", max_shard_mb, 0.001)
    workers = None if workers is None else _whole("workers", workers, 1)
    resize = None if resize is None else _whole("resize", resize, 1)
    max_pixels, seed = _whole("max_pixels", max_pixels, 1), _whole("seed", seed, 0)
    out = _make_folder(out)
    unpacked = out / ".unpacked"
    listing = list_source(source, unpacked, split)
    if masks is not None:
        listing = _with_masks(listing, Path(source), Path(masks))
    classes, samples = _labelled(listing.samples, labels)
    classes = classes or (list(listing.classes) if labels == "auto" else [])
    # by a hash of the index: the same order on every machine, also when packing resumes
    samples = _shuffled(samples, seed)
    folder = source if os.path.isdir(source) else ""
    # before `resize`, so that shards are cut alike whether images shrink or not: a resumed packing must find the same cuts
    sizes = array("Q", (sum(place.size + _PADDING for place in sample.places) for sample in samples))
    plan = plan_shards(sizes, int(max_shard_mb * 1e6))
    settings = {
        **{"source": str(source), "max_shard_mb": max_shard_mb, "labels": labels, "masks": masks, "resize": resize},
        **{"max_pixels": max_pixels, "seed": seed, **({"split": split} if split else {})},
        "samples": len(samples),
        "bytes": sum(sizes),
    }
    _check_same_packing(out, settings)
    _write_info(out, {"settings": settings, "classes": classes, "complete": False})
    _write_origins(out, samples, listing.files, str(folder))
    paths = [out / f"shard-{number:06d}.tar" for number in range(len(plan))]
    jobs = []  # shards that are whole already are left alone
    for path, (start, stop) in zip(paths, plan, strict=True):
        if not path.exists():
            # a whole shard is known by its name, as nothing half written ever has it
            jobs.append((path, *_with_own_files(samples[start:stop], listing.files), resize, max_pixels))
    done = len(samples) - sum(len(job[1]) for job in jobs)
    with progress("packing", total=len(samples), unit="images", start=done) as bar:
        for count in _run(jobs, workers or os.cpu_count() or 1):
            bar.update(count)
    skipped = sum(file.read_bytes().count(b"\n") for file in out.glob("shard-*.skipped.txt"))
    if skipped:
        log.warning("%d images do not decode and were left out; they are listed in %s", skipped, out / "shard-*.skipped.txt")
    shutil.rmtree(unpacked, ignore_errors=True)
    result = {"samples": len(samples) - skipped, "shards": len(plan), "classes": classes}
    result |= {"ignored": listing.ignored, "skipped": skipped, "out": str(out)}
    _write_info(out, {"settings": settings, **result, "complete": True})
    return result


def _number(name: str, value: object, least: float, whole: bool = False) -> float:
    """The value of an option."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else least - 1
    if least <= number < 1 << 63 and (not whole or number == int(number)):
        return number
    raise UserError(f"{name} is {value!r}; expected a {'whole ' * whole}number from {least}, as in {name}={max(1, least)}")


def _whole(name: str, value: object, least: int) -> int:
    """A whole number; 1e8 is one too."""
    return int(_number(name, value, least, whole=True))


def _make_folder(out: str | Path) -> Path:
    if "://" in str(out):
        raise UserError(
            f"OUT is {shown(str(out))!r}, but shards are packed into a local folder. Pack there, then copy the folder with the store's own "
            "tool (aws s3 cp --recursive, gcloud storage cp -r, hf upload): shards are read from anywhere."
        )
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"OUT is {str(out)!r}, which is no folder and cannot be made one: {error.strerror}. Give another."
        ) from None
    return Path(out)


def _write_origins(out: Path, samples: list[Source], files: list[str], folder: str) -> None:
    """`OUT/files.tsv`: key, tab, the file (or tar) it came from, relative to the folder that was packed. Keys flatten folders and dots; this is
    the way back."""
    temporary = out / f".{_ORIGINS}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            for sample in samples:
                origin = sample.origin or files[sample.places[0].file].removeprefix(folder.rstrip("/") + "/" if folder else "")
                file.write(f"{sample.key}\t{origin}\n")
        temporary.rename(out / _ORIGINS)
    finally:
        temporary.unlink(missing_ok=True)


def _write_info(out: Path, info: dict) -> None:
    """Beside and renamed: a packing that was stopped must find it whole."""
    temporary = out / f".{_INFO}.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        temporary.rename(out / _INFO)
    finally:
        temporary.unlink(missing_ok=True)


def _run(jobs: list[tuple], workers: int) -> Iterator[int]:
    """Yields the number of samples of each shard as it gets done."""
    if workers <= 1 or len(jobs) <= 1:
        yield from (_pack_shard(*job) for job in jobs)
        return
    # spawned, not forked: decoders and cv2 hold threads and locks that do not survive a fork
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=spawn, initializer=_without_torch) as pool:
        futures = [pool.submit(_pack_shard, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _with_own_files(samples: list[Source], files: list[str]) -> tuple[list[Source], dict[int, str]]:
    """What a worker needs of the files: millions of names would otherwise travel with every shard."""
    return samples, {place.file: files[place.file] for sample in samples for place in sample.places}


def _pack_shard(path: Path, samples: list[Source], files: dict[int, str], resize: int | None, max_pixels: int) -> int:
    """Returns how many samples were read; those that `resize` could not decode are listed beside the shard."""
    skipped: list[str] = []

    def members() -> Iterator[tuple[str, dict[str, bytes]]]:
        for sample in samples:
            content = {place.extension: _read(files[place.file], place) for place in sample.places}
            try:
                content = _resized(content, resize, max_pixels) if resize else content
            except CorruptSample as error:
                skipped.append(f"{sample.key}\t{error.reason}")
                continue
            if sample.label is not None:
                content["cls"] = b"%d" % sample.label
            yield sample.key, content

    write_shard(path, members())
    if skipped:
        text = "\n".join(skipped) + "\n"
        path.with_suffix(".skipped.txt").write_bytes(text.encode("utf-8", "surrogateescape"))  # file names need not be UTF-8
    return len(samples)


def _read(file: str, place: Place) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(place.offset)
        data = stream.read(place.size)
    if len(data) != place.size:
        raise DataError(f"{file} changed while it was packed: {len(data)} bytes at {place.offset} instead of {place.size}")
    return data


def _resized(content: dict[str, bytes], size: int, max_pixels: int) -> dict[str, bytes]:
    """Images whose shorter side exceeds `size` are reduced; the rest of the sample stays, and images that 8 bits would cut."""
    names = [name for name in content if name.rpartition(".")[2] in IMAGE_EXTENSIONS and name != "seg.png"]
    for name in names:
        if needs_bands(content[name]):
            continue
        image = decode_image(content[name], max_pixels=max_pixels)
        height, width = image.shape[:2]
        scale = size / min(height, width)
        if scale >= 1:
            continue
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        # INTER_AREA averages what it drops; the others would alias
        reduced = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
        if "seg.png" in content:
            # the image is stored upright from here on, so the mask must turn with it
            turned = image_orientation(content[name])
            mask: np.ndarray = decode_mask(content["seg.png"], orientation=turned, max_pixels=max_pixels).astype(np.uint16)
            # nearest, as averaged class ids would be other classes; EXACT, as plain INTER_NEAREST is shifted by up to half a pixel
            mask = cv2.resize(mask, shape, interpolation=cv2.INTER_NEAREST_EXACT)
            mask = mask.astype(np.uint8) if mask.max() < 256 else mask
            content["seg.png"] = cv2.imencode(".png", mask)[1].tobytes()
        del content[name]
        content[name.rpartition(".")[0] + ".jpg" if "." in name else "jpg"] = simplejpeg.encode_jpeg(reduced, _JPEG_QUALITY)
    return content


def _labelled(samples: list[Source], labels: str) -> tuple[list[str], list[Source]]:
    """(class names, samples with their class id); without names or ids if there are none or the samples carry their own."""
    if labels == "none":
        return [], samples
    if labels != "auto":
        return _labelled_by_csv(samples, labels)
    if any(has_labels(sample) for sample in samples) or not all(sample.group for sample in samples):
        return [], samples
    classes = sorted({sample.group for sample in samples})
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [sample._replace(label=numbers[sample.group]) for sample in samples]


def _labelled_by_csv(samples: list[Source], path: str) -> tuple[list[str], list[Source]]:
    if not os.path.isfile(path):
        raise DataError(f"labels is {path!r}; expected 'auto', 'none', or a CSV file of name,class")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin theirs with a mark
            rows = [row for row in csv.reader(file) if len(row) >= 2]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"labels is {path!r}, which is no CSV file in UTF-8 ({error}); save it as one, with rows of name,class"
        ) from None
    named = {os.path.basename(name.strip()).rsplit(".", 1)[0].replace(".", "_"): value.strip() for name, value, *_ in rows}
    missing = [sample.name for sample in samples if sample.name not in named]
    if missing:
        raise DataError(f"{path} has no class for {len(missing)} of {len(samples)} images, such as {missing[0]!r}")
    used = sorted({named[sample.name] for sample in samples})
    if all(value.isascii() and value.isdecimal() for value in used):
        try:
            numbers = {value: find_label({"cls": value.encode()}) for value in used}
        except CorruptSample as error:
            raise DataError(f"{path}: {error.reason}") from None
        return [], [sample._replace(label=numbers[named[sample.name]]) for sample in samples]
    return used, [sample._replace(label=used.index(named[sample.name])) for sample in samples]


def _with_masks(listing: Listing, source: Path, masks: Path) -> Listing:
    """The listing with `seg.png` beside each image, from the same relative path under `masks`."""
    if not source.is_dir() or not masks.is_dir():
        raise DataError(f"masks = {masks} mirrors a folder of images; {source if masks.is_dir() else masks} is not a folder")
    files, samples = list(listing.files), []
    for sample in listing.samples:
        image = files[sample.places[0].file]
        path = masks / Path(image).relative_to(source).with_suffix(".png")
        if not path.is_file():
            raise DataError(f"{image} has no mask: {path} is not there")
        mask = Place("seg.png", len(files), 0, path.stat().st_size)
        files.append(str(path))
        samples.append(sample._replace(places=(*sample.places, mask)))
    return listing._replace(files=files, samples=samples)


def _shuffled(samples: list[Source], seed: int) -> list[Source]:
    """In an order of its own for each seed, with keys made unique: a.jpg and a.png would otherwise look like one sample."""
    seen: Counter = Counter()
    unique = []
    for sample in samples:
        seen[sample.key] += 1
        unique.append(sample if seen[sample.key] == 1 else sample._replace(key=f"{sample.key}__{seen[sample.key]}"))
    # not random.shuffle: its algorithm is not promised to stay
    order = sorted(range(len(unique)), key=lambda index: mix64(seed, index))
    return [unique[index] for index in order]


def _check_same_packing(out: Path, settings: dict) -> None:
    info = out / _INFO
    if not info.exists():
        if any(out.glob("shard-*.tar")):
            raise UserError(f"{out} holds shards of another origin; pack into an empty folder")
        return
    try:
        before = dict(json.loads(info.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{info} is damaged, so nobody can tell what the shards beside it were made of; pack into an empty folder"
        ) from None
    changed = [f"{key}: {before.get(key)!r} -> {settings[key]!r}" for key in settings if before.get(key) != settings[key]]
    if changed:
        raise UserError(f"{out} was packed with other settings or other files ({'; '.join(changed)}); pack into an empty folder")
