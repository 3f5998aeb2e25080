"""`ssl-locat table TABLE --dry-run`: every job with the operations that its networks do, and hours only for a speed that the user gives.

A network's operations are counted on the real model, forward and backward, by torch's own counter on tensors without memory ("meta"), so that
a Base model costs a second. A multiply-accumulate counts as two operations (FLOP). What is not counted: decoding, crops, the optimiser, heads'
losses, and the search of k-NN and Hummingbird.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_locat.config.schema import Config
from ssl_locat.evaluation.shared.seg_datasets import LAYOUTS
from ssl_locat.models.attention import forced_backend
from ssl_locat.models.backbone import create_backbone, load_backbone, split_options
from ssl_locat.models.registry import TWINS
from ssl_locat.pretraining.operations import operations_of_run
from ssl_locat.runs.log import say
from ssl_locat.tables.images import images_of, seen_by
from ssl_locat.tables.jobs import Job, TrainingJob, all_jobs
from ssl_locat.tables.schema import TableConfig, load_table, training_of
from ssl_locat.tables.table import cell_file, check, finished, where

log = logging.getLogger(__name__)

ASPECT = 4 / 3  # of a photograph: test images of segmentation have sizes of their own


def dry_run(name: str, arguments: Sequence[str] = (), tflops: float | None = None) -> None:
    """Check everything and list all jobs: those at hand, those that would be done, those whose data set is not given. Writes nothing.

    tflops: what a GPU sustains, 10^12 operations a second; then hours of one GPU stand beside the operations.
    """
    check(name, arguments)
    table = load_table(name, arguments)
    total, unknown = 0.0, 0
    seen: set[Path] = set()
    for job in all_jobs(table):
        path = job.result if isinstance(job, TrainingJob) else cell_file(table, job)
        # columns that show several metrics of one run measure it once
        done = "done" if finished(path) else "as above" if path in seen else ""
        seen.add(path)
        operations = 0.0 if done else cost(table, job)
        total, unknown = total + (operations or 0.0), unknown + (operations is None)
        state = done or (f"needs {job.lacks}" if job.lacks else "to do")
        if isinstance(job, TrainingJob):
            what = f"{job.protocol} of {job.fresh}" if job.protocol else f"pretrain {job.fresh}"
        else:
            what = f"{job.protocol} of " + (f"what {job.row}'s training gives" if job.training else job.model)
        say(f"{state:<31}{where(job)}: {what}" + ("" if done else f"  {in_words(operations, tflops)}"))
    say(f"in all {in_words(total, tflops)}" + (f", and {unknown} jobs whose cost is not known" if unknown else ""))


def in_words(operations: float | None, tflops: float | None) -> str:
    if operations is None:
        return "(cost not known: the model or its data set is not here)"
    text = f"{operations / 1e15:,.3g} PFLOP" if operations < 1e18 else f"{operations / 1e18:,.3g} EFLOP"
    return text if tflops is None else f"{text}, {operations / (tflops * 1e12) / 3600:,.3g} GPU hours at {tflops:g} TFLOP/s"


def cost(table: TableConfig, job: TrainingJob | Job) -> float | None:
    """FLOP of a job; None where nobody can tell: weights that are not here yet, or a set without a size."""
    try:
        if isinstance(job, TrainingJob):
            return cost_of_training(table, job)
        if job.protocol == "efficiency":
            return 0.0  # one image on the CPU
        protocol = COSTS.get(job.protocol)
        count = images_of(table, table.columns[job.column].data)
        spec = table.rows[job.row].fresh if job.training and job.training.protocol else job.model
        if job.training and job.training.protocol is None:
            spec = spec_of(job.training.config())
        return None if protocol is None or count is None or spec is None else protocol(spec, job.options, *count)
    except Exception as error:
        log.info("%s: %s", where(job), error)  # a plan goes on with what can be told
        return None


# --- operations of one image ----------------------------------------------------------------------------------------------


@cache
def operations(spec: str, height: int, width: int, backward: bool = False, num_classes: int | None = None) -> float:
    """FLOP of one image through a model (timm:NAME?options, or weights that are here), and its gradient's where `backward`."""
    model = on_meta(spec, num_classes)
    channels = getattr(model, "in_chans", 3)
    images = torch.empty(1, channels, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, forced_backend("sdpa"), sdpa_kernel(SDPBackend.MATH):
        if not backward:
            with torch.no_grad():
                model.eval()(images)
        else:
            model.train()(images).sum().backward()
    return float(counter.get_total_flops())


@cache
def on_meta(spec: str, num_classes: int | None) -> nn.Module:
    """A model without memory: what counts is its shape."""
    if spec.startswith("timm:"):
        name, options = split_options(spec.removeprefix("timm:"))
        options |= {"num_classes": num_classes or options.get("num_classes", 0)}
        with torch.device("meta"):
            if options.pop("pretrained", False):  # any model of timm's, as `load_backbone` opens it
                return timm.create_model(name, **{**TWINS.get(name.split(".")[0], {}), **options})
            return create_backbone(name, **options)
    model = load_backbone(spec).to("meta")
    if num_classes:
        model.reset_classifier(num_classes)
    return model.to("meta")


def own_size(spec: str, options: dict[str, Any]) -> int:
    if options.get("image_size"):
        return int(options["image_size"])
    model = on_meta(spec, None)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    return int(size[-1])


# --- operations of a job --------------------------------------------------------------------------------------------------


def frozen_pass(spec: str, options: dict[str, Any], train: int, test: int) -> float:
    """k-NN, Hummingbird: every image once."""
    size = own_size(spec, options)
    return (train * options.get("train_fraction", 1.0) + test) * operations(spec, size, size)


def validation(spec: str, options: dict[str, Any], train: int, test: int) -> float:
    size = own_size(spec, options)
    return test * operations(spec, size, size, num_classes=(options.get("data") or {}).get("num_classes") or 1000)


def linear(spec: str, options: dict[str, Any], train: int, test: int) -> float:
    """Every training crop anew in each epoch, and the test set once, whose features are kept; without augmentation each image once."""
    size, epochs = own_size(spec, options), options["epochs"] if options.get("augment", True) else 1
    return (epochs * train * options.get("train_fraction", 1.0) + test) * operations(spec, size, size)


def supervised(spec: str, options: dict[str, Any], train: int, test: int) -> float:
    """Forward and backward of every training image in each epoch; a distillation teacher's forward beside it; the test once."""
    size, classes = own_size(spec, options), (options.get("data") or {}).get("num_classes") or 1000
    each = operations(spec, size, size, backward=True, num_classes=classes)
    if teacher := (options.get("distill") or {}).get("model"):
        each += operations(teacher, size, size, num_classes=classes)
    seen = options["epochs"] * train * options.get("train_fraction", 1.0)
    return seen * each + test * operations(spec, size, size, num_classes=classes)


def segmentation(spec: str, options: dict[str, Any], train: int, test: int) -> float:
    """A frozen pass over the crops, the probe's head forward and backward, and whole test images of a photograph's shape."""
    crop, (longer, shorter) = options["image_size"], options["scale"]
    height = min(shorter, round(longer / ASPECT))
    stride, width = on_meta(spec, None).feature_info[-1]["reduction"], round(height * ASPECT)
    height, width = -(-height // stride) * stride, -(-width // stride) * stride
    crops = options["iterations"] * options["batch_size"]
    return crops * (operations(spec, crop, crop) + head(spec, options, crop)) + test * operations(spec, height, width)


def head(spec: str, options: dict[str, Any], crop: int) -> float:
    """Of a segmentation probe on one crop: weights' gradients, and the second layer's inputs'."""
    model = on_meta(spec, None)
    dim, hidden, reduction = model.feature_info[-1]["num_chs"], options.get("hidden", 512), model.feature_info[-1]["reduction"]
    data = options.get("data") or {}
    classes = LAYOUTS[data["layout"]].num_classes if data.get("layout") else data.get("num_classes") or 1
    cells = (crop // reduction) ** 2
    if options.get("head") == "linear":
        return 2.0 * cells * dim * classes * 2
    return 2.0 * cells * (dim * hidden * 2 + hidden * classes * 3)


COSTS: dict[str, Callable[..., float]] = {
    "knn": frozen_pass,
    "hummingbird": frozen_pass,
    "linear": linear,
    "linear_sweep": linear,
    "supervised": supervised,
    "validate": validation,
    "segmentation": segmentation,
}


def cost_of_training(table: TableConfig, job: TrainingJob) -> float | None:
    """Of a recipe: both networks with their heads, crop by crop."""
    if job.protocol is None:
        seen = seen_by(table, job)
        return None if seen is None else seen * operations_of_run(job.config())
    training = training_of(table, table.rows[job.row])
    count = images_of(table, training.data if training else None)
    return None if count is None else COSTS[job.protocol](job.fresh, job.options, *count)


def spec_of(config: Config) -> str:
    """timm:NAME?options of a run's backbone, which its columns read."""
    options = {"img_size": config.crops.global_size, **config.backbone.options}
    return f"timm:{config.backbone.name}?" + "&".join(f"{key}={value}" for key, value in options.items())
