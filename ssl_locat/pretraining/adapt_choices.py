"""What `adapt` chooses, from MODEL, the images and the machine, with the reason beside each value.

Rules that fit in one's head. What the command line gives is taken as it is, and what follows from it is chosen after it.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ssl_locat.config.yaml_files import dump_yaml
from ssl_locat.pretraining.adapt_look import Images, Start

MOST_JUDGED = {True: 5000, False: 1000}  # on a GPU, on a CPU
# images that judge, before a tenth of all is more: 400 did not show a loss of 3.5 points that 1,000 did (docs/results.md, pbc_blood)
ENOUGH_JUDGED = 1000
JUDGEMENTS = 4  # probes after the start: each more asks for a clearer difference
CPU_MINUTES = 40.0  # what a run on a CPU may take
# what keeps the patches near the start's
HOLDING: list[dict[str, Any]] = [
    {"name": "gram", "weight": 0.5, "anchor": "start"},
    {"name": "distill", "weight": [0.5, 0.0], "weight_until": 0.5, "anchor": "start", "project": False, "local_crops": False},
]
GIVEN = "as given on the command line"


class Machine(NamedTuple):
    """Where the run will be. gpu_gb: 0 without a GPU; words: how it is called in the reasons; bf16: a CPU that multiplies bf16 by instructions
    of its own."""

    gpu_gb: float
    cores: int
    words: str
    bf16: bool = False


class Choices:
    """key -> (value, reason), in the order in which they were made. `given`: what the command line says, as nested values."""

    def __init__(self, given: Mapping[str, Any]):
        self.given, self.made = given, dict[str, tuple[Any, str]]()

    def of(self, key: str, value: Any, reason: str) -> Any:
        """Choose, unless the command line did; returns what counts."""
        told = self.told(key)
        if isinstance(told, Mapping) and isinstance(value, Mapping):  # a part of it was given
            told = {**value, **told}
        self.made[key] = (value, reason) if told is None else (told, GIVEN)
        return self.made[key][0]

    def told(self, key: str) -> Any:
        found: Any = self.given
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found


def choose(
    model: str, images: Images, start: Start, machine: Machine, given: Mapping[str, Any], locat: bool, run_dir: str
) -> Choices:
    """All but the length of a run on a CPU, which is measured (`fit_length`)."""
    made, gpu = Choices(given), machine.gpu_gb > 0
    made.of("run_dir", run_dir, "the same command with the same folder resumes; the start is kept in it, too")
    made.of("data.train", images.train, f"{images.count:,} images, {images.side} px on the shorter side in the median")
    judged, trained_on = _judge(made, images, gpu)
    made.of("data.workers", max(1, min(8, machine.cores - 1)), f"{machine.words} has {machine.cores} cores")
    if start.channels:
        made.of("data.channels", start.channels, "the bands that MODEL reads, and their scale")
    _backbone(made, model, start, machine, trained_on, locat)
    size = _crops(made, images, start, machine)
    batch = _optim(made, trained_on, size, start, machine)
    _objectives(made, batch, trained_on, start, gpu)
    _probes(made, judged, size, gpu, images)
    fit_length(made, trained_on, None)
    return made


def _judge(made: Choices, images: Images, gpu: bool) -> tuple[bool, int]:
    """(whether labels are there to judge by, how many images are trained on)."""
    if made.told("data.validation") is not None:
        made.of("data.validation", None, "")
        return True, images.count
    if made.told("data.test") is not None:
        made.of("data.test", None, "")
        return True, images.count  # the verdict will say that the guard saw it
    if images.validation:
        made.of("data.validation", images.validation, "found beside the training images, with labels: the guard judges by them")
        return True, images.count
    if images.labelled and images.count >= 200:
        held = min(MOST_JUDGED[gpu], max(images.count // 10, min(ENOUGH_JUDGED, images.count // 3)))
        held = made.of(
            "data.held_out",
            held,
            "the images have labels: so many are kept from training, a third at most, and the guard judges by theirs; fewer would not show a small loss",
        )
        return True, images.count - held
    return False, images.count


def _backbone(made: Choices, model: str, start: Start, machine: Machine, trained_on: int, locat: bool) -> None:
    # a name of ours for a timm model would attach LocAt unless it is told not to
    told = start.has_gaug or start.name.startswith("locat_")
    options = {key: value for key, value in start.options.items() if key not in ("gaug", "prr") or told}
    made.of("backbone.name", start.name, "what MODEL is")
    for key, value in options.items():
        made.of(
            f"backbone.{key}",
            value,
            "MODEL's" if key != "img_size" else "MODEL's own size, so that its positions stay as they are; crops may be smaller",
        )
    if locat and not start.has_gaug:
        made.of(
            "backbone.gaug", {"small_start": True}, "--locat: GAug attached, so small at first that it changes next to nothing"
        )
        made.of("backbone.prr", True, "--locat: what heads and probes read goes through PRR")
    made.of("backbone.init", model, "MODEL")
    made.of("backbone.drop_path_rate", 0.0, "a short run forgets less without")
    gpu, large = machine.gpu_gb > 0, start.parameters > 250e6
    if not gpu or trained_on < 5000:
        why = (
            "a CPU: blocks below need no gradient, which halves a step"
            if not gpu
            else f"{trained_on:,} images are few for all weights"
        )
        made.of("backbone.trainable", "last", why)
        made.of(
            "backbone.last_blocks",
            max(1, min(4 if gpu else 3, start.depth // 2)),
            f"of {start.depth}: the last ones are what suits other images least",
        )
    elif large and machine.gpu_gb < 40:
        made.of("backbone.trainable", "lora", f"{start.parameters / 1e6:.0f} M weights and a GPU of {machine.gpu_gb:.0f} GB")
    else:
        made.of("backbone.trainable", "full", f"{trained_on:,} images; the first blocks move least (optim.layer_decay)")


def _crops(made: Choices, images: Images, start: Start, machine: Machine) -> int:
    patch, most = start.patch, 224 if machine.gpu_gb > 0 else 112
    # seven eighths of the image, as 224 of 256
    fits = max(2, min(most, round(images.side * 7 / 8)) // patch)
    size: int = made.of(
        "crops.global_size",
        fits * patch,
        f"{fits} patches of {patch}: what the images show" + ("" if machine.gpu_gb > 0 else ", 112 px at most on a CPU"),
    )
    made.of("crops.local_size", max(1, (size // patch) // 2) * patch, "half of it, whole patches")
    made.of("crops.num_local", 6 if machine.gpu_gb >= 16 else 2, "each costs time")
    if images.gray or len(start.mean) != 3:
        made.of("crops.gray_prob", 0.0, "the images have no colours")
        made.of("crops.jitter", [0.4, 0.4, 0.0, 0.0], "likewise")
    made.of("crops.mean", list(start.mean), "MODEL's")
    made.of("crops.std", list(start.std), "MODEL's")
    return size


def _optim(made: Choices, trained_on: int, size: int, start: Start, machine: Machine) -> int:
    gpu = machine.gpu_gb > 0
    # a power of two, half of the images at most: a batch must not hold an image twice
    batch: int = made.of(
        "optim.global_batch_size",
        min(256 if gpu else 64, 2 ** int(math.log2(trained_on / 2))),
        "at most half of the images; KoLeo and Sinkhorn compare them",
    )
    if gpu:
        patches = (size / start.patch) ** 2 + 1
        # GB an image in bf16, roughly: 34 bytes a token, a block and a channel for each of two global views, and a quarter for local ones
        per_image = 2.5 * 34 * patches * start.depth * math.sqrt(start.parameters / (12 * start.depth)) / 1e9
        accumulate = 1
        # micro-batches of 64 at least: KoLeo and Sinkhorn compare the images of one
        while batch // accumulate * per_image > 0.6 * machine.gpu_gb and batch // (2 * accumulate) >= 64:
            accumulate *= 2
        made.of("optim.accumulate_steps", accumulate, f"{machine.words}; raise it if the GPU runs out of memory")
        if batch // accumulate * per_image > 0.6 * machine.gpu_gb:
            made.of("activation_checkpointing", True, "blocks are computed twice, so that a micro-batch fits into the GPU")
    by_size = next(lr for most, lr in ((10_000, 4e-4), (100_000, 2e-4), (math.inf, 1e-4)) if trained_on <= most)
    made.of("optim.lr", by_size, "at a batch of 256, scaled linearly; the more images, the more steps and the smaller each")
    made.of("precision", *_precision(machine))
    return batch


def _precision(machine: Machine) -> tuple[str, str]:
    """A step of ViT-S/14 took 3.8 CPU-s in fp32 and 2.1 in bf16 (64 images at 56 px, AMD EPYC with avx512_bf16, no AMX)."""
    if machine.gpu_gb > 0:
        return "bf16", machine.words
    if machine.bf16:
        return "bf16", f"{machine.words} multiplies bf16 by instructions of its own"
    return "fp32", f"{machine.words} has no instructions for bf16"


def _objectives(made: Choices, batch: int, trained_on: int, start: Start, gpu: bool) -> None:
    if made.told("objective") is not None:
        return
    held_out = made.told("probes.held_out.data") or {}
    holds = gpu or "num_classes" in held_out or "mask_classes" in held_out
    # Sinkhorn spreads the images of a batch over the prototypes: a handful cannot fill them
    dino: dict[str, Any] = {"name": "dino", "targets": "sinkhorn" if batch >= 64 else "centering", "frozen_last_layer_epochs": 0}
    if "dino" in start.heads:
        dino |= {**start.heads["dino"], "teacher_temp": [0.07, 0.07]}
        made.of(
            "backbone.init_heads",
            True,
            "MODEL holds its head and prototypes: nothing has to be learned anew before the backbone moves",
        )
        why = "the head that MODEL holds"
    else:
        # one for two images, within what a linear head can tell apart
        prototypes = min(16384, max(256, 2 ** round(math.log2(max(trained_on / 2, 1)))))
        dino |= {"num_prototypes": prototypes, "num_layers": 1, "bottleneck_dim": 256, "teacher_temp": [0.05, 0.05]}
        why = "a linear head, whose gradient reaches the features from the first step: no warm-up"
    koleo = {"name": "koleo", "weight": 0.1, **({"min_images": batch} if batch < 64 else {})}
    hold = (
        "the Gram anchor and a pull that fades hold it to the start"
        if holds
        else "no anchor on a CPU, where it costs a third: give one for dense tasks"
    )
    made.of(
        "objective", [dino, koleo, *(HOLDING if holds else [])], f"{why}; KoLeo spreads what the start keeps too close; {hold}"
    )


def _probes(made: Choices, judged: bool, size: int, gpu: bool, images: Images) -> None:
    if judged:
        about: dict[str, Any] = {"image_size": size}
        if not made.told("data.held_out") and "data.held_out" not in made.made:
            about["data"] = {"test_images": MOST_JUDGED[gpu]}
        made.of("probes.held_out", about, f"the guard's: at most {MOST_JUDGED[gpu]:,} images, at the size of the crops")
        made.of("stop_when", {"measure": "held_out.score", "patience": 2}, "ends early when it decays")
        return
    made.of(
        "probes.unlabelled",
        {"image_size": size, "images": 256},
        "no labels were found: these measures follow the run, and prove nothing",
    )
    made.of("checkpoint.keep_best", {"dense": "unlabelled.dse"}, "what guard.unverified=trained would export")


def fit_length(made: Choices, trained_on: int, epoch_seconds: float | None) -> None:
    """Steps, and what follows from them. epoch_seconds: as measured on this machine's CPU, which then sets the length."""
    batch = made.made["optim.global_batch_size"][0]
    per_epoch = max(1, trained_on // batch)
    epochs = next(
        count for most, count in ((1000, 40), (10_000, 20), (100_000, 10), (1_000_000, 3), (math.inf, 1)) if trained_on <= most
    )
    steps, why = max(50, epochs * per_epoch), f"{epochs} passes over {trained_on:,} images"
    if epoch_seconds is not None:
        # a fifth is left for the probes and the export
        fits = max(20, int(0.8 * 60 * CPU_MINUTES / max(epoch_seconds / per_epoch, 1e-3)))
        if fits < steps:
            steps, why = (
                fits,
                f"what fits into {CPU_MINUTES:.0f} minutes here, by a few measured steps ({epoch_seconds / per_epoch:.1f} s each)",
            )
    if (asked := made.told("optim.epochs")) is not None:
        steps = max(1, round(asked * per_epoch))
        made.of("optim.epochs", None, "")
        made.made.pop("optim.total_steps", None)
    else:
        steps = made.of("optim.total_steps", steps, why)
    # what is exported is the teacher: nearer to 1 it would not get where the student is by the end of a short run
    momentum = [round(min(0.999, max(low, 1 - lag / steps)), 4) for low, lag in ((0.5, 10), (0.6, 5))]
    made.of("teacher.momentum", momentum, "the teacher follows within a tenth of the run, so that the end has what was learned")
    if made.told("probes.every_epochs") is None:
        made.of(
            "probes.every_steps", max(1, -(-steps // JUDGEMENTS)), f"{JUDGEMENTS} times: each more asks for a clearer difference"
        )
    made.of("log.every_steps", max(1, min(10, steps // 10)), "fetched together, so that no step waits")


# --- the YAML -------------------------------------------------------------------------------------------------------------


def to_yaml(made: Choices, head: list[str], values: Mapping[str, Any]) -> str:
    """The YAML with a reason beside each value. values: what counts, nested, with all that the command line gave."""
    reasons = {key: reason for key, (_, reason) in made.made.items()}
    return "\n".join([*(f"# {line}" for line in head), "", "base: adapt/default", *_lines(values, (), reasons)]) + "\n"


def _lines(values: Mapping[str, Any], above: tuple[str, ...], reasons: Mapping[str, str]) -> Iterator[str]:
    for key, value in values.items():
        path = (*above, str(key))
        name, indent = ".".join(path), "  " * len(above)
        inside = any(other.startswith(f"{name}.") for other in reasons)
        if isinstance(value, Mapping) and value and name not in reasons and (inside or not above):
            yield f"{indent}{key}:"
            yield from _lines(value, path, reasons)
            continue
        reason = reasons.get(name, GIVEN)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}:   # {reason}"
            yield from (f"{indent}  - {_flow(item)}" for item in value)
        else:
            yield f"{indent}{key}: {_flow(value)}   # {reason}"


def _flow(value: Any) -> str:
    """One line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'" if not value.replace("_", "").isalnum() else _plain(value)
    return dump_yaml(value).removesuffix("\n...\n").strip()


def _plain(text: str) -> str:
    """Quoted where YAML would read something else than text."""
    return dump_yaml(text).removesuffix("\n...\n").strip()
