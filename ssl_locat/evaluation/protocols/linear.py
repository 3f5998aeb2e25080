"""Linear classification on frozen features: DINO's protocol, and a sweep over learning rates, blocks and pooling in one pass (DINOv2's).

    ssl-locat evaluate linear MODEL data.train=... data.test=...
    ssl-locat evaluate linear_sweep MODEL data.train=... data.test=...

Features are what the head saw: each block that is read goes through final norm and PRR, then gives its class token.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.errors import ConfigError
from ssl_locat.evaluation.shared.features import (
    Features,
    check_classes,
    check_depth,
    check_image_size,
    default_resize,
    extract,
    label_subset,
    split,
)
from ssl_locat.evaluation.shared.heads import average_gradients, load_progress, purpose_of, save_progress
from ssl_locat.evaluation.shared.image_views import centre_view, normalisation, training_view
from ssl_locat.evaluation.shared.metrics import top_hits
from ssl_locat.evaluation.shared.options import (
    Count,
    Counts,
    Flag,
    Flags,
    LabelledData,
    Portion,
    Positive,
    Positives,
    Share,
    Text,
    Whole,
)
from ssl_locat.evaluation.shared.samples import (
    LabelledSamples,
    Members,
    Pass,
    load_in_order,
    read_labels,
    same_classes,
    training_keys,
)
from ssl_locat.models.tokens import class_token, last_blocks, refine
from ssl_locat.runs.distributed import world_size
from ssl_locat.runs.log import progress
from ssl_locat.seeds import mix64


class Setting(NamedTuple):
    """One classifier: what it reads and how fast it learns."""

    blocks: int  # class tokens of the last so many blocks, side by side
    patch_mean: bool  # and the mean of the last block's patches
    lr: float  # at a batch of 256; scaled linearly


class Layout(NamedTuple):
    """Columns of `read_blocks`: class tokens of `blocks` blocks, then the patch mean."""

    blocks: int
    class_width: int
    mean_width: int

    def pick(self, features: Tensor, setting: Setting) -> Tensor:
        """[B, ...] the columns that a setting reads."""
        end = features.shape[1] - self.mean_width
        classes = features[:, end - setting.blocks * self.class_width : end]
        return torch.cat([classes, features[:, end:]], dim=1) if setting.patch_mean else classes


def read_blocks(backbone: nn.Module, images: Tensor, blocks: int) -> Tensor:
    """[B, blocks * C + D]: class tokens of the last blocks, the last one at the end, then the mean of the last block's patches."""
    refined = [refine(backbone, tokens) for tokens in last_blocks(backbone, images, blocks)]
    return torch.cat([class_token(backbone, tokens) for tokens in refined] + [refined[-1].patches.mean(1)], dim=1)


def make_heads(settings: Sequence[Setting], layout: Layout, num_classes: int, seed: int) -> nn.ModuleList:
    """One classifier for each setting, started as DINO's: weights N(0, 0.01), biases 0."""
    heads = nn.ModuleList()
    generator = torch.Generator().manual_seed(seed)
    for setting in settings:
        head = nn.Linear(setting.blocks * layout.class_width + setting.patch_mean * layout.mean_width, num_classes)
        head.weight.data.normal_(std=0.01, generator=generator)
        head.bias.data.zero_()
        heads.append(head)
    return heads


def annealed(done: float, steps: float, peak: float) -> float:
    """A cosine from `peak` to 0."""
    return peak * 0.5 * (1 + math.cos(math.pi * done / steps))


