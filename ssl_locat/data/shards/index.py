"""Datasets: samples by number, out of tar shards, Parquet files, zip archives or plain folders of images.

dataset = open_dataset("data/train-{000..099}.tar")      # or "s3://bucket/train-*.tar", a list of them, or a folder
dataset.read(0, 32)                                      # 32 x RawSample, or Damage where a sample cannot be used
"""

import bz2
import gzip
import io
import logging
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ssl_locat.data.images.decode import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from ssl_locat.data.images.names import has_extension, warn_of_unread
from ssl_locat.data.shards.filters import Filters
from ssl_locat.data.shards.folder import FolderDataset
from ssl_locat.data.shards.lists import check_counts, choose_split, has_splits, is_shard_list, read_shard_list
from ssl_locat.data.shards.parquet import ENDING as PARQUET
from ssl_locat.data.shards.parquet import ParquetDataset, open_parquet
from ssl_locat.data.shards.raster import Options, RasterDataset, open_rasters, options_of
from ssl_locat.data.shards.shard_index import open_shards, scan_shard, write_sidecars
from ssl_locat.data.shards.shard_set import ShardDataset
from ssl_locat.data.shards.tar import COMPRESSED, Damage, RawSample, parse
from ssl_locat.data.shards.zips import ENDING as ZIP
from ssl_locat.data.shards.zips import ZipDataset, open_zips
from ssl_locat.data.stores.objects import Gone, Stat, join, normalise, scheme_of
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import ConfigError, CorruptSample, DataError, Outage
from ssl_locat.text.shown import redact, shown

log = logging.getLogger(__name__)

_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    **{".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open},
    **{".tbz2": bz2.open, ".xz": lzma.open, ".txz": lzma.open},
}

AnySet = ShardDataset | FolderDataset | ParquetDataset | ZipDataset | RasterDataset
RASTERS = ("tif", "tiff", "svs", "ndpi", "scn", "btf", "gtiff")


def open_dataset(
    spec: str | list[str],
    *,
    store: Store | None = None,
    cache_dir: Path | None = None,
    split: str | None = None,
    in_groups: bool = False,
    metadata: bool = False,
) -> AnySet:
    """Open shards (paths, URLs, braces, globs; or a list of these; tars, Parquet or zip), a wids list of shards, or a folder of shards or images.

    split: 'train' or 'test': which one of a folder that holds several (lists.py).
    in_groups: rows of Parquet in the order that training reads them with the fewest bytes, not in that of the files (parquet.py).
    metadata: the other columns of Parquet, too.
    Raises DataError for what is missing, empty, compressed, or of an unknown scheme; Outage if a store does not answer.
    """
    store = store or Store()
    if isinstance(spec, str) and is_shard_list(spec):
        promised = {url: count for part in read_shard_list(store, spec) for url, count in part.counts.items()}
        return _open_listed(spec, promised, store, cache_dir)
    name = (
        redact(spec)
        if isinstance(spec, str)
        else f"{redact(spec[0])} and {len(spec) - 1} more"
        if len(spec) > 1
        else redact(spec[0])
    )
    if isinstance(spec, str) and (folder := _as_folder(spec)):
        shards, images = _list_folder(store, folder, split)
        if not shards:
            return FolderDataset(name, store, folder, images)
        found: dict[str, Stat | None] = shards
    else:
        found = store.expand(spec)
    return _open_found(name, found, store, cache_dir, in_groups, metadata)


def _open_found(
    name: str,
    found: dict[str, Stat | None],
    store: Store,
    cache_dir: Path | None,
    in_groups: bool = False,
    metadata: bool = False,
) -> ShardDataset | ParquetDataset | ZipDataset:
    if packed := next((url for url in found if is_compressed(url)), None):
        raise DataError(
            f"{shown(packed)} is compressed: samples inside cannot be reached by offset, as training does. Repack it once: "
            f"ssl-locat shards pack {shown(packed)} OUT_FOLDER (or unpack it to a plain .tar). Evaluation reads it as it is."
        )
    kinds = {kind_of(url) for url in found}
    if len(kinds) > 1:
        raise DataError(
            f"{name}: {' and '.join(sorted(kinds))} in one pattern. Name them apart, as a list of {{shards, weight}}."
        )
    if kinds == {"Parquet"}:
        return open_parquet(name, store, found, in_groups, metadata)
    if kinds == {"zip"}:
        return open_zips(name, store, found)
    dataset = ShardDataset(name, store, open_shards(store, found, cache_dir))
    if not len(dataset):
        raise DataError(f"{name} holds no samples: {len(found)} shard(s), all empty. Members must be named KEY.EXTENSION.")
    return dataset


