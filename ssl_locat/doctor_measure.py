"""What `doctor` measures: a sample of the data, and a few training steps on this machine, part by part."""

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from ssl_locat.config import Config
from ssl_locat.data.crops import MultiCrop, Sample
from ssl_locat.data.decode import decode_image, find_image
from ssl_locat.data.index import Dataset
from ssl_locat.data.tar import Damage
from ssl_locat.errors import BadSample
from ssl_locat.objectives import Needs, Progress, Views
from ssl_locat.run_parts import autocasts, build_model, mask_seeds, total_loss

SECONDS = 2.0  # for each timing, about
ATTENTION_OPERATIONS = ("attention", "bmm", "softmax")


class DataSample(NamedTuple):
    """A look at some samples, spread over the data."""

    looked_at: int
    damaged: list[str]  # 'shard: key: reason'
    formats: Counter  # of the image members: JPEG, PNG, ...
    sizes: list[tuple[int, int]]  # (height, width), pixels
    read_seconds: float  # per image
    decode_seconds: float
    crop_seconds: float
    payload: list[Sample] | None  # what a worker hands on for the step, as this device's crops.mode wants it


class StepTimes(NamedTuple):
    """Seconds per image of one process, and what the model takes."""

    device: torch.device
    transfer: float
    step: float  # teacher, student, backward, optimiser
    attention: float  # of the step
    head: float  # of the step
    backbone_params: int
    head_params: int
    memory_fixed: float  # bytes: weights, gradients, optimiser, teacher
    memory_per_image: float  # bytes kept for the backward pass


def step_device(config: Config) -> torch.device:
    """Where the steps are measured, hence for which device crops are cut."""
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def sample_data(datasets: list[Dataset], config: Config, count: int = 64) -> DataSample:
    """Read, decode and crop `count` samples as training would, in this process, timing each part."""
    crops = MultiCrop(**config.crops.model_dump(), device=step_device(config).type)
    damaged, formats, sizes, cut = [], Counter(), [], []
    spent = {"read": 0.0, "decode": 0.0, "crop": 0.0}
    looked_at = 0
    for dataset in datasets:
        share = max(1, count // len(datasets))
        for place in np.linspace(0, len(dataset) - 1, min(share, len(dataset))).round().astype(int).tolist():
            looked_at += 1
            began = time.perf_counter()
            sample = dataset.read(place, place + 1)[0]
            spent["read"] += time.perf_counter() - began
            if isinstance(sample, Damage):
                damaged.append(f"{sample.shard}: {sample.key}: {sample.reason}")
                continue
            try:
                data = find_image(sample.members, config.data.image_key)
                began = time.perf_counter()
                image = decode_image(data, channels=len(config.crops.mean), max_pixels=config.data.max_pixels)
                decoded = time.perf_counter()
                cut.append(crops.cut(image, seed=looked_at))
                spent["decode"] += decoded - began
                spent["crop"] += time.perf_counter() - decoded
            except BadSample as bad:
                damaged.append(f"{sample.shard}: {sample.key}: {bad.reason}")
                continue
            formats[kind_of(data)] += 1
            sizes.append(image.shape[:2])
    usable = max(1, len(cut))
    return DataSample(
        looked_at,
        damaged,
        formats,
        sizes,
        spent["read"] / looked_at,
        spent["decode"] / usable,
        spent["crop"] / usable,
        cut or None,
    )


def kind_of(data: bytes) -> str:
    """Image format by its first bytes."""
    magic = {
        b"\xff\xd8": "JPEG",
        b"\x89PNG": "PNG",
        b"GIF8": "GIF",
        b"BM": "BMP",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"\x93NUMPY": "npy",
    }
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in magic.items() if data.startswith(start)), "other")


def measure_step(config: Config, payload: list[Sample], micro_batch: int) -> StepTimes:
    """Time training steps of this config's model on real crops, repeated where there are fewer than a batch takes.

    On a CPU a few images serve; times per image hold for more."""
    device = step_device(config)
    model, losses = build_model(config, device)
    crops = MultiCrop(**config.crops.model_dump(), device=device.type)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-6)
    teacher_autocast, student_autocast = autocasts(config, device)
    at = Progress(0, 0.0, 1.0)

    def batch(images: int) -> dict[str, Tensor]:
        collated = crops.collate([payload[place % len(payload)] for place in range(images)])
        return {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in collated.items()}

    def step(collated: dict[str, Tensor]) -> None:
        images, local = crops.finish(collated, device)
        masks = model.make_masks(losses, mask_seeds(config, range(len(images) // 2)), images)
        with teacher_autocast:
            targets, _ = model.targets(images, 2, masks)
        with student_autocast:
            views = model.student(images, local, 2, masks)
        loss, _ = total_loss(losses, config, views, targets, at)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for objective in losses.values():
            objective.finish_step()

    two, four = batch(2), batch(4)
    # the difference: casts of weights and what else does not grow with images stay out of it
    kept = bytes_kept(model.student, lambda: step(four)) - bytes_kept(model.student, lambda: step(two))
    images = micro_batch if device.type == "cuda" else min(micro_batch, 16 if config.crops.global_size <= 64 else 2)
    some = batch(images)
    seconds = timed(lambda: step(some), device) / images
    transfer = timed(lambda: crops.finish(some, device), device) / images
    backbone_params, head_params = (
        sum(p.numel() for p in part.parameters()) for part in (model.student.backbone, model.student.heads)
    )
    return StepTimes(
        device=device,
        transfer=transfer,
        step=seconds - transfer,
        attention=seconds * attention_share(lambda: step(some), device),
        head=time_heads(model, losses, images, crops, device) / images,
        backbone_params=backbone_params,
        head_params=head_params,
        memory_fixed=(backbone_params + head_params) * 4 * 5.0,  # weight, gradient, two moments; the teacher's weight
        memory_per_image=kept / 2,
    )


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, over about SECONDS."""
    run()
    times = []
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


def bytes_kept(student: nn.Module, run: Callable[[], None]) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, weights aside, each tensor once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(seen.values())


def attention_share(run: Callable[[], None], device: torch.device) -> float:
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


def time_heads(model: nn.Module, losses: nn.ModuleDict, images: int, crops: MultiCrop, device: torch.device) -> float:
    """Seconds of the heads that read class tokens alone, forward and backward, for one batch."""
    views = Views(torch.randn(2 + crops.num_local, images, model.student.backbone.num_features, device=device))
    heads = [model.student.heads[name] for name, objective in losses.items() if objective.needs == Needs()]
    heads = [head for head in heads if any(True for _ in head.parameters())]  # KoLeo has none to train

    def run() -> None:
        for head in heads:
            head(views).sum().backward()

    return timed(run, device) if heads else 0.0
