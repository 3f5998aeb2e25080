"""Projection heads and prototypes of the weights that a run starts from, where MODEL holds them: a run of ours, or a training checkpoint of DINO,
iBOT or DINOv2. With them nothing has to be learned anew before the backbone may move (`backbone.init_heads`)."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_locat.errors import ConfigError
from ssl_locat.models.backbone import find_checkpoint, is_foreign, is_run_or_checkpoint, split_options
from ssl_locat.models.weights import read_heads
from ssl_locat.pretraining.student_teacher import StudentTeacher
from ssl_locat.runs.checkpoint import read_weights

PROTOTYPES = "last_layer.weight_v"


def heads_in(model: str) -> dict[str, dict[str, Tensor]]:
    """`dino`, `ibot` -> the teacher's head, in the names of objectives/heads.DINOHead; {} where MODEL is a backbone alone."""
    path = split_options(model)[0]
    if is_run_or_checkpoint(path):
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_weights(find_checkpoint(Path(path), None), "teacher.heads.").items():
            objective, _, inside = name.partition(".")
            found.setdefault(objective, {})[inside] = tensor
    elif not model.startswith(("timm:", "hf-hub:")) and is_foreign(model) and Path(path).is_file():
        found = read_heads(Path(path))
    else:
        return {}
    return {name: state for name, state in found.items() if name in ("dino", "ibot") and PROTOTYPES in state}


def options_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """The options of an objective that make such a head; ConfigError is left to the shapes that do not fit."""
    linear = sorted(
        (name for name in state if re.fullmatch(r"mlp(\.\d+)?\.weight", name) and state[name].ndim == 2),
        key=lambda name: (len(name), name),
    )
    prototypes, bottleneck = state[PROTOTYPES].shape
    options: dict[str, Any] = {"num_prototypes": prototypes, "bottleneck_dim": bottleneck, "num_layers": len(linear)}
    if len(linear) > 1:
        options["hidden_dim"] = state[linear[0]].shape[0]
    if any(name.endswith("running_mean") for name in state):
        options["batch_norm"] = True
    g = state.get("last_layer.weight_g")
    options["norm_last_layer"] = g is None or bool(torch.all(g == 1))
    return options


def load_heads(model: StudentTeacher, source: str) -> None:
    """Student and teacher begin with the heads of MODEL. ConfigError where it holds none, or others than the objectives have."""
    found = heads_in(source)
    fitting = {name: state for name, state in found.items() if name in model.student.heads}
    if not fitting:
        there = f"it has heads of {', '.join(found)}" if found else "it holds a backbone alone"
        raise ConfigError(
            f"backbone.init_heads is true, but {source} brings none for these objectives: {there}. Set it to false."
        )
    for name, state in fitting.items():
        for network in (model.student, model.teacher):
            own = network.heads[name].state_dict()
            if own.keys() != state.keys() or any(own[key].shape != state[key].shape for key in own):
                wanted = ", ".join(f"{key}: {value}" for key, value in options_of(state).items())
                raise ConfigError(
                    f"{name} has another head than the one in {source}, which is of {{{wanted}}}. Give these, or backbone.init_heads=false."
                )
            network.heads[name].load_state_dict(state)
