"""`ssl-locat pretrain CONFIG --replay FILE`: run one saved batch again, and say where it stops being finite."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssl_locat.config.schema import Config
from ssl_locat.data.images.crops import StagedCrops
from ssl_locat.objectives import Progress
from ssl_locat.optim.optim import build_optimizer
from ssl_locat.pretraining.parts import autocasts, build_model, mask_seeds, saved_modules, total_loss
from ssl_locat.pretraining.stages import keep_on_average
from ssl_locat.runs.checkpoint import Checkpointer
from ssl_locat.runs.diagnosis import load_replay
from ssl_locat.runs.distributed import setup
from ssl_locat.runs.folder import read_config


def replay(config: Config, path: Path) -> None:
    """One forward and backward pass on the batch, with the weights of the run's newest checkpoint, in the run's precision.

    Prints the loss, the first module whose output is not finite, and the parameters whose gradients are not.
    """
    payload, meta = load_replay(path)
    device = setup(config.device)
    if config.precision == "auto":  # what the run decided
        config = config.model_copy(update={"precision": read_config(config.run_dir).precision})
    newest = Checkpointer(config.run_dir).newest()
    model, losses = build_model(config, device, newest)
    if newest:
        optim = config.optim
        # a checkpoint is loaded as a whole; no step is made
        optimizer = build_optimizer(model.student, optim.betas, optim.layer_decay, optim.patch_embed_lr, optim.name)
        Checkpointer(config.run_dir).load(newest, saved_modules(model, losses), optimizer)
    _print(f"{path}: step {meta['step']} of rank {meta['rank']}, {len(meta['keys'])} samples: {', '.join(meta['keys'][:8])} ...")
    _print(f"weights: {newest or 'random initialisation (the run has no checkpoint)'}; precision {config.precision}")
    for name, tensor in payload.items():
        _print(f"input {name}: {list(tensor.shape)} {tensor.dtype}, {tensor.float().min():.4g} to {tensor.float().max():.4g}")
    broken: list[str] = []
    for network in ("teacher", "student"):
        _watch(getattr(model, network), network, broken)
    crops = StagedCrops([stage.crops.options() for stage in config.crops.resolved()], device.type)
    global_crops, local_crops, anchor_crops, metadata = crops.finish(payload, device)
    stage = config.crops.resolved()[int(payload["stage"]) if "stage" in payload else 0]
    seeds = mask_seeds(config, range(len(meta["keys"])))  # not those of that step
    masks = model.make_masks(losses, seeds, global_crops, keep_on_average(stage.crops))
    teacher_autocast, student_autocast = autocasts(config, device)
    with teacher_autocast:
        targets, _ = model.targets(global_crops, 2, masks, anchor_crops, metadata)
    with student_autocast:
        views = model.student(global_crops, local_crops, 2, masks)
    loss, metrics = total_loss(losses, config, views, targets, Progress(meta["step"], 0.0, 1.0))
    loss.backward()
    _print("loss " + "  ".join(f"{name} {value.item():.5g}" for name, value in {"loss": loss.detach(), **metrics}.items()))
    _print(f"first output that is not finite: {broken[0]}" if broken else "every module's output is finite")
    gradients = {name: parameter.grad for name, parameter in model.student.named_parameters() if parameter.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    _print(f"gradients that are not finite: {', '.join(bad[:8])}" if bad else "every gradient is finite")
    if not broken and not bad:
        _print(
            "So the batch itself is harmless with these weights: they went wrong after this checkpoint. A lower lr is the first thing to try."
        )


def _watch(network: nn.Module, prefix: str, broken: list[str]) -> None:
    """Note the modules whose output is not finite, in the order in which they ran."""

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # named tuples, views and the like are made of what the modules inside gave
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                broken.append(name)

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(hook_for(f"{prefix}.{name}"))


def _print(text: str) -> None:
    print(text, file=sys.stderr)
