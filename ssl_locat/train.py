"""Pretraining, top to bottom: `ssl-locat pretrain CONFIG`. run_parts.py makes what it is put together from."""

import copy
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_locat import distributed
from ssl_locat.checkpoint import Checkpointer, read_marker
from ssl_locat.config import Config
from ssl_locat.data.crops import MultiCrop
from ssl_locat.data.plan import choose_plan, resume_plan
from ssl_locat.data.prefetch import prefetch
from ssl_locat.data.stream import TrainStream
from ssl_locat.diagnosis import Diagnosis, feature_std, not_finite, patch_cls_similarity, rankme, save_replay
from ssl_locat.distributed import is_main, rank, world_size
from ssl_locat.errors import CheckpointError, Preempted, UserError
from ssl_locat.log import EventLog, MetricsLog, next_steps, progress
from ssl_locat.objectives import Progress
from ssl_locat.optim import build_optimizer, clip_gradients, set_hyperparameters
from ssl_locat.probes import Probes
from ssl_locat.run_folder import differences, prepare, read_summary, write_atomically
from ssl_locat.run_parts import (
    Prepare,
    autocasts,
    build_model,
    check,
    describe,
    distribute,
    mask_seeds,
    rates,
    saved_modules,
    total_loss,
)
from ssl_locat.seeds import mix64
from ssl_locat.student_teacher import StudentTeacher

log = logging.getLogger(__name__)


