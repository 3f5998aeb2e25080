"""`precision: auto`: in which type the networks multiply, decided once for a run by timing its own steps, with the reason in words."""

import math
import time

import torch

from ssl_locat.config.schema import Config
from ssl_locat.objectives import Progress
from ssl_locat.pretraining.parts import autocasts, build_model, mask_seeds, total_loss
from ssl_locat.pretraining.stages import keep_on_average
from ssl_locat.runs.distributed import broadcast_object
from ssl_locat.runs.folder import cpu_features

_SECONDS = 6.0  # for all timed steps, about; never fewer than two in each precision
_STEPS = 5  # timed in each precision, at most
_GAIN = 1.05  # at least, so that noise decides nothing
_FIRST = 4  # images of the first step, by which the number of the others goes
_AT = Progress(0, 0.0, 1.0)


def low_precision(device: torch.device) -> str | None:
    """The 16-bit type that this device multiplies by instructions of its own; None where it would only convert to and fro."""
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        # tensor cores: fp16 since Volta, bf16, which needs no loss scale, since Ampere
        return "bf16" if major >= 8 else "fp16" if major == 7 else None
    return "bf16" if device.type == "cpu" and cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"} else None


def decide_precision(config: Config, device: torch.device, micro_batch: int) -> tuple[str, str]:
    """(precision, why), the same on all ranks: all of them take part, as losses may gather over ranks, and rank 0 decides.

    micro_batch: images of a rank's forward pass.
    """
    candidate = low_precision(device)
    # ranks may stand on different machines
    candidate = broadcast_object(candidate)
    if candidate is None:
        return "fp32", f"this {device.type} has no instructions that multiply 16-bit numbers"
    seconds, images = measure_steps(config, device, micro_batch, ("fp32", candidate))
    chosen = candidate if seconds["fp32"] > _GAIN * seconds[candidate] else "fp32"
    words = ", ".join(f"{1000 * value:.1f} ms in {name}" for name, value in seconds.items())
    chosen, words = broadcast_object([chosen, f"forward and backward of {images} images: {words}"])
    return chosen, words


def measure_steps(
    config: Config, device: torch.device, micro_batch: int, precisions: tuple[str, ...]
) -> tuple[dict[str, float], int]:
    """({precision: seconds (on a CPU those of all its cores) of teacher, student, losses and backward}, images), the best of a few, taking turns; all ranks call it.

    The optimiser is left out: it works in float32 whatever the networks do."""
    model, losses = build_model(config, device)
    crops, channels = config.crops, len(config.crops.mean)
    clock = (
        time.perf_counter if device.type == "cuda" else time.process_time
    )  # other work on these cores would delay the one or the other

    def seconds(precision: str, images: int) -> float:
        large, small = (
            torch.randn(views * images, channels, side, side, device=device) if views else None
            for views, side in ((2, crops.global_size), (crops.num_local, crops.local_size))
        )
        assert large is not None
        masks = model.make_masks(losses, mask_seeds(config, range(images)), large, keep_on_average(config.crops))
        teacher_autocast, student_autocast = autocasts(with_precision(config, precision), device)
        _finish(device)
        began = clock()
        with teacher_autocast:
            targets, _ = model.targets(large, 2, masks)
        with student_autocast:
            views = model.student(large, small, 2, masks)
        total_loss(losses, config, views, targets, _AT)[0].backward()
        _finish(device)
        taken = clock() - began
        model.student.zero_grad(set_to_none=True)
        for objective in losses.values():
            objective.finish_step()
        return taken

    few = min(_FIRST, micro_batch)
    for precision in precisions:  # makes buffers and loads kernels
        seconds(precision, few)
    each = max(seconds(precision, few) for precision in precisions) / few
    # a step of a second tells more than one of a millisecond; all ranks must agree on both numbers
    images, rounds = broadcast_object(
        [
            max(few, min(micro_batch, round(1 / each))),
            max(2, min(_STEPS, math.floor(_SECONDS / (2 * min(1.0, micro_batch * each))))),
        ]
    )
    timings = [[seconds(precision, images) for precision in precisions] for _ in range(1 + rounds)][1:]
    return {name: min(times) for name, times in zip(precisions, zip(*timings, strict=True), strict=True)}, images


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_precision(config: Config, precision: str) -> Config:
    return config.model_copy(update={"precision": precision})
