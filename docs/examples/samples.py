"""What the examples beside this file share: a backbone out of an export, and samples out of WebDataset shards."""

import io

import numpy as np
import timm
import torch
import webdataset
from PIL import Image
from torch import nn

import ssl_locat.models  # noqa: F401  timm knows LocAt's names from here on; a vanilla export needs timm alone


def open_backbone(model: str, **options) -> nn.Module:
    """An export folder of ours (or any name of timm's), with its weights."""
    pretrained = model.startswith(("local-dir:", "hf-hub:"))
    return timm.create_model(model, pretrained=pretrained, **options)


def read_samples(shards: str, *keys: str, limit: int | None = None) -> list[tuple]:
    """The first `limit` samples of shards (brace notation), each with what lies under `keys`: images as PIL has them, classes as numbers."""
    found = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        found.append(tuple(int(sample[key]) if key == "cls" else Image.open(io.BytesIO(sample[key])) for key in keys))
        if len(found) == limit:
            break
    return found


def normalised(image: Image.Image, size: int, backbone: nn.Module) -> torch.Tensor:
    """[3, size, size] with the mean and std that the backbone was trained with."""
    pixels = (
        torch.from_numpy(np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    )
    mean, std = (torch.tensor(backbone.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    return (pixels - mean) / std


def batches(items: list, size: int, steps: int, seed: int = 0):
    """`steps` batches drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield [items[i] for i in torch.randint(len(items), (size,), generator=generator).tolist()]