def pretrain(config: Config, resume: str = "auto") -> dict[str, Any]:
    """Pretrain, or go on; returns what summary.json holds.

    Args:
        resume: `auto`, from the newest whole checkpoint of the run folder if there is one; `never`; or the path of a checkpoint.

    Raises:
        Preempted: a signal asked it to stop; it saved first, and the same call goes on.
        Diverged: the loss is not finite, or a collapse named in `stop_on` was seen.
    """
    began = time.monotonic()
    device = distributed.setup(config.device)
    datasets, weights, length = check(config, world_size())
    run_dir = Path(config.run_dir)
    lock = prepare(config) if is_main() else None
    distributed.barrier()
    events = EventLog(run_dir)

    # where to go on from: (step, samples_seen, weights, optimiser) is everything, all randomness is a function of (seed, step)
    checkpointer = Checkpointer(
        run_dir, config.checkpoint.keep_last, config.checkpoint.milestone_every_steps, config.checkpoint.asynchronous
    )
    start_from = find_checkpoint(checkpointer, resume, config)

    # model and optimiser
    model, losses = build_model(config, device, start_from)
    judged = copy.deepcopy(model.teacher.backbone) if config.parallel == "fsdp" else model.teacher.backbone  # whole on every rank
    introduction = describe(config, model, length, datasets, device)
    student = distribute(model, config, device)
    optimizer = build_optimizer(model.student, config.optim.betas, config.optim.layer_decay, config.optim.patch_embed_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    modules = saved_modules(model, losses)

    # resume
    step, samples_seen, restarts = 0, 0, 0
    diagnosis = Diagnosis(judged_prototypes(losses), fatal=config.stop_on)
    if start_from:
        saved = checkpointer.load(start_from, modules, optimizer)
        meta = saved["meta"]
        step, samples_seen, restarts = saved["step"], meta["samples_seen"], meta["restarts"] + 1
        plan = resume_plan(meta["plan"], datasets, weights, config.seed)
        if "diagnosis" in meta:  # of a version before it was saved
            diagnosis.load_state(meta["diagnosis"])
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    else:
        plan = choose_plan(datasets, weights, config.seed, config.optim.global_batch_size)
    if step >= length.total_steps and (summary := read_summary(run_dir)):
        log.info("%s finished before; nothing is left to do", run_dir)
        return summary
    resumed_at = samples_seen
    events.add(
        "resume" if start_from else "start",
        step=step,
        total_steps=length.total_steps,
        world_size=world_size(),
        checkpoint=str(start_from or ""),
    )
    log.info("%s; %s at step %d; run folder %s", introduction, "goes on" if start_from else "starts", step, run_dir)
    if len(datasets) > 1:
        log.info(
            "shares of the mix: %s", ", ".join(f"{d.name} {share:.3f}" for d, share in zip(datasets, plan.shares, strict=True))
        )

    # data
    crops = MultiCrop(**config.crops.model_dump(), device=device.type)
    stream = TrainStream(
        datasets,
        plan,
        Prepare(crops, config.data),
        crops.collate,
        start_samples=samples_seen,
        global_batch_size=config.optim.global_batch_size,
        accumulate_steps=config.optim.accumulate_steps,
        rank=rank(),
        world_size=world_size(),
        workers=config.data.workers,
        max_bad=config.data.max_bad,
        quarantine_path=run_dir / "quarantine.jsonl",
        pin_memory=device.type == "cuda",
    )
    metrics_log = MetricsLog(
        run_dir,
        every_steps=config.log.every_steps,
        resume_step=step,
        tensorboard=config.log.tensorboard,
        trackers=tuple(config.log.trackers),
        config=config.model_dump(mode="json"),
    )
    probes = Probes(config, judged, length.steps_per_epoch, length.total_steps, events)
    probes.forget_after(step)

    def judge(step: int) -> None:
        if judged is not model.teacher.backbone:
            distributed.copy_whole(model.teacher.backbone, judged)
        probes.run(step)

    def save(block: bool) -> None:
        metrics_log.flush()
        meta = {
            "samples_seen": samples_seen,
            "plan": plan.to_dict(),
            "restarts": restarts,
            "config": config.model_dump(mode="json"),
            "initial_grid": getattr(model.student.backbone, "gaug_options", {}).get("initial_grid"),
            "diagnosis": diagnosis.state(),
        }
        checkpointer.save(step, modules, optimizer, meta, scaler.state_dict() if scaler.is_enabled() else None, block=block)
        events.add("save", step=step)

    teacher_autocast, student_autocast = autocasts(config, device)
    micro_batches, own_losses = config.optim.accumulate_steps, []
    batches = prefetch(stream, crops, device)
    with (
        events.ending(),
        distributed.StopFlag() as stop,
        progress("pretraining", length.total_steps, "steps", start=step) as bar,
    ):
        if step == 0:
            judge(0)
        speed = Speed()
        while step < length.total_steps:
            torch.manual_seed(mix64(config.seed, step, rank()))  # stochastic depth: the same again after a resume
            rate = rates(config, length, samples_seen)
            at = Progress(step, step / length.steps_per_epoch, length.total_steps / length.steps_per_epoch)
            set_hyperparameters(optimizer, rate.lr, rate.weight_decay)
            looked_at = step % config.log.every_steps == 0
            sums, positions = {}, []
            torch.compiler.cudagraph_mark_step_begin()  # graphs may write over the last step's tensors; gradients of micro-batches stay
            for micro in range(micro_batches):
                with speed.waiting():
                    batch, (global_crops, local_crops) = next(batches)
                positions.extend(batch.positions)
                masks = model.make_masks(losses, mask_seeds(config, batch.positions), global_crops)
                with distributed.gradient_sync(student, now=micro == micro_batches - 1):
                    with teacher_autocast:
                        targets, tokens = model.targets(global_crops, 2, masks)
                    with student_autocast:
                        views = student(global_crops, local_crops, 2, masks)
                    loss, metrics = total_loss(losses, config, views, targets, at)
                    scaler.scale(loss / micro_batches).backward()
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    sums[name] = sums.get(name, 0) + value / micro_batches
            scaler.unscale_(optimizer)
            sums["grad_norm"] = clip_gradients(model.student.parameters(), config.optim.clip_grad, config.optim.clip)
            hold_still(model, losses, config, at)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            for objective in losses.values():
                sums.update(objective.finish_step())
            model.update_teacher(rate.momentum)  # after the student moved, not before
            model.renew_snapshots(losses, step + 1)
            step, samples_seen = step + 1, samples_seen + config.optim.global_batch_size
            if looked_at:
                sums.update(signs(tokens))
            images_per_second, data_wait = speed.after(config.optim.global_batch_size)
            numbers = {
                "images_per_second": images_per_second,
                "data_wait": data_wait,
                "memory_gb": memory_gb(device),
                "quarantined": stream.quarantined * world_size(),  # a sum over ranks, not a mean
            }
            # filled on the device: a copy of a host number would wait for all that is queued there
            sums.update({name: torch.full((), float(value), device=device) for name, value in numbers.items()})
            own_losses.append((step, sums["loss"], positions))
            written = metrics_log.add(step, samples_seen, **mean_over_ranks(sums, device), **rate._asdict())
            if len(own_losses) == config.log.every_steps or step == length.total_steps:
                stop_at_nan(own_losses, run_dir, stream, crops, events)
                own_losses.clear()
            if written:
                speed.look()
            for record in written:
                for warning in diagnosis.check(record, record["step"], length.total_steps):
                    log.warning("%s", warning)
                    events.add("warning", step=record["step"], name=warning.kind, message=warning.message, advice=warning.advice)
            bar.update(
                1, **({"loss": written[-1]["loss"], "images/s": round(written[-1]["images_per_second"])} if written else {})
            )

            stopped = stop.agreed()
            with speed.paused():
                if stopped or step == length.total_steps or step % config.checkpoint.every_steps == 0:
                    save(block=stopped or step == length.total_steps)
                if stopped:
                    break
                if probes.due(step):
                    judge(step)

    metrics_log.close()
    stream.close()
    if step < length.total_steps:
        events.add("preempt", step=step, signal=stop.reason)
        raise Preempted(
            f"Stopped by {stop.reason} at step {step} of {length.total_steps}; saved. The same command goes on from there."
        )
    events.add("finish", step=step)
    seconds = time.monotonic() - began
    summary = {
        "steps": step,
        "samples_seen": samples_seen,
        "seconds": round(seconds, 1),
        "images_per_second": round((samples_seen - resumed_at) / seconds, 1),
        "knn": probes.knn(),
        "quarantined": int(distributed.all_reduce_sum_(torch.tensor(stream.quarantined, device=device))),
        "restarts": restarts,
    }
    if is_main():
        write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1))
    if config.export and is_main():
        from ssl_locat.export import export

        export(str(run_dir), str(run_dir / "export"))
    distributed.barrier()
    if lock:
        lock.close()
    return summary


