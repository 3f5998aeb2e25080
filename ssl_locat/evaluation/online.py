"""Protocols during pretraining: the teacher's backbone is judged on small labelled splits, and training never notices."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from ssl_locat.config.yaml_files import LoadedYaml
from ssl_locat.errors import ConfigError, did_you_mean
from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.evaluation.shared.options import check_arguments

ONLINE = [
    name for name in PROTOCOLS if name not in ("supervised", "attention", "efficiency")
]  # frozen backbone, numbers that move

DENSE = ("segmentation", "hummingbird")


def probe(backbone: nn.Module, name: str, options: dict[str, Any], data_defaults: dict[str, Any]) -> dict[str, float]:
    """The metrics of one protocol on `backbone` as it is now, for the arguments of `resolve`; random state, modes and gradients are left as found."""
    protocol, arguments = resolve(name, options, data_defaults)
    module, _, function = PROTOCOLS[protocol].partition(":")
    with preserve_state(backbone):
        return getattr(import_module(module), function)(backbone, **arguments)


def resolve(name: str, options: dict[str, Any], data_defaults: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The protocol of a probe and its arguments. Raises ConfigError for what the protocol does not take.

    Args:
        name: a protocol. An option `protocol` overrides it, so that one protocol can run twice under two names.
        options: the protocol's keys; `data` is laid over `data_defaults` key by key.
        data_defaults: the run's own train and test sets.
    """
    options = dict(options)
    protocol = options.pop("protocol", name)
    if protocol not in ONLINE:
        raise ConfigError(f"probes.{name}: {protocol!r} is no probe; known: {', '.join(ONLINE)}.{did_you_mean(protocol, ONLINE)}")
    inherited = data_defaults
    if protocol in DENSE:  # classes of masks are not those of images
        inherited = {key: value for key, value in data_defaults.items() if key in ("train", "test", "image_key")}
    data = {**inherited, **(options.pop("data", None) or {})}
    arguments = {**options, "data": {key: value for key, value in data.items() if value is not None}}
    check_arguments(PROTOCOLS[protocol], arguments, LoadedYaml("the config", {}), ("probes", name))
    return protocol, arguments


@contextmanager
def preserve_state(backbone: nn.Module) -> Iterator[None]:
    """Whatever happens inside, random generators (torch, CUDA, numpy, Python) and each module's train/eval mode come out unchanged."""
    modes = {module: module.training for module in backbone.modules()}
    python, arrays = random.getstate(), np.random.get_state()
    device = next(backbone.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        for module, training in modes.items():
            module.training = training