def kind_of(url: str) -> str:
    """What a file of samples is, by its name: "Parquet", "zip", or "tar", whatever else it is called."""
    ending = redact(url).lower()
    return "Parquet" if ending.endswith(PARQUET) else "zip" if ending.endswith(ZIP) else "tar"


def is_collection(name: str) -> bool:
    """Whether a name is that of a file that holds samples."""
    base = redact(name).rpartition("/")[2]
    return ".tar" in base or kind_of(base) != "tar"


def _open_listed(spec: str, promised: dict[str, int], store: Store, cache_dir: Path | None = None) -> ShardDataset:
    """Shards of a wids list, in its order."""
    dataset = _open_found(redact(spec), dict.fromkeys(promised), store, cache_dir)
    if not isinstance(dataset, ShardDataset):
        raise DataError(f"{dataset.name} lists other files than tars; a wids list is one of tars. Name them by a pattern.")
    check_counts(dataset.name, promised, ((shard.url, shard.count, shard.damaged) for shard in dataset.shards))
    return dataset


def open_mix(
    spec: Any, *, store: Store | None = None, split: str | None = None, in_groups: bool = False, metadata: bool = False
) -> tuple[list[AnySet], list[float]]:
    """(datasets, weights) of a `data.train` value: one source, or a list of {shards: ..., weight: ..., filters: ...}.

    An entry {raster: ..., size: ..., ...} stands for windows of large TIFFs (raster.py). A wids list with weights in it is a mix, too; its parts share the weight of their entry. split, in_groups, metadata: as for `open_dataset`.
    """
    store = store or Store()
    listed = [spec] if isinstance(spec, Mapping) else spec
    parts = (
        listed if isinstance(listed, list | tuple) and any(isinstance(part, Mapping) for part in listed) else [{"shards": spec}]
    )
    datasets: list[AnySet] = []
    weights: list[float] = []
    for part in parts:
        keys = set(part) if isinstance(part, Mapping) else set()
        raster = {"raster"} <= keys <= {"raster", "weight", "filters", *Options._fields}
        if not raster and not {"shards"} <= keys <= {"shards", "weight", "filters"}:
            raise ConfigError(
                f"data.train: {part!r} is not of the form {{shards: PATTERN, weight: NUMBER, filters: [MODULE:NAME]}}, nor {{raster: PATTERN, size: "
                "PIXELS, ...}; a mix lists only such entries"
            )
        opened = [(_open_raster(part, store), 1.0)] if raster else _open_part(part["shards"], store, split, in_groups, metadata)
        for dataset, share in opened:
            dataset.filters = Filters(part["filters"]) if part.get("filters") else None
            datasets.append(dataset)
            weights.append(float(part.get("weight", 1.0)) * share)
    return datasets, weights


def _open_part(
    spec: str | list[str], store: Store, split: str | None, in_groups: bool, metadata: bool
) -> list[tuple[AnySet, float]]:
    """(dataset, share of the entry's weight): several only for a wids list that weights them."""
    parts = read_shard_list(store, spec) if isinstance(spec, str) and is_shard_list(spec) else []
    if isinstance(spec, list) or all(part.weight is None for part in parts) or len(parts) < 2:
        return [(open_dataset(spec, store=store, split=split, in_groups=in_groups, metadata=metadata), 1.0)]
    total = sum(part.weight or 1.0 for part in parts)
    return [(_open_listed(spec, part.counts, store), (part.weight or 1.0) / total) for part in parts]


def _open_raster(part: Mapping[str, Any], store: Store) -> RasterDataset:
    pattern = part["raster"]
    folder = _as_folder(pattern) if isinstance(pattern, str) and not has_extension(redact(pattern), RASTERS) else None
    if folder:
        files = store.walk(folder)
        found = {join(folder, name): stat for name, stat in files.items() if has_extension(name, RASTERS)}
        if not found:
            raise DataError(f"{shown(folder)} holds no rasters ({len(files)} files; they end in {', '.join(RASTERS)})")
    else:
        found = store.expand(pattern)
    name = redact(pattern) if isinstance(pattern, str) else f"{redact(pattern[0])} and {len(pattern) - 1} more"
    return open_rasters(name, store, found, options_of(part))


