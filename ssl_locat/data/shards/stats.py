"""`ssl-locat shards stats`: mean, deviation, percentiles and no data of each channel, over all images of a set in one pass."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_locat.config.yaml_files import dump_yaml, read_value
from ssl_locat.data.images.bands import band_count, decode_stored, needs_bands, picked
from ssl_locat.data.images.decode import MAX_PIXELS, decode_image, find_image
from ssl_locat.data.images.statistics import ChannelStatistics, Counting
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.errors import CorruptSample, DataError, UserError, did_you_mean
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import progress, say
from ssl_locat.text.shown import shown, to_json

log = logging.getLogger(__name__)

_OPTIONS = ("pick", "no_data", "bands_first", "window", "image_key", "max_pixels", "images", "base")
_THREADS = 4
_TOGETHER = 32  # samples that a thread reads at once


@dataclass
class Reading:
    """How files are read: keys of a config's data.channels, and whether they are needed at all."""

    pick: Sequence[int | str] | None = None
    no_data: float | None = None
    bands_first: bool = False
    window: Any = None
    image_key: str | None = None
    max_pixels: int = MAX_PIXELS
    deep: bool = False  # 8 bits would lose something


@dataclass
class Found:
    """What the pass saw."""

    counting: Counting = field(default_factory=Counting)
    type: str = "uint8"
    damaged: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    no_data: float | None = None  # that files name themselves
    bands: int = 0  # of the first file, whether picked or not


def count_sample(sample: RawSample | Damage, reading: Reading, found: Found) -> np.ndarray | None:
    """One more image; returns its values [H, W, C] as stored. What cannot be used, or is not like the first, goes to `damaged`."""
    try:
        if isinstance(sample, Damage):
            raise CorruptSample(sample.reason)
        data = find_image(sample.members, reading.image_key)
        if reading.deep:
            stored = decode_stored(data, reading.max_pixels, reading.pick, reading.bands_first, reading.window)
            values, missing = picked(stored, reading.pick, reading.no_data)
            kind, names, no_data, bands = stored.type, stored.names, stored.no_data, band_count(stored)
        else:
            values, missing, kind = decode_image(data, channels=None, max_pixels=reading.max_pixels), None, "uint8"
            names, no_data, bands = (), None, values.shape[2]
        counting = found.counting
        if not counting.images:
            found.bands = bands
            found.type, found.no_data = kind, no_data if reading.no_data is None else reading.no_data
            found.names = [str(band) for band in reading.pick] if reading.pick else list(names)
        if (kind, bands) != (found.type, found.bands):
            raise CorruptSample(f"{bands} channels of {kind}, not {found.bands} of {found.type} as the first")
        counting.add(values, missing)
        counting.types[kind] += 1
        return values
    except CorruptSample as error:
        found.damaged.append(f"{sample.key}: {error.reason}")
        return None


def is_deep(dataset: Dataset, image_key: str | None) -> bool:
    """By the first sample that can be opened."""
    for place in range(min(len(dataset), 16)):
        (sample,) = dataset.read(place, place + 1)
        try:
            if isinstance(sample, RawSample):
                return needs_bands(find_image(sample.members, image_key))
        except CorruptSample:
            continue
    return False


def count_all(spec: str | list[str], reading: Reading, images: int | None = None) -> Found:
    """One pass over the set, or over `images` of it, spread evenly. Raises DataError where nothing can be used."""
    dataset = open_dataset(spec)
    reading.deep = reading.deep or is_deep(dataset, reading.image_key)
    count = min(len(dataset), images or len(dataset))
    places = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)).tolist()
    # neighbours together, where all are read: one request for several
    step = _TOGETHER if count == len(dataset) else 1
    parts = [(places[at], places[min(at + step, len(places)) - 1] + 1) for at in range(0, len(places), step)]

    def part(bounds: tuple[int, int]) -> Found:
        found = Found()
        for sample in dataset.read(*bounds):
            count_sample(sample, reading, found)
        return found

    whole = Found()
    with ThreadPoolExecutor(_THREADS) as pool, progress("statistics", total=count, unit="images") as bar:
        # in order, whichever thread is first: sums are then the same each time
        for bounds, found in zip(parts, pool.map(part, parts), strict=True):
            if found.counting.images:
                _join(whole, found)
            whole.damaged += found.damaged
            bar.update(bounds[1] - bounds[0])
    if not whole.counting.images:
        raise DataError(f"{dataset.name}: none of {count} samples can be used, such as {whole.damaged[0]}.")
    return whole


