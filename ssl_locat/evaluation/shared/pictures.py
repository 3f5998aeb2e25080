"""Images without labels, for protocols that only look: one ordered pass, centre crops as the backbone was trained to see them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.errors import CorruptSample, DataError
from ssl_locat.evaluation.shared.features import check_image_size, default_resize, split
from ssl_locat.evaluation.shared.image_views import centre_view, normalisation
from ssl_locat.evaluation.shared.samples import Members, load_in_order, share
from ssl_locat.runs.distributed import rank, world_size


class Pictures(NamedTuple):
    images: Tensor  # [B, C, H, W], normalised
    valid: Tensor  # [B] bool; False on repeats, which make all processes' shares equally long


class _Views(Dataset):
    def __init__(self, members: Members, view, image_key: str | None, channels: int):
        self.members, self.view, self.image_key, self.channels = members, view, image_key, channels

    def fetch(self, indices: list[int]) -> list[Tensor]:
        return [self._view(sample, index) for sample, index in zip(self.members.fetch(indices), indices, strict=True)]

    def _view(self, sample, index: int) -> Tensor:
        try:
            return self.view(decode_image(find_image(sample.members, self.image_key), channels=self.channels), index)
        except CorruptSample as error:
            raise DataError(f"{sample.shard}: {sample.key}: {error.reason}.") from None


def pictures(
    backbone: nn.Module,
    data: dict,
    *,
    limit: int | None,
    image_size: int | None,
    resize_size: int | None = None,
    batch_size: int = 64,
    workers: int = 4,
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
    members = Members(split(data, "test"))
    count = min(len(members), limit or len(members))
    indices, valid = share(count, rank(), world_size())
    if spread:
        indices = [index * len(members) // count for index in indices]
    starts = range(0, len(indices), batch_size)
    keys = [indices[start : start + batch_size] for start in starts]
    samples = _Views(members, view, data.get("image_key"), len(mean))
    for start, views in zip(starts, load_in_order(samples, keys, workers), strict=True):
        yield Pictures(torch.stack(views), torch.tensor(valid[start : start + len(views)]))
