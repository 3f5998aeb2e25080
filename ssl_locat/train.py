"""Pretraining, top to bottom: `ssl-locat pretrain CONFIG`.

check       everything that can be wrong, before a model is built
pretrain    data, model, optimiser, resume, loop, export
"""

import copy
import json
import logging
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_locat import distributed, objectives
from ssl_locat.backbone import create_backbone, init_weights, load_backbone
from ssl_locat.checkpoint import Checkpointer
from ssl_locat.config import OBJECTIVES, Config, Data
from ssl_locat.data.cache import CachedStore
from ssl_locat.data.crops import MultiCrop
from ssl_locat.data.decode import decode_image, find_image
from ssl_locat.data.index import Dataset, open_mix
from ssl_locat.data.plan import choose_plan, micro_batch_size, resume_plan
from ssl_locat.data.prefetch import prefetch
from ssl_locat.data.store import Store
from ssl_locat.data.stream import TrainStream
from ssl_locat.data.textures import make_textures
from ssl_locat.diagnosis import Diagnosis, feature_std, not_finite, patch_cls_similarity, rankme, save_replay
from ssl_locat.distributed import is_main, rank, world_size
from ssl_locat.errors import ConfigError, Preempted, UserError
from ssl_locat.log import EventLog, MetricsLog, next_steps, progress
from ssl_locat.models.attach import LocAtModel
from ssl_locat.objectives import Progress
from ssl_locat.optim import build_optimizer, clip_gradients, set_hyperparameters
from ssl_locat.probes import Probes
from ssl_locat.run_folder import prepare, write_atomically
from ssl_locat.schedules import cosine
from ssl_locat.seeds import mix64
from ssl_locat.student_teacher import StudentTeacher

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Length(NamedTuple):
    """How long the run is. Progress is counted in samples, so that these follow a changed batch size."""

    epoch_samples: int
    steps_per_epoch: int
    total_steps: int


