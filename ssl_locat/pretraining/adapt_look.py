"""What `adapt` looks at before it chooses: the images, where labels are to judge by, and MODEL itself."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.tar import Damage
from ssl_locat.errors import CorruptSample, UserError
from ssl_locat.evaluation.shared.image_views import channels_of, normalisation
from ssl_locat.export.licences import Licence
from ssl_locat.export.timm_folder import architecture_of
from ssl_locat.models.backbone import create_backbone, load_backbone, split_options
from ssl_locat.pretraining.guard import licence_of_model, source_of
from ssl_locat.pretraining.start_heads import heads_in, options_of

SAMPLED = 32
FEWEST = 16  # images: two batches of the smallest size
TEST_NAMES = ("val", "valid", "validation", "test")


class Images(NamedTuple):
    """What the training images are like, by a sample spread over all of them."""

    train: str  # where: FOLDER, or FOLDER/train where there is one
    validation: str | None  # labelled images found beside them
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    side: int  # pixels of the shorter side, median
    gray: bool  # no colours
    labelled: bool


class Start(NamedTuple):
    """MODEL, opened."""

    name: str
    options: dict[str, Any]  # of the constructor
    patch: int  # pixels
    grid: tuple[int, int]  # of the images that it is made for
    depth: int
    parameters: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: dict | None  # a config's data.channels, where it reads other than 8 bits
    has_gaug: bool
    licence: Licence
    heads: dict[str, dict[str, Any]]  # dino, ibot -> options of the heads that MODEL holds beside its backbone


def look_at_images(source: str, backbone: nn.Module, validation: str | None = None) -> Images:
    """Open the images and read some. UserError for too few, and for what is no image."""
    train, beside = split(source)
    dataset = open_dataset(train)
    if len(dataset) < FEWEST:
        raise UserError(
            f"{train} holds {len(dataset)} images: too few for a batch that compares them. Give at least {FEWEST}, better thousands."
        )
    sides, gray, labels, reason = [], [], 0, ""
    for place in np.linspace(0, len(dataset) - 1, min(SAMPLED, len(dataset))).round().astype(int).tolist():
        (sample,) = dataset.read(place, place + 1)
        try:
            if isinstance(sample, Damage):
                raise CorruptSample(sample.reason)
            image = decode_image(find_image(sample.members), channels=channels_of(backbone))
        except CorruptSample as error:
            reason = reason or f"{sample.key}: {error.reason}"
            continue
        sides.append(min(image.shape[:2]))
        small = image[:: max(1, image.shape[0] // 64), :: max(1, image.shape[1] // 64)].astype(np.float32)
        # no pixel is more than 5 of 255 off the mean of its channels
        gray.append(image.dtype == np.uint8 and float(np.abs(small - small.mean(2, keepdims=True)).max()) < 5)
        labels += _has_label(sample.members)
    if not sides:
        raise UserError(f"{train}: none of {min(SAMPLED, len(dataset))} samples could be read as an image, such as {reason}.")
    found = validation or (beside if beside and _first_has_label(beside) else None)
    return Images(train, found, len(dataset), int(statistics.median(sides)), all(gray), labels == len(sides))


def _has_label(members: dict[str, bytes]) -> bool:
    try:
        find_label(members)
    except CorruptSample:
        return False
    return True


def _first_has_label(source: str) -> bool:
    (sample,) = open_dataset(source).read(0, 1)
    return not isinstance(sample, Damage) and _has_label(sample.members)


def split(source: str) -> tuple[str, str | None]:
    """Training images, and those to measure on, where a folder holds both: FOLDER/train and FOLDER/val, or shards named *train* and *val*."""
    folder = Path(source)
    if not folder.is_dir():
        return source, None
    inside = {path.name.lower(): path for path in folder.iterdir()}
    if "train" in inside and inside["train"].is_dir():
        return str(inside["train"]), next((str(inside[name]) for name in TEST_NAMES if name in inside), None)
    tars = [name for name in inside if name.endswith(".tar")]
    tests = [word for word in TEST_NAMES if any(word in name for name in tars)]
    if tests and any("train" in name for name in tars):
        return f"{source.rstrip('/')}/*train*.tar", f"{source.rstrip('/')}/*{tests[0]}*.tar"
    return source, None


def look_at_model(model: str) -> tuple[nn.Module, Start]:
    """MODEL and what follows from it. UserError for what cannot be loaded, and for networks without blocks of patch tokens."""
    if model.startswith("timm:"):
        # its kind is known without its weights: nothing is fetched for a network that cannot be used
        name, options = split_options(model.removeprefix("timm:"))
        with torch.device("meta"):
            require_blocks(model, create_backbone(name, **{key: value for key, value in options.items() if key != "pretrained"}))
    backbone = load_backbone(source_of(model))
    require_blocks(model, backbone)
    patch = backbone.patch_embed.patch_size
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    if rows != columns:
        raise UserError(
            f"{model} has patches of {rows} x {columns} pixels; `adapt` crops squares of a whole number of square patches."
        )
    name, options = architecture_of(backbone)
    mean, std = normalisation(backbone)
    height, width = backbone.pretrained_cfg["input_size"][1:]
    start = Start(
        name, options, rows, (height // rows, width // rows), len(backbone.blocks), sum(p.numel() for p in backbone.parameters()), tuple(mean),
        tuple(std), backbone.pretrained_cfg.get("channels"), bool(getattr(backbone, "has_gaug", False)), licence_of_model(model, backbone),
        {name: options_of(state) for name, state in heads_in(model).items()},
    )  # fmt: skip
    return backbone, start


def require_blocks(model: str, backbone: nn.Module) -> None:
    """UserError unless it is a vision transformer whose patches go through blocks of one width."""
    if not hasattr(backbone, "blocks") or not hasattr(backbone, "patch_embed"):
        raise UserError(
            f"{model} is a {type(backbone).__name__}; `adapt` continues vision transformers, whose patches go through blocks of one width. Give a ViT "
            "(DINO, DINOv2, DINOv3, MAE, iBOT, CLIP, SigLIP, timm's, LocAtViT), or write a YAML of your own for `ssl-locat pretrain`."
        )
