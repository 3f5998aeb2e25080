"""Semantic segmentation by a small head on frozen patches: the paper's probe (1x1 convolutions) and DINOv2's linear one.

    ssl-locat evaluate segmentation MODEL data.layout=ade20k data.train=ROOT data.test=ROOT

Images are augmented as mmseg does and tested whole, at their own size. The head alone learns; the backbone stays in eval mode.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ssl_locat.errors import ConfigError, DataError, did_you_mean
from ssl_locat.evaluation.shared.dense import IMAGENET, PreparedScene, keep_aspect, last_patches, read_scenes
from ssl_locat.evaluation.shared.features import check_depth, check_image_size, stride
from ssl_locat.evaluation.shared.heads import average_gradients, load_progress, purpose_of, save_progress
from ssl_locat.evaluation.shared.image_views import channels_of, normalisation, to_tensor
from ssl_locat.evaluation.shared.metrics import class_ious, confusion_matrix, segmentation_scores
from ssl_locat.evaluation.shared.options import Count, Flag, FromEnd, NotNegative, Positive, SceneData, Text, Whole
from ssl_locat.evaluation.shared.samples import check_damage, share
from ssl_locat.evaluation.shared.seg_augment import augment, pad
from ssl_locat.evaluation.shared.seg_datasets import VOID, Scenes, open_scenes
from ssl_locat.evaluation.shared.stopping import asked_to_stop, stopped
from ssl_locat.evaluation.shared.training_data import plan_for, training_batches
from ssl_locat.runs.distributed import SyncBatchNorm, all_reduce_sum_, rank, world_size
from ssl_locat.runs.log import progress

HEADS = ("mlp", "linear")
Scale = tuple[int, int]  # (long, short) side limits, pixels
Channels = tuple[float, ...]  # a number for each
SAVE_EVERY = 1000  # iterations
RISE, DIV = 0.25, 1e4  # of the one-cycle schedule: share of the run that rises; peak / start, and start / end


def make_head(kind: str, width: int, hidden: int, num_classes: int, *, paper_compat: bool) -> nn.Module:
    """patches [B, D, h, w] -> logits [B, C, h, w]. `mlp`: 1x1 to `hidden`, norm, GELU, 1x1; `linear`: batch norm, 1x1.

    The paper's "LayerNorm" is GroupNorm with one group in its code, over C, H and W together: under `paper_compat`; else per pixel.
    """
    if kind not in HEADS:
        raise ConfigError(f"head is {kind!r}; known: {', '.join(HEADS)}.{did_you_mean(kind, HEADS)}")
    if kind == "linear":
        head = nn.Sequential(SyncBatchNorm(width), nn.Conv2d(width, num_classes, 1))
    else:
        norm = nn.GroupNorm(1, hidden, eps=1e-5) if paper_compat else LayerNorm2d(hidden)
        head = nn.Sequential(nn.Conv2d(width, hidden, 1, bias=False), norm, nn.GELU(), nn.Conv2d(hidden, num_classes, 1))
        nn.init.kaiming_normal_(head[0].weight, mode="fan_out", nonlinearity="relu")
    # mmseg's start of a classifier: nearly uniform scores
    nn.init.normal_(head[-1].weight, std=0.01)
    nn.init.zeros_(head[-1].bias)
    return head


def segmentation_loss(logits: Tensor, masks: Tensor, *, paper_compat: bool) -> Tensor:
    """Cross-entropy at the masks' resolution, a mean over all processes' valid pixels; over void ones too under `paper_compat` (mmseg 0.30).

    logits [B, C, h, w], masks [B, H, W]. Averaging the gradients of equal shares over processes gives the gradient of that mean.
    """
    logits = F.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, masks, ignore_index=VOID, reduction="sum")
    if paper_compat:
        return total / masks.numel()
    # valid pixels of an average process: gradients are averaged later, so that dividing by all of them would divide twice
    count = all_reduce_sum_((masks != VOID).sum()) / world_size()
    return total / count.clamp(min=1)


def one_cycle(iteration: int, total: int, peak: float) -> float:
    """Learning rate of torch's linear OneCycleLR: peak / 1e4 to peak over a quarter of the run, then down to peak / 1e8."""
    start, top = peak / DIV, RISE * total - 1
    if iteration <= top:
        return start + (peak - start) * iteration / top
    return peak + (start / DIV - peak) * (iteration - top) / max(total - 1 - top, 1)


