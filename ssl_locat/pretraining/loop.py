"""Pretraining, top to bottom: `ssl-locat pretrain CONFIG`.

What stands before the loop is in setup.py (data, model, optimiser, the checkpoint to resume from), what looks at each step in
monitor.py (metrics, warnings, the bar), what ends a run in summary.py. parts.py makes what all of them are put together from.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ssl_locat.config.schema import Config
from ssl_locat.objectives import Progress
from ssl_locat.optim.optim import clip_gradients, set_hyperparameters
from ssl_locat.pretraining.monitor import Monitor
from ssl_locat.pretraining.parts import autocasts, mask_seeds, total_loss
from ssl_locat.pretraining.setup import set_up
from ssl_locat.pretraining.student_teacher import StudentTeacher
from ssl_locat.pretraining.summary import finish, finished_before, stop_early
from ssl_locat.runs import distributed
from ssl_locat.runs.checkpoint import SAVE_OR_END
from ssl_locat.runs.distributed import rank
from ssl_locat.runs.folder import read_summary
from ssl_locat.runs.log import progress
from ssl_locat.runs.stop import StopFlag
from ssl_locat.seeds import mix64

log = logging.getLogger(__name__)


@distributed.lost_ranks_named()
def pretrain(config: Config, resume: str = "auto", allow: Iterable[str] = ()) -> dict[str, Any]:
    """Pretrain, or resume; returns what summary.json holds.

    Args:
        resume: `auto`, from the newest intact checkpoint of the run folder if there is one; `never`; or the path of a checkpoint.
        allow: settings that may differ from the checkpoint's, on purpose (docs/branching.md).

    Raises:
        Preempted: a signal asked it to stop; it saved first, and the same call resumes.
        Diverged: the loss is not finite, or a collapse named in `stop_on` was seen.
    """
    run = set_up(config, resume, allow)
    config, length, optim = run.config, run.length, run.config.optim
    if run.finished and (summary := read_summary(run.folder)):
        return finished_before(run, summary)
    run.open_data()
    model, losses, student, optimizer, scaler = run.model, run.losses, run.student, run.optimizer, run.scaler
    teacher_autocast, student_autocast = autocasts(config, run.device)
    with (
        run.ending(),
        StopFlag() as stop,
        progress("pretraining", length.total_steps, "steps", start=run.step) as bar,
    ):
        monitor = Monitor(run, bar)
        if run.probes.owed(run.step):
            with monitor.paused("probe", run.probes.period):
                run.probe()
        while not run.finished:
            # all that is random or scheduled is a function of (seed, step, rank): the same again after a resume
            torch.manual_seed(mix64(config.seed, run.step, rank()))  # stochastic depth
            rate, at, images = run.rates(), run.progress(), run.stage.batch
            set_hyperparameters(optimizer, rate.lr, rate.weight_decay)
            metrics: dict[str, Tensor] = {}
            positions: list[int] = []
            torch.compiler.cudagraph_mark_step_begin()  # graphs may write over the last step's tensors; gradients of micro-batches stay

            for micro in range(optim.accumulate_steps):
                with monitor.waiting_for_data():
                    # [2*B, C, H, W], [L*B, C, h, w]; [2*B, C, A, A] for an anchor that sees finer; [B, M], beside the images
                    batch, (global_crops, local_crops, anchor_crops, metadata) = next(run.batches)
                masks = model.make_masks(losses, mask_seeds(config, batch.positions), global_crops, run.keep())
                monitor.first_crops.show(global_crops, local_crops, masks and masks.on_grid(kept_out=True))
                # gradients cross the network once a step, with the last micro-batch
                with distributed.gradient_sync(student, now=micro == optim.accumulate_steps - 1):
                    with teacher_autocast:
                        targets, teacher_tokens = model.targets(global_crops, 2, masks, anchor_crops, metadata)
                    with student_autocast:
                        views = student(global_crops, local_crops, 2, masks)
                    loss, parts = total_loss(losses, config, views, targets, at)
                    # gradients add up over micro-batches: a share each makes them those of the mean
                    scaler.scale(loss / optim.accumulate_steps).backward()
                add_mean(metrics, {"loss": loss.detach(), **parts}, optim.accumulate_steps)
                positions.extend(batch.positions)

            # clipping must see true norms, not those times the loss scale of fp16
            scaler.unscale_(optimizer)
            metrics["grad_norm"] = clip_gradients(model.student.parameters(), optim.clip_grad, optim.clip)
            drop_frozen_gradients(model, losses, config, at)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            for objective in losses.values():
                metrics.update(objective.finish_step())
            model.update_teacher(rate.momentum)  # after the student moved, not before
            model.renew_snapshots(losses, run.step + 1)
            run.step, run.samples_seen = run.step + 1, run.samples_seen + images

            monitor.log(metrics, rate, images, positions, teacher_tokens)
            stopped, done = stop.agreed(run.checkpointer.wish()), run.step == length.total_steps
            if stopped or done or stop.wish or run.saves_at(run.step):
                with monitor.paused("save", config.checkpoint.every_steps):
                    run.save(block=stopped or done or stop.wish == SAVE_OR_END)
            if stopped:
                break
            if run.probes.due(run.step) and not done:  # the last one waits for export and summary
                with monitor.paused("probe", run.probes.period):
                    run.probe()
                if run.finished:  # by its rule: what ends here is whole and on disk
                    monitor.look_for_nan()
                    run.save(block=True)

    with run.ending():
        run.close()
        if not run.finished:
            stop_early(run, stop.reason)  # raises Preempted
        return finish(run)


def add_mean(sums: dict[str, Tensor], values: dict[str, Tensor], count: int) -> None:
    """Add a micro-batch's share of each mean over `count` of them."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value / count


def drop_frozen_gradients(model: StudentTeacher, losses: nn.ModuleDict, config: Config, at: Progress) -> None:
    """Gradients of what must not move yet become None, not zero, so that AdamW neither decays nor counts it."""
    for name, objective in losses.items():
        for parameter in objective.frozen(model.student.heads[name], at):
            parameter.grad = None
    if at.epoch < config.backbone.frozen_epochs or at.step < config.backbone.frozen_steps:
        for parameter in model.student.backbone.parameters():
            parameter.grad = None
