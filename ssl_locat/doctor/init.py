"""`ssl-locat init FOLDER_OR_URL`: look at images and machine, and write a commented YAML that `pretrain` runs.

A starting point, chosen by rules that fit in one's head; every choice is written beside its reason, and every line may be changed.
"""

import json
import os
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from ssl_locat.config.schema import Config, load
from ssl_locat.data.images.decode import LABEL_KEYS, decode_image, find_image
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.stats import Found, Reading, as_text, count_sample, is_deep, sections
from ssl_locat.data.shards.tar import Damage
from ssl_locat.doctor.early import check_enough, name_of, yaml_to_write
from ssl_locat.errors import CorruptSample, UserError
from ssl_locat.measure.images import kind_of
from ssl_locat.measure.machine import Load, band
from ssl_locat.pretraining.adapt_look import split
from ssl_locat.pretraining.step_times import expected_seconds
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import console, next_steps, progress
from ssl_locat.text.shown import carries_credentials

NUM_SAMPLED = 64
CPU_HOURS = 1.0  # what a first run on a CPU may take
FEW = 500  # images, below which there is little to learn
EIGHT = 8  # GPUs of fast_8gpu, whose batch another number shares as well
SAVE_SECONDS = 300  # from one checkpoint to the next: what a kill may cost


class DataStats(NamedTuple):
    """What the images are like, by a sample spread over all of them."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    short_sides: list[int]  # pixels
    ratios: list[float]  # longer side over shorter
    formats: list[str]
    gray: float  # share of images without colour
    damaged: float  # share
    damage: str  # of the first: what it is
    mean: tuple[float, ...]  # one for each channel
    std: tuple[float, ...]
    num_classes: int | None  # class folders, or labels seen
    mean_bytes: float
    channels: dict | None = None  # a config's data.channels, where 8 bits would lose something
    notes: tuple[str, ...] = ()  # what was measured of each channel, in words


class Sizes(NamedTuple):
    """Choices that follow from the images' size. All are multiples of the patch, pixels."""

    global_size: int
    local_size: int
    patch_size: int


def init(source: str, out: str | None = None, then_pretrain: bool = False) -> Path:
    """Write the YAML (`out`, or NAME.yaml here) for the images at `source` and return its path.

    then_pretrain: the run follows at once, so that nothing is said about what to do next.

    Raises UserError if the file exists or its folder cannot hold it, or for too few images; DataError if there are none.
    """
    target = yaml_to_write(source, out)
    check_enough(source)
    load_before = Load.now()
    train, test = split(source)
    with progress("looking at the images"):
        seen = inspect_data(train)
        test, unlabelled = usable_test(train, test)
    try:
        # a run that follows at once is this process, on one GPU
        gpus = min(torch.cuda.device_count(), 1 if then_pretrain else 64) if torch.cuda.is_available() else 0
        write_atomically(target, compose(target, train, test, seen, gpus), private=carries_credentials([train, test]))
        config = load(str(target))
        with progress("trying a few steps"):
            seconds, steps_per_epoch = expected_seconds(config, max(1, gpus))
        fit_time(target, seconds, steps_per_epoch, load_before)
        config = load(str(target))
    except BaseException:
        target.unlink(missing_ok=True)  # a YAML that was never tried is worse than none
        raise
    say = console().print
    say(
        f"{seen.count:,} images of {_channels(len(seen.mean))}, {min(seen.short_sides)} to {max(seen.short_sides)} px (shorter side), {' and '.join(sorted(set(seen.formats)))}"
    )
    if seen.count < FEW:
        say(f"{seen.count} images are few: expect little, or continue released weights: ssl-locat adapt MODEL {source}.")
    if test:
        say(f"Found labelled images to measure k-NN on: {test}", markup=False)
    if unlabelled:
        say(unlabelled, markup=False)
    if seen.damage:
        say(f"{100 * seen.damaged:.0f} % of those looked at cannot be read, such as {seen.damage}", markup=False)
    assert config.optim.epochs is not None  # fit_time has written them
    total = config.optim.epochs * seconds
    say(
        f"Wrote {target}: {config.optim.epochs:g} epochs, {band(total, load_before)} on this machine{load_before.words()}; a checkpoint every "
        f"{config.checkpoint.every_steps} steps.",
        markup=False,
        soft_wrap=True,
    )
    if not then_pretrain:
        next_steps(
            f"ssl-locat doctor {target}", f"ssl-locat pretrain {target}{on(gpus)}", f"ssl-locat report {config.run_dir} --watch"
        )
    return target


