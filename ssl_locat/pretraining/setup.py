"""What stands before the first step: device, data, model and optimiser, and the state of the checkpoint that the run resumes from."""

import copy
import logging
import time
from pathlib import Path

import torch
from torch import nn

from ssl_locat.config.schema import Config
from ssl_locat.data.images.crops import MultiCrop
from ssl_locat.data.stream.plan import choose_plan, resume_plan
from ssl_locat.data.stream.prefetch import prefetch
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import CheckpointError, UserError
from ssl_locat.optim.optim import build_optimizer
from ssl_locat.pretraining.parts import Prepare, build_model, check, describe, distribute, saved_modules
from ssl_locat.pretraining.probes import Probes
from ssl_locat.pretraining.step_times import decide_crops, with_crop_mode
from ssl_locat.runs import distributed
from ssl_locat.runs.checkpoint import Checkpointer, read_marker
from ssl_locat.runs.diagnosis import Diagnosis
from ssl_locat.runs.distributed import is_main, rank, world_size
from ssl_locat.runs.folder import differences, prepare, read_config
from ssl_locat.runs.log import EventLog, MetricsLog

log = logging.getLogger(__name__)


class Run:
    """All that a pretraining holds while it lives. What resuming needs is (step, samples_seen, weights, optimiser): `save` writes it.

    step, samples_seen: optimiser steps and images done; the loop counts them up.
    """

    def __init__(self, config: Config, resume: str):
        self.began = time.monotonic()
        self.config, self.folder = config, Path(config.run_dir)
        self.device = distributed.setup(config.device)
        self.datasets, self.weights, self.length = check(config, world_size())
        config = self.config = self._decide_crops()
        self.lock = prepare(config) if is_main() else None
        distributed.barrier()
        self.events = EventLog(self.folder)
        options = config.checkpoint
        self.checkpointer = Checkpointer(self.folder, options.keep_last, options.milestone_every_steps, options.asynchronous)
        self.start_from = find_checkpoint(self.checkpointer, resume, config)
        self._build_model()
        self._resume()

    def _decide_crops(self) -> Config:
        """`crops.mode: auto` becomes what config.yaml says since the first start, else what rank 0 measures: crops of one run never change."""
        config = self.config
        if config.crops.mode != "auto":
            return config
        decided = None
        if is_main():
            kept = read_config(self.folder) if (self.folder / "config.yaml").is_file() else None
            if (
                kept
                and kept.crops.mode != "auto"
                and not any(differences(kept.model_dump(mode="json"), config.model_dump(mode="json")))
            ):
                decided = with_crop_mode(config, kept.crops.mode), "as at the first start of this run"
            else:
                ranks_share = config.optim.global_batch_size // (world_size() * config.optim.accumulate_steps)
                decided = decide_crops(config, self.datasets, self.device, ranks_share)
            log.info("crops.mode auto: %s (%s)", decided[0].crops.mode, decided[1])
        return distributed.broadcast_object(decided)[0]

    def _build_model(self) -> None:
        config = self.config
        self.model, self.losses = build_model(config, self.device, self.start_from)
        teacher = self.model.teacher.backbone
        # what probes evaluate, whole on every rank: FSDP shards the teacher, so that a copy is filled from it each time
        self.evaluated = copy.deepcopy(teacher) if config.parallel == "fsdp" else teacher
        self.introduction = describe(config, self.model, self.length, self.datasets, self.device)
        self.student = distribute(self.model, config, self.device)
        optim = config.optim
        self.optimizer = build_optimizer(self.model.student, optim.betas, optim.layer_decay, optim.patch_embed_lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.modules = saved_modules(self.model, self.losses)

    def _resume(self) -> None:
        """Counters, plan and state of the checkpoint, or those of a fresh start."""
        config = self.config
        self.step, self.samples_seen, self.restarts = 0, 0, 0
        self.diagnosis = Diagnosis(diagnosed_prototypes(self.losses), fatal=config.stop_on)
        if self.start_from:
            saved = self.checkpointer.load(self.start_from, self.modules, self.optimizer)
            meta = saved["meta"]
            self.step, self.samples_seen, self.restarts = saved["step"], meta["samples_seen"], meta["restarts"] + 1
            self.plan = resume_plan(meta["plan"], self.datasets, self.weights, config.seed)
            if "diagnosis" in meta:  # of a version before it was saved
                self.diagnosis.load_state(meta["diagnosis"])
            if saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
        else:
            batch, memory = config.optim.global_batch_size, round(config.data.read_memory_gb * 2**30)
            self.plan = choose_plan(self.datasets, self.weights, config.seed, batch, memory)
        self.resumed_at = self.samples_seen

    def open_data(self) -> None:
        """The stream from where the run stands, and what watches the steps: metrics and probes."""
        config, start = self.config, "resume" if self.start_from else "start"
        self.events.add(
            start,
            step=self.step,
            total_steps=self.length.total_steps,
            world_size=world_size(),
            checkpoint=str(self.start_from or ""),
        )
        log.info("%s; %ss at step %d; run folder %s", self.introduction, start, self.step, self.folder)
        if len(self.datasets) > 1:
            shares = (f"{data.name} {share:.3f}" for data, share in zip(self.datasets, self.plan.shares, strict=True))
            log.info("shares of the mix: %s", ", ".join(shares))
        self.crops = MultiCrop(**config.crops.model_dump(), device=self.device.type)
        self.stream = TrainStream(
            self.datasets,
            self.plan,
            Prepare(self.crops, config.data),
            self.crops.collate,
            start_samples=self.samples_seen,
            global_batch_size=config.optim.global_batch_size,
            accumulate_steps=config.optim.accumulate_steps,
            rank=rank(),
            world_size=world_size(),
            workers=config.data.workers,
            memory_bytes=round(config.data.read_memory_gb * 2**30),
            max_bad=config.data.max_bad,
            quarantine_path=self.folder / "quarantine.jsonl",
            pin_memory=self.device.type == "cuda",
        )
        self.batches = prefetch(self.stream, self.crops, self.device)
        self.metrics_log = MetricsLog(
            self.folder,
            every_steps=config.log.every_steps,
            resume_step=self.step,
            tensorboard=config.log.tensorboard,
            trackers=tuple(config.log.trackers),
            config=config.model_dump(mode="json"),
        )
        length = self.length
        self.probes = Probes(config, self.evaluated, length.steps_per_epoch, length.total_steps, self.events)
        self.probes.forget_after(self.step)

    def probe(self) -> None:
        """Evaluate the teacher's backbone at this step."""
        if self.evaluated is not self.model.teacher.backbone:
            distributed.copy_whole(self.model.teacher.backbone, self.evaluated)
        self.probes.run(self.step)

    def save(self, block: bool) -> None:
        """A checkpoint of this step; `block`: return when it is on disk on all ranks."""
        self.metrics_log.flush()
        meta = {
            "samples_seen": self.samples_seen,
            "plan": self.plan.to_dict(),
            "restarts": self.restarts,
            "config": self.config.model_dump(mode="json"),
            "initial_grid": getattr(self.model.student.backbone, "gaug_options", {}).get("initial_grid"),
            "diagnosis": self.diagnosis.state(),
        }
        scaler_state = self.scaler.state_dict() if self.scaler.is_enabled() else None
        self.checkpointer.save(self.step, self.modules, self.optimizer, meta, scaler_state, block=block)
        self.events.add("save", step=self.step)

    def close(self) -> None:
        self.metrics_log.close()
        self.stream.close()


def set_up(config: Config, resume: str = "auto") -> Run:
    """A run that stands at its first step, or at the step of its checkpoint; `open_data` makes it ready to go.

    Raises:
        UserError: whatever is wrong with config, data, run folder or checkpoint.
    """
    return Run(config, resume)


def find_checkpoint(checkpointer: Checkpointer, resume: str, config: Config) -> Path | None:
    """Where `--resume` leads: None for a fresh start. Raises UserError for checkpoints that cannot be used, or are of other settings."""
    if resume not in ("auto", "never"):
        changed = list(differences(read_marker(Path(resume))["meta"]["config"], config.model_dump(mode="json")))
        if changed:
            raise UserError(
                f"{resume} is of a run with other settings: {'; '.join(changed)}. Give the same settings to resume, or start a new run from "
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


def diagnosed_prototypes(losses: nn.ModuleDict) -> int | None:
    """K of the objective whose entropy and loss runs/diagnosis.py looks at: DINO's, else the first that has prototypes."""
    counts = {name: objective.num_prototypes for name, objective in losses.items() if hasattr(objective, "num_prototypes")}
    return counts.get("dino", next(iter(counts.values()), None))
