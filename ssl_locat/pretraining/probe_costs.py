"""What probes read: how many images of each set, so that all probes of a run together cost a small share of its training.

The sets are chosen by their keys (data/shards/selections.py): the same images in every probe, and in every run on the same data.
"""

import inspect
from importlib import import_module
from typing import Any, NamedTuple

from ssl_locat.config.schema import Config
from ssl_locat.evaluation import PROTOCOLS

SHARE = 0.05  # of the training's images, and of its forward FLOPs, for all probes of a run
MOST = 10_000  # of each set: an interval of +-1 % at 95 %, and raw pixels of so many fit into half a GB
FEWEST = {"train": 1000, "test": 500}  # below that a number says little, however short the run


class ProbeCost(NamedTuple):
    """One probe over the whole run."""

    name: str
    times: int  # it is run, the one before the first step included
    images: int  # it decodes each time
    forwards: float  # forward passes each time, in passes of one global crop


def limits(config: Config, steps_per_epoch: int, total_steps: int) -> dict[str, dict[str, int]]:
    """Probe -> {train_images, test_images} where its own `data` does not say: what SHARE of the training allows, at most MOST of each."""
    probes = config.probes.options
    found = {}
    for name, options in probes.items():
        options = options or {}
        passes = _passes(options.get("protocol", name), options)
        decoded = (
            SHARE * samples(config, steps_per_epoch, total_steps) / (len(probes) * times(config, steps_per_epoch, total_steps))
        )
        allowed = decoded * min(1.0, training_forwards(config) / forward(config, options))
        test = min(MOST, max(FEWEST["test"], allowed / 3))
        found[name] = {
            "train_images": int(min(MOST, max(FEWEST["train"], (allowed - test) / passes))),
            "test_images": int(test),
        }
    return found


def costs(config: Config, steps_per_epoch: int, total_steps: int, sizes: dict[str, int]) -> list[ProbeCost]:
    """What the probes of a run cost. sizes: images of data.train, data.test and data.validation."""
    automatic, found = limits(config, steps_per_epoch, total_steps), []
    for name, options in config.probes.options.items():
        options = options or {}
        own = {**automatic[name], **(options.get("data") or {})}
        train, test = (min(sizes.get(key) or 0, own.get(f"{key}_images") or 1 << 62) for key in ("train", "test"))
        protocol = options.get("protocol", name)
        images = _argument(protocol, options, "images") if protocol in ("locality", "unlabelled") else None
        if protocol == "held_out":  # one set, each image once
            whole = sizes.get("validation") or sizes.get("test") or config.data.held_out or 0
            images = min(whole, (options.get("data") or {}).get("test_images") or MOST)
        if images is None:
            iterations = _argument(protocol, options, "iterations")
            trained = (
                iterations * _argument(protocol, options, "batch_size") if iterations else train * _passes(protocol, options)
            )
            images = trained + test
        found.append(ProbeCost(name, times(config, steps_per_epoch, total_steps), images, images * forward(config, options)))
    return found


def shares(config: Config, found: list[ProbeCost], trained: int) -> tuple[float, float]:
    """(of the images decoded, of the forward FLOPs) that all probes take, relative to the training's. trained: images of the whole run."""
    decoded = sum(cost.times * cost.images for cost in found) / trained
    return decoded, sum(cost.times * cost.forwards for cost in found) / (trained * training_forwards(config))


def samples(config: Config, steps_per_epoch: int, total_steps: int) -> int:
    """Images of the whole run."""
    if any(
        stage.batch_size for stage in config.crops.stages
    ):  # steps of several sizes: only the length that was asked for counts images
        total_steps = config.optim.total_steps or max(1, round((config.optim.epochs or 0) * steps_per_epoch))
    return total_steps * config.optim.global_batch_size


def period(config: Config, steps_per_epoch: int, total_steps: int) -> int:
    """Steps between probes."""
    options = config.probes
    every = options.every_steps or (options.every_epochs and max(1, round(options.every_epochs * steps_per_epoch)))
    return every or total_steps


def times(config: Config, steps_per_epoch: int, total_steps: int) -> int:
    """Probes of a run: before the first step, at the period, after the last step."""
    return 1 + -(-total_steps // period(config, steps_per_epoch, total_steps))


def training_forwards(config: Config) -> float:
    """Forward passes of an image in training, in passes of a global crop: two of the teacher, two and the local ones of the student.
    Of a run with stages the mean, in passes of the last stage's crop."""
    found, begins, side = 0.0, 0.0, config.crops.global_size
    for until, crops, _ in config.crops.resolved():
        of_an_image = (2 + 2 * sum(crops.keeps) / 2) * (crops.global_size / side) ** 2 + crops.num_local * (
            crops.local_size / side
        ) ** 2
        found, begins = found + (until - begins) * of_an_image, until
    return found


def forward(config: Config, options: dict[str, Any]) -> float:
    """Of one image of a probe, in passes of a global crop: cost grows with the pixels."""
    size = options.get("image_size") or config.backbone.options.get("img_size") or config.crops.global_size
    size = max(size) if isinstance(size, list | tuple) else size  # [height, width]
    return (size / config.crops.global_size) ** 2


def _passes(protocol: str, options: dict[str, Any]) -> int:
    """How often a protocol reads its training images."""
    epochs = _argument(protocol, options, "epochs")
    return epochs if epochs and _argument(protocol, options, "augment") is not False else 1


def _argument(protocol: str, options: dict[str, Any], name: str) -> Any:
    """An option's value, or its default; None where the protocol has no such option."""
    module, _, function = PROTOCOLS[protocol].partition(":")
    parameter = inspect.signature(getattr(import_module(module), function)).parameters.get(name)
    return options.get(name, parameter.default) if parameter else None