# --- pieces of the loop -------------------------------------------------------------------------------------------------


class Speed:
    """Images per second, and the share of time spent waiting for data, of the steps since the last `look`.

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

    def look(self) -> None:
        """The numbers were fetched: from here on they are those of the next steps."""
        self.began, self.images, self.waited = self.ended, 0, 0.0


def hold_still(model: StudentTeacher, losses: nn.ModuleDict, config: Config, at: Progress) -> None:
    """Drop the gradients of what must not move yet: None, not zero, so that AdamW neither decays nor counts it."""
    for name, objective in losses.items():
        for parameter in objective.frozen(model.student.heads[name], at):
            parameter.grad = None
    if at.epoch < config.backbone.frozen_epochs:
        for parameter in model.student.backbone.parameters():
            parameter.grad = None


def signs(tokens) -> dict[str, Tensor]:
    """Signs of collapse in the teacher's tokens; see diagnosis.py."""
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


def stop_at_nan(own_losses: list, run_dir: Path, stream: TrainStream, crops: MultiCrop, events: EventLog) -> None:
    """Raise Diverged if this rank's loss was not finite at one of the last steps; its batch is read again and saved for --replay.

    own_losses: (step, loss on its device, positions) since the last look: they cross to the host together, so that no step waits.
    """
    values = torch.stack([loss for _, loss, _ in own_losses]).tolist()
    bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is None:
        return
    step, _, positions = own_losses[bad]
    taken = [stream.take(int(position)) for position in positions]
    keys = [key for key, _ in taken]
    path = run_dir / "replay" / f"step_{step:08d}_rank_{rank()}.safetensors"
    replay = save_replay(path, crops.collate([sample for _, sample in taken]), step=step, rank=rank(), keys=keys)
    error = not_finite(step, rank(), {"loss": values[bad]}, keys, replay)
    events.add("diverged", step=step, message=str(error))
    raise error


def memory_gb(device: torch.device) -> float:
    """Peak memory, GB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def find_checkpoint(checkpointer: Checkpointer, resume: str, config: Config) -> Path | None:
    """Where `--resume` leads: None for a fresh start. Raises UserError for checkpoints that cannot be used, or are of other settings."""
    if resume not in ("auto", "never"):
        changed = list(differences(read_marker(Path(resume))["meta"]["config"], config.model_dump(mode="json")))
        if changed:
            raise UserError(
                f"{resume} is of a run with other settings: {'; '.join(changed)}. Give the same settings to go on, or start a new run from "
                f"its weights: backbone.init={resume}."
            )
        return Path(resume)
    newest = checkpointer.newest()
    if newest and resume == "never":
        raise UserError(
            f"--resume never, but {config.run_dir} holds {newest.name}. Give another run_dir, or remove that folder first."
        )
    if not newest and resume == "auto" and (unusable := checkpointer.unusable()):
        raise CheckpointError(
            f"none of the checkpoints of {config.run_dir} can be used: {'; '.join(unusable)}. Put whole ones back, or begin anew "
            "with --resume never (these are kept aside)."
        )
    return newest


def judged_prototypes(losses: nn.ModuleDict) -> int | None:
    """K of the objective whose entropy and loss diagnosis.py judges: DINO's, else the first that has prototypes."""
    counts = {name: objective.num_prototypes for name, objective in losses.items() if hasattr(objective, "num_prototypes")}
    return counts.get("dino", next(iter(counts.values()), None))


# --- words ----------------------------------------------------------------------------------------------------------------


def dry_run(config: Config) -> None:
    """Check everything and say what would run, without running it."""
    datasets, _, length = check(config, world_size())
    model, _ = build_model(config, torch.device("cpu"))
    print(describe(config, model, length, datasets, torch.device(config.device if config.device != "auto" else "cpu")))
    print(config.to_yaml(), end="")


def last_words(config: Config, summary: dict[str, Any]) -> None:
    """What a finished run prints: the k-NN numbers, where everything is, and what to try next."""
    if not is_main():
        return
    run, knn = config.run_dir, summary["knn"]
    lines = [f"Finished {summary['steps']:,} steps, {summary['samples_seen']:,} images, in {summary['seconds']:.0f} s."]
    if knn:
        lines += ["k-NN top-1 on the test images:"]
        names = {"raw_pixels": "raw pixels", "init": "random initialisation", "trained": "trained backbone"}
        lines += [f"  {names[name]:<24}{value:5.1f} %" for name, value in knn.items()]
    lines += [f"Run folder: {run}" + (f"   exported backbone: {run}/export" if config.export else "")]
    print("\n".join(lines), file=sys.stderr)
    train, test = (split if isinstance(split, str) else "DATA" for split in (config.data.train, config.data.test))
    own_images = ["ssl-locat init FOLDER_OF_YOUR_IMAGES"] if config.data.make else []
    next_steps(f"ssl-locat report {run}", f"ssl-locat evaluate linear {run} data.train='{train}' data.test='{test}'", *own_images)
