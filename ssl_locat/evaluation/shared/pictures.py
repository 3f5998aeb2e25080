"""Images without labels, for protocols that only look: one ordered pass, centre crops as the backbone was trained to see them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ssl_locat.data.images.bands import Bands, how_many
from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.stream.ordered import read_in_order
from ssl_locat.data.stream.workers import choose_workers
from ssl_locat.evaluation.shared.features import check_image_size, default_resize, split
from ssl_locat.evaluation.shared.image_views import centre_view, channels_of, normalisation
from ssl_locat.evaluation.shared.samples import StackReadable, open_split, refuse_damage, share
from ssl_locat.evaluation.shared.stopping import stop_if_asked
from ssl_locat.runs.distributed import rank, world_size


class Pictures(NamedTuple):
    images: Tensor  # [B, C, H, W], normalised
    valid: Tensor  # [B] bool; False on repeats, which make all processes' shares equally long


class _View:
    """The image alone, in a view."""

    def __init__(self, view: Callable[[np.ndarray, int], Tensor], data: Mapping[str, Any], channels: Bands | int):
        self.view, self.image_key, self.channels = view, data.get("image_key"), channels

    def __call__(self, raw: RawSample, index: int) -> tuple[Tensor]:
        return (self.view(decode_image(find_image(raw.members, self.image_key), channels=self.channels), index),)

    def blank(self) -> tuple[Tensor]:
        return (self.view(np.zeros((64, 64, how_many(self.channels)), np.uint8), 0),)


def pictures(
    backbone: nn.Module,
    data: Mapping[str, Any],
    *,
    limit: int | None,
    image_size: int | None,
    resize_size: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    spread: bool = False,
    view: Callable[[np.ndarray, int], Tensor] | None = None,
) -> Iterator[Pictures]:
    """This process's share of the first `limit` images of data.test (all of them where None).

    spread: take them evenly over the whole set instead, where classes may lie one after the other. view: of (image uint8 [H, W, C], place
    in the set), instead of the centre crop.
    """
    size = check_image_size(backbone, image_size)
    mean, std = normalisation(backbone)
    view = view or partial(centre_view, size=size, resize=resize_size or default_resize(size), mean=mean, std=std)
    split(data, "test")
    dataset = open_split(data, "test")
    count = min(len(dataset), limit or len(dataset))
    indices, valid = share(count, rank(), world_size())
    if spread:
        indices = indices * len(dataset) // count
    prepare = _View(view, data, channels_of(backbone))
    options: dict[str, Any] = {"batch_size": batch_size, "workers": choose_workers(workers)}
    starts = range(0, len(indices), batch_size)
    for start, ((images,), damaged) in zip(
        starts, read_in_order(dataset, indices, prepare, StackReadable(prepare), **options), strict=True
    ):
        # maps and statistics of a few images: each of them counts
        refuse_damage(damaged, 0.0)
        stop_if_asked("looking at images")
        yield Pictures(images, torch.from_numpy(valid[start : start + len(images)]))
