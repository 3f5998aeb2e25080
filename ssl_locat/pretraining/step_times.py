"""The training step of a config, built and measured on this machine: what `doctor` and `init` estimate hours and memory from, and what
`crops.mode: auto` must feed."""

import os

import torch
from torch import Tensor

from ssl_locat.config.schema import Config
from ssl_locat.data.images.crops import MultiCrop, Sample
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.measure.crop_mode import MODES, choose_mode, cores_of_a_rank, measured_rates
from ssl_locat.measure.images import DataSample, sample_data
from ssl_locat.measure.step import StepTimes, measure_step, step_device
from ssl_locat.objectives import Needs, Progress, Views
from ssl_locat.objectives.blocks import BlockScores
from ssl_locat.pretraining.operations import operations_of_stages
from ssl_locat.pretraining.parts import Length, autocasts, build_model, check, mask_seeds, total_loss
from ssl_locat.pretraining.precision_choice import decide_precision, with_precision
from ssl_locat.pretraining.stages import keep_on_average, stages_of, stretches
from ssl_locat.runs import distributed


def usable_workers(config: Config, ranks: int = 1) -> int:
    """Loader processes per rank that have a core: more do not read faster."""
    return max(1, min(config.data.workers, (os.cpu_count() or 1) // ranks))


def seconds_per_image(config: Config, sample: DataSample, times: StepTimes, ranks: int = 1) -> float:
    """Of one rank, loading and training together: one after the other where they share cores, else the slower of both."""
    feed = (sample.read_seconds + sample.decode_seconds + sample.crop_seconds) / usable_workers(config, ranks)
    model = times.transfer + times.step
    return feed + model if shares_cores(config, times) else max(feed, model)


def seconds_of_run(config: Config, sample: DataSample, times: StepTimes, ranks: int, length: Length, flop: list[float]) -> float:
    """Of a whole run, without probes. A stage's steps take as much less than the measured ones, the last stage's, as they cost less FLOP (of an
    image in each stage: operations.py); loading is taken to be the same in all."""
    seconds = 0.0
    for stage, _, steps in stretches(stages_of(config, length.total_samples), 0, length.total_samples):
        share = flop[stage.number] / flop[-1]
        there = times._replace(transfer=times.transfer * share, step=times.step * share)
        seconds += steps * stage.batch * seconds_per_image(config, sample, there, ranks) / ranks
    return seconds


def shares_cores(config: Config, times: StepTimes) -> bool:
    """Whether loading takes its time from training: on a CPU, and without workers."""
    return config.data.workers == 0 or times.device.type == "cpu"


def step_times(config: Config, payload: list[Sample], micro_batch: int) -> StepTimes:
    """Time training steps of this config's model on real crops, repeated where there are fewer than a batch takes.

    On a CPU as many images as make a step of a second or so."""
    device = step_device(config.device)
    model, losses = build_model(config, device)
    crops = MultiCrop(**config.crops.options(), device=device.type)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-6)
    teacher_autocast, student_autocast = autocasts(config, device)
    at = Progress(0, 0.0, 1.0)

    def make_batch(images: int) -> dict[str, Tensor]:
        collated = crops.collate([payload[place % len(payload)] for place in range(images)])
        return {name: tensor.pin_memory() if device.type == "cuda" else tensor for name, tensor in collated.items()}

    def step(collated: dict[str, Tensor]) -> None:
        images, local, larger, metadata = crops.finish(collated, device)
        # two global crops an image
        masks = model.make_masks(losses, mask_seeds(config, range(len(images) // 2)), images, keep_on_average(config.crops))
        with teacher_autocast:
            targets, _ = model.targets(images, 2, masks, larger, metadata)
        with student_autocast:
            views = model.student(images, local, 2, masks)
        loss, _ = total_loss(losses, config, views, targets, at)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for objective in losses.values():
            objective.finish_step()

    heads = [model.student.heads[name] for name, objective in losses.items() if objective.needs == Needs()]
    heads = [head for head in heads if any(True for _ in head.parameters())]  # KoLeo has none to train

    def run_heads(images: int) -> None:
        # [2 + n, B, D]: class tokens of all crops
        views = Views(torch.randn(2 + crops.num_local, images, model.student.backbone.num_features, device=device))
        for head in heads:
            scores = head(views)
            (scores.whole() if isinstance(scores, BlockScores) else scores).sum().backward()

    return measure_step(
        model.student,
        make_batch,
        lambda batch: crops.finish(batch, device),
        step,
        run_heads if heads else None,
        images=micro_batch if device.type == "cuda" else min(micro_batch, 32),
        device=device,
    )


def expected_seconds(config: Config, ranks: int = 1) -> tuple[float, int]:
    """(seconds of one epoch of this config on this machine, on average over its stages, by a few steps of one rank; steps of an epoch)."""
    datasets, _, length = check(config)
    sample = sample_data(datasets, config, step_device(config.device), 32)
    # one micro-batch, as the run will have it
    assert sample.payload is not None  # some of these images were read before
    batch = config.optim.global_batch_size // (config.optim.accumulate_steps * ranks)
    if config.precision == "auto":
        config = with_precision(config, decide_precision(config, step_device(config.device), batch)[0])
    times = step_times(config, sample.payload, batch)
    flop = operations_of_stages(config).stages if config.crops.stages else [1.0]
    epochs = length.total_samples / (length.steps_per_epoch * config.optim.global_batch_size)
    return seconds_of_run(config, sample, times, ranks, length, flop) / epochs, length.steps_per_epoch


def decide_crops(config: Config, datasets: list[Dataset], device: torch.device, micro_batch: int) -> tuple[Config, str]:
    """The config with its `crops.mode: auto` decided by what this machine measures, in seconds, and the reason in words.

    Args:
        micro_batch: images of a rank's forward pass.
    """
    rates = measured_rates(datasets, config, device)
    if rates is None:
        return with_crop_mode(config, MODES[0]), "no image of the data could be read"
    speed = None
    if device.type == "cuda":
        measured = with_crop_mode(config, "device-photometric")
        payload = sample_data(datasets, measured, device).payload or []
        with distributed.alone():  # the other ranks are waiting in _decide_crops for what rank 0 finds
            speed = 1 / step_times(measured, payload, micro_batch).step
    mode, why = choose_mode(rates, device.type, config.data.workers, cores_of_a_rank(), speed)
    return with_crop_mode(config, mode), why


def with_crop_mode(config: Config, mode: str) -> Config:
    return config.model_copy(update={"crops": config.crops.model_copy(update={"mode": mode})})
