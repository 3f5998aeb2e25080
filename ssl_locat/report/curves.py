"""The curves of one run, or of several over each other: which metrics are drawn, with which captions, levels and marks."""

import ast
import math
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ssl_locat.config.schema import objective_target
from ssl_locat.config.signatures import keyword_defaults
from ssl_locat.errors import UserError
from ssl_locat.report.captions import NO_CURVES, TRAINING, Caption, plain, score
from ssl_locat.report.charts import Chart, Line, Mark
from ssl_locat.runs.best import read_best
from ssl_locat.runs.history import Run

# kind of event -> how its mark on the time axis is called
MARKED = {
    "branch": "branch",
    "change": "changed settings",
    "resume": "resumed",
    "preempt": "preempted",
    "requeue": "requeued",
    "stage": "next stage",
    "stop": "ended by its rule",
    "warning": "warning",
    "diverged": "diverged",
    "outage": "outage",
    "fault": "fault",
    "quarantine": "quarantine",
}


class Axis(NamedTuple):
    """What all curves run over: steps, or images seen where the runs' batches differ."""

    key: str
    label: str

    def at(self, run: Run, step: float) -> float:
        """Where a step lies: steps of one run may have several batch sizes."""
        if self.key == "step" or not run.metrics:
            return step
        steps = [0, *(record["step"] for record in run.metrics)]
        return float(np.interp(step, steps, [0, *(record["samples_seen"] for record in run.metrics)]))


def curves(runs: list[Run]) -> list[tuple[str, list[Chart]]]:
    """(heading, charts) in the order of the page; headings without charts are left out."""
    # with another batch size, the same step means another number of images
    ends = [record for run in runs if run.metrics for record in (run.metrics[0], run.metrics[-1])]
    batches = {record["samples_seen"] / max(record["step"], 1) for record in ends} if len(runs) > 1 else set()
    axis = Axis("step", "step") if len(batches) <= 1 else Axis("samples_seen", "images seen")
    sections = [("Scores", _scores(runs, axis)), *((heading, _training(runs, axis, found)) for heading, found in TRAINING)]
    sections.append(("Other numbers", _training(runs, axis, _unknown(runs))))
    if len(runs) == 1:
        for chart in (chart for _, charts in sections for chart in charts):
            for mark in marks(runs[0], axis):
                chart.mark(*mark)
            ringed = {mark.label for mark in chart.marks if mark.curve}  # a line through the ring would only say it again
            chart.marks = [mark for mark in chart.marks if mark.curve or mark.label not in ringed]
    return [(heading, charts) for heading, charts in sections if charts]


def marks(run: Run, axis: Axis) -> list[Mark]:
    """What stands on the curves of a run: its events, its decay and its kept checkpoints, across all of them. With a `curve` a mark is a
    ring on that metric's curves: where a kept checkpoint was the best."""
    found = [
        Mark(axis.at(run, event["step"]), MARKED[event["kind"]])
        for event in run.events
        if event["kind"] in MARKED and "step" in event
    ]
    begins = [event["decay_from"] for event in run.events if event.get("decay_from") is not None]
    if begins and begins[-1] < run.last["step"]:
        found.append(Mark(axis.at(run, begins[-1]), "decay begins"))
    for choice, best in read_best(run.path).items():
        measure = best.of()
        record = next((record for record in run.probes.get(measure.probe, []) if record["step"] == best.step), {})
        found += [
            Mark(axis.at(run, best.step), f"best {choice}", curve) for curve in dict.fromkeys(("", measure.named_in(record)))
        ]
    return found


# --- what training logs ---------------------------------------------------------------------------------------------------


def _training(runs: list[Run], axis: Axis, captions: list[Caption]) -> list[Chart]:
    charts = []
    for caption in captions:
        lines = [
            line for number, run in enumerate(runs) for line in _lines(run, caption, axis, number if len(runs) > 1 else None)
        ]
        if lines:
            level = _level(runs, caption)
            charts.append(Chart(caption.title, caption.what, lines, axis.label, caption.good, caption.unit, caption.log, level))
    return charts


def _lines(run: Run, caption: Caption, axis: Axis, number: int | None) -> list[Line]:
    """number: of the run where several are compared: its colour."""
    names = [name for name in _logged(run) if plain(name, _objective_names(run)) in caption.names]
    lines: list[Line] = []
    for offset, name in enumerate(names):
        points = [(record[axis.key], record[name]) for record in run.metrics if isinstance(record.get(name), int | float)]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if points:
            label = name if number is None else f"{run.name}: {name}" if len(names) > 1 else run.name
            x, y = zip(*points, strict=True)
            # a run keeps its colour over the page; the second of its curves in a chart is dashed
            later = number is not None and offset % 2 == 1
            lines.append(Line(label, x, y, color=offset if number is None else number, dashed=later, name=name))
    return lines


def _logged(run: Run) -> list[str]:
    """Names of the numbers in the run's lines, in their order: the first lines have them all, but for what comes at a period."""
    return list(dict.fromkeys(name for record in run.metrics for name in record if name not in NO_CURVES))


