"""What training a head on frozen features needs: gradients averaged over processes, and progress kept in one file."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ssl_locat.distributed import all_reduce_sum_, barrier, is_main, world_size
from ssl_locat.errors import CheckpointError


def average_gradients(module: nn.Module) -> None:
    """Mean over processes, in place: heads are small, and DDP would want a forward pass of its own."""
    if world_size() > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                all_reduce_sum_(parameter.grad).div_(world_size())


def save_progress(path: str | Path | None, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, purpose: str) -> None:
    """Write (rank 0; None: nothing) beside and rename: a kill leaves the old file or the new one.

    purpose: what the file belongs to, compared by `load_progress`.
    """
    if path is None:
        return
    if is_main():
        tensors = {f"module.{name}": tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{name}": torch.as_tensor(value).cpu() for name, value in state.items() if value is not None
            }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata={"step": str(step), "purpose": purpose})
        part.replace(path)
    barrier()


def load_progress(path: str | Path | None, module: nn.Module, optimizer: torch.optim.Optimizer, purpose: str) -> int:
    """The step to go on from: 0 without a file. Raises CheckpointError for a file of other settings."""
    if path is None or not Path(path).exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"{path}: not a progress file ({error}). Delete it, or give another resume_file.") from None
    if metadata["purpose"] != purpose:
        raise CheckpointError(
            f"{path}: holds the progress of other settings ({metadata['purpose']}; this run is {purpose}). Delete it, or give another resume_file."
        )
    module.load_state_dict(
        {name.removeprefix("module."): tensor for name, tensor in tensors.items() if name.startswith("module.")}
    )
    state: dict[int, dict] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])
