"""Dense nearest-neighbour retrieval, "Hummingbird" (arXiv:2306.01667): patches of test images take the labels of similar training patches.

    ssl-locat evaluate hummingbird MODEL data.train=... data.test=... data.num_classes=21

No training. The memory holds L2-normalised patch features of the training images and the class frequencies inside each patch; a test patch
attends to its nearest 30. Each process keeps the memory of its own images, and all search together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.errors import ConfigError, DataError
from ssl_locat.evaluation.protocols.knn import nearest
from ssl_locat.evaluation.shared.dense import HUMMINGBIRD, DenseImages, dense_images, last_patches
from ssl_locat.evaluation.shared.features import check_depth, check_image_size, near
from ssl_locat.evaluation.shared.image_views import channels_of, normalisation
from ssl_locat.evaluation.shared.metrics import confusion_matrix, hungarian_scores, segmentation_scores
from ssl_locat.evaluation.shared.options import Count, Flag, FromEnd, Positive, SceneData, Whole
from ssl_locat.evaluation.shared.seg_datasets import VOID, zero_is_other
from ssl_locat.models.tokens import Tokens
from ssl_locat.runs.distributed import all_gather_cat, all_reduce_sum_, rank, world_size
from ssl_locat.runs.log import progress
from ssl_locat.seeds import mix64


def patch_frequencies(masks: Tensor, grid: tuple[int, int], num_classes: int, void_class: int | None = None) -> Tensor:
    """[B, N, C] share of each class among the pixels of each patch. masks [B, H, W] integers, 255 is void.

    Void pixels belong to no class, or to `void_class` (the reference: 0).
    """
    height, width = masks.shape[1] // grid[0], masks.shape[2] // grid[1]  # pixels of a patch
    # [B, rows, cols, height, width] -> [B, N, height * width]
    tiles = masks.long().unfold(1, height, height).unfold(2, width, width).reshape(len(masks), -1, height * width)
    if void_class is not None:
        tiles = torch.where(tiles == 255, void_class, tiles)
    tiles = torch.where(tiles == 255, num_classes, tiles)  # a bin of its own, cut off below
    # [B, N, C + 1]: one added for each pixel, in the bin of its class
    counts = torch.zeros(*tiles.shape[:2], num_classes + 1, device=masks.device)
    counts.scatter_add_(2, tiles, torch.ones(1, device=masks.device).expand(tiles.shape))
    return counts[..., :num_classes] / (height * width)  # void lowers the sum below 1: such a patch votes with less weight


def sample_patches(frequencies: Tensor, draws: Tensor, count: int) -> Tensor:
    """int64 [B, count]: the patches of each image that a bounded memory keeps. frequencies [B, N, C], draws [B, N] from U(0, 1).

    A patch scores, over the classes it holds, the number of patches of its image that hold that class; times luck; the smallest are kept,
    so that rare classes are remembered (the published sampling).
    """
    holds = (frequencies > 0).float()  # [B, N, C]
    crowd = torch.einsum("bnc,bc->bn", holds, holds.sum(1))  # holds.sum(1) [B, C]: in how many patches of the image a class is
    return (crowd * draws).topk(min(count, draws.shape[1]), dim=1, largest=False).indices


def retrieve(memory: Tensor, memory_labels: Tensor, queries: Tensor, neighbours: int, beta: float) -> Tensor:
    """Soft labels [Q, C] of queries [Q, D]: softmax(cosine / beta) over the nearest memories of all processes.

    memory [M, D] L2-normalised, memory_labels [M, C]: this process's part. Every process must bring the same number of queries.
    """
    # [W * Q, D], of all W processes: the memory is too large to be sent, queries are not
    everyone = all_gather_cat(F.normalize(queries, dim=1))
    similarity, where = nearest(memory, everyone, neighbours)  # [W * Q, k] each
    # each process answers all queries from its part, then keeps the answers to its own
    labels = memory_labels[where.to(memory_labels.device)].to(queries.device)  # [W * Q, k, C]
    missing = neighbours - similarity.shape[1]  # a small share of a small set: gathering wants one shape
    # a similarity of -inf has weight 0 below
    similarity, labels = F.pad(similarity, (0, missing), value=-torch.inf), F.pad(labels, (0, 0, 0, missing))
    # [W, W * Q, k]: row w holds what the memory of process w found for all queries
    similarity, labels = all_gather_cat(similarity[None]), all_gather_cat(labels[None])
    mine = slice(rank() * len(queries), (rank() + 1) * len(queries))
    similarity = similarity[:, mine].transpose(0, 1).flatten(1, 2)  # [Q, W * k]
    labels = labels[:, mine].transpose(0, 1).flatten(1, 2)  # [Q, W * k, C]
    best, order = similarity.topk(min(neighbours, similarity.shape[1]), dim=1)
    labels = labels.gather(1, order[..., None].expand(-1, -1, labels.shape[2]))
    return torch.einsum("qk,qkc->qc", (best / beta).softmax(1), labels)


def paint(soft_labels: Tensor, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
    """int64 [B, H, W]: soft labels [B, N, C] spread over the image bilinearly, and the strongest class of each pixel."""
    maps = soft_labels.transpose(1, 2).unflatten(2, grid)  # [B, C, rows, cols]
    return F.interpolate(maps, size=list(size), mode="bilinear", align_corners=False).argmax(1)


@torch.no_grad()
def build_memory(
    backbone: nn.Module,
    images: DenseImages,
    num_classes: int,
    *,
    read: Callable[[nn.Module, Tensor], Tokens],
    per_image: int | None,
    void_class: int | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(features [M, D] L2-normalised, class frequencies [M, C]) of this process's share of the training images, on the CPU."""
    device = next(backbone.parameters()).device
    features, labels = [], []
    with progress("memory", total=len(images), unit="images") as bar:
        for batch in images:
            tokens = read(backbone, batch.images.to(device))
            frequencies = patch_frequencies(batch.masks.to(device), tokens.grid, num_classes, void_class)
            # [B, N, D]
            rows, index = F.normalize(tokens.patches.float(), dim=2), batch.index
            if per_image is not None:
                draws = torch.stack([_draws(seed, int(i), rows.shape[1]) for i in index]).to(device)
                kept = sample_patches(frequencies, draws, per_image)[..., None]  # [B, per_image, 1]
                rows, frequencies = rows.take_along_dim(kept, 1), frequencies.take_along_dim(kept, 1)
            valid = batch.valid
            features.append(rows.cpu()[valid].flatten(0, 1))
            labels.append(frequencies.cpu()[valid].flatten(0, 1))
            bar.update(int(valid.sum()) * world_size())
    return torch.cat(features), torch.cat(labels)


