"""What a training step takes on this machine: seconds an image, and attention's and the heads' part of them.

The caller builds the step (pretraining/step_times.py does so from a config); here it is only run and looked at.
"""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

SECONDS = 2.0  # for each timing, about
ATTENTION_OPERATIONS = ("attention", "bmm", "softmax")


class StepTimes(NamedTuple):
    """Seconds per image of one process, and the model's size."""

    device: torch.device
    transfer: float
    step: float  # teacher, student, backward, optimiser
    attention: float  # of the step
    head: float  # of the step
    backbone_params: int
    head_params: int


def step_device(asked: str) -> torch.device:
    """Where steps are measured, hence for which device crops are cut. asked: the config's `device`."""
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def measure_step(
    student: nn.Module,
    make_batch: Callable[[int], dict[str, Tensor]],
    transfer: Callable[[dict[str, Tensor]], object],
    step: Callable[[dict[str, Tensor]], object],
    heads: Callable[[int], object] | None,
    images: int,
    device: torch.device,
) -> StepTimes:
    """Time training steps.

    Args:
        student: has `.backbone` and `.heads`.
        make_batch: so many images as the stream hands them on; transfer: to finished crops on the device; step: from a batch to moved weights.
        heads: the heads that read class tokens alone, forward and backward, for so many images; None if there are none.
        images: of the batch that is timed; on a CPU at most: as many as make a step of half of SECONDS.
    """
    if device.type == "cpu":
        four = make_batch(4)
        step(four)  # the first one allocates
        began = time.perf_counter()
        step(four)
        # with a few images the optimiser and the teacher, which cost as much for one as for many, would seem half of the work
        images = min(images, max(2, round(SECONDS / 2 * 4 / (time.perf_counter() - began))))
    batch = make_batch(images)
    seconds = timed(lambda: step(batch), device) / images
    transfer_seconds = timed(lambda: transfer(batch), device) / images
    backbone_params, head_params = (sum(p.numel() for p in part.parameters()) for part in (student.backbone, student.heads))
    return StepTimes(
        device=device,
        transfer=transfer_seconds,
        step=seconds - transfer_seconds,
        attention=seconds * attention_share(lambda: step(batch), device),
        head=timed(lambda: heads(images), device) / images if heads else 0.0,
        backbone_params=backbone_params,
        head_params=head_params,
    )


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, over about SECONDS."""
    run()
    times: list[float] = []
    while sum(times) < SECONDS and len(times) < 10:
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attention_share(run: Callable[[], object], device: torch.device) -> float:
    """Share of a step that attention takes, by the profiler: of its operators' own time, on a GPU that of the kernels they launch."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it speaks to stderr otherwise
    on_gpu, kinds = device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as profile:
        run()
        wait(device)
    operators = [
        event for event in profile.key_averages() if event.device_type == DeviceType.CPU
    ]  # kernels have names of their own
    spent = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in operators}
    inside = sum(value for name, value in spent.items() if any(word in name.lower() for word in ATTENTION_OPERATIONS))
    return inside / max(sum(spent.values()), 1)