def to_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, D] -> [B, D, rows, cols]."""
    return patches.transpose(1, 2).unflatten(2, grid)


def evaluate(
    backbone: nn.Module,
    *,
    data: SceneData,
    head: Literal["mlp", "linear"] = "mlp",
    hidden: Count = 512,
    iterations: Count = 20_000,
    batch_size: Count = 32,
    image_size: Count = 512,
    scale: tuple[Count, Count] = (2048, 512),
    lr: Positive = 1e-3,
    weight_decay: NotNegative = 0.01,
    norm: Flag = False,
    block: FromEnd = -1,
    paper_compat: Flag = False,
    per_class: Flag = False,
    workers: Whole | None = None,
    seed: Whole = 0,
    resume_file: Text | None = None,
) -> dict[str, float]:
    """miou, mean_accuracy and pixel_accuracy in percent (and iou_0, iou_1, ... with `per_class`).

    Args:
        data: train, test: roots of a published `layout`, or shards or folders of image + mask with num_classes (seg_datasets.py).
        head: mlp (the paper's) or linear (DINOv2's). hidden: channels inside mlp.
        batch_size: over all processes. image_size: side of training crops, pixels.
        scale: (long, short) side limits that images are resized into, for testing and, times 0.5..2, for training.
        lr: AdamW's peak, on a linear one-cycle schedule.
        norm: read patches after final norm and PRR instead of the raw ones. block: counted from the end.
        paper_compat: the reference's GroupNorm, its loss averaged over void pixels, ImageNet's mean and std whatever the backbone's, and
            logits of a padded test image stretched over it.
        resume_file: progress is kept there, and the same command resumes from it (the commands give one by themselves).
    """
    purpose = purpose_of("segmentation", locals())
    check_image_size(backbone, image_size)
    check_depth(backbone, "block", block)
    if batch_size % world_size():
        raise ConfigError(
            f"batch_size is {batch_size}, over all processes; it must be a multiple of their number, {world_size()}."
        )
    train, test = open_scenes(data, "train"), open_scenes(data, "test")
    train.channels = test.channels = channels_of(backbone)
    device = next(backbone.parameters()).device
    mean, std = normalisation(backbone)
    mean, std = IMAGENET if paper_compat and len(mean) == 3 else (mean, std)
    backbone.eval()

    @torch.no_grad()
    def read(images: Tensor) -> Tensor:
        tokens = last_patches(backbone, images, norm=norm, block=block)
        return to_map(tokens.patches.float(), tokens.grid)

    # [1, D, rows, cols]
    width = read(torch.zeros(1, len(mean), image_size, image_size, device=device)).shape[1]
    # the head alone depends on the seed here; the caller's generator is left as it was
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        probe = make_head(head, width, hidden, train.num_classes, paper_compat=paper_compat)
    probe.to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)
    step, saved = load_progress(resume_file, probe, optimizer, purpose)
    plan = plan_for(train.dataset, seed, batch_size, saved)
    prepare = PreparedScene(train, partial(_training_view, size=image_size, scale=(scale[0], scale[1]), mean=mean, std=std))
    options: dict[str, Any] = {"first": step, "batch_size": batch_size, "device": device, "workers": workers, "data": data}
    with (
        training_batches(train.dataset, plan, prepare, **options, progress_file=resume_file) as batches,
        progress("segmentation", total=iterations, unit="iterations", start=step) as bar,
    ):
        while step < iterations:
            images, masks = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(step, iterations, lr)
            probe.train()
            loss = segmentation_loss(probe(read(images)), masks, paper_compat=paper_compat)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(probe)
            optimizer.step()
            step += 1
            bar.update()
            stop = asked_to_stop()
            if stop or step % SAVE_EVERY == 0 or step == iterations:
                save_progress(resume_file, step, probe, optimizer, purpose, plan.to_dict())
            if stop:
                raise stopped(f"segmentation, iteration {step} of {iterations}")
    confusion = test_whole(
        read, probe, test, data, (scale[0], scale[1]), mean, std, stride(backbone), workers, device, paper_compat=paper_compat
    )
    scores = segmentation_scores(confusion)
    if per_class:
        scores |= {f"iou_{index}": 100 * iou for index, iou in enumerate(class_ious(confusion).tolist()) if iou == iou}
    return scores


def _training_view(
    image: np.ndarray, mask: np.ndarray, seed: int, *, size: int, scale: Scale, mean: Channels, std: Channels
) -> tuple[Tensor, Tensor]:
    colour = np.round(255 * np.array(mean)).astype(image.dtype)  # zero after normalisation
    image, mask = pad(*augment(image, mask, seed, crop=size, scale=scale), size, colour)
    return to_tensor(image, mean, std), torch.from_numpy(mask)


def _test_view(
    image: np.ndarray, mask: np.ndarray, seed: int, *, scale: Scale, mean: Channels, std: Channels
) -> tuple[Tensor, Tensor]:
    return to_tensor(keep_aspect(image, *scale), mean, std), torch.from_numpy(mask)


@torch.no_grad()
def test_whole(
    read: Callable[[Tensor], Tensor],
    probe: nn.Module,
    scenes: Scenes,
    data: Mapping[str, Any],
    scale: Scale,
    mean: Channels,
    std: Channels,
    multiple: int,
    workers: int | None,
    device: torch.device,
    *,
    paper_compat: bool,
) -> Tensor:
    """Confusion [C, C] over whole images: resized into `scale`, padded to the patch grid, scored at the mask's own resolution.

    `paper_compat`: the padded grid's logits are stretched over the image, as in the reference, where timm pads inside the patch embedding
    and mmseg does not know: up to a patch out of place at the right and the bottom. Else the padding is cut off.
    """
    prepare = PreparedScene(scenes, partial(_test_view, scale=scale, mean=mean, std=std))
    probe.eval()
    indices, valid = share(len(scenes), rank(), world_size())
    lost = 0
    confusion = torch.zeros(scenes.num_classes, scenes.num_classes, dtype=torch.int64)
    with progress("testing", total=len(scenes), unit="images") as bar:
        # one by one: images have sizes of their own
        for ((image,), (mask,)), damaged in read_scenes(scenes, indices[valid], prepare, data, batch_size=1, workers=workers):
            lost += len(damaged)
            height, width = image.shape[1:]
            bottom, right = -height % multiple, -width % multiple
            # [1, C, rows, cols]
            maps = probe(read(F.pad(image[None].to(device), (0, right, 0, bottom))))
            resize = partial(F.interpolate, mode="bilinear", align_corners=False)
            padded = (height, width) if paper_compat else (height + bottom, width + right)
            logits = resize(maps, size=padded)[..., :height, :width]
            # scores are enlarged, not classes: borders then lie between patches
            predicted = resize(logits, size=mask.shape).argmax(1)[0].cpu()
            confusion += confusion_matrix(predicted, mask, scenes.num_classes)
            bar.update(world_size())
    check_damage(int(all_reduce_sum_(torch.tensor(lost))), len(scenes), data.get("max_bad") or 0.0)
    confusion = all_reduce_sum_(confusion.to(device)).cpu()
    if not confusion.sum():
        raise DataError("data.test holds no labelled pixel: every mask is void. Are num_classes and ignore_index right?")
    return confusion