def train_heads(
    heads: nn.ModuleList, settings: Sequence[Setting], layout: Layout, batches: Iterator[tuple[Tensor, Tensor]], *,
    batch_size: int, steps: int, steps_per_epoch: int, epoch_decay: bool, resume_file: str | None, purpose: dict, first: int = 0,
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """SGD on all classifiers at once; `batches` gives (features [b, F], labels [b]) of this process from step `first` on.

    Learning rates follow a cosine to 0 over `steps`: once an epoch (DINO) with `epoch_decay`, else at every step.
    """
    with progress("linear", total=steps, unit="steps", start=first) as bar:
        for step, (features, labels) in enumerate(batches, start=first):
            done = step // steps_per_epoch * steps_per_epoch if epoch_decay else step
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group["lr"] = annealed(done, steps, setting.lr * batch_size / 256)
            loss = sum(
                F.cross_entropy(head(layout.pick(features, setting)), labels)
                for head, setting in zip(heads, settings, strict=True)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(heads)
            optimizer.step()
            bar.update()
            if (step + 1) % steps_per_epoch == 0:
                save_progress(resume_file, step + 1, heads, optimizer, purpose)


@torch.no_grad()
def accuracies(
    heads: nn.ModuleList, settings: Sequence[Setting], layout: Layout, table: Features, device: torch.device
) -> list[dict[str, float]]:
    """top1 and top5 in percent of each classifier."""
    hits = torch.zeros(len(settings), 2)
    for start in range(0, len(table.labels), 4096):
        features, labels = table.values[start : start + 4096].to(device), table.labels[start : start + 4096].to(device)
        for index, (head, setting) in enumerate(zip(heads, settings, strict=True)):
            logits = head(layout.pick(features, setting))
            hits[index] += torch.stack([top_hits(logits, labels, k).sum() for k in (1, 5)]).cpu()
    return [{"top1": 100 * one.item() / len(table.labels), "top5": 100 * five.item() / len(table.labels)} for one, five in hits]


class Task:
    """The data of a linear protocol on one backbone: which images train, which choose, which test, and their features."""

    def __init__(
        self, backbone: nn.Module, data: dict, *, blocks: int, image_size: int | None, resize_size: int | None, train_fraction: float,
        held_out: float, augment: bool, batch_size: int, workers: int, seed: int,
    ):  # fmt: skip
        size = check_image_size(backbone, image_size)
        check_depth(backbone, "blocks", blocks)
        if batch_size % world_size():
            raise ConfigError(
                f"batch_size is {batch_size}, over all processes; it must be a multiple of their number, {world_size()}."
            )
        self.backbone, self.blocks, self.augment, self.seed = backbone.eval(), blocks, augment, seed
        self.batch_size, self.workers = batch_size, workers
        self.device = next(backbone.parameters()).device
        mean, std = normalisation(backbone)
        keys = data.get("image_key"), data.get("label_key")
        members, test = Members(split(data, "train")), Members(split(data, "test"))
        same_classes(members, test)
        centre = partial(centre_view, size=size, resize=resize_size or default_resize(size), mean=mean, std=std)
        self.plain, self.test = (LabelledSamples(part, centre, *keys, len(mean)) for part in (members, test))
        self.views = LabelledSamples(members, partial(training_view, size=size, mean=mean, std=std), *keys, len(mean))
        labels, test_labels = (read_labels(part, keys[1], workers) for part in (members, test))
        self.num_classes = check_classes(labels, test_labels, data.get("num_classes"))
        chosen = label_subset(labels, train_fraction, seed)
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(mix64(seed, 1) >> 1))
        cut = round(held_out * len(chosen))
        self.validation, self.train = chosen[order[:cut]].sort().values, chosen[order[cut:]].sort().values
        if not len(self.train):
            raise ConfigError(f"{len(chosen)} training images are too few to hold out {held_out:.0%} of them.")
        self.batch_size = min(batch_size, len(self.train) // world_size() * world_size())
        self.steps_per_epoch = len(self.train) // self.batch_size
        with torch.no_grad():
            tokens = last_blocks(backbone, torch.zeros(1, len(mean), size, size, device=self.device), blocks)[-1]
            tokens = refine(backbone, tokens)
            self.layout = Layout(blocks, class_token(backbone, tokens).shape[1], tokens.patches.shape[2])

    def features(self, samples: LabelledSamples, positions: Tensor | None = None) -> Features:
        positions = torch.arange(len(samples.members)) if positions is None else positions
        images = Pass(samples, positions, batch_size=self.batch_size, workers=self.workers)
        return extract(self.backbone, images, read=partial(read_blocks, blocks=self.blocks))

    def batches(self, first: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels of steps first..steps-1, this process's share, a pure function of seed and step."""
        keys = training_keys(len(self.train), self.batch_size, first, steps, self.seed)
        if not self.augment:
            table = self.features(self.plain, self.train)
            for batch in keys:
                rows = torch.tensor([index for index, _ in batch])
                yield table.values[rows].to(self.device), table.labels[rows].to(self.device)
            return
        keys = ([(int(self.train[index]), seed) for index, seed in batch] for batch in keys)
        for batch in load_in_order(self.views, keys, self.workers):
            images, labels = batch
            with torch.no_grad():
                features = read_blocks(self.backbone, images.to(self.device), self.blocks).float()
            yield features, torch.tensor(labels, device=self.device)

    def fit(
        self, settings: Sequence[Setting], epochs: int, *, epoch_decay: bool, resume_file: str | None, purpose: dict
    ) -> nn.ModuleList:
        """Trained classifiers, one for each setting. purpose: what resume_file must belong to (heads.purpose_of)."""
        heads = make_heads(settings, self.layout, self.num_classes, self.seed).to(self.device)
        groups = [{"params": list(head.parameters())} for head in heads]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0)
        steps = epochs * self.steps_per_epoch
        first = load_progress(resume_file, heads, optimizer, purpose)
        train_heads(
            heads, settings, self.layout, self.batches(first, steps), batch_size=self.batch_size, steps=steps, first=first,
            steps_per_epoch=self.steps_per_epoch, epoch_decay=epoch_decay, resume_file=resume_file, purpose=purpose, optimizer=optimizer,
        )  # fmt: skip
        return heads


# arguments that both protocols hand to Task as they are
TASK_KEYS = ("image_size", "resize_size", "train_fraction", "augment", "batch_size", "workers", "seed")


def train_and_test(
    protocol: str, arguments: dict[str, Any], settings: Sequence[Setting], *, held_out: float, epoch_decay: bool
) -> tuple[dict[str, float], Setting, float | None]:
    """What both protocols do: train all classifiers in one pass, choose one on the held-out images, test that one alone.

    Args:
        arguments: of the protocol's function, its `locals()` at the start.
        held_out: share of the training images to choose by; 0 where there is but one classifier.

    Returns the test scores, the setting that was chosen, and its top1 on the held-out images (None without any).
    """
    purpose = purpose_of(protocol, arguments)
    # the deepest classifier decides what is read; the others read a part of its columns
    task = Task(
        arguments["backbone"], arguments["data"], blocks=max(setting.blocks for setting in settings), held_out=held_out,
        **{name: arguments[name] for name in TASK_KEYS},
    )  # fmt: skip
    heads = task.fit(
        settings, arguments["epochs"], epoch_decay=epoch_decay, resume_file=arguments["resume_file"], purpose=purpose
    )
    best, best_top1 = 0, None
    if held_out:
        validation = accuracies(heads, settings, task.layout, task.features(task.plain, task.validation), task.device)
        best = max(range(len(settings)), key=lambda index: validation[index]["top1"])
        best_top1 = validation[best]["top1"]
    one = slice(best, best + 1)  # the test images are read once, after the choice
    (scores,) = accuracies(heads[one], settings[one], task.layout, task.features(task.test), task.device)
    return scores, settings[best], best_top1


def evaluate(
    backbone: nn.Module,
    *,
    data: LabelledData,
    blocks: Count = 1,
    patch_mean: Flag = False,
    epochs: Count = 100,
    lr: Positive = 1e-3,
    batch_size: Count = 1024,
    image_size: Count | None = None,
    resize_size: Count | None = None,
    augment: Flag = True,
    train_fraction: Share = 1.0,
    workers: Whole = 8,
    seed: Whole = 0,
    resume_file: Text | None = None,
) -> dict[str, float]:
    """top1 and top5 in percent of one linear classifier, DINO's eval_linear: SGD, momentum 0.9, no weight decay, a cosine by epoch.

    Args:
        data: train, test (labelled; DATA specs), optionally num_classes, image_key, label_key.
        blocks: last blocks whose class tokens are read. patch_mean: the mean of the last block's patches too.
        lr: at a batch of 256, scaled linearly. batch_size: images over all processes.
        augment: random resized crops and flips; false reads each image once, centre-cropped, and trains on the kept features.
        train_fraction: share of each class's labels that is used (0.01, 0.1).
        resume_file: progress is kept there after every epoch, and the same command resumes from it.
    """
    arguments = dict(locals())  # a copy: a debugger refreshes the one that locals() gives
    scores, _, _ = train_and_test("linear", arguments, [Setting(blocks, patch_mean, lr)], held_out=0.0, epoch_decay=True)
    return scores


def sweep(
    backbone: nn.Module,
    *,
    data: LabelledData,
    blocks: Counts = (1, 4),
    patch_mean: Flags = (False, True),
    lrs: Positives = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    held_out: Portion = 0.1,
    epochs: Count = 10,
    batch_size: Count = 1024,
    image_size: Count | None = None,
    resize_size: Count | None = None,
    augment: Flag = True,
    train_fraction: Share = 1.0,
    workers: Whole = 8,
    seed: Whole = 0,
    resume_file: Text | None = None,
) -> dict[str, float]:
    """top1 and top5 in percent of the best of blocks x patch_mean x lrs classifiers, all trained in one pass over the images (DINOv2's linear).

    The best is chosen on `held_out` of the training images; the test images are read once, after the choice. Also returns
    validation_top1, and the choice as best_blocks, best_patch_mean (0 or 1) and best_lr. The other keys are those of `evaluate`.
    """
    arguments = dict(locals())  # a copy: a debugger refreshes the one that locals() gives
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out is {held_out}; expected a share of the training images in (0, 1) to choose by, such as 0.1.")
    settings = [Setting(count, mean, lr) for count in blocks for mean in patch_mean for lr in lrs]
    scores, chosen, validation_top1 = train_and_test("linear_sweep", arguments, settings, held_out=held_out, epoch_decay=False)
    return {
        **scores,
        "validation_top1": validation_top1,
        "best_blocks": chosen.blocks,
        "best_patch_mean": float(chosen.patch_mean),
        "best_lr": chosen.lr,
    }
