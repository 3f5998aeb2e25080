"""How a run ends: stopped before its last step, or with a summary and an export; and what would run, without running it (`--dry-run`)."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from ssl_locat.config.schema import Config
from ssl_locat.config.yaml_files import dump_yaml
from ssl_locat.errors import Preempted
from ssl_locat.export.export import export
from ssl_locat.intervals.figures import wilson
from ssl_locat.pretraining.guard import hand_back, judge, refuse
from ssl_locat.pretraining.operations import operations_of_stages
from ssl_locat.pretraining.parts import build_model, check, describe
from ssl_locat.pretraining.probes import counted
from ssl_locat.pretraining.setup import Run
from ssl_locat.pretraining.stages import changes, in_words, told
from ssl_locat.runs import distributed
from ssl_locat.runs.best import read_best
from ssl_locat.runs.distributed import broadcast_object, is_main, world_size
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import next_steps, say
from ssl_locat.text.shown import redact, redacted, to_json

log = logging.getLogger(__name__)


def stop_early(run: Run, reason: str) -> NoReturn:
    """A signal stopped the run, which saved. Raises Preempted."""
    run.events.add("preempt", step=run.step, signal=reason)
    # typed again, `never` and a checkpoint of this very folder would not lead to what was saved now
    same = run.resume == "auto" or (run.origin.parent and run.origin.parent["checkpoint"] == str(Path(run.resume).resolve()))
    again = "The same command" if same else "The same command with --resume auto"
    raise Preempted(f"Stopped by {reason} at step {run.step} of {run.length.total_steps}; saved. {again} resumes from there.")


def finish(run: Run) -> dict[str, Any]:
    """Write the export, if the config says so, then summary.json, then probe once more; returns the summary.

    In this order: a finished run always has its export, and neither waits for anything optional.
    """
    if run.choices.enough and run.step < run.length.total_steps:
        run.events.add("stop", step=run.step, message=run.choices.enough)
        log.info("ends at step %d of %d: %s", run.step, run.length.total_steps, run.choices.enough)
    run.events.add("finish", step=run.step)
    verdict = None
    if run.config.guard:  # its last probe decides what is exported
        if run.probes.missing(run.step):
            run.probe()
        verdict = judge(run.config, run.probes.results, sum(map(len, run.datasets)))
        run.events.add("guard", step=run.step, verdict=verdict["verdict"], exported=verdict["exported"])
        if is_main():
            hand_back(run.config, verdict)
    elif run.config.export and is_main():
        export(str(run.folder), str(run.folder / "export"))
    distributed.barrier()
    summary = write_summary(run, verdict=verdict)
    if run.probes.missing(run.step):
        run.probe()
        summary = write_summary(run, summary)
    distributed.barrier()
    if run.claim:
        run.claim.close()
    if verdict:
        refuse(verdict)
    return summary


def write_summary(run: Run, before: dict[str, Any] | None = None, verdict: dict[str, Any] | None = None) -> dict[str, Any]:
    """summary.json. before: one that was written a moment ago, whose times count: what came after it is no training."""
    seconds = before["seconds"] if before else time.monotonic() - run.began
    summary = {
        "steps": run.step,
        "samples_seen": run.samples_seen,
        "seconds": round(seconds, 1),
        # of this start alone: what a former process took is not known
        "images_per_second": round((run.samples_seen - run.resumed_at) / seconds, 1),
        "knn": run.probes.knn(),
        # each rank knows those that it met
        "quarantined": int(distributed.all_reduce_sum_(torch.tensor(run.stream.quarantined, device=run.device))),
        "restarts": run.restarts,
        **decisions(run),
        **({"guard": verdict} if verdict else {}),
    }
    if is_main():
        write_atomically(run.folder / "summary.json", to_json(summary, indent=1))
    return summary


def decisions(run: Run) -> dict[str, Any]:
    """What `keep_best` kept and why `stop_when` ended the run, in the summary of a run that was asked to."""
    kept = (
        broadcast_object({choice: best._asdict() for choice, best in read_best(run.folder).items()})
        if run.choices.measures
        else None
    )
    why = run.choices.enough if run.step < run.length.total_steps else ""
    return ({} if kept is None else {"best": kept}) | ({"stopped": why} if why else {})


def finished_before(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that is started again at its end; an export that is not there is made, and a last probe that was cut off."""
    if run.config.guard:
        return _judged_again(run, summary)
    if run.config.export and is_main() and not (run.folder / "export" / "config.json").is_file():
        log.info("%s finished before; only its export is missing", run.folder)
        export(str(run.folder), str(run.folder / "export"))
    else:
        log.info("%s finished before; nothing is left to do", run.folder)
    if run.probes.missing(run.step):
        run.probe()
        summary = {**summary, "knn": run.probes.knn(), **decisions(run)}
        if is_main():
            write_atomically(run.folder / "summary.json", to_json(summary, indent=1))
    distributed.barrier()
    if run.claim:
        run.claim.close()
    return summary


