"""Top-1 and top-5 of a trained classifier as it is: a LocAtViT release, a timm model with weights, what `supervised` trained.

    ssl-locat evaluate validate weights.safetensors data.test=...

Images are shown as timm's own `validate.py` shows them (arXiv's tables and timm's results are made so): size, crop, interpolation, mean and
std come from the model's `pretrained_cfg` through timm.data.resolve_data_config. Images of other bands than 8-bit RGB get the same resize and
crop, band by band.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.transforms import Compose

from ssl_locat.errors import ConfigError
from ssl_locat.evaluation.shared.classifier import test_accuracy
from ssl_locat.evaluation.shared.features import check_image_size, reading, split
from ssl_locat.evaluation.shared.image_views import as_picture, channels_of, normalisation, to_tensor
from ssl_locat.evaluation.shared.options import Count, LabelledData, Share, Whole
from ssl_locat.evaluation.shared.samples import LabelledImage, Pass, open_split


def evaluate(
    backbone: nn.Module,
    *,
    data: LabelledData,
    image_size: Count | None = None,
    crop_fraction: Share | None = None,
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None,
    precision: Literal["bf16", "fp32"] | None = None,
    batch_size: Count = 256,
    workers: Whole | None = None,
) -> dict[str, float]:
    """top1 and top5 in percent on data.test.

    Args:
        data: test (labelled; a DATA spec), optionally image_key, label_key. Class ids are the classifier's outputs.
        image_size, crop_fraction (timm: crop_pct), interpolation: None: the model's own.
        precision: bf16 or fp32; None: bf16 on a GPU.
        batch_size: images of each process.

    Raises ConfigError for a model without a classifier.
    """
    num_classes = getattr(backbone, "num_classes", 0)
    if not num_classes:
        raise ConfigError(
            "validate: this model has no classifier. `ssl-locat evaluate linear MODEL` trains one on its features; of timm's models one is "
            "opened with weights by timm:NAME?pretrained, and an untrained one by timm:NAME?num_classes=1000."
        )
    split(data, "test")
    given = {"crop_pct": crop_fraction, "interpolation": interpolation}
    if image_size:
        given["img_size"] = check_image_size(backbone, image_size)
    transform: Any = create_transform(**resolve_data_config({k: v for k, v in given.items() if v is not None}, model=backbone))
    view, channels = partial(_view, transform), channels_of(backbone)
    if channels != 3:
        # all but its last two, which make a tensor of RGB and normalise it: they take bands of any number, one by one
        mean, std = normalisation(backbone)
        view = partial(_view_of_bands, Compose(transform.transforms[:-2]), mean, std)
    images = Pass(
        open_split(data, "test"),
        LabelledImage(view, data, channels, num_classes),
        batch_size=batch_size,
        workers=workers,
        max_bad=data.get("max_bad") or 0.0,
    )
    device = next(backbone.parameters()).device
    with reading(device, precision):
        return test_accuracy(backbone, images, device)


def _view(transform: Callable[[Image.Image], Tensor], image: np.ndarray, seed: int) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, size, size], normalised."""
    shown: Any = transform(Image.fromarray(image))
    assert isinstance(shown, torch.Tensor)
    return shown


def _view_of_bands(
    change: Callable[[Image.Image], Image.Image], mean: tuple[float, ...], std: tuple[float, ...], image: np.ndarray, seed: int
) -> Tensor:
    """[H, W, C], uint8 or float32 -> float32 [C, size, size], normalised."""
    return to_tensor(as_picture(image, change), mean, std)