def usable_test(train: str, test: str | None) -> tuple[str | None, str]:
    """(the test images if k-NN can be measured on them, why not): both sets need labels, and the same class folders."""
    if not test:
        return None, ""
    sets = {"training": open_dataset(train), "test": open_dataset(test)}
    for name, dataset in sets.items():
        sample = dataset.read(0, 1)[0]
        if isinstance(sample, Damage) or not {*LABEL_KEYS} & {key.lower() for key in sample.members}:
            return (
                None,
                f"{test}: not measured on. k-NN needs class folders (cats/, dogs/) in both sets; the {name} images have no labels.",
            )
    mine, theirs = (getattr(dataset, "classes", None) or [] for dataset in sets.values())
    if mine and theirs and mine != theirs:
        odd = sorted({*mine} ^ {*theirs})
        return None, f"{test}: not measured on. k-NN needs the same class folders in both sets; {odd[0]}/ is in one alone."
    return test, ""


def inspect_data(source: str) -> DataStats:
    """Open the data and read a sample of it."""
    dataset = open_dataset(source)
    if is_deep(dataset, None):
        return inspect_bands(source, dataset)
    pixels: list[np.ndarray] = []  # of each image [n, C]
    sides, ratios, formats, labels, damaged, gray = [], [], [], [], [], 0
    # evenly over the set: its start may be one class, one camera, one year
    places = np.linspace(0, len(dataset) - 1, min(NUM_SAMPLED, len(dataset))).round().astype(int).tolist()
    for place in places:
        sample = dataset.read(place, place + 1)[0]
        try:
            if isinstance(sample, Damage):
                raise CorruptSample(sample.reason)
            data = find_image(sample.members)
            image = decode_image(data, channels=None)
        except CorruptSample as error:
            damaged.append(f"{sample.key}: {error.reason}")
            continue
        height, width = image.shape[:2]
        sides.append(min(height, width))
        ratios.append(max(height, width) / min(height, width))
        formats.append(kind_of(data))
        # a grid of about 64 x 64 pixels of each image, in 0..1: [n, C]
        small = image[:: max(1, height // 64), :: max(1, width // 64)].reshape(-1, image.shape[2]) / 255
        if pixels and small.shape[1] != pixels[0].shape[1]:
            raise UserError(
                f"{source}: images of {pixels[0].shape[1]} and of {small.shape[1]} channels ({sample.key}); a run takes one kind. Sort them apart."
            )
        # no pixel is more than 5 of 255 off the mean of its channels: no colour to speak of
        gray += bool(np.abs(small - small.mean(1, keepdims=True)).max() < 0.02)
        pixels.append(small)
        if "cls" in sample.members:
            labels.append(sample.members["cls"])
    if not pixels:
        raise UserError(
            f"{source}: none of {len(places)} samples could be read as an image, such as {damaged[0]}. Is this the right folder?"
        )
    joined = np.concatenate(pixels)
    classes = len(getattr(dataset, "classes", None) or []) or None
    mean, std = (tuple(round(float(value), 3) for value in values) for values in (joined.mean(0), joined.std(0)))
    found = len(places)
    return DataStats(
        len(dataset),
        sides,
        ratios,
        formats,
        gray / found,
        len(damaged) / found,
        damaged[0] if damaged else "",
        mean,
        std,
        classes if labels else None,
        dataset.mean_bytes,
    )


def inspect_bands(source: str, dataset: Dataset) -> DataStats:
    """The same, of images that 8 bits would cut: all values of the sample count."""
    reading, found = Reading(deep=True), Found()
    sides, ratios, formats, labels = [], [], [], 0
    places = np.linspace(0, len(dataset) - 1, min(NUM_SAMPLED, len(dataset))).round().astype(int).tolist()
    for number, place in enumerate(places):
        (sample,) = dataset.read(place, place + 1)
        values = count_sample(sample, reading, found)
        if values is not None and not number and len(values) < 32 < min(values.shape[1:]):
            # a few rows of many columns and channels: bands come first in these arrays
            reading, found = Reading(deep=True, bands_first=True), Found()
            values = count_sample(sample, reading, found)
        if values is None or isinstance(sample, Damage):
            continue
        height, width = values.shape[:2]
        sides.append(min(height, width))
        ratios.append(max(height, width) / min(height, width))
        formats.append(kind_of(find_image(sample.members)))
        labels += "cls" in sample.members
    if not sides:
        raise UserError(
            f"{source}: none of {len(places)} samples could be read, such as {found.damaged[0]}. Is this the right folder?"
        )
    written = sections(found, reading)
    lines = as_text(found.counting.result(), found).splitlines()[1 : 1 + found.counting.channels]
    return DataStats(
        len(dataset),
        sides,
        ratios,
        formats,
        0.0,
        len(found.damaged) / len(places),
        found.damaged[0] if found.damaged else "",
        tuple(written["crops"]["mean"]),
        tuple(written["crops"]["std"]),
        (len(getattr(dataset, "classes", None) or []) or None) if labels else None,
        dataset.mean_bytes,
        written["data"]["channels"],
        tuple(lines),
    )


# --- choices --------------------------------------------------------------------------------------------------------------


def choose_sizes(short_sides: list[int], gpu: bool) -> Sizes:
    """Crops near the images' own size, up to 224; on a CPU up to 96, since cost grows with the square."""
    # (shorter side up to, sizes): grids of 8 x 8 to 14 x 14 patches
    side = statistics.median(short_sides)
    for at_most, sizes in ((40, Sizes(32, 16, 4)), (80, Sizes(64, 32, 8)), (160 if gpu else 1e9, Sizes(96, 48, 8))):
        if side <= at_most:
            return sizes
    return Sizes(224, 96, 16)


def choose_backbone(gpu_gb: float) -> tuple[str, str]:
    """(options of `backbone` in YAML, reason)."""
    if gpu_gb >= 16:
        return "name: locatvit_small", "21 M parameters: the size of the published DINO recipes"
    if gpu_gb > 0:
        return "name: locatvit_tiny", "6 M parameters, for a GPU of less than 16 GB"
    return "name: locatvit_tiny, embed_dim: 96, depth: 4, num_heads: 3", "0.5 M parameters: what a CPU trains in an hour"


def choose_prototypes(count: int) -> int:
    """A power of two, about one for eight images, from 64 to 65536."""
    # 65536: DINO's, for ImageNet's 1.28 million
    return min(65536, max(64, 2 ** round(np.log2(max(count / 8, 1)))))


def choose_recipe(gpus: int) -> str:
    """The shipped recipe for this kind of machine, whose objective, batch, rates and savings are taken over (docs/cheaper.md)."""
    return "fast_cpu" if not gpus else "fast_one_gpu" if gpus == 1 else "fast_8gpu"


def choose_epochs(count: int, gpu: bool) -> int:
    """The fewer images, the more passes."""
    if not gpu:
        return 100
    return next(
        epochs for limit, epochs in ((10_000, 800), (100_000, 400), (1_000_000, 100), (float("inf"), 50)) if count <= limit
    )


def compose_objective(recipe: Config, name: str, prototypes: int, gpu: bool, compares: bool, epochs: int) -> list[str]:
    """Lines below `objective:`: the recipe's, where a micro-batch has the images that it compares."""
    if compares:
        given = [{"name": objective.name, **objective.options} for objective in recipe.objectives]
        return [f"  - {_flow(options)}   # as in {name}" for options in given]
    dino = ["name: dino", f"num_prototypes: {prototypes}   # about one for eight images"]
    if gpu:
        dino += ["teacher_temp: [0.04, 0.07]", f"teacher_temp_warmup_epochs: {min(30, epochs // 10)}"]
    else:
        dino += ["hidden_dim: 256", "bottleneck_dim: 64"]
    return [f"  {line}" for line in dino]


def compose_savings(recipe: Config, name: str, sizes: Sizes) -> list[str]:
    """Lines below `crops:` of what makes the recipe cheap, its stages at these sizes: as large a part of the last one's as there."""
    crops = recipe.crops
    if not crops.stages:
        kept = crops.model_dump(mode="json")["keep_patches"]
        return [f"  keep_patches: {_flow(kept)}   # the student's share of large crops, the teacher sees all; as in {name}"]
    lines = [f"  stages:   # most of the run at lower resolution, as in {name}"]
    for until, stage, _ in crops.resolved():
        # sizes of the last stage are those beside; its patches are all kept unless it says otherwise
        own: dict[str, Any] = {"until": until}
        for key, side in (("global_size", sizes.global_size), ("local_size", sizes.local_size)):
            patches = getattr(stage, key) / getattr(crops, key) * side / sizes.patch_size
            own[key] = max(1, round(patches)) * sizes.patch_size
        own["keep_patches"] = stage.model_dump(mode="json")["keep_patches"]
        lines.append(f"    - {_flow(own)}")
    return lines


def _flow(value: Any) -> str:
    """YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf")).removesuffix("...\n").strip()


def on(gpus: int) -> str:
    """What starts a process on each GPU."""
    return " --on torchrun" if gpus > 1 else ""


def compose(target: Path, train: str, test: str | None, seen: DataStats, gpus: int) -> str:
    """The YAML, with the reason beside each choice. gpus: that the run will have."""
    gpu_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if gpus else 0.0
    gpu, cores, ranks = gpus > 0, os.cpu_count() or 1, max(1, gpus)
    fast = choose_recipe(gpus)
    recipe = load(fast)
    sizes, (backbone, why) = choose_sizes(seen.short_sides, gpu), choose_backbone(gpu_gb)
    name = name_of(target.name)
    # a power of two, a quarter of the images at most: a batch must not hold an image twice
    most = recipe.optim.global_batch_size * (gpus if gpus > 1 else EIGHT) // EIGHT
    batch = min(most, max(16 if seen.count >= 16 else 8, 2 ** int(np.log2(seen.count / 4))))
    batch = max(1, batch // ranks) * ranks
    per_image = (
        (sizes.global_size / 224) ** 2 * (16 / sizes.patch_size) ** 2 * (0.35 if gpu_gb >= 16 else 0.2)
    )  # GB, roughly, in bf16
    accumulate = 1
    while gpu and batch // (accumulate * ranks) * per_image > 0.7 * gpu_gb and accumulate < batch // ranks // 8:
        accumulate *= 2
    epochs = choose_epochs(seen.count, gpu)
    channels, labelled = len(seen.mean), test is not None
    in_chans = "" if channels == 3 else f", in_chans: {channels}"
    gray = f"{_channels(channels)}, no colours" if channels != 3 else "the images are grey" if seen.gray > 0.9 else ""
    # the recipes' losses compare the images of a micro-batch; with few, DINO's, whose centre goes over the steps
    compares = batch // accumulate >= 64
    objective = compose_objective(recipe, fast, choose_prototypes(seen.count), gpu, compares, epochs)
    learns = "a cosine that rises" if compares else "a loss that leaves ln(num_prototypes)"
    knn = " and a k-NN above the untrained network's" if labelled else ""
    lines = [
        f"# Written by `ssl-locat init` for {seen.count:,} images in {train}: {min(seen.short_sides)} to {max(seen.short_sides)} px",
        f"# on the shorter side, {max(seen.ratios):.1f} the longest ratio of sides, about {seen.mean_bytes / 1000:.0f} kB each.",
        f"# Expected: {learns}{knn}; no published number fits your images.",
        f"# Command: ssl-locat pretrain {target.name}{on(gpus)}      (look first: ssl-locat doctor {target.name})",
        "# Read by: ssl_locat/pretraining/loop.py (keys: docs/config.md)",
        "",
        f"run_dir: runs/{name}   # the same command with the same folder resumes from the newest checkpoint",
        "data:",
        f"  train: {_quoted(train)}",
        *([f"  test: {_quoted(test)}   # labelled: k-NN is measured on it during training"] if test else []),
        *([f"  num_classes: {seen.num_classes}"] if seen.num_classes and labelled else []),
        *([f"  channels: {json.dumps(seen.channels)}   # low and high: percentiles 1 and 99"] if seen.channels else []),
        *(f"    # {line.strip()}" for line in seen.notes),
        f"  workers: {max(1, min(8, cores - 1))}   # this machine has {cores} cores",
        f"  max_bad: {max(0.01, round(2 * seen.damaged, 3))}   # share of unreadable images above which the run stops; {100 * seen.damaged:.0f} % of those looked at",
        f"backbone: {{{backbone}, img_size: {sizes.global_size}, patch_size: {sizes.patch_size}{in_chans}}}   # {why}",
        "objective:",
        *objective,
        "crops:",
        f"  global_size: {sizes.global_size}   # images: {statistics.median(seen.short_sides):.0f} px in the median",
        f"  local_size: {sizes.local_size}",
        f"  num_local: {4 if 0 < gpu_gb < 16 else recipe.crops.num_local}   # each costs time; 8 in the published recipes",
        *compose_savings(recipe, fast, sizes),
        *(
            ["  blur_prob: [0.5, 0.1, 0.0]   # small images lose everything to strong blur", "  blur_sigma: [0.1, 0.5]"]
            if sizes.global_size <= 64
            else []
        ),
        *([f"  gray_prob: 0.0   # {gray}", "  jitter: [0.4, 0.4, 0.0, 0.0]"] if gray else []),
        *(["  band_jitter_prob: 0.8   # gain and offset of each channel, in place of colour"] if channels not in (1, 3) else []),
        *(
            [f"  mean: {list(seen.mean)}   # of these images", f"  std: {list(seen.std)}"]
            if gray or seen.channels or _unusual(seen)
            else []
        ),
        "optim:",
        f"  epochs: {epochs}",
        f"  global_batch_size: {batch}",
        f"  accumulate_steps: {accumulate}" + ("   # raise it if the GPU runs out of memory" if gpu else ""),
        f"  lr: {recipe.optim.lr if gpu or compares else 1.0e-3}   # at a batch of 256; scaled linearly",
        f"  warmup_epochs: {max(1, epochs // 20)}",
        f"teacher: {{momentum: [{0.996 if seen.count * epochs / batch > 50_000 else 0.99 if gpu else recipe.teacher.momentum[0] if compares else 0.98}, 1.0]}}   # nearer to 1 for longer runs",
        f"precision: {recipe.precision}",
        "checkpoint: {every_steps: 1000}",
        *(
            ["probes:", f"  every_epochs: {max(1, epochs // 20)}", f"  knn: {{k: [20], image_size: {sizes.global_size}}}"]
            if labelled
            else []
        ),
        "export: true   # the backbone for timm, in RUN/export",
    ]
    return "\n".join(lines) + "\n"


def _unusual(seen: DataStats) -> bool:
    """Far from ImageNet's mean and deviation."""
    return (
        len(seen.mean) != 3
        or max(abs(a - b) for a, b in zip((*seen.mean, *seen.std), (0.485, 0.456, 0.406, 0.229, 0.224, 0.225), strict=True))
        > 0.12
    )


def _channels(number: int) -> str:
    return "1 channel" if number == 1 else f"{number} channels"


def _quoted(text: str) -> str:
    # YAML's single quotes: nothing but the quote itself has a meaning inside, so that any path or pattern comes back as it was
    return "'" + text.replace("'", "''") + "'"


# --- time -----------------------------------------------------------------------------------------------------------------


def fit_time(path: Path, epoch_seconds: float, steps_per_epoch: int, load_before: Load) -> None:
    """Write the expected time beside `epochs`; on a CPU choose as many as fit into CPU_HOURS (10 to 400). Checkpoints come every five minutes,
    in a shorter run five times."""
    text = path.read_text(encoding="utf-8")
    # as text, not as YAML: dumping it would lose the comments that are the point of the file
    written = re.search(r"^  epochs: (\d+)$", text, re.M)
    assert written is not None  # by compose
    epochs = int(written[1])
    if not torch.cuda.is_available():
        epochs = int(min(400, max(10, CPU_HOURS * 3600 // max(epoch_seconds, 1e-3))))
        for key in ("warmup_epochs", "every_epochs"):
            text = re.sub(rf"^  {key}: \d+$", f"  {key}: {max(1, epochs // 20)}", text, flags=re.M)
    said = f"{band(epochs * epoch_seconds, load_before)} on this machine, by a few measured steps{load_before.words()}"
    text = re.sub(r"^  epochs: \d+$", f"  epochs: {epochs}   # {said}", text, flags=re.M)
    step_seconds = max(epoch_seconds / steps_per_epoch, 1e-3)
    every = max(1, min(_two_digits(SAVE_SECONDS / step_seconds), epochs * steps_per_epoch // 5))
    saves = f"checkpoint: {{every_steps: {every}}}   # {band(every * step_seconds, load_before)}: what a kill may cost"
    path.write_text(re.sub(r"^checkpoint: .*$", saves, text, flags=re.M), encoding="utf-8")


def _two_digits(value: float) -> int:
    """1234.5 -> 1200: no more digits than were measured."""
    return int(float(f"{max(1.0, value):.1e}"))
