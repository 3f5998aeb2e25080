"""Linear classification on frozen features: DINO's protocol, and a sweep over learning rates, blocks and pooling in one pass (DINOv2's).

    ssl-locat evaluate linear MODEL data.train=... data.test=...
    ssl-locat evaluate linear_small MODEL data.train=... data.test=...      # sets of some thousand images
    ssl-locat evaluate linear_sweep MODEL data.train=... data.test=...

Features are what the head saw: each block that is read goes through final norm and PRR, then gives its class token.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
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
    near,
    reading,
    split,
)
from ssl_locat.evaluation.shared.heads import average_gradients, load_progress, purpose_of, save_progress
from ssl_locat.evaluation.shared.image_views import centre_view, channels_of, normalisation, training_view
from ssl_locat.evaluation.shared.metrics import top_hits
from ssl_locat.evaluation.shared.options import (
    Count,
    Counts,
    Flag,
    Flags,
    LabelledData,
    NotNegative,
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
from ssl_locat.runs.distributed import is_main, rank, world_size
from ssl_locat.runs.log import progress
from ssl_locat.seeds import mix64

log = logging.getLogger(__name__)

SAVE_EVERY = 1000  # steps, and at the end of every epoch
FEW_STEPS = 1000  # with fewer, SGD at any rate that is stable ends far from where it would converge (docs/results.md)


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


class Classifiers(nn.ModuleList):
    """Linear classifiers that train together."""

    best: Tensor

    def __init__(self, modules: Iterable[nn.Module] = ()):
        super().__init__(modules)
        # highest top1 of the first one on the test images, and after which epoch; saved with the weights, so that an interruption does not lose it
        self.register_buffer("best", torch.tensor([-1.0, 0.0], dtype=torch.float64))


def make_heads(settings: Sequence[Setting], layout: Layout, num_classes: int, seed: int) -> Classifiers:
    """One classifier for each setting, started as DINO's: weights N(0, 0.01), biases 0."""
    heads = Classifiers()
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
    heads: Classifiers, settings: Sequence[Setting], layout: Layout, batches: Iterator[tuple[Tensor, Tensor]], *,
    batch_size: int, steps: int, steps_per_epoch: int, period: int, epoch_decay: bool, watch: Callable[[int], None],
    save: Callable[[int], None], first: int = 0, optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """SGD on all classifiers at once; `batches` gives (features [b, F], labels [b]) of this process from step `first` on.

    Learning rates follow a cosine to 0 over `steps`: once an epoch (DINO) with `epoch_decay`, else at every step. Every `period` steps, and
    at the end, `watch` looks at the classifiers and `save` keeps them.
    """
    with progress("linear", total=steps, unit="steps", start=first) as bar:
        for step, (features, labels) in zip(range(first, steps), batches, strict=False):
            done = step // steps_per_epoch * steps_per_epoch if epoch_decay else step
            for index, group in enumerate(optimizer.param_groups):  # weight and bias of each classifier
                group["lr"] = annealed(done, steps, settings[index // 2].lr * batch_size / 256)
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
            due = (step + 1) % period == 0 or step + 1 == steps
            if due:
                watch(step + 1)
            stop = asked_to_stop()
            if stop or due or (step + 1) % SAVE_EVERY == 0:
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
        held_out: float, augment: bool, standardize: bool, batch_size: int, workers: int | None, seed: int, precision: str | None,
    ):  # fmt: skip
        size = check_image_size(backbone, image_size)
        check_depth(backbone, "blocks", blocks)
        if batch_size % world_size():
            raise ConfigError(
                f"batch_size is {batch_size}, over all processes; it must be a multiple of their number, {world_size()}."
            )
        self.backbone, self.blocks, self.seed = backbone.eval(), blocks, seed
        self.augment, self.standardize = augment, standardize
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
        self.plain, self.views = (
            LabelledImage(view, data, channels_of(backbone), self.num_classes) for view in (centre, cropped)
        )
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

    @cached_property
    def kept(self) -> Features:
        """Of the training images' centre crops, read once; as the backbone gives them."""
        return self._extract(self.train)

    @cached_property
    def tested(self) -> Features:
        """Of the test images, read once."""
        return self.features(self.test)

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation [F] of each feature over the training images."""
        # a feature that never changes tells nothing: its deviation is rounding, and must not blow it up
        std, mean = torch.std_mean(self.kept.values, 0)
        return mean, 1 / std.clamp(min=1e-3 * std.mean())

    def standardized(self, features: Tensor) -> Tensor:
        """Features [B, F] on one scale, where asked for; a linear classifier on them is one on the features as they are."""
        if not self.standardize:
            return features
        mean, gain = (part.to(features.device) for part in self.scale)
        return (features - mean) * gain

    def features(self, dataset: Joined | Chosen) -> Features:
        """Of centre crops, where they are computed with. Among training images some may be damaged, unless data.max_bad says otherwise."""
        table = self.kept if dataset is self.train else self._extract(dataset)
        return Features(near(self.standardized(table.values), self.device), near(table.labels, self.device))

    def _extract(self, dataset: Joined | Chosen) -> Features:
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
        options: dict[str, Any] = {"first": first, "batch_size": self.batch_size, "device": self.device}
        options |= {"workers": self.workers, "data": self.data}
        with training_batches(self.train, plan, self.views, **options, progress_file=progress_file) as batches:
            yield (self._read(*batch) for batch in batches)

    def _read(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with reading(self.device, self.precision):
            return self.standardized(read_blocks(self.backbone, images, self.blocks).float()), labels

    def _kept(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each image is read once; batches are rows of the features that are kept."""
        table = self.features(self.train)
        for rows in batches_of_rows(len(table.labels), self.batch_size, first, self.seed):
            index = rows.to(table.values.device)
            yield table.values[index].to(self.device), table.labels[index].to(self.device)

    def fit(
        self, settings: Sequence[Setting], epochs: int, least_steps: int, weight_decay: float, *, epoch_decay: bool, best_on_test: bool,
        resume_file: str | None, purpose: dict,
    ) -> Classifiers:  # fmt: skip
        """Trained classifiers, one for each setting. purpose: what resume_file must belong to (heads.purpose_of).

        best_on_test: also look at the test images after every epoch; `.best` is the first classifier's highest top1, and after which epoch."""
        heads = make_heads(settings, self.layout, self.num_classes, self.seed).to(self.device)
        # classifiers differ in lr, which train_heads sets; biases do not decay: an intercept costs nothing in a regression
        decays = {"weight": weight_decay, "bias": 0.0}
        groups = [{"params": [getattr(head, name)], "weight_decay": decay} for head in heads for name, decay in decays.items()]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
        steps = self.steps_per_epoch * max(epochs, -(-least_steps // self.steps_per_epoch))
        if steps < FEW_STEPS and is_main():
            log.warning(
                "%d steps of %d images are too few for a linear classifier to converge: evaluate linear_small is made for such sets; or give "
                "least_steps=5000 with augment=false.", steps, self.batch_size,
            )  # fmt: skip
        # as often as epochs were asked for, however many more least_steps made of them
        period = self.steps_per_epoch * max(1, round(steps / (epochs * self.steps_per_epoch)))

        def watch(step: int) -> None:
            if best_on_test:
                top1 = accuracies(heads, settings, self.layout, self.tested, self.device)[0]["top1"]
                if top1 > heads.best[0]:  # the first of equals
                    heads.best.copy_(torch.tensor([top1, step // self.steps_per_epoch]))

        first, saved = load_progress(resume_file, heads, optimizer, purpose)
        plan = plan_for(self.train, self.seed, self.batch_size, saved)
        with self.batches(first, plan, resume_file) as batches:
            train_heads(
                heads, settings, self.layout, batches, batch_size=self.batch_size, steps=steps, first=first, optimizer=optimizer,
                steps_per_epoch=self.steps_per_epoch, period=period, epoch_decay=epoch_decay, watch=watch,
                save=lambda step: save_progress(resume_file, step, heads, optimizer, purpose, plan.to_dict()),
            )  # fmt: skip
        return heads


# arguments that both protocols hand to Task as they are
TASK_KEYS = (
    *("image_size", "resize_size", "train_fraction", "augment", "standardize"),
    *("batch_size", "precision", "workers", "seed"),
)


def train_and_test(
    protocol: str, arguments: dict[str, Any], settings: Sequence[Setting], *, held_out: float, epoch_decay: bool
) -> tuple[dict[str, float], Setting, float | None, Classifiers]:
    """What both protocols do: train all classifiers in one pass, choose one on the held-out images, test that one alone.

    Args:
        arguments: of the protocol's function, its `locals()` at the start.
        held_out: share of the training images to choose by; 0 where there is but one classifier.

    Returns the test scores, the setting that was chosen, its top1 on the held-out images (None without any), and the classifiers.
    """
    purpose = purpose_of(protocol, arguments)
    # the deepest classifier decides what is read; the others read a part of its columns
    task = Task(
        arguments["backbone"], arguments["data"], blocks=max(setting.blocks for setting in settings), held_out=held_out,
        **{name: arguments[name] for name in TASK_KEYS},
    )  # fmt: skip
    heads = task.fit(
        settings, arguments["epochs"], arguments["least_steps"], arguments.get("weight_decay", 0.0), epoch_decay=epoch_decay,
        best_on_test=not held_out, resume_file=arguments["resume_file"], purpose=purpose,
    )  # fmt: skip
    best, best_top1 = 0, None
    if held_out:
        validation = accuracies(heads, settings, task.layout, task.features(task.validation), task.device)
        # max keeps the first of equals: fewer blocks, then the smaller lr
        best = max(range(len(settings)), key=lambda index: validation[index]["top1"])
        best_top1 = validation[best]["top1"]
    one = slice(best, best + 1)  # the test images are read once, after the choice
    (scores,) = accuracies(heads[one], settings[one], task.layout, task.tested, task.device)
    return scores, settings[best], best_top1, heads


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
    standardize: Flag = False,
    least_steps: Whole = 0,
    weight_decay: NotNegative = 0.0,
    train_fraction: Share = 1.0,
    precision: Literal["bf16", "fp32"] | None = None,
    workers: Whole | None = None,
    seed: Whole = 0,
    resume_file: Text | None = None,
) -> dict[str, float]:
    """top1 and top5 in percent of one linear classifier, DINO's eval_linear: SGD, momentum 0.9, no weight decay, a cosine by epoch.

    They are those after the last epoch, which is what to compare; beside them top1_best, the highest after any epoch on the same test images
    (DINO's script prints it; chosen on the test, it flatters), and best_epoch.

    Args:
        data: train, test (labelled; DATA specs), optionally num_classes, image_key, label_key.
        blocks: last blocks whose class tokens are read. patch_mean: the mean of the last block's patches too.
        lr: at a batch of 256, scaled linearly. batch_size: images over all processes.
        augment: random resized crops and flips; false reads each image once, centre-cropped, and trains on the kept features.
        standardize: each feature by its mean and deviation over the training images: directions of small variance learn as fast.
        least_steps: go on for more epochs until there were so many steps, for small sets; weight_decay: of the classifier (an L2 penalty).
        train_fraction: share of each class's labels that is used (0.01, 0.1).
        resume_file: progress is kept there after every epoch, and the same command resumes from it.
    """
    arguments = dict(locals())  # a copy: a debugger refreshes the one that locals() gives
    scores, _, _, heads = train_and_test("linear", arguments, [Setting(blocks, patch_mean, lr)], held_out=0.0, epoch_decay=True)
    top1_best, best_epoch = heads.best.tolist()
    return {**scores, "top1_best": top1_best, "best_epoch": best_epoch}


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
    standardize: Flag = False,
    least_steps: Whole = 0,
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
    scores, chosen, validation_top1, _ = train_and_test("linear_sweep", arguments, settings, held_out=held_out, epoch_decay=False)
    assert validation_top1 is not None  # there are images held out
    return {
        **scores,
        "validation_top1": validation_top1,
        "best_blocks": chosen.blocks,
        "best_patch_mean": float(chosen.patch_mean),
        "best_lr": chosen.lr,
    }