def _unknown(runs: list[Run]) -> list[Caption]:
    known = {name for _, captions in TRAINING for caption in captions for name in caption.names}
    found = dict.fromkeys(
        name for run in runs for name in _logged(run) if name not in known and plain(name, _objective_names(run)) not in known
    )
    return [Caption(name, (name,), "Logged by this run under this name.") for name in found]


# --- what probes measured -------------------------------------------------------------------------------------------------


def _scores(runs: list[Run], axis: Axis) -> list[Chart]:
    """One chart per kind of score that probes measured; top1_k10 and top1_k20 share one."""
    charts: dict[tuple[str, str], Chart] = {}
    for number, run in enumerate(runs):
        for probe, records in run.probes.items():
            for name in sorted({name for record in records for name in record} - NO_CURVES):
                points = [(axis.at(run, r["step"]), r[name]) for r in records if isinstance(r.get(name), int | float)]
                points = [(x, y) for x, y in points if math.isfinite(y)]
                if not points:
                    continue
                caption = score(name)
                chart = charts.setdefault(
                    (probe, caption.title),
                    Chart(f"{_probe_name(probe)}: {caption.title}", caption.what, [], axis.label, caption.good, caption.unit, caption.log),
                )  # fmt: skip
                x, y = zip(*points, strict=True)
                label = name if len(runs) == 1 else f"{run.name}: {name}"
                color = len(chart.lines) if len(runs) == 1 else number
                chart.lines.append(Line(label, x, y, color=color, dots=True, name=name))
    if len(runs) == 1 and runs[0].config.get("guard"):
        for chart in charts.values():
            # of a chart with one curve: with several it would not be clear whose start it is
            if len(chart.lines) == 1 and chart.lines[0].x[0] == 0:
                chart.level = (chart.lines[0].y[0], f"the start: {chart.lines[0].y[0]:.4g}")
    return list(charts.values())


def _probe_name(probe: str) -> str:
    return {"knn": "k-NN", "unlabelled": "label-free"}.get(probe, probe)


# --- guessing -------------------------------------------------------------------------------------------------------------


def _level(runs: list[Run], caption: Caption) -> tuple[float, str] | None:
    """What guessing among the prototypes costs, where that is the same in all runs."""
    levels = {_guess(run, caption) for run in runs}
    return levels.pop() if len(levels) == 1 else None


def _guess(run: Run, caption: Caption) -> tuple[float, str] | None:
    objectives = _objectives(run)
    prototypes = {objective["name"]: count for objective in objectives if (count := _prototypes(objective, objectives))}
    if not prototypes:
        return None
    first = caption.names[0]
    if first == "teacher_entropy":
        counts = set(prototypes.values())
        return _ln(counts.pop()) if len(counts) == 1 else None
    if first == "ibot" and "ibot" in prototypes:
        objective = next(objective for objective in objectives if objective["name"] == "ibot")
        return _ln(prototypes["ibot"], _share_masked(objective))
    if first == "dino" and "dino" in prototypes:
        return _ln(prototypes["dino"])
    if first == "loss" and len(objectives) == 1:
        (objective,) = objectives
        return _ln(next(iter(prototypes.values())), _share_masked(objective) * float(objective.get("weight", 1.0)))
    return None


def _share_masked(objective: dict) -> float:
    """Of crops: those of which nothing is hidden count as a loss of 0."""
    share = _option(objective, "mask_probability")
    return float(share) if isinstance(share, int | float) else 1.0


def _ln(count: int, share: float = 1.0) -> tuple[float, str]:
    """The level and its words. share: of crops that have hidden patches, or an objective's weight."""
    # cross-entropy with a uniform guess: -sum p ln(1/K) = ln K, whatever the targets p
    value = share * math.log(count)
    return value, f"{f'{share:g} ' if share != 1 else ''}ln K = {value:.2f} (K = {count:,})"


def _objectives(run: Run) -> list[dict]:
    found = run.config.get("objective") or []
    return [o for o in (found if isinstance(found, list) else [found]) if isinstance(o, dict) and isinstance(o.get("name"), str)]


def _objective_names(run: Run) -> tuple[str, ...]:
    return tuple(objective["name"] for objective in _objectives(run))


def _prototypes(objective: dict, objectives: list[dict]) -> int | None:
    """K, as given or by default; of a shared head DINO's. None for an objective without prototypes."""
    if objective["name"] == "ibot" and objective.get("shared_head"):
        return next((_prototypes(other, objectives) for other in objectives if other["name"] == "dino"), None)
    if objective.get("active_prototypes"):
        return None  # another K in each stage
    count = _option(objective, "num_prototypes")
    return count if isinstance(count, int) and count > 1 else None


def _option(objective: dict, name: str) -> object:
    """An option of an objective, or its default; None where it has no such option, or lies in a package that is not here."""
    if name in objective:
        return objective[name]
    with suppress(UserError, ValueError, SyntaxError):
        # read from the source, not by importing it: the class may need torch, or a package that is not here
        default = (keyword_defaults(objective_target(objective["name"], "the config")) or {}).get(name)
        return ast.literal_eval(default) if default else None
    return None
