"""Linear classification on frozen features: DINO's protocol, and a sweep over learning rates, blocks and pooling in one pass (DINOv2's).

    ssl-locat evaluate linear MODEL data.train=... data.test=...
    ssl-locat evaluate linear_sweep MODEL data.train=... data.test=...

Features are what the head saw: each block that is read goes through final norm and PRR, then gives its class token.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.data.shards.selections import Chosen, Joined
from ssl_locat.data.stream.plan import Plan
from ssl_locat.errors import ConfigError
from ssl_locat.evaluation.shared.features import (
    Features,
    check_depth,
    check_image_size,
    default_resize,
    extract,
    labelled_for_training,
    reading,
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
from ssl_locat.evaluation.shared.samples import LabelledImage, Pass, open_split, same_classes
from ssl_locat.evaluation.shared.stopping import asked_to_stop, stopped
from ssl_locat.evaluation.shared.training_data import MAX_BAD, plan_for, training_batches
from ssl_locat.models.tokens import class_token, last_blocks, refine
from ssl_locat.runs.distributed import rank, world_size
from ssl_locat.runs.log import progress
from ssl_locat.seeds import mix64

SAVE_EVERY = 1000  # steps, and at the end of every epoch


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
    # the norm and PRR of the last block serve the earlier ones too: DINOv2 reads them so
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
    batch_size: int, steps: int, steps_per_epoch: int, epoch_decay: bool, save: Callable[[int], None], first: int = 0,
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """SGD on all classifiers at once; `batches` gives (features [b, F], labels [b]) of this process from step `first` on.

    Learning rates follow a cosine to 0 over `steps`: once an epoch (DINO) with `epoch_decay`, else at every step.
    """
    with progress("linear", total=steps, unit="steps", start=first) as bar:
        for step, (features, labels) in zip(range(first, steps), batches, strict=False):
            done = step // steps_per_epoch * steps_per_epoch if epoch_decay else step
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group["lr"] = annealed(done, steps, setting.lr * batch_size / 256)
            # the classifiers share nothing: the gradient of the sum is the gradient of each
            loss: Any = sum(
                F.cross_entropy(head(layout.pick(features, setting)), labels)
                for head, setting in zip(heads, settings, strict=True)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(heads)
            optimizer.step()
            bar.update()
            stop = asked_to_stop()
            if stop or (step + 1) % steps_per_epoch == 0 or (step + 1) % SAVE_EVERY == 0:
                save(step + 1)
            if stop:
                raise stopped(f"linear, step {step + 1} of {steps}")


@torch.no_grad()
def accuracies(
    heads: nn.ModuleList, settings: Sequence[Setting], layout: Layout, table: Features, device: torch.device
) -> list[dict[str, float]]:
    """top1 and top5 in percent of each classifier."""
    hits = torch.zeros(len(settings), 2)
    # 4096 rows at a time: one product of all test features with many classifiers would not fit
    for start in range(0, len(table.labels), 4096):
        features, labels = table.values[start : start + 4096].to(device), table.labels[start : start + 4096].to(device)
        for index, (head, setting) in enumerate(zip(heads, settings, strict=True)):
            logits = head(layout.pick(features, setting))
            hits[index] += torch.stack([top_hits(logits, labels, k).sum() for k in (1, 5)]).cpu()
    return [{"top1": 100 * one.item() / len(table.labels), "top5": 100 * five.item() / len(table.labels)} for one, five in hits]


def batches_of_rows(total: int, batch_size: int, first: int, seed: int) -> Iterator[Tensor]:
    """int64 [b]: rows of a table for steps `first`, ..., this process's part of each; a new order every epoch, the incomplete batch left out.

    The order depends on neither the number of processes nor where it begins.
    """
    per_epoch, mine = total // batch_size, batch_size // world_size()
    for epoch in itertools.count(first // per_epoch):
        # every process draws the whole order and takes its part of each batch
        order = torch.randperm(total, generator=torch.Generator().manual_seed(mix64(seed, epoch) >> 1))
        for step in range(max(first - epoch * per_epoch, 0), per_epoch):
            start = step * batch_size + rank() * mine
            yield order[start : start + mine]


class Task:
    """The data of a linear protocol on one backbone: which images train, which choose, which test, and their features."""

    def __init__(
        self, backbone: nn.Module, data: Mapping[str, Any], *, blocks: int, image_size: int | None, resize_size: int | None, train_fraction: float,
        held_out: float, augment: bool, batch_size: int, workers: int | None, seed: int, precision: str | None,
    ):  # fmt: skip
        size = check_image_size(backbone, image_size)
        check_depth(backbone, "blocks", blocks)
        if batch_size % world_size():
            raise ConfigError(
                f"batch_size is {batch_size}, over all processes; it must be a multiple of their number, {world_size()}."
            )
        self.backbone, self.blocks, self.augment, self.seed = backbone.eval(), blocks, augment, seed
        self.data, self.workers, self.precision = data, workers, precision
        self.device = next(backbone.parameters()).device
        mean, std = normalisation(backbone)
        for name in ("train", "test"):
            split(data, name)
        train, self.test = open_split(data, "train"), open_split(data, "test")
        same_classes(train, self.test)
        train, self.num_classes = labelled_for_training(train, self.test, data, train_fraction, seed, workers)
        centre = partial(centre_view, size=size, resize=resize_size or default_resize(size), mean=mean, std=std)
        cropped = partial(training_view, size=size, mean=mean, std=std)
        self.plain, self.views = (LabelledImage(view, data, len(mean), self.num_classes) for view in (centre, cropped))
        cut = round(held_out * len(train))
        if cut >= len(train):
            raise ConfigError(f"{len(train)} training images are too few to hold out {held_out:.0%} of them.")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(mix64(seed, 1) >> 1))
        self.train = train
        if cut:
            # ascending, so that neighbours are read together
            self.validation, self.train = (Chosen(train, part.sort().values.numpy()) for part in (order[:cut], order[cut:]))
        self.batch_size = min(batch_size, len(self.train) // world_size() * world_size())
        self.steps_per_epoch = len(self.train) // self.batch_size
        with torch.no_grad():
            # widths by looking: Swin's stages and Jumbo's class token are not `embed_dim` wide
            tokens = last_blocks(backbone, torch.zeros(1, len(mean), size, size, device=self.device), blocks)[-1]
            tokens = refine(backbone, tokens)
            self.layout = Layout(blocks, class_token(backbone, tokens).shape[1], tokens.patches.shape[2])

    def features(self, dataset: Joined | Chosen) -> Features:
        """Of centre crops. Among training images some may be damaged, unless data.max_bad says otherwise."""
        given = self.data.get("max_bad")
        max_bad = given if given is not None else 0.0 if dataset is self.test else MAX_BAD
        images = Pass(dataset, self.plain, batch_size=self.batch_size, workers=self.workers, max_bad=max_bad)
        return extract(self.backbone, images, partial(read_blocks, blocks=self.blocks), self.precision)

    @contextmanager
    def batches(self, first: int, plan: Plan, progress_file: str | None) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Endless features and labels from step `first` on, this process's share, a pure function of seed and step."""
        if not self.augment:
            yield self._kept(first)
            return
        options: dict[str, Any] = {
            "first": first,
            "batch_size": self.batch_size,
            "device": self.device,
            "workers": self.workers,
            "data": self.data,
        }
        with training_batches(self.train, plan, self.views, **options, progress_file=progress_file) as batches:
            yield (self._read(*batch) for batch in batches)

    def _read(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with reading(self.device, self.precision):
            return read_blocks(self.backbone, images, self.blocks).float(), labels

    def _kept(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each image is read once; batches are rows of the features that are kept."""
        table = self.features(self.train)
        for rows in batches_of_rows(len(table.labels), self.batch_size, first, self.seed):
            yield table.values[rows].to(self.device), table.labels[rows].to(self.device)

    def fit(
        self, settings: Sequence[Setting], epochs: int, *, epoch_decay: bool, resume_file: str | None, purpose: dict
    ) -> nn.ModuleList:
        """Trained classifiers, one for each setting. purpose: what resume_file must belong to (heads.purpose_of)."""
        heads = make_heads(settings, self.layout, self.num_classes, self.seed).to(self.device)
        # one group for each classifier: they differ in lr, which train_heads sets
        groups = [{"params": list(head.parameters())} for head in heads]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0)
        steps = epochs * self.steps_per_epoch
        first, saved = load_progress(resume_file, heads, optimizer, purpose)
        plan = plan_for(self.train, self.seed, self.batch_size, saved)
        with self.batches(first, plan, resume_file) as batches:
            train_heads(
                heads, settings, self.layout, batches, batch_size=self.batch_size, steps=steps, first=first, optimizer=optimizer,
                steps_per_epoch=self.steps_per_epoch, epoch_decay=epoch_decay,
                save=lambda step: save_progress(resume_file, step, heads, optimizer, purpose, plan.to_dict()),
            )  # fmt: skip
        return heads


# arguments that both protocols hand to Task as they are
TASK_KEYS = ("image_size", "resize_size", "train_fraction", "augment", "batch_size", "precision", "workers", "seed")


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
        validation = accuracies(heads, settings, task.layout, task.features(task.validation), task.device)
        # max keeps the first of equals: fewer blocks, then the smaller lr
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
    epochs: Count = 50,
    lr: Positive = 1e-3,
    batch_size: Count = 1024,
    image_size: Count | None = None,
    resize_size: Count | None = None,
    augment: Flag = True,
    train_fraction: Share = 1.0,
    precision: Literal["bf16", "fp32"] | None = None,
    workers: Whole | None = None,
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
    precision: Literal["bf16", "fp32"] | None = None,
    workers: Whole | None = None,
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
    assert validation_top1 is not None  # there are images held out
    return {
        **scores,
        "validation_top1": validation_top1,
        "best_blocks": chosen.blocks,
        "best_patch_mean": float(chosen.patch_mean),
        "best_lr": chosen.lr,
    }
