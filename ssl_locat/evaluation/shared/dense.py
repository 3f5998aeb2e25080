"""What dense protocols share: the patches they read, and finite passes over scenes, resized and normalised for a backbone."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation

from ssl_locat.data.images.bands import Bands, how_many
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.stream.ordered import read_in_order
from ssl_locat.data.stream.workers import choose_workers
from ssl_locat.evaluation.shared.image_views import as_picture, random_box, to_tensor
from ssl_locat.evaluation.shared.metrics import VOID
from ssl_locat.evaluation.shared.samples import StackReadable, check_damage, refuse_damage, share
from ssl_locat.evaluation.shared.seg_datasets import Scenes, open_scenes
from ssl_locat.evaluation.shared.stopping import stop_if_asked
from ssl_locat.models.tokens import Tokens, last_blocks, refine
from ssl_locat.runs.distributed import all_reduce_sum_, rank, world_size
from ssl_locat.seeds import mix64

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HUMMINGBIRD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.255))  # a slip in the reference's code that its numbers contain


class DenseBatch(NamedTuple):
    images: Tensor  # [B, 3, H, W] float32, normalised
    masks: Tensor  # [B, H, W] int64, class ids or 255
    index: Tensor  # type: ignore[assignment]  # [B] position in the set
    valid: Tensor  # [B] bool; False on the repeats that make all processes' shares equally long, and on damaged pairs


def last_patches(backbone: nn.Module, images: Tensor, *, norm: bool = False, block: int = -1) -> Tokens:
    """Tokens of a block (a stage, for Swin), counted from the end: raw, as the paper's code reads them, or after final norm and PRR.

    Raises UserError for a backbone that has no patch tokens.
    """
    tokens = last_blocks(backbone, images, -block)[0]
    return refine(backbone, tokens) if norm else tokens


def squash(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (bilinear, antialiased) and mask (nearest) at size x size, whatever their aspect."""
    return as_picture(image, lambda one: one.resize((size, size), Image.Resampling.BILINEAR)), resize_mask(mask, size, size)


def keep_aspect(image: np.ndarray, long_side: float, short_side: float) -> np.ndarray:
    """The image at the largest size whose sides stay within the two given (mmseg's Resize with keep_ratio)."""
    height, width = image.shape[:2]
    factor = min(long_side / max(height, width), short_side / min(height, width))
    # mmcv's rounding, so that scores at the published sizes compare
    size = max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).reshape(size[1], size[0], -1)  # cv2 drops an axis of one


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """int64 [height, width]: nearest neighbour, so that no class is invented."""
    # cv2 resizes no int64; class ids and VOID fit into 8 bits
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(np.int64)


def random_view(image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hummingbird's augmentation of the memory: colours by up to 0.1, each half the time, and a random crop of 0.5..2 of the area."""
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    left, top, right, bottom = random_box(height, width, (0.5, 2.0), rng)
    image, mask = image[top:bottom, left:right], mask[top:bottom, left:right]
    if image.shape[2] != 3 or image.dtype != np.uint8:  # no colours to move: gain and offset of all bands
        gain, offset = rng.uniform(0.9, 1.1), rng.uniform(-25.5, 25.5)
        return image.astype(np.float32) * (gain if rng.random() < 0.5 else 1) + (offset if rng.random() < 0.5 else 0), mask
    picture = Image.fromarray(image)
    # torchvision on Pillow images, as the reference: its order and its rounding
    for adjust in (adjust_brightness, adjust_contrast, adjust_saturation):
        if rng.random() < 0.5:
            picture = adjust(picture, rng.uniform(0.9, 1.1))
    if rng.random() < 0.5:
        picture = adjust_hue(picture, rng.uniform(-0.1, 0.1))
    return np.asarray(picture), mask


class PreparedScene:
    """What a worker makes of a pair: the tensors of `prepare(image, mask, seed)`."""

    def __init__(self, scenes: Scenes, prepare: Callable[[np.ndarray, np.ndarray, int], tuple[Tensor, Tensor]]):
        self.decode, self.prepare, self.channels = scenes.decode, prepare, how_many(scenes.channels)

    def __call__(self, raw: RawSample, seed: int) -> tuple[Tensor, Tensor]:
        return self.prepare(*self.decode(raw), seed)

    def blank(self) -> tuple[Tensor, Tensor]:
        """Stands in for a damaged pair: void everywhere, which no score counts."""
        return self.prepare(np.zeros((64, 64, self.channels), np.uint8), np.full((64, 64), VOID, np.int64), 0)


def read_scenes(
    scenes: Scenes, indices: np.ndarray, prepare: PreparedScene, data: Mapping[str, Any], *, batch_size: int, workers: int | None
) -> Iterator[tuple[tuple[Any, Any], list[int]]]:
    """((images, masks), indices of damaged pairs) of each batch of `indices`, in order. DataError for damage unless data.max_bad allows some."""
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "workers": choose_workers(workers),
        "pin_memory": torch.cuda.is_initialized(),
    }
    for columns, damaged in read_in_order(scenes.dataset, indices, prepare, StackReadable(prepare), **options):
        refuse_damage(damaged, data.get("max_bad") or 0.0)
        yield columns, [item.index for item in damaged]


class DenseImages:
    """A finite pass over a labelled set: this process's share, every image at one size. Iterates DenseBatch; len() is the whole set."""

    def __init__(self, scenes: Scenes, prepare: Callable, data: Mapping[str, Any], *, batch_size: int, workers: int | None):
        self.scenes, self.prepare, self.data = scenes, prepare, data
        self.batch_size, self.workers = batch_size, workers
        self.num_classes = scenes.num_classes

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[DenseBatch]:
        indices, valid = share(len(self.scenes), rank(), world_size())
        prepare, start, lost = PreparedScene(self.scenes, self.prepare), 0, 0
        options: dict[str, Any] = {"batch_size": self.batch_size, "workers": self.workers}
        for (images, masks), damaged in read_scenes(self.scenes, indices, prepare, self.data, **options):
            end, lost = start + len(images), lost + len(damaged)
            # a damaged pair is known by its place, a repeat by `valid`
            readable = valid[start:end] & ~np.isin(indices[start:end], damaged)
            yield DenseBatch(images, masks, torch.from_numpy(indices[start:end]), torch.from_numpy(readable))
            start = end
            stop_if_asked("reading scenes")
        check_damage(int(all_reduce_sum_(torch.tensor(lost))), len(self), self.data.get("max_bad") or 0.0)


def dense_images(
    data: Mapping[str, Any],
    name: str,
    *,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    workers: int | None,
    augment_seed: int | None = None,
    other_is_a_class: bool = False,
    channels: Bands | int = 3,
) -> DenseImages:
    """`data.train` or `data.test`, images and masks squashed to image_size x image_size; with `augment_seed`, one random view of each.

    channels: as the backbone takes them (`channels_of`). other_is_a_class: see open_scenes.
    """

    prepare = partial(_squashed, size=image_size, mean=mean, std=std, augment_seed=augment_seed)
    scenes = open_scenes(data, name, other_is_a_class=other_is_a_class)
    scenes.channels = channels
    return DenseImages(scenes, prepare, data, batch_size=batch_size, workers=workers)


def _squashed(
    image: np.ndarray, mask: np.ndarray, index: int, *, size: int, mean: tuple, std: tuple, augment_seed: int | None
) -> tuple[Tensor, Tensor]:
    if augment_seed is not None:
        image, mask = random_view(image, mask, mix64(augment_seed, index))
    image, mask = squash(image, mask, size)
    return to_tensor(image, mean, std), torch.from_numpy(mask)
