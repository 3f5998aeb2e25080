"""A look at some samples of the data: what they are, which cannot be read, and what reading, decoding and cropping one takes here."""

import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from ssl_locat.config.schema import Config
from ssl_locat.data.images.bands import reading
from ssl_locat.data.images.crops import MultiCrop, Sample
from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.data.shards.filters import filtered
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.metadata import fields_of, read_all
from ssl_locat.data.shards.tar import Damage
from ssl_locat.errors import CorruptSample


class DataSample(NamedTuple):
    """A look at some samples, spread over the data."""

    looked_at: int
    damaged: list[str]  # 'shard: key: reason'
    formats: Counter  # of the image members: JPEG, PNG, ...
    sizes: list[tuple[int, int]]  # (height, width), pixels
    read_seconds: float  # per image
    decode_seconds: float
    crop_seconds: float
    payload: list[Sample] | None  # what a worker hands on for the step, as this device's crops.mode wants it


def sample_data(datasets: list[Dataset], config: Config, device: torch.device, count: int = 64) -> DataSample:
    """Read, decode and crop `count` samples, spread over the data, as training on `device` would, in this process, timing each part."""
    crops = MultiCrop(**config.crops.options(), device=device.type)
    fields = fields_of(config.data.model_dump(mode="json")["metadata"])
    damaged, sizes, cut = [], [], []
    formats: Counter[str] = Counter()
    spent = {"read": 0.0, "decode": 0.0, "crop": 0.0}
    looked_at = 0
    for dataset in datasets:
        share = max(1, count // len(datasets))
        for place in np.linspace(0, len(dataset) - 1, min(share, len(dataset))).round().astype(int).tolist():
            looked_at += 1
            began = time.perf_counter()
            sample = dataset.read(place, place + 1)[0]
            spent["read"] += time.perf_counter() - began
            if isinstance(sample, Damage):
                damaged.append(f"{sample.shard}: {sample.key}: {sample.reason}")
                continue
            try:
                members = filtered(sample, looked_at).members
                data = find_image(members, config.data.image_key)
                began = time.perf_counter()
                image = decode_image(
                    data, channels=reading(config.channels, config.crops.mean), max_pixels=config.data.max_pixels
                )
                decoded = time.perf_counter()
                cut.append(crops.cut(image, seed=looked_at)._replace(metadata=read_all(fields, members)))
                spent["decode"] += decoded - began
                spent["crop"] += time.perf_counter() - decoded
            except CorruptSample as error:
                damaged.append(f"{sample.shard}: {sample.key}: {error.reason}")
                continue
            formats[kind_of(data)] += 1
            sizes.append(image.shape[:2])
    usable = max(1, len(cut))
    return DataSample(
        looked_at,
        damaged,
        formats,
        sizes,
        spent["read"] / looked_at,
        spent["decode"] / usable,
        spent["crop"] / usable,
        cut or None,
    )


def kind_of(data: bytes) -> str:
    """Image format by its first bytes."""
    magic = {
        b"\xff\xd8": "JPEG",
        b"\x89PNG": "PNG",
        b"GIF8": "GIF",
        b"BM": "BMP",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"\x93NUMPY": "npy",
        b"PK\x03\x04": "npz",
    }
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[128:132] == b"DICM":
        return "DICOM"
    return next((name for start, name in magic.items() if data.startswith(start)), "other")
