"""Supervised classification as the LocAt paper trains it: from scratch, or fine-tuning a pretrained backbone with layer-wise decay.

    ssl-locat evaluate supervised timm:locatvit_tiny data.train=... data.test=... data.num_classes=1000
    ssl-locat evaluate finetune RUN data.train=... data.test=... data.num_classes=100

timm supplies the parts: RandAugment, Mixup/CutMix, random erasing, drop path, layer decay. Every step is a function of the seed and its
number, so that a stopped run resumes with the same crops and the same mixing.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from ssl_locat.errors import ConfigError
from ssl_locat.evaluation.shared.classifier import test_accuracy
from ssl_locat.evaluation.shared.features import check_image_size, labelled_for_training, split
from ssl_locat.evaluation.shared.heads import load_progress, purpose_of, save_progress
from ssl_locat.evaluation.shared.image_views import centre_view, channels_of, training_view
from ssl_locat.evaluation.shared.image_views import normalisation as normalisation_of
from ssl_locat.evaluation.shared.options import (
    BelowOne,
    Count,
    Distill,
    LabelledData,
    NotNegative,
    Positive,
    Probability,
    Share,
    Text,
    Whole,
)
from ssl_locat.evaluation.shared.samples import LabelledImage, Pass, open_split, same_classes
from ssl_locat.evaluation.shared.stopping import asked_to_stop, stopped
from ssl_locat.evaluation.shared.training_data import plan_for, training_batches
from ssl_locat.export.timm_folder import check_timm_target, write_timm_whole
from ssl_locat.models.architecture import HALF
from ssl_locat.models.backbone import load_backbone
from ssl_locat.models.layouts import IMAGENET
from ssl_locat.runs.distributed import barrier, is_main, rank, world_size
from ssl_locat.runs.folder import save_tensors
from ssl_locat.runs.log import progress
from ssl_locat.seeds import mix64

DROP_PATH = {192: 0.1, 384: 0.2, 768: 0.4, 1024: 0.4, 96: 0.1, 128: 0.4}  # by width: ViT tiny to large; Swin tiny, base
SAVE_EVERY = 1000  # steps, and at the end of every epoch
LOW = 1e-7  # lr at both ends of the schedule
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def triangle(update: int, total: int, warmup: int, peak: float) -> float:
    """The paper's "one-cycle": LOW to `peak` over `warmup` updates, then in a straight line to LOW at `total`, and there it stays."""
    if update < warmup:
        return LOW + (peak - LOW) * update / warmup
    return LOW + (peak - LOW) * max(total - update, 0) / max(total - warmup, 1)


def set_drop_path(backbone: nn.Module, rate: float) -> None:
    """Stochastic depth growing linearly from 0 in the first block to `rate` in the last, whatever the model was built with."""
    blocks = [module for module in backbone.modules() if any(name.startswith("drop_path") for name, _ in module.named_children())]
    for index, block in enumerate(blocks):
        probability = rate * index / max(len(blocks) - 1, 1)
        for name, _ in list(block.named_children()):
            if name.startswith("drop_path"):
                setattr(block, name, DropPath(probability) if probability else nn.Identity())