def _judged_again(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """The guard's word on a finished run: the same again, unless it was told otherwise since (guard.unverified=trained, say)."""
    if run.probes.missing(run.step):
        run.probe()
    verdict = judge(run.config, run.probes.results, sum(map(len, run.datasets)))
    same = summary.get("guard") == json.loads(to_json(verdict))
    there = (run.folder / "export" / "config.json").is_file()
    if same and (there or not run.config.export or verdict["exported"] is None):
        log.info("%s finished before; nothing is left to do", run.folder)
    else:
        summary = {**summary, "knn": run.probes.knn(), **decisions(run), "guard": verdict}
        if is_main():
            hand_back(run.config, verdict)
            write_atomically(run.folder / "summary.json", to_json(summary, indent=1))
    distributed.barrier()
    if run.claim:
        run.claim.close()
    refuse(verdict)
    return summary


def dry_run(config: Config, text: str = "") -> None:
    """Check everything and say what would run, without running it or writing anything. text: the YAML as it was written, comments and all."""
    datasets, _, length = check(config, world_size(), may_write=False)
    model, _ = build_model(config, torch.device("cpu"))
    say(describe(config, model, length, datasets, torch.device(config.device if config.device != "auto" else "cpu")))
    if changes(config):
        say("\n".join(in_words(told(config, length.total_samples, *operations_of_stages(config)))))
    say(redact(text).rstrip() or dump_yaml(redacted(config.model_dump(mode="json"))).rstrip())


def print_summary(config: Config, summary: dict[str, Any]) -> None:
    """What a finished run prints: the k-NN numbers, where everything is, and what to try next."""
    if not is_main():
        return
    run, knn = config.run_dir, summary["knn"]
    lines = [f"Finished {summary['steps']:,} steps, {summary['samples_seen']:,} images, in {summary['seconds']:.0f} s."]
    if knn:
        count = counted(run)
        sets = f" ({count[1]:,} of them, by their neighbours among {count[0]:,} training images; 95 % intervals)" if count else ""
        lines += [f"k-NN top-1 on the test images{sets}:"]
        before = "the start" if config.backbone.init else "random initialisation"
        names = {"raw_pixels": "raw pixels", "init": before, "trained": "trained backbone"}
        for name, value in knn.items():
            low, high = wilson(value, count[1]) if count else (value, value)
            lines += [f"  {names[name]:<24}{value:6.2f} %" + (f"   {low:.1f} to {high:.1f}" if count else "")]
    if verdict := summary.get("guard"):
        lines += [
            verdict["sentence"],
            f"Licence of the start's weights: {verdict['licence']['name']}; {verdict['licence']['words']}.",
        ]
    if why := summary.get("stopped"):
        lines += [f"It ended early: {why}."]
    for choice, best in (summary.get("best") or {}).items():
        lines += [
            f"Best {choice} checkpoint: step {best['step']:,} ({best['measure']} {best['value']:.4g}); take it with --step best-{choice}"
        ]
    lines += [f"Run folder: {run}" + (f"   exported backbone: {run}/export" if config.export else "")]
    say("\n".join(lines), sys.stderr)
    train, test = (split if isinstance(split, str) else "DATA" for split in (config.data.train, config.data.test))
    own_images = ["ssl-locat init FOLDER_OF_YOUR_IMAGES"] if config.data.make else []
    if config.guard and config.export:  # on images that the guard never saw
        own_images = [f"ssl-locat compare {run}/start {run}/export data.train=LABELLED data.test=UNSEEN"]
    next_steps(f"ssl-locat report {run}", f"ssl-locat evaluate linear {run} data.train='{train}' data.test='{test}'", *own_images)