def write_index(spec: str | list[str]) -> list[str]:
    """Index shards and write `shards.index` into their folders, so that nobody need scan them again; returns the files written."""
    dataset = open_dataset(spec)
    if isinstance(dataset, ParquetDataset | ZipDataset | RasterDataset):
        raise DataError(f"{dataset.name}: Parquet files and zip archives have their index at their end: nothing is to be done.")
    if isinstance(dataset, FolderDataset):
        raise DataError(
            f"{dataset.name} is a folder of images: only tar shards have an index. Pack it first: ssl-locat shards pack FOLDER OUT"
        )
    written = write_sidecars(dataset.store, dataset.shards)
    log.info("indexed %d samples in %d shards: %s", len(dataset), len(dataset.shards), ", ".join(map(shown, written)))
    return written


def is_compressed(url: str) -> bool:
    return redact(url).lower().endswith(COMPRESSED)


def read_compressed(url: str, store: Store | None = None) -> Iterator[RawSample | Damage]:
    """Samples of one .tar.gz, .tar.bz2 or .tar.xz in order, for evaluation: unpacked to a temporary file, then read as any shard.

    A file cut short gives what could be unpacked, and a Damage for the rest. Raises DataError for what is missing or no such archive.
    """
    store, name = store or Store(), redact(url)
    opener = next((opener for ending, opener in _OPENERS.items() if name.lower().endswith(ending)), None)
    if opener is None:
        raise DataError(f"{name}: this compression cannot be read; known are {', '.join(_OPENERS)}. Unpack it to a plain .tar.")
    with tempfile.NamedTemporaryFile(suffix=".tar") as plain:
        try:
            with opener(io.BytesIO(store.read_all(normalise(url)))) as packed:
                # piece by piece: unpacked it may be larger than memory
                shutil.copyfileobj(packed, plain, 1 << 20)
        except Gone:
            raise DataError(f"shard {name} does not exist. Check the data pattern.") from None
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, Outage):
                raise
            log.warning("%s cannot be unpacked to its end (%s): the rest counts as damaged", name, error)
        plain.flush()
        local = Store()
        stat = local.stat(plain.name)
        try:
            starts, crcs = scan_shard(local, plain.name, stat)
        except CorruptSample as error:
            raise DataError(f"{name} is {error.reason}") from None
        for start, end, crc in zip(starts, starts[1:], crcs, strict=False):
            yield parse(local.read(plain.name, start, end), 0, end - start, crc, name)


def _as_folder(spec: str) -> str | None:
    """The folder that a spec names, or None if it names shards."""
    if any(letter in spec for letter in "{*[") and not os.path.isdir(spec):
        return None
    url = normalise(spec)
    if scheme_of(url) == "file":
        return url if os.path.isdir(url) else None
    return None if is_collection(url) else url.rstrip("/")


def _list_folder(store: Store, folder: str, split: str | None) -> tuple[dict[str, Stat | None], list[str]]:
    """({URL of a shard: Stat}, relative paths of images at any depth). Shards are tars at the top, or Parquet files or zip archives where there is nothing else; where they lie deeper, or the folder's README
    tells their splits, those of one split."""
    files = store.walk(folder)
    tars = [name for name in files if name.endswith(".tar") and not name.rpartition("/")[2].startswith("._")]
    top = [name for name in tars if "/" not in name]
    images = [name for name in files if has_extension(name, IMAGE_EXTENSIONS)]
    images = images or [name for name in files if has_extension(name, ARRAY_EXTENSIONS)]
    if tars and (has_splits(store, folder, files) or not (top or images)):
        top = choose_split(store, folder, tars, split)
    if not tars and not images:  # the hub's data sets: Parquet at any depth, and images nowhere else
        rows = [name for name in files if kind_of(name) == "Parquet"]
        rows = rows or [name for name in files if kind_of(name) == "zip"]
        top = choose_split(store, folder, rows, split) if rows else []
    warn_of_unread(folder, files)
    if not top and not images:
        raise DataError(
            f"{shown(folder)} holds neither .tar shards nor Parquet files nor zip archives nor images ({len(files)} files; images end in {', '.join(IMAGE_EXTENSIONS)})"
        )
    return {join(folder, name): files[name] for name in top}, images
