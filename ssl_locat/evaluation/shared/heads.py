"""What training a head on frozen features needs: gradients averaged over processes, and progress kept in one file."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_locat.errors import CheckpointError
from ssl_locat.runs.distributed import all_reduce_sum_, barrier, is_main, world_size

log = logging.getLogger(__name__)


def average_gradients(module: nn.Module) -> None:
    """Mean over processes, in place: heads are small, and DDP would want a forward pass of its own."""
    if world_size() > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                all_reduce_sum_(parameter.grad).div_(world_size())


WITHOUT_EFFECT = (
    "backbone",
    "workers",
    "per_class",
    "resume_file",
    "weights_file",
    "export",
)  # arguments that leave a training as it is


def purpose_of(protocol: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a progress file belongs to: the arguments of a protocol's function (its `locals()` at the start), and the backbone's weights."""
    weights = hashlib.sha256()
    for name, tensor in arguments["backbone"].state_dict().items():
        weights.update(name.encode())
        # as bytes: numpy has no bfloat16
        weights.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    named = {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}
    # through JSON, as the file keeps it: tuples become lists
    return json.loads(json.dumps({"protocol": protocol, **named, "weights": weights.hexdigest()[:16]}, default=str))


class Resumed(NamedTuple):
    """Where a training resumes: steps done, and the plan of its samples (None for a fresh start)."""

    step: int = 0
    plan: dict | None = None


def save_progress(
    path: str | Path | None,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    purpose: dict[str, Any],
    plan: dict | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write (rank 0; None: nothing) beside and rename: a kill leaves the old file or the new one."""
    if path is None:
        return
    if is_main():
        tensors = {f"module.{name}": tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            # before its first step SGD's momentum is None
            tensors |= {
                f"optimizer.{index}.{name}": torch.as_tensor(value).cpu() for name, value in state.items() if value is not None
            }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        about = {"plan": plan, "scaler": scaler.state_dict() if scaler else None}
        metadata = {"step": str(step), "purpose": json.dumps(purpose), "about": json.dumps(about)}
        save_file(tensors, part, metadata=metadata)
        part.replace(path)
    # nobody trains on, and perhaps dies, before the file is whole
    barrier()


def open_progress(path: str | Path, purpose: dict[str, Any]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a progress file. Raises CheckpointError for one of other settings, data or weights, or that is none."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            int(metadata["step"])
            theirs = json.loads(metadata["purpose"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"{path}: not a progress file ({error}). Delete it, or give another resume_file.") from None
    if theirs != purpose:
        names = [name for name in purpose | theirs if purpose.get(name) != theirs.get(name)]
        differences = "; ".join(f"{name}: {theirs.get(name)!r} there, {purpose.get(name)!r} here" for name in names)
        raise CheckpointError(
            f"{path}: holds the progress of another command ({differences}). Delete it, or give another resume_file."
        )
    return metadata, tensors


def load_progress(
    path: str | Path | None,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    purpose: dict[str, Any],
    scaler: torch.amp.GradScaler | None = None,
) -> Resumed:
    """Where to resume from: step 0 without a file. Raises CheckpointError for a file of other settings, data or weights."""
    if path is None or not Path(path).exists():
        return Resumed()
    metadata, tensors = open_progress(path, purpose)
    step = int(metadata["step"])
    about = json.loads(metadata.get("about", "{}"))  # a file of version 0.1 has none
    module.load_state_dict(
        {name.removeprefix("module."): tensor for name, tensor in tensors.items() if name.startswith("module.")}
    )
    state: dict[int, dict] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = tensor
    # groups are as the arguments made them, and `purpose` says that those are the same
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if scaler is not None and about.get("scaler"):
        scaler.load_state_dict(about["scaler"])
    log.info("resumes at step %d, from %s", step, path)
    return Resumed(step, about.get("plan"))
