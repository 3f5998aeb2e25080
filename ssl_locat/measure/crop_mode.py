"""`crops.mode: auto`: which part of making crops the loader's cores do, and which the device, from what both measured a second.

A few images of the run's own data are decoded, cut and coloured as a worker would, and finished as the device would, each for a fraction
of a second. The measurement is kept in the user's cache, by machine, crops and data, so that only a first start waits for it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch

from ssl_locat.config.schema import Config
from ssl_locat.data.images.bands import reading
from ssl_locat.data.images.crops import MultiCrop
from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.data.shards.filters import filtered
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.shard_index import default_cache_dir
from ssl_locat.data.shards.tar import Damage
from ssl_locat.errors import CorruptSample
from ssl_locat.runs.folder import cpu_name

MODES = (
    "cpu",
    "device-photometric",
    "device",
)  # in the order in which they are preferred: what is done on a CPU is exact on every device
_IMAGES = 8
_ON_CPU = 1  # of them, where a CPU plays the device, which takes it a tenth of a second an image
_SECONDS = 0.1  # for each of six timings
_UNMEASURED = 1e6  # images a second: quicker than any photometric work
_GAIN = 1.2  # by which a later mode must be faster: timings of a busy machine differ by less, and runs of one config should agree


class Rates(NamedTuple):
    """Images a second: of one core for a worker's parts, of the device for what each mode leaves to it."""

    decode: float
    cut: float
    photometric: float
    device: dict[str, float]  # mode -> finishing its payload

    def worker(self, mode: str) -> float:
        parts = {"cpu": (self.decode, self.cut, self.photometric), "device-photometric": (self.decode, self.cut)}
        return 1 / sum(1 / rate for rate in parts.get(mode, (self.decode,)))


def measured_rates(datasets: list[Dataset], config: Config, device: torch.device) -> Rates | None:
    """`Rates` for this machine and data, from the cache where they were measured before. None if no image could be read."""
    what = (os.uname().nodename, cpu_name(), torch.cuda.get_device_name() if device.type == "cuda" else "cpu", torch.__version__)
    data = [dataset.manifest_hash for dataset in datasets]
    about = [
        what,
        data,
        config.crops.model_dump(mode="json", exclude={"mode", "stages", "keep_patches", "keep_shape"}),
        torch.get_num_threads(),
    ]
    key = json.dumps([*about, config.channels] if config.channels else about)
    kept = default_cache_dir().parent / "crops" / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.json"
    with suppress(OSError, ValueError, TypeError):
        return Rates(**json.loads(kept.read_text()))
    rates = measure_rates(datasets, config, device)
    if rates:
        with suppress(OSError):  # a home that cannot be written: measured again next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(rates._asdict()))
    return rates


def measure_rates(datasets: list[Dataset], config: Config, device: torch.device) -> Rates | None:
    options = config.crops.options() | {"device": device.type}
    crops = {mode: MultiCrop(**options | {"mode": mode}) for mode in MODES}
    encoded = _some_images(datasets, config)
    if not encoded:
        return None
    limits: dict[str, Any] = {"channels": reading(config.channels, config.crops.mean), "max_pixels": config.data.max_pixels}
    images = [decode_image(data, **limits) for data in encoded]
    some = images if device.type == "cuda" else images[:_ON_CPU]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        decode = _rate(lambda: [decode_image(data, **limits) for data in encoded], len(images))
        worker = {mode: _rate(partial(_cut_all, crops[mode], images), len(images)) for mode in ("cpu", "device-photometric")}
        payloads = {
            mode: made.collate([made.cut(image, place) for place, image in enumerate(some)]) for mode, made in crops.items()
        }
        # a CPU as the device: by the core, too, as all of it is done by the same cores
        on_device = {mode: _rate(partial(_finish, crops[mode], payloads[mode], device), len(some)) for mode in MODES}
    finally:
        torch.set_num_threads(threads)
    cut = worker["device-photometric"]
    return Rates(decode, cut, 1 / max(1 / worker["cpu"] - 1 / cut, 1 / _UNMEASURED), on_device)


def choose_mode(rates: Rates, device: str, workers: int, cores: int, step: float | None) -> tuple[str, str]:
    """(mode, why).

    Args:
        workers: decoding processes of a rank; 0: the trainer's own.
        cores: that a rank has.
        step: images a second that the networks take on the device; None where they share the cores with the crops, as on a CPU.
    """
    busy = max(1, min(workers, cores))
    if step is None:
        # all on the same cores: the least work wins
        speed = {mode: busy / (1 / rates.worker(mode) + 1 / rates.device[mode]) for mode in MODES}
    else:
        speed = {mode: min(busy * rates.worker(mode), 1 / (1 / step + 1 / rates.device[mode])) for mode in MODES}
    chosen = MODES[0]
    for mode in MODES[1:]:
        if speed[mode] > _GAIN * speed[chosen]:
            chosen = mode
    # the difference of two timings: on a busy machine the longer work may seem the quicker
    photometric = f"{rates.photometric:.0f}" if rates.photometric < _UNMEASURED else "not to be told from cut,"
    per_core = f"decode {rates.decode:.0f}, cut {rates.cut:.0f}, photometric {photometric} images/s a core"
    feeds = ", ".join(f"{mode} {value:.0f}" for mode, value in speed.items())
    model = "" if step is None else f", networks {step:.0f} images/s"
    return chosen, f"{per_core}{model}; {busy} of them on {device} would feed a rank with images/s: {feeds}"


def cores_of_a_rank() -> int:
    """This process's own cores if Slurm bound it to some of the job's on this node; else its share of the node's (LOCAL_WORLD_SIZE)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bound = cores < int(os.environ.get("SLURM_CPUS_ON_NODE", 0))
    return max(1, cores // (1 if bound else int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _some_images(datasets: list[Dataset], config: Config) -> list[bytes]:
    found = []
    for dataset in datasets:
        share = min(len(dataset), max(1, _IMAGES // len(datasets)))
        for place in range(0, len(dataset), -(-len(dataset) // share)):
            sample = dataset.read(place, place + 1)[0]
            if isinstance(sample, Damage):
                continue
            with suppress(CorruptSample):
                data = find_image(filtered(sample, place).members, config.data.image_key)
                decode_image(data, channels=reading(config.channels, config.crops.mean), max_pixels=config.data.max_pixels)
                found.append(data)
    return found


def _cut_all(crops: MultiCrop, images: list) -> None:
    for image in images:
        crops.cut(image, 7)


def _finish(crops: MultiCrop, payload: dict, device: torch.device) -> None:
    crops.finish(payload, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(run: Callable[[], object], images: int) -> float:
    """Images a second of the best of several calls: what else runs on the machine only ever slows one down."""
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while True:
        began = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - began)
        if now > until:
            return images / best