def _draws(seed: int, index: int, count: int) -> Tensor:
    """U(0, 1) draws that belong to the image, not to the process that reads it."""
    return torch.rand(count, generator=torch.Generator().manual_seed(mix64(seed, index) >> 1))


@torch.no_grad()
def evaluate(
    backbone: nn.Module,
    *,
    data: SceneData,
    image_size: Count | None = 224,
    neighbours: Count = 30,
    beta: Positive = 0.02,
    memory_size: Count | None = None,
    block: FromEnd = -1,
    norm: Flag = False,
    paper_compat: Flag = False,
    augment: Flag = False,
    batch_size: Count = 32,
    workers: Whole | None = None,
    seed: Whole = 0,
) -> dict[str, float]:
    """miou, mean_accuracy, pixel_accuracy and miou_hungarian (what the reference reports), in percent.

    Images and masks are squashed to image_size x image_size and scored there, as published.

    Args:
        data: train, test: images with masks; num_classes; optionally layout, reduce_zero_label, image_key, mask_key (segmentation.py).
        neighbours, beta: of the attention over the memory.
        memory_size: most patches kept, over all training images; None keeps all (the paper's runs).
        block: whose patches are read, counted from the end (the paper: -1; Swin's last stage but one, -2).
        norm: read patches after the final norm and PRR instead of the last block's raw ones.
        paper_compat: the reference's oddities: the memory takes void pixels for class 0, and the third channel's std is 0.255. Where id 0
            means "other" (ADE20K), it is a class that is remembered and predicted, and void in the truth alone: 151 rows in the means.
        augment: the memory is made from one random view of each image, as in the reference, instead of the plain image.
    """
    image_size = check_image_size(backbone, image_size)
    check_depth(backbone, "block", block)
    if neighbours < 1 or beta <= 0:
        raise ConfigError(f"neighbours is {neighbours} and beta {beta}; expected at least 1 and above 0.")
    backbone.eval()
    device = next(backbone.parameters()).device
    read = partial(last_patches, norm=norm, block=block)
    mean, std = HUMMINGBIRD if paper_compat and len(normalisation(backbone)[0]) == 3 else normalisation(backbone)
    keep_other = paper_compat and zero_is_other(data)
    settings: dict[str, Any] = {"image_size": image_size, "mean": mean, "std": std, "batch_size": batch_size, "workers": workers}
    settings |= {"other_is_a_class": keep_other, "channels": channels_of(backbone)}
    train = dense_images(data, "train", augment_seed=seed if augment else None, **settings)
    test = dense_images(data, "test", **settings)
    num_classes = train.num_classes
    # the same from every image, however many processes hold it
    per_image = None if memory_size is None else max(1, memory_size // len(train))
    memory, memory_labels = build_memory(
        backbone, train, num_classes, read=read, per_image=per_image, void_class=0 if paper_compat else None, seed=seed
    )
    if not len(memory):
        raise DataError("the memory is empty: no process read a training image with its mask.")
    memory, memory_labels = near(memory, device), near(memory_labels, device)  # every batch of test images searches all of it
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    with progress("hummingbird", total=len(test), unit="images") as bar:
        for batch in test:
            tokens = read(backbone, batch.images.to(device))
            # [B * N, D] -> [B * N, C] -> [B, N, C] -> [B, H, W]
            soft = retrieve(memory, memory_labels, tokens.patches.float().flatten(0, 1), neighbours, beta)
            predicted = paint(soft.unflatten(0, tokens.patches.shape[:2]), tokens.grid, batch.masks.shape[1:]).cpu()
            truth = torch.where(batch.masks == 0, VOID, batch.masks) if keep_other else batch.masks
            confusion += confusion_matrix(predicted[batch.valid], truth[batch.valid], num_classes)
            bar.update(int(batch.valid.sum()) * world_size())
    confusion = all_reduce_sum_(confusion.to(device)).cpu()
    return {**segmentation_scores(confusion), "miou_hungarian": hungarian_scores(confusion)[0]}