def parameter_groups(backbone: nn.Module, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
    """AdamW's groups: biases, norms, tokens and positions do not decay; with `layer_decay` a group's `lr_scale` is this to the power of its
    distance from the head."""
    # tokens and positions, which the model names; biases and norms are exempt by their shape
    exempt = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    # by name: what stands in third place is not the same in timm's two functions
    if layer_decay:
        return param_groups_layer_decay(backbone, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    return param_groups_weight_decay(backbone, weight_decay, no_weight_decay_list=exempt)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators at `seed` inside, as they were outside: timm's augmentation draws from all three."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would reseed the GPUs too; numpy takes 32 bits
    torch.random.default_generator.manual_seed(seed >> 1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation, with 0 bits too (black), which its RandAugment draws now and then and Pillow 12 refuses."""
    if bits >= 8:
        return picture
    return ImageOps.posterize(picture, bits) if bits >= 1 else Image.new(picture.mode, picture.size)


def training_transform(
    size: int, mean: tuple, std: tuple, *, scale: tuple[float, float], auto_augment: str | None
) -> Callable[[Image.Image], Tensor]:
    """timm's augmentation of one picture -> [3, size, size], normalised. Random erasing comes later, after mixing."""
    try:
        transform = create_transform(
            size, is_training=True, scale=(scale[0], scale[1]), auto_augment=auto_augment, color_jitter=0.4, interpolation="random",
            mean=mean, std=std,
        )  # fmt: skip
    except AssertionError:
        raise ConfigError(
            f"auto_augment is {auto_augment!r}, which timm does not know; expected its notation, such as rand-m9-mstd0.5-inc1, or null."
        ) from None
    # replaced in the built transform, so that all else stays as timm draws it
    for part in transform.transforms:
        for operation in getattr(part, "ops", []):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
    return transform


def show_as(backbone: nn.Module, normalisation_name: str) -> None:
    """Note in `pretrained_cfg`, which exports carry, the mean and std that this training shows its images with.

    release: those of the LocAt paper's code, which left ViT, RegViT and Jumbo (with LocAt or without) at timm's 0.5 and gave ImageNet's to
    RoPEViT and Swin.
    """
    if normalisation_name == "release":
        normalisation_name = "half" if isinstance(backbone, VisionTransformer) else "imagenet"
    if normalisation_name != "model":
        mean, std = HALF if normalisation_name == "half" else IMAGENET
        backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": mean, "std": std}


class Distillation:
    """The agreement with a trained classifier (Hinton et al., arXiv:1503.02531): (1 - weight) CE + weight T^2 KL(teacher || student).

    The paper's Jumbo rows are trained on the agreement alone, at T = 1: the defaults.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, model: str, weight: float = 1.0, temperature: float = 1.0):
        device = next(backbone.parameters()).device
        self.teacher, self.weight, self.temperature = (
            load_backbone(model).to(device).eval().requires_grad_(False),
            weight,
            temperature,
        )
        if self.teacher.num_classes != num_classes:
            raise ConfigError(
                f"distill.model {model} has {self.teacher.num_classes} classes, the data {num_classes}. It must be a classifier of the same."
            )
        (mean, std), (theirs, spread) = (
            [torch.tensor(part, device=device)[:, None, None] for part in normalisation_of(one)]
            for one in (backbone, self.teacher)
        )
        # x * std + mean is the picture, (picture - theirs) / spread what the teacher expects: one product and one sum
        self.gain, self.offset = std / spread, (mean - theirs) / spread

    def __call__(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            targets = (self.teacher(images * self.gain + self.offset).float() / self.temperature).softmax(1)
        # "batchmean" is the divergence as defined; "mean" would divide by the classes too
        agreement = F.kl_div((logits / self.temperature).log_softmax(1), targets, reduction="batchmean")
        # T^2: gradients of softened targets shrink by 1 / T^2 (section 2)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * agreement


def evaluate(
    backbone: nn.Module,
    *,
    data: LabelledData,
    epochs: Count = 300,
    warmup_epochs: NotNegative = 20,
    lr: Positive | None = None,
    batch_size: Count = 1024,
    weight_decay: NotNegative = 0.05,
    layer_decay: Share | None = None,
    clip_grad: NotNegative = 5.0,
    drop_path: BelowOne | None = None,
    label_smoothing: BelowOne = 0.1,
    mixup: NotNegative = 0.8,
    cutmix: NotNegative = 1.0,
    auto_augment: Text | None = "rand-m9-mstd0.5-inc1",
    random_erasing: Probability = 0.25,
    crop_scale: tuple[Share, Share] = (0.08, 1.0),
    crop_fraction: Share = 0.9,
    normalisation: Literal["model", "release", "half", "imagenet"] = "release",
    distill: Distill | None = None,
    image_size: Count | None = None,
    train_fraction: Share = 1.0,
    precision: Literal["fp32", "bf16", "fp16"] = "fp16",
    workers: Whole | None = None,
    seed: Whole = 42,
    resume_file: Text | None = None,
    weights_file: Text | None = None,
    export: Text | None = None,
) -> dict[str, float]:
    """top1 and top5 in percent on data.test of the whole network, trained on data.train. The backbone given is changed.

    Args:
        data: train, test (labelled; DATA specs), optionally num_classes, image_key, label_key.
        lr: AdamW's peak; None: 5e-4 * batch_size / 512. warmup_epochs: linear from 1e-7; then linear to 1e-7 at the end.
        batch_size: images over all processes.
        layer_decay: each block's lr is this times the next one's; None for training from scratch.
        clip_grad: global norm; 0: none. drop_path: of the last block; None: 0.1, 0.2, 0.4 for tiny, small, base and larger.
        mixup, cutmix: alphas; both 0: none. auto_augment: timm's notation. random_erasing: probability, after mixing.
        crop_scale: of the training crop's area. crop_fraction: of a test image's side that the centre crop keeps (timm: size 224 of 248).
        normalisation: mean and std of the images, and of what is exported: the release's for its family (as for training from scratch), the
            model's own, 0.5 (half), ImageNet's.
        distill: {model: MODEL with a classifier, weight: 1.0, temperature: 1.0}, weight 1: no labels at all; None: labels alone.
        precision: fp32, bf16 or fp16 (with loss scaling) autocast.
        resume_file: progress is kept there after every epoch and every 1000 steps, and the same command resumes from it (the commands
            give one by themselves).
        weights_file: a .safetensors for the trained weights; as a MODEL it is evaluated by the other protocols.
        export: a folder in timm's format for weights and classifier, with size, crop, mean and std; likewise a MODEL.
    """
    purpose = purpose_of("supervised", locals())
    if not layer_decay:
        purpose["parameter_groups"] = 2  # states are kept by their place in the groups; in 1, tokens and positions decayed
    size = check_image_size(backbone, image_size)
    if precision not in DTYPES:
        raise ConfigError(f"precision is {precision!r}; known: {', '.join(DTYPES)}.")
    if batch_size % (2 * world_size()):
        raise ConfigError(
            f"batch_size is {batch_size}, over all processes; mixing pairs images, so it must be a multiple of {2 * world_size()}."
        )
    device = next(backbone.parameters()).device
    channels = channels_of(backbone)
    if channels == 3:  # a convention of RGB; other channels have their own
        show_as(backbone, normalisation)
    mean, std = normalisation_of(backbone)
    if export:
        check_timm_target(Path(export))
    if channels == 3:
        train_view = partial(_training_view, training_transform(size, mean, std, scale=crop_scale, auto_augment=auto_augment))
    elif auto_augment:
        raise ConfigError(
            f"auto_augment is {auto_augment!r}, which is made for 8-bit RGB; this backbone takes {len(mean)} channels by data.channels or "
            "in_chans: give auto_augment=null, which leaves crops, flips, mixing and erasing."
        )
    else:
        train_view = partial(training_view, size=size, mean=mean, std=std, scale=(crop_scale[0], crop_scale[1]))
    test_view = partial(centre_view, size=size, resize=math.floor(size / crop_fraction), mean=mean, std=std)
    for name in ("train", "test"):
        split(data, name)
    train, test = open_split(data, "train"), open_split(data, "test")
    same_classes(train, test)
    train, num_classes = labelled_for_training(train, test, data, train_fraction, seed, workers)
    # a set smaller than a batch is one batch, of an even number on each process
    batch_size = min(batch_size, len(train) // (2 * world_size()) * 2 * world_size())
    per_epoch = len(train) // batch_size
    total, warmup = epochs * per_epoch, round(warmup_epochs * per_epoch)

    torch.manual_seed(seed)
    backbone.reset_classifier(num_classes)
    backbone.to(device)
    set_drop_path(backbone, DROP_PATH.get(backbone.embed_dim, 0.1) if drop_path is None else drop_path)
    optimizer = torch.optim.AdamW(parameter_groups(backbone, weight_decay, layer_decay), lr=LOW)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type == "cuda")
    mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes) if mixup or cutmix else None
    # on the mixed batch, as timm's training does it: an erased part is noise at full strength
    erase = RandomErasing(random_erasing, mode="pixel", device=device) if random_erasing else None
    distillation = Distillation(backbone, num_classes, **distill) if distill else None
    peak = lr or 5e-4 * batch_size / 512
    step, saved = load_progress(resume_file, backbone, optimizer, purpose, scaler)
    plan = plan_for(train, seed, batch_size, saved)
    # after load_progress: DDP takes its first parameters from rank 0, and all have the same by then
    network = nn.parallel.DistributedDataParallel(backbone) if world_size() > 1 else backbone

    def save() -> None:
        save_progress(resume_file, step, backbone, optimizer, purpose, plan.to_dict(), scaler)

    prepare = LabelledImage(train_view, data, channels, num_classes)
    options: dict[str, Any] = {"first": step, "batch_size": batch_size, "device": device, "workers": workers, "data": data}
    network.train()
    with (
        training_batches(train, plan, prepare, **options, progress_file=resume_file) as batches,
        progress("supervised", total=total, unit="steps", start=step) as bar,
    ):
        while step < total:
            images, targets = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = triangle(step, total, warmup, peak) * group.get("lr_scale", 1.0)
            torch.manual_seed(mix64(seed, step, rank()) >> 1)  # drop path, noise of erasing
            np.random.seed(mix64(seed, step, rank()) % 2**32)  # mixing
            random.seed(mix64(seed, step, rank()))  # erasing
            if mix:
                images, targets = mix(images, targets)
            if erase:
                images = erase(images)
            with torch.autocast(device.type, dtype=DTYPES[precision]) if DTYPES[precision] else nullcontext():
                logits = network(images)
            logits = logits.float()
            # Mixup smooths its targets itself; beside it smoothing would count twice
            loss = F.cross_entropy(logits, targets, label_smoothing=0.0 if mix else label_smoothing)
            if distillation:
                loss = distillation(loss, logits, images)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            # before clipping: the norm is that of true gradients, not of those times the loss scale
            scaler.unscale_(optimizer)
            if clip_grad:
                nn.utils.clip_grad_norm_(backbone.parameters(), clip_grad)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            shown: dict[str, Any] = {"loss": loss.item()} if step % 50 == 0 else {}  # .item() waits for the device
            bar.update(**shown)
            stop = asked_to_stop()
            if stop or step % per_epoch == 0 or step % SAVE_EVERY == 0:
                save()
            if stop:
                raise stopped(f"supervised training, step {step} of {total}")
    # as the test below shows them: `validate` of what is exported gives the same numbers
    shown_as = {"mean": mean, "std": std, "crop_pct": crop_fraction, "interpolation": "bicubic"}
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, **shown_as, "input_size": (3, size, size)}
    if weights_file and is_main():
        weights = {name: tensor.cpu().contiguous() for name, tensor in backbone.state_dict().items()}
        save_tensors(weights, weights_file, metadata={"pretrained_cfg": json.dumps(shown_as)})
    if export and is_main():
        write_timm_whole(backbone, Path(export))
    barrier()
    tested = Pass(
        test, LabelledImage(test_view, data, channels, num_classes), batch_size=batch_size // world_size(), workers=workers,
        max_bad=data.get("max_bad") or 0.0,
    )  # fmt: skip
    return test_accuracy(backbone, tested, device)


def _training_view(augment: Callable[[Image.Image], Tensor], image: np.ndarray, seed: int) -> Tensor:
    """timm's augmentation, a function of the seed."""
    with seeded(seed):
        return augment(Image.fromarray(image))
