"""A run's state as tensors by name, the same for any wrapping (DDP, FSDP2, torch.compile): what checkpoint.py writes and fills.

Modules give `student.backbone.blocks.0...`, the optimizer `optimizer.<parameter>.<state>`, so that a checkpoint knows neither the order of
parameters nor their groups.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ssl_locat.errors import CheckpointError


def plain_name(module: nn.Module, name: str) -> str:
    """`name` as in the bare module: without the levels that DDP, torch.compile and checkpoint wrappers put in."""
    parts: list[str] = []
    current: nn.Module | None = module
    for part in name.split("."):
        wrapper = (isinstance(current, DistributedDataParallel) and part == "module") or part in (
            "_orig_mod",
            "_checkpoint_wrapped_module",
        )
        parts += [] if wrapper else [part]
        current = getattr(current, part, None) if current is not None else None
    return ".".join(parts)


def state_tensors(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """All state by name; tensors share memory with the modules'."""
    found = {}
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            found[f"{prefix}.{plain_name(module, name)}"] = tensor
    if optimizer is not None:
        for name, parameter in optimized_parameters(modules, optimizer).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):  # timm's Muon remembers there which kind a parameter is, which its group says anew
                    found[f"optimizer.{name}.{key}"] = value
    return found


def optimized_parameters(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by name; those without state yet (frozen so far) included."""
    # by identity: what is frozen for good is in no group, and has no state to save
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {
        f"{prefix}.{plain_name(module, name)}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if id(parameter) in owned
    }


def empty_optimizer_state(modules: dict, optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """{(name, parameter): {key: tensor to fill}} for what the checkpoint holds; sharded as the parameter is."""
    state: dict = {}
    for name, parameter in optimized_parameters(modules, optimizer).items():
        for key in [full.removeprefix(f"optimizer.{name}.") for full in saved if full.startswith(f"optimizer.{name}.")]:
            if "." in key:
                continue  # a longer parameter name that begins alike
            info = saved[f"optimizer.{name}.{key}"]
            if info.size == parameter.shape and parameter.ndim > 0 and key != "step":
                value = torch.empty_like(parameter, dtype=info.properties.dtype, requires_grad=False)
            else:  # a count of steps: on the parameter's device if the optimizer is fused, else on the CPU
                group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
                on_device = group.get("fused") or group.get("capturable")
                value = torch.empty((), dtype=info.properties.dtype, device=parameter.device if on_device else "cpu")
            state.setdefault((name, parameter), {})[key] = value
    return state


def compare(path: Path, saved: dict[str, Any], targets: dict[str, Tensor]) -> None:
    """CheckpointError if the checkpoint's model is not the one in memory. saved: torch's metadata by name."""
    for name, info in saved.items():
        # a header may claim anything: parts that do not fill the tensor would leave its rest as it was
        if sum(math.prod(chunk.sizes) for chunk in info.chunks) != math.prod(info.size):
            raise CheckpointError(f"{path} cannot be read: the parts of {name} do not make up its shape {tuple(info.size)}.")
    saved = {name: info for name, info in saved.items() if not name.startswith("optimizer.")}
    missing, extra = sorted(targets.keys() - saved.keys()), sorted(saved.keys() - targets.keys())
    both = [(name, saved[name], tensor) for name, tensor in targets.items() if name in saved]
    shapes = [f"{name}: {tuple(info.size)} saved, {tuple(t.shape)} here" for name, info, t in both if info.size != t.shape]
    types = [f"{n}: {i.properties.dtype} saved, {t.dtype} here" for n, i, t in both if i.properties.dtype != t.dtype]
    for what, names in (
        ("lacks", missing),
        ("has besides", extra),
        ("differs in shape", shapes),
        ("differs in type", types),
    ):
        if names:
            listed = "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(
                f"{path} belongs to another model: it {what} {listed}. Resume with the config.yaml in its run folder, "
                "or start anew in another run_dir."
            )


def is_finite(tensor: Tensor) -> bool:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not own.is_floating_point() or bool(own.isfinite().all())


def at_least_1d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views with the same memory; safetensors storage wants at least one dimension."""
    return {name: tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach() for name, tensor in tensors.items()}
