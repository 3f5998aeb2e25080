"""What looks at each step of a run: metrics and their means over ranks, images per second, warnings, and the loss that is no number."""

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ssl_locat.label_free.rankme import rankme
from ssl_locat.measure.usage import Usage
from ssl_locat.models.tokens import Tokens
from ssl_locat.pretraining.first_crops import FirstCrops
from ssl_locat.pretraining.parts import Rates
from ssl_locat.pretraining.setup import Run
from ssl_locat.pretraining.stages import keep_at, work
from ssl_locat.runs import distributed
from ssl_locat.runs.diagnosis import feature_std, not_finite, patch_cls_similarity, save_replay
from ssl_locat.runs.distributed import rank, world_size

log = logging.getLogger(__name__)


class Monitor:
    """Logs the steps of a run. Numbers stay on the device until a few steps' worth are fetched together: no step waits for them."""

    def __init__(self, run: Run, bar: Any):
        self.run, self.bar, self.speed = run, bar, Speed()
        self.waiting_for_data = self.speed.waiting
        self.first_crops = FirstCrops(
            run.folder, run.config.crops.mean, run.config.crops.std, (run.config.channels or {}).get("show")
        )
        self.usage = Usage(run.device)
        looks = torch.tensor(float(self.usage.looks_at_gpu), device=run.device)
        self.usage.looks_at_gpu = bool(distributed.all_reduce_mean_(looks) == 1)  # all ranks log the same numbers
        self.stage = run.stage.number
        self.keeps = any(min(stage.crops.keeps) < 1 for stage in run.stages)
        if run.stage_flop:
            bar.work = work(run.stages, run.step, run.samples_seen, run.length.total_samples, run.stage_flop)
        self.own_losses: list[tuple[int, Tensor, list]] = []  # (step, this rank's loss, positions), since the last look at them

    @contextmanager
    def paused(self, kind: str, every: int) -> Iterator[None]:
        """A save or a probe, which comes every so many steps: no part of images/s, and told to the bar for its ETA."""
        began = time.monotonic()
        with self.speed.paused():
            yield
        self.bar.pause(time.monotonic() - began, kind, every)

    def log(self, metrics: dict[str, Tensor], rate: Rates, images: int, positions: list, teacher_tokens: Tokens) -> None:
        """At the end of a step of so many images. metrics: scalars of this rank; teacher_tokens: of the last micro-batch's global crops.

        Raises Diverged if a loss was not finite, or if a collapse named in `stop_on` was seen."""
        run, config = self.run, self.run.config
        # tokens of all patches: worth a look once per transfer, not once a step
        if (run.step - 1) % config.log.every_steps == 0:
            metrics.update(collapse_metrics(teacher_tokens))
        images_per_second, data_wait = self.speed.after(images)
        numbers = {
            "images_per_second": images_per_second,
            "data_wait": data_wait,
            "memory_gb": memory_gb(run.device),
            "quarantined": run.stream.quarantined * world_size(),  # a sum over ranks, not a mean
        }
        if self.keeps:
            keep = keep_at(run.stages, run.samples_seen - images)  # of the step that ended
            numbers["student_patches"] = keep.share if keep else 1.0
        if (run.step - 1) % config.log.every_steps == 0:
            numbers |= self.usage.since_last()
        # filled on the device: a copy of a host number would wait for all that is queued there
        metrics.update({name: torch.full((), float(value), device=run.device) for name, value in numbers.items()})
        self.own_losses.append((run.step, metrics["loss"], positions))
        written = run.metrics_log.add(run.step, run.samples_seen, **mean_over_ranks(metrics, run.device), **rate._asdict())
        # the mean over ranks hides which rank, and which batch, it was
        if len(self.own_losses) == config.log.every_steps or run.step == run.length.total_steps:
            self.look_for_nan()
        if written:
            self.speed.restart()
        for record in written:
            for warning in run.diagnosis.check(record, record["step"], run.length.total_steps):
                log.warning("%s", warning)
                run.events.add("warning", step=record["step"], name=warning.kind, message=warning.message, advice=warning.advice)
        if run.stage.number != self.stage:
            self.stage = run.stage.number
            self.speed.restart()  # of images of another size
            crops, batch = run.stage.crops, run.stage.batch
            sizes = {
                "global_size": crops.global_size,
                "local_size": crops.local_size,
                "num_local": crops.num_local,
                "batch": batch,
            }
            local = f" and {crops.num_local} of {crops.local_size}" if crops.num_local else ""
            what = f"2 crops of {crops.global_size}{local} px, {batch} images a step"
            log.info("step %d: stage %d of crops begins: %s", run.step, self.stage + 1, what)
            run.events.add("stage", step=run.step, number=self.stage + 1, **sizes)
        shown = {"loss": written[-1]["loss"], "images/s": round(written[-1]["images_per_second"])} if written else {}
        self.bar.update(1, **shown)

    def look_for_nan(self) -> None:
        """Raises Diverged if a loss since the last look was not finite; at the end of a run, too, whatever its period."""
        if self.own_losses:
            stop_at_nan(self.own_losses, self.run)
            self.own_losses.clear()


class Speed:
    """Images per second, and the share of time spent waiting for data, of the steps since the last `restart`.

    Steps are queued faster than a GPU works them off, and the queue is waited for when numbers are fetched: so time counts from the end of
    one step to the end of the next, what happens between steps included, saves and probes left out.
    """

    def __init__(self):
        self.began = self.ended = time.monotonic()
        self.images, self.waited = 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    def after(self, images: int) -> tuple[float, float]:
        """At the end of a step of so many images."""
        self.ended = time.monotonic()
        self.images += images
        return self.images / (self.ended - self.began), self.waited / (self.ended - self.began)

    def restart(self) -> None:
        """The numbers were fetched: from here on they are those of the next steps."""
        self.began, self.images, self.waited = self.ended, 0, 0.0


def collapse_metrics(tokens: Tokens) -> dict[str, Tensor]:
    """Collapse shows in the teacher's tokens first; runs/diagnosis.py says what each number means."""
    classes = tokens.prefix[:, 0] if tokens.prefix.shape[1] else tokens.patches.mean(1)
    return {
        "feature_std": feature_std(classes),
        "rankme": rankme(classes),
        "patch_cls_similarity": patch_cls_similarity(classes, tokens.patches),
    }


def mean_over_ranks(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """One small collective for all numbers of a step; on one process, nothing."""
    if world_size() == 1:
        return values
    stacked = torch.stack([value.detach().to(device, torch.float32).reshape(()) for value in values.values()])
    return dict(zip(values, distributed.all_reduce_mean_(stacked).unbind(), strict=True))


def stop_at_nan(own_losses: list, run: Run) -> None:
    """Raise Diverged if this rank's loss was not finite at one of the last steps; its batch is read again and saved for --replay.

    own_losses: (step, loss on its device, positions) since the last look: they cross to the host together, so that no step waits.
    """
    values = torch.stack([loss for _, loss, _ in own_losses]).tolist()
    bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is None:
        return
    step, _, positions = own_losses[bad]
    # positions make the same crops again: nothing of a batch need be kept in case it goes wrong
    keys, payload = run.stream.again([int(position) for position in positions])
    path = run.folder / "replay" / f"step_{step:08d}_rank_{rank()}.safetensors"
    replay = save_replay(path, payload, step=step, rank=rank(), keys=keys)
    error = not_finite(step, rank(), {"loss": values[bad]}, keys, replay)
    run.events.add("diverged", step=step, message=str(error))
    raise error


def memory_gb(device: torch.device) -> float:
    """Peak memory, GB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
