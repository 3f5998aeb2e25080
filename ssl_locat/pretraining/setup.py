"""What stands before the first step: device, data, model and optimiser, and the state of the checkpoint that the run resumes from."""

import copy
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ssl_locat.config.schema import Config
from ssl_locat.data.images.crops import StagedCrops
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.prefetch import prefetch
from ssl_locat.data.stream.stream import Part, TrainStream
from ssl_locat.errors import Outage, disk_error_message
from ssl_locat.objectives import Progress
from ssl_locat.objectives.masking import Keep
from ssl_locat.optim.optim import build_optimizer
from ssl_locat.pretraining.choices import Choices
from ssl_locat.pretraining.guard import keep_start, load_start
from ssl_locat.pretraining.operations import operations_of_stages
from ssl_locat.pretraining.origin import find_origin, launcher, may_be_missing
from ssl_locat.pretraining.packing_choice import decide_packing, with_packing
from ssl_locat.pretraining.parts import (
    Prepare,
    Rates,
    build_model,
    check,
    decay_done,
    decay_steps,
    describe,
    distribute,
    rates,
    saved_modules,
)
from ssl_locat.pretraining.precision_choice import decide_precision, with_precision
from ssl_locat.pretraining.probes import Probes
from ssl_locat.pretraining.stages import (
    RunStage,
    Stretch,
    changes,
    in_words,
    keep_at,
    stage_at,
    stages_of,
    steps_left,
    stretches,
    told,
)
from ssl_locat.pretraining.step_times import decide_crops, with_crop_mode
from ssl_locat.runs import distributed
from ssl_locat.runs.checkpoint import Checkpointer
from ssl_locat.runs.diagnosis import Diagnosis, traits
from ssl_locat.runs.distributed import is_main, rank, world_size
from ssl_locat.runs.folder import RunFolder, differences, read_config, saved_config
from ssl_locat.runs.log import EventLog, MetricsLog

log = logging.getLogger(__name__)