def _join(whole: Found, found: Found) -> None:
    first = not whole.counting.images
    if first:
        whole.type, whole.names, whole.no_data, whole.bands = found.type, found.names, found.no_data, found.bands
    elif (found.type, found.bands) != (whole.type, whole.bands):
        unlike = f"{found.bands} channels of {found.type}, not {whole.bands} of {whole.type} as the first"
        whole.damaged += [f"{found.counting.images} samples: {unlike}"]
        return
    whole.counting.join(found.counting)


def sections(found: Found, reading: Reading) -> dict[str, Any]:
    """The keys of a config that say what was measured."""
    statistics = found.counting.result()
    low, high = statistics.scale(found.type)
    if reading.window:
        low, high = [0.0] * len(low), [1.0] * len(low)
    mean, std = statistics.on(low, high)
    channels = len(mean)
    written: dict[str, Any] = {"crops": {"mean": mean, "std": std}}
    if channels != 3:
        written["backbone"] = {"in_chans": channels}
    if reading.deep:
        written["data"] = {"channels": channels_section(found, reading, low, high)}
    return written


def channels_section(found: Found, reading: Reading, low: list[float], high: list[float]) -> dict[str, Any]:
    """A config's data.channels."""
    section: dict[str, Any] = {"type": found.type}
    if reading.pick:
        section |= {"pick": list(reading.pick), "bands": found.bands}
    if found.names:
        section["names"] = found.names
    section |= {"window": reading.window} if reading.window else {"low": low, "high": high}
    if found.no_data is not None:
        section["no_data"] = found.no_data
    if reading.bands_first:
        section["bands_first"] = True
    return section


def stats_command(spec: str | list[str], options: Sequence[str], out: str | None, as_json: bool) -> None:
    """Print what was measured; write it as a YAML, on top of a `base`, where `out` names one."""
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in _OPTIONS:
            raise UserError(
                f"{option!r} is not an option of shards stats.{did_you_mean(key, _OPTIONS)} Known: {'=, '.join(_OPTIONS)}="
            )
        given[key] = read_value(value)
    base, images = given.pop("base", None), given.pop("images", None)
    if out and Path(out).exists():
        raise UserError(f"{out} exists; give another file with --out, or remove it.")
    reading = Reading(**given, deep=bool({"pick", "no_data", "bands_first", "window"} & set(given)))
    found = count_all(spec, reading, images)
    statistics, written = found.counting.result(), sections(found, reading)
    if as_json:
        print(
            to_json(
                {"type": found.type, "names": found.names, "damaged": found.damaged, **statistics._asdict(), "config": written}
            )
        )
    else:
        say(as_text(statistics, found))
        say(dump_yaml(written).rstrip())
    if out:
        name = spec if isinstance(spec, str) else spec[0]
        text = [
            f"# Written by `ssl-locat shards stats` from {statistics.images:,} images of {shown(name)}: what they hold, and on which scale.",
            "# Source: these images. Expected: inputs of mean 0 and deviation 1 in each channel; it costs nothing.",
            f"# Command: ssl-locat pretrain {Path(out).name}",
            "# Read by: ssl_locat/data/images/bands.py (keys: docs/config.md)",
            *(f"# {line}" for line in as_text(statistics, found).splitlines()),
            *([f"base: {base}"] if base else []),
            dump_yaml(written),
        ]
        write_atomically(Path(out), "\n".join(text))
        log.info("wrote %s", out)


def as_text(statistics: ChannelStatistics, found: Found) -> str:
    """A line for each channel."""
    lines = [f"{statistics.images:,} images of {found.type}, {len(statistics.mean)} channels"]
    for place in range(len(statistics.mean)):
        name = found.names[place] if found.names else str(place)
        percentiles = ", ".join(f"{percent:g} %: {values[place]:.5g}" for percent, values in statistics.percentiles.items())
        lines.append(
            f"{name:>12}  mean {statistics.mean[place]:.5g}  std {statistics.std[place]:.5g}  least {statistics.least[place]:.5g}  "
            f"greatest {statistics.greatest[place]:.5g}  {percentiles}  no data {100 * statistics.no_data[place]:.3g} %"
        )
    if found.damaged:
        lines.append(f"{len(found.damaged)} could not be used, such as {shown(found.damaged[0])}")
    return "\n".join(lines)