class Rates(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float


# --- before the run -----------------------------------------------------------------------------------------------------


def check(config: Config, ranks: int = 1) -> tuple[list[Dataset], list[float], Length]:
    """Everything that can be found wrong without building a model; returns the data sets, their weights, and how long the run is.

    Raises:
        UserError: with what is wrong and how to mend it.
    """
    batch = config.optim.global_batch_size
    micro_batch_size(batch, ranks, config.optim.accumulate_steps)
    if config.precision == "fp16" and config.parallel == "fsdp":
        raise ConfigError(
            "precision fp16 with parallel fsdp is not served (its loss scale is not shared between ranks): take bf16, or ddp."
        )
    Diagnosis(None, fatal=config.stop_on)
    if config.data.make:
        if is_main():
            make_textures(config.data.make.folder, **config.data.make.model_dump(exclude={"folder"}))
        distributed.barrier()
    budget, cache = 60 * config.data.retry_minutes, config.data.cache
    store = CachedStore(cache.folder, int(cache.max_gb * 1e9), budget_seconds=budget) if cache else Store(budget_seconds=budget)
    datasets, weights = open_mix(config.data.model_dump()["train"], store=store)
    if config.data.epoch_samples is None and len(datasets) > 1:
        raise ConfigError(
            "data.train mixes several data sets: say how many samples count as an epoch, such as data.epoch_samples=1281167."
        )
    epoch_samples = config.data.epoch_samples or len(datasets[0])
    steps_per_epoch = max(1, epoch_samples // batch)
    total_steps = config.optim.total_steps or max(1, round(config.optim.epochs * steps_per_epoch))
    return datasets, weights, Length(epoch_samples, steps_per_epoch, total_steps)


def rates(config: Config, length: Length, samples_seen: int) -> Rates:
    """Learning rate, weight decay and teacher momentum at this point: DINO's cosine schedules, functions of the samples seen."""
    optim, batch = config.optim, config.optim.global_batch_size
    iteration, warmup = samples_seen / batch, optim.warmup_epochs * length.steps_per_epoch
    return Rates(
        cosine(iteration, length.total_steps, optim.lr * batch / 256, optim.min_lr, warmup),
        cosine(iteration, length.total_steps, *optim.weight_decay),
        cosine(iteration, length.total_steps, *config.teacher.momentum),
    )


def build_model(config: Config, device: torch.device) -> tuple[StudentTeacher, nn.ModuleDict]:
    """Student and teacher, and the objectives, on the device; a pure function of config and seed."""
    torch.manual_seed(mix64(config.seed, 0))
    options = {"img_size": config.crops.global_size, **config.backbone.options}
    backbone = create_backbone(config.backbone.name, drop_path_rate=config.backbone.drop_path_rate, **options)
    backbone.pretrained_cfg = {
        **(getattr(backbone, "pretrained_cfg", None) or {}),
        "mean": config.crops.mean,
        "std": config.crops.std,
    }
    if config.backbone.init:
        init_weights(backbone, config.backbone.init)
    losses = objectives.build(config.objectives)
    objectives.check_batch(losses, config.optim.global_batch_size // config.optim.accumulate_steps)
    anchors = {
        name: load_backbone(objective.anchor)
        for name, objective in losses.items()
        if getattr(objective, "anchor", None) not in (None, "teacher")
    }
    model = StudentTeacher(backbone, losses, anchors).to(device)
    if config.optim.accumulate_steps > 1 and any(isinstance(part, nn.BatchNorm1d) for part in model.student.heads.modules()):
        raise ConfigError("batch_norm in a head sees one micro-batch at a time: with it, optim.accumulate_steps must be 1.")
    return model, losses.to(device)


def saved_modules(model: StudentTeacher, losses: nn.ModuleDict) -> dict[str, nn.Module]:
    """What a checkpoint holds, by the prefix of its names in there."""
    return {"student": model.student, "teacher": model.teacher, "objective": losses, "snapshot": model.snapshots}


def mask_seeds(config: Config, positions) -> list[int]:
    """One per image, of its place in the stream: any resume and any number of ranks hides the same patches."""
    return [mix64(config.seed, 1, int(position)) for position in positions]


def distribute(model: StudentTeacher, config: Config, device: torch.device) -> nn.Module:
    """The student as the loop calls it: compiled, recomputing its blocks, its gradients averaged over ranks, as the config says."""
    blocks = {network: backbone_blocks(network.backbone) for network in (model.student, model.teacher)}
    if config.activation_checkpointing:
        distributed.checkpoint_activations(blocks[model.student])
    if config.compile:
        mode = "reduce-overhead" if config.compile == "cuda-graphs" else None
        for network in blocks:
            network.compile(mode=mode)  # dynamic sizes are found out: the number of hidden patches changes
    if world_size() == 1:
        return model.student
    if config.parallel == "fsdp":
        for network, parts in blocks.items():
            distributed.shard(network, [*parts, *network.heads.values()], device)
        return model.student
    ids = [device.index] if device.type == "cuda" else None
    # ours leave no parameter without a gradient; of someone else's model or loss nobody knows
    own_model = isinstance(model.student.backbone, LocAtModel) or type(model.student.backbone) is VisionTransformer
    ours = own_model and all(objective.name in OBJECTIVES for objective in config.objectives)
    return DistributedDataParallel(model.student, device_ids=ids, find_unused_parameters=not ours)


def backbone_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Transformer blocks of a ViT, or of all stages of a Swin."""
    return (
        list(backbone.blocks) if hasattr(backbone, "blocks") else [block for stage in backbone.layers for block in stage.blocks]
    )


class Prepare:
    """From a raw sample to its crops; runs in the loader's workers."""

    def __init__(self, crops: MultiCrop, data: Data):
        self.crops, self.image_key = crops, data.image_key
        self.options = {"channels": len(crops.mean), "max_pixels": data.max_pixels}

    def __call__(self, sample, seed: int):
        return self.crops.cut(decode_image(find_image(sample.members, self.image_key), **self.options), seed)


# --- the run ------------------------------------------------------------------------------------------------------------


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
    if is_main():
        prepare(config)
    distributed.barrier()
    events = EventLog(run_dir)

    # model and optimiser
    model, losses = build_model(config, device)
    judged = copy.deepcopy(model.teacher.backbone) if config.parallel == "fsdp" else model.teacher.backbone  # whole on every rank
    introduction = describe(config, model, length, datasets, device)
    student = distribute(model, config, device)
    optimizer = build_optimizer(model.student, config.optim.betas, config.optim.layer_decay, config.optim.patch_embed_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    modules = saved_modules(model, losses)

    # resume: everything that goes on is (step, samples_seen, weights, optimiser); all randomness is a function of (seed, step)
    checkpointer = Checkpointer(
        run_dir, config.checkpoint.keep_last, config.checkpoint.milestone_every_steps, config.checkpoint.asynchronous
    )
    step, samples_seen, restarts = 0, 0, 0
    start_from = find_checkpoint(checkpointer, resume, run_dir)
    if start_from:
        saved = checkpointer.load(start_from, modules, optimizer)
        meta = saved["meta"]
        step, samples_seen, restarts = saved["step"], meta["samples_seen"], meta["restarts"] + 1
        plan = resume_plan(meta["plan"], datasets, weights, config.seed)
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    else:
        plan = choose_plan(datasets, weights, config.seed, config.optim.global_batch_size)
    if step >= length.total_steps and (run_dir / "summary.json").is_file():
        log.info("%s finished before; nothing is left to do", run_dir)
        return json.loads((run_dir / "summary.json").read_text())
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
    diagnosis = Diagnosis(getattr(next(iter(losses.values())), "num_prototypes", None), fatal=config.stop_on)
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
        while step < length.total_steps:
            step_began = time.monotonic()
            torch.manual_seed(mix64(config.seed, step, rank()))  # stochastic depth: the same again after a resume
            rate = rates(config, length, samples_seen)
            at = Progress(step, samples_seen / length.epoch_samples, length.total_steps / length.steps_per_epoch)
            set_hyperparameters(optimizer, rate.lr, rate.weight_decay)
            looked_at = step % config.log.every_steps == 0
            waited, sums, positions = 0.0, {}, []
            for micro in range(micro_batches):
                torch.compiler.cudagraph_mark_step_begin()
                waiting = time.monotonic()
                batch, (global_crops, local_crops) = next(batches)
                waited += time.monotonic() - waiting
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
            seconds = time.monotonic() - step_began
            sums.update(
                images_per_second=torch.tensor(config.optim.global_batch_size / seconds),
                data_wait=torch.tensor(waited / seconds),
                memory_gb=torch.tensor(memory_gb(device)),
                quarantined=torch.tensor(float(stream.quarantined * world_size())),  # a sum over ranks, not a mean
            )
            own_losses.append((step, sums["loss"], positions))
            written = metrics_log.add(step, samples_seen, **mean_over_ranks(sums, device), **rate._asdict())
            if len(own_losses) == config.log.every_steps or step == length.total_steps:
                stop_at_nan(own_losses, run_dir, stream, crops, events)
                own_losses.clear()
            for record in written:
                for warning in diagnosis.check(record, record["step"], length.total_steps):
                    log.warning("%s", warning)
                    events.add("warning", step=record["step"], name=warning.kind, message=warning.message, advice=warning.advice)
            bar.update(
                1, **({"loss": written[-1]["loss"], "images/s": round(written[-1]["images_per_second"])} if written else {})
            )

            stopped = stop.agreed()
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
    return summary


# --- pieces of the loop -------------------------------------------------------------------------------------------------


def autocasts(config: Config, device: torch.device) -> tuple[torch.autocast, torch.autocast]:
    """What the teacher's forward pass runs under, and the student's."""
    precisions = (config.teacher.precision or config.precision, config.precision)
    return tuple(torch.autocast(device.type, DTYPES[name], enabled=name != "fp32") for name in precisions)


def total_loss(
    losses: nn.ModuleDict, config: Config, views: dict, targets: dict, at: Progress
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the objectives; their metrics, under their own names where there are several."""
    total, metrics = 0.0, {}
    for option in config.objectives:
        loss, seen = losses[option.name](views[option.name], targets[option.name], at)
        total = total + option.weight * loss
        if len(losses) > 1:
            seen = {option.name: loss.detach(), **{f"{option.name}_{name}": value for name, value in seen.items()}}
        metrics.update(seen)
    return total, metrics


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


def find_checkpoint(checkpointer: Checkpointer, resume: str, run_dir: Path) -> Path | None:
    """Where `--resume` leads: None for a fresh start."""
    if resume not in ("auto", "never"):
        return Path(resume)
    newest = checkpointer.newest()
    if newest and resume == "never":
        raise UserError(f"--resume never, but {run_dir} holds {newest.name}. Give another run_dir, or remove that folder first.")
    return newest


def describe(config: Config, model: StudentTeacher, length: Length, datasets: list[Dataset], device: torch.device) -> str:
    """One paragraph at the start: what runs, on what, how long."""
    backbone = sum(parameter.numel() for parameter in model.student.backbone.parameters())
    heads = sum(parameter.numel() for parameter in model.student.heads.parameters())
    batch, scaled = config.optim.global_batch_size, config.optim.lr * config.optim.global_batch_size / 256
    return (
        f"{config.backbone.name} ({backbone / 1e6:.2f} M parameters, heads {heads / 1e6:.2f} M) on {device} x {world_size()}, {config.precision}; "
        f"{sum(map(len, datasets)):,} images; {length.total_steps:,} steps of {batch} ({length.steps_per_epoch:,} an epoch), "
        f"lr {scaled:.3g}"
    )


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