class Run:
    """All that a pretraining holds while it lives. What resuming needs is (step, samples_seen, weights, optimiser): `save` writes it.

    step, samples_seen: optimiser steps and images done; the loop counts them up.
    origin: where it started from; its checkpoint may be another run's.
    """

    def __init__(self, config: Config, resume: str, allow: Iterable[str] = ()):
        self.began = time.monotonic()
        self.folder, self.resume = Path(config.run_dir), resume
        self.device = distributed.setup(config.device)
        torch.backends.cuda.matmul.fp32_precision = "tf32" if config.tf32 else "ieee"
        self.datasets, self.weights, self.length = check(config, world_size())
        # rank 0 holds the lock, the others wait until it has it: a second job on this folder ends here
        self.claim = RunFolder(self.folder) if is_main() else None
        distributed.barrier()
        self.events = EventLog(self.folder)
        options = config.checkpoint
        self.checkpointer = Checkpointer(self.folder, options.keep_last, options.milestone_every_steps, options.asynchronous)
        # before config.yaml is written: a refused resume leaves it as it was
        self.origin = find_origin(config, self.checkpointer, self.datasets, self.weights, resume, tuple(allow))
        self.start_from = self.origin.checkpoint
        # the precision first: crops and packing are measured in it
        self.config = self._decide_packing(self._decide_crops(self._decide_precision(self.origin.config)))
        if self.claim:
            if not self.start_from:
                self.claim.require_same_settings(self.config)
            self.claim.write(self.config)
        self._build_model()
        self._resume()

    def _decide_precision(self, config: Config) -> Config:
        """`precision: auto` becomes what the checkpoint or config.yaml says since the first start, else what all ranks measure and rank 0 decides."""
        if config.precision != "auto":
            return config
        kept = self._kept_config() if is_main() else None
        precision = distributed.broadcast_object(kept.precision if kept and kept.precision != "auto" else None)
        why = "as at the first start of this run"
        if precision is None:
            ranks_share = config.optim.global_batch_size // (world_size() * config.optim.accumulate_steps)
            precision, why = decide_precision(config, self.device, ranks_share)
        if is_main():
            log.info("precision auto: %s (%s)", precision, why)
        return with_precision(config, precision)

    def _decide_crops(self, config: Config) -> Config:
        """`crops.mode: auto` becomes what the checkpoint or config.yaml says since the first start, else what rank 0 measures: crops of one
        run never change."""
        if config.crops.mode != "auto":
            return config
        mode = None
        if is_main():
            decided, why = self._kept_config(), "as at the first start of this run"
            if decided is None or decided.crops.mode == "auto":
                ranks_share = config.optim.global_batch_size // (world_size() * config.optim.accumulate_steps)
                decided, why = decide_crops(config, self.datasets, self.device, ranks_share)
            mode = decided.crops.mode
            log.info("crops.mode auto: %s (%s)", mode, why)
        return with_crop_mode(config, distributed.broadcast_object(mode))

    def _decide_packing(self, config: Config) -> Config:
        """`backbone.pack_crops: auto` likewise: one run rounds in one way throughout."""
        if config.backbone.pack_crops != "auto":
            return config
        packed = None
        if is_main():
            kept, why = self._kept_config(), "as at the first start of this run"
            if kept is not None and kept.backbone.pack_crops != "auto":
                packed = kept.backbone.pack_crops
            else:
                ranks_share = config.optim.global_batch_size // (world_size() * config.optim.accumulate_steps)
                packed, why = decide_packing(config, self.device, ranks_share)
            log.info("backbone.pack_crops auto: %s (%s)", str(packed).lower(), why)
        return with_packing(config, distributed.broadcast_object(packed))

    def _kept_config(self) -> Config | None:
        """Of the checkpoint, or of this run's own start that came to none yet."""
        if self.start_from:
            return saved_config(self.start_from)
        file = self.folder / "config.yaml"
        kept = read_config(self.folder) if file.is_file() and file.stat().st_size else None
        same = kept and not any(differences(kept.model_dump(mode="json"), self.origin.config.model_dump(mode="json")))
        return kept if same else None

    def _build_model(self) -> None:
        config = self.config
        self.model, self.losses = build_model(config, self.device, self.start_from)
        teacher = self.model.teacher.backbone
        # what probes evaluate, whole on every rank: FSDP shards the teacher, so that a copy is filled from it each time
        self.evaluated = copy.deepcopy(teacher) if config.parallel == "fsdp" else teacher
        self.introduction = describe(config, self.model, self.length, self.datasets, self.device)
        self.student = distribute(self.model, config, self.device)
        optim = config.optim
        # after distributing: FSDP replaces the parameters by their shards
        self.optimizer = build_optimizer(self.model.student, optim.betas, optim.layer_decay, optim.patch_embed_lr, optim.name)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.modules = saved_modules(self.model, self.losses)

    def _resume(self) -> None:
        """Counters, plan and state of the checkpoint, or those of a fresh start."""
        config = self.config
        self.step, self.samples_seen, self.restarts = 0, 0, 0
        self.stages = stages_of(config, self.length.total_samples)
        self.diagnosis = Diagnosis(diagnosed_prototypes(self.losses), fatal=config.stop_on, has=traits(config))
        if self.start_from:
            may_differ = may_be_missing(self.origin.changes)
            saved = self.checkpointer.load(self.start_from, self.modules, self.optimizer, may_differ)
            meta = saved["meta"]
            self.step, self.samples_seen = saved["step"], meta["samples_seen"]
            self.restarts = 0 if self.origin.new_branch else meta["restarts"] + 1
            # steps of another batch size may lie behind
            left = steps_left(self.stages, self.samples_seen, self.length.total_samples)
            self.length = self.length._replace(total_steps=self.step + left)
            for name, anchor in self.model.snapshots.items():
                if may_differ and f"snapshot.{name}.".startswith(
                    may_differ
                ):  # an objective that is new: it starts from this teacher
                    distributed.copy_whole(self.model.teacher.backbone, anchor.backbone)
            assert self.origin.plan is not None  # of the checkpoint
            self.plan = self.origin.plan
            if "diagnosis" in meta:  # of a version before it was saved
                self.diagnosis.load_state(meta["diagnosis"])
            if saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
        else:
            batch, memory = config.optim.global_batch_size, round(config.data.read_memory_gb * 2**30)
            self.plan = choose_plan(self.datasets, self.weights, config.seed, batch, memory)
        self.resumed_at = self.samples_seen
        length = self.length
        self.probes = Probes(config, self.evaluated, length.steps_per_epoch, length.total_steps, self.events)
        self.probes.forget_after(self.step if self.start_from else -1)
        self.choices = Choices(config, self.checkpointer, self.events)
        self.choices.decide(self.probes.results)

    @property
    def finished(self) -> bool:
        """Whether no step is left: the last one is done, or `stop_when` has seen enough."""
        return self.step >= self.length.total_steps or bool(self.choices.enough)

    @property
    def stage(self) -> RunStage:
        """Of the step that comes next: its crops and its batch size."""
        return stage_at(self.stages, self.samples_seen)

    def keep(self) -> Keep | None:
        """What the student gets of the global crops' patches in the step that comes next; None: all."""
        return keep_at(self.stages, self.samples_seen)

    def rates(self) -> Rates:
        """Of the step that comes next."""
        return rates(self.config, self.length, self.samples_seen, self.origin.since)

    def _decay_from(self) -> int | None:
        """The step at which the decay begins, for the report; None for a run without."""
        length = decay_steps(self.config, self.length, self.origin.since)
        if not length:
            return None
        begins = self.length.total_samples - length * self.config.optim.global_batch_size
        return self._step_at(begins)

    def _step_at(self, samples: float) -> int:
        """The step that begins when so many samples are seen, or next to that."""
        if samples <= self.samples_seen:
            return round(self.step - (self.samples_seen - samples) / self.stage.batch)
        step = self.step
        for stage, first, steps in stretches(self.stages, self.samples_seen, self.length.total_samples):
            if samples < first + steps * stage.batch:
                return round(step + (samples - first) / stage.batch)
            step += steps
        return step

    def progress(self) -> Progress:
        """Where the objectives stand at the step that comes next."""
        epoch_samples = self.length.steps_per_epoch * self.config.optim.global_batch_size
        done = decay_done(self.config, self.length, self.samples_seen, self.origin.since)
        return Progress(self.step, self.samples_seen / epoch_samples, self.length.total_samples / epoch_samples, done)

    def open_data(self) -> None:
        """The stream from where the run stands, and what watches the steps: metrics and probes."""
        config, origin = self.config, self.origin
        start = "resume" if self.start_from and not origin.new_branch else "start"
        if is_main():
            (self.folder / "summary.json").unlink(missing_ok=True)  # of the shorter run that this was
        self.events.add(
            start,
            step=self.step,
            total_steps=self.length.total_steps,
            steps_per_epoch=self.length.steps_per_epoch,
            decay_from=self._decay_from(),
            world_size=world_size(),
            checkpoint=str(self.start_from or ""),
            launcher=launcher(),
            **self._told(),
        )
        if origin.new_branch:
            self.events.add("branch", step=self.step, parent=str(self.start_from), changes=[str(c) for c in origin.changes])
        elif origin.changes:
            self.events.add("change", step=self.step, changes=[str(change) for change in origin.changes])
        for change in origin.changes:
            log.info("allowed: %s", change)
        if config.guard:
            keep_start(config)
        log.info("%s; %ss at step %d; run folder %s", self.introduction, start, self.step, self.folder)
        if len(self.datasets) > 1:
            shares = (f"{data.name} {share:.3f}" for data, share in zip(self.datasets, self.plan.shares, strict=True))
            log.info("shares of the mix: %s", ", ".join(shares))
        self.crops = StagedCrops([stage.crops.options() for stage in self.stages], self.device.type)
        now, *later = self._parts()
        self.stream = TrainStream(
            self.datasets,
            self.plan,
            now.prepare,
            now.collate,
            start_samples=self.samples_seen,
            global_batch_size=now.global_batch_size,
            later=later,
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

    def _told(self) -> dict[str, list]:
        """The stages, for events.jsonl and so for the report; nothing for a run without, and on other ranks."""
        self.stage_flop: list[float] = []
        if not (changes(self.config) and is_main()):
            return {}
        counted = operations_of_stages(self.config)
        self.stage_flop = counted.stages
        stages = told(self.config, self.length.total_samples, *counted)
        for line in in_words(stages):
            log.info("%s", line)
        return {"stages": [stage._asdict() for stage in stages]}

    def _parts(self) -> list[Part]:
        """How the stream is cut and prepared from here on: a part for each stage that is left."""
        found = []
        left = stretches(self.stages, self.samples_seen, self.length.total_samples)
        # of a finished run none: it opens its data all the same, and ends, evaluates and exports as it would have
        for stage, first, _ in left or [Stretch(stage_at(self.stages, self.samples_seen), self.samples_seen, 0)]:
            crops = self.crops.stages[stage.number]
            found.append(Part(first, stage.batch, Prepare(crops, self.config.data), crops.collate))
        return found

    def probe(self) -> None:
        """Evaluate the teacher's backbone at this step, and decide by it. Its checkpoint is saved before, so that a run that is killed
        here resumes from it and measures the same."""
        if self.evaluated is not self.model.teacher.backbone:
            distributed.copy_whole(self.model.teacher.backbone, self.evaluated)
        # the start is what the guard compares with, as it came; the teacher of step 0 may carry what is new (LocAt)
        begins = self.config.guard and self.step == 0
        self.probes.run(self.step, load_start(self.config, self.device) if begins else None)
        self.choices.require_measured(self.probes.results)
        self.choices.decide(self.probes.results)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due: by its period, or because what a probe measures then may be the best."""
        return step % self.config.checkpoint.every_steps == 0 or (self.choices.wanted and self.probes.due(step))

    def save(self, block: bool) -> None:
        """A checkpoint of this step; `block`: return when it is on disk on all ranks."""
        if self.claim:
            self.claim.require_in_place()
        # a checkpoint must not be ahead of its metrics: the lines up to here are not computed again
        self.metrics_log.flush()
        meta = {
            "samples_seen": self.samples_seen,
            "plan": self.plan.to_dict(),
            "restarts": self.restarts,
            "config": self.config.model_dump(mode="json"),
            "new_parameters": self.model.student.backbone.new_parameters,
            "initial_grid": getattr(self.model.student.backbone, "gaug_options", {}).get("initial_grid"),
            "diagnosis": self.diagnosis.state(),
            "parent": self.origin.parent,
            "since": self.origin.since and self.origin.since._asdict(),
        }
        scaler_state = self.scaler.state_dict() if self.scaler.is_enabled() else None
        self.checkpointer.save(self.step, self.modules, self.optimizer, meta, scaler_state, block=block)
        self.events.add("save", step=self.step)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Around all that is done after `open_data`: an error is told as the last event; what the disk refuses is an Outage, and a run folder
        that is gone a UserError."""
        with self.events.ending():
            try:
                yield
            except (OSError, SafetensorError) as error:
                if self.claim:
                    self.claim.require_in_place()
                if message := disk_error_message(error):
                    raise Outage(message) from error
                raise

    def close(self) -> None:
        self.metrics_log.close()
        self.stream.close()


def set_up(config: Config, resume: str = "auto", allow: Iterable[str] = ()) -> Run:
    """A run that stands at its first step, or at the step of its checkpoint; `open_data` makes it ready to go.

    Raises:
        UserError: whatever is wrong with config, data, run folder or checkpoint.
    """
    return Run(config, resume, allow)


def diagnosed_prototypes(losses: nn.ModuleDict) -> int | None:
    """K of the objective whose entropy and loss runs/diagnosis.py looks at: DINO's, else the first that has prototypes."""
    counts = {name: objective.num_prototypes for name, objective in losses.items() if hasattr(objective, "num_prototypes")}
    return counts.get("dino", next(iter(counts.values()), None))
