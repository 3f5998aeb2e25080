"""Protocols during pretraining: the teacher's backbone is evaluated on small labelled splits, and training never notices."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.evaluation.probe_options import DENSE, resolve
from ssl_locat.evaluation.protocols.held_out import kinds_of
from ssl_locat.evaluation.shared.samples import Members, first_label, open_store
from ssl_locat.evaluation.shared.seg_datasets import open_scenes

LABELLED = ("knn", "linear")  # one label an image


def probe(backbone: nn.Module, name: str, options: dict[str, Any], data_defaults: dict[str, Any]) -> dict[str, float]:
    """The metrics of one protocol on `backbone` as it is now, for the arguments of `resolve`; random state, modes and gradients are left as found."""
    protocol, arguments = resolve(name, options, data_defaults)
    module, _, function = PROTOCOLS[protocol].partition(":")
    with preserve_state(backbone):
        return getattr(import_module(module), function)(backbone, **arguments)


def open_splits(protocol: str, data: dict[str, Any]) -> None:
    """Open the data sets of a protocol as it will; of labelled ones read the first label. UserError if one is not there."""
    given = {key: value for key, value in data.items() if value is not None}
    if protocol == "held_out":
        kinds_of(given)
        return
    for split in ("train", "test"):
        if not given.get(split):
            continue
        if protocol in DENSE:
            open_scenes(given, split)
            continue
        members = Members(given[split], open_store(given))
        if protocol in LABELLED:
            first_label(members, given.get("label_key"))


@contextmanager
def preserve_state(backbone: nn.Module) -> Iterator[None]:
    """Whatever happens inside, random generators (torch, CUDA, numpy, Python) and each module's train/eval mode come out unchanged."""
    # module by module: a frozen part may be in eval mode while the rest trains
    modes = {module: module.training for module in backbone.modules()}
    python, arrays = random.getstate(), np.random.get_state()
    device = next(backbone.parameters()).device
    try:
        # without a list fork_rng saves the state of every GPU of the node; gradients are on, as linear trains a head
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        for module, training in modes.items():
            module.training = training
