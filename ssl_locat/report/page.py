"""`ssl-locat report RUN [RUN ...]`: one self-contained HTML page about a run, or about several side by side.

What the files of the run say is in runs/history.py, the curves in curves.py and curves.js, what happened in events.py, the pictures made
from checkpoints in pictures.py, the page itself in page.html. Nothing is fetched from a network, by us or by the page.
"""

import logging
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ssl_locat.config.yaml_files import dump_yaml
from ssl_locat.report.charts import Chart, points_each
from ssl_locat.report.classes import by_class
from ssl_locat.report.curves import curves
from ssl_locat.report.events import happenings
from ssl_locat.runs.history import Run, ending, findings, flatten, open_run
from ssl_locat.runs.log import duration
from ssl_locat.text.shown import printable, redact, redacted

log = logging.getLogger(__name__)


def write(paths: list[Path], target: Path) -> None:
    """Beside and renamed, so that a browser never meets half a page."""
    save(render([open_run(path) for path in paths]), target)


def save(page: str, target: Path) -> None:
    """Put a page in its place."""
    # in the same folder, since only within a disk is a rename one step; by process, since two may write the same page
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def render(runs: list[Run], live: str = "") -> str:
    """The page as a string. `live`: the version that a served page is of; it asks its server for a newer one."""
    from ssl_locat.report.pictures import pictures  # imports torch

    charts = _Charts()
    sections = [(heading, [charts.place(chart) for chart in found]) for heading, found in curves(runs)]
    seen = [{"name": run.name, **_placed(pictures(run), charts)} for run in runs]
    # of all charts together: pictures have some, too
    most = points_each(charts.all)
    return template("page.html").render(
        live=live,
        title=", ".join(run.name for run in runs),
        runs=[_facts(run) for run in runs],
        curves=sections,
        charts=[chart.data(most) for chart in charts.all],
        uplot=vendored(),
        scripts=[_file("curves.js"), _file("scatter.js")],
        classes=[(run.name, table) for run in runs for table in by_class(run)],
        pictures=seen,
        differences=_differences(runs),
        configs=[(run.name, dump_yaml(redacted(run.config))) for run in runs],
        environments=[(run.name, flatten(run.environment)) for run in runs],
        events=[(run.name, happenings(run)) for run in runs],
        # the first 500: a page of millions of lines opens nowhere
        quarantines=[(run.name, run.quarantine[:500], len(run.quarantine)) for run in runs if run.quarantine],
    )


def template(name: str) -> Any:
    """A page of this room. Whatever is put into it is escaped, and shown without credentials and control characters."""
    # what is not given is an error (StrictUndefined), not an empty place on the page
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_safe)
    environment.globals["style"] = _file("style.css")
    return environment.from_string(files("ssl_locat").joinpath(f"report/{name}").read_text(encoding="utf-8"))


def _safe(value: object) -> object:
    """Of everything that the page says: without credentials and control characters. Markup of our own passes as it is."""
    return value if hasattr(value, "__html__") or isinstance(value, int | float) else printable(redact(str(value)))


def _file(name: str) -> Markup:
    """A style sheet or script of ours, for between its tags."""
    return Markup(files("ssl_locat").joinpath(f"report/{name}").read_text(encoding="utf-8"))


def vendored() -> dict[str, Markup]:
    """uPlot, unchanged (uplot/SHA256SUMS), with the notice that its licence asks for."""
    return {"script": _file("uplot/uPlot.iife.min.js"), "style": _file("uplot/uPlot.min.css"), "licence": _file("uplot/LICENSE")}


class _Charts:
    """All charts of a page: the place of one in the list is its name there."""

    def __init__(self) -> None:
        self.all: list[Chart] = []

    def place(self, chart: Chart) -> tuple[int, Chart]:
        self.all.append(chart)
        return len(self.all) - 1, chart


def _placed(seen: dict[str, Any], charts: _Charts) -> dict[str, Any]:
    """What `pictures` gave, with its charts numbered."""
    sections = [
        section | {"charts": [charts.place(chart) for chart in section.get("charts", [])], "scatter": section.get("scatter")}
        for section in seen["sections"]
    ]
    return {**seen, "sections": sections}


def _facts(run: Run) -> dict[str, Any]:
    """Each number once: what a card says is in no sentence."""
    knn = run.summary.get("knn") or {}
    speed = run.summary.get("images_per_second") or run.last.get("images_per_second")
    compared = [
        f"{name} {knn[key]:.1f}"
        for key, name in (("init", "untrained"), ("raw_pixels", "raw pixels"))
        if knn.get(key) is not None
    ]
    cards = [
        ("status", run.status, ""),
        ("steps", f"{run.last['step']:,}", f"of {run.total_steps:,}" if run.total_steps else ""),
        ("images seen", f"{run.last['samples_seen']:,}", ""),
        ("time", duration(run.seconds), f"restarted {run.restarts} time{'s' * (run.restarts > 1)}" if run.restarts else ""),
        ("images a second", f"{speed:,.4g}" if speed else "", ""),
        ("k-NN top-1", f"{knn['trained']:.1f} %" if knn.get("trained") is not None else "", ", ".join(compared)),
    ]
    found = [("", ending(run)[1]), *findings(run)]
    return {
        "name": run.name,
        "about": _about(run),
        "cards": [card for card in cards if card[1]],
        "stages": stages(run),
        "findings": [(fact, _sentence(advice)) for fact, advice in found if fact or advice],
    }


def stages(run: Run) -> list[tuple[str, ...]]:
    """A row for each stage of crops, as the last start counted them, and what they cost beside the last stage's crops; [] for a run without."""
    told: list[dict[str, Any]] = next((event["stages"] for event in reversed(run.events) if event.get("stages")), [])
    if not told:
        return []
    rows = []
    for one in told:
        local = f" + {one['num_local']} x {one['local_size']}" if one["num_local"] else ""
        first, last = (f"{100 * share:.3g}" for share in one["keeps"])
        kept = "all" if min(one["keeps"]) == 1 else f"{first} %" if first == last else f"{first} to {last} %"
        counts = (f"{one[name]:,}" for name in ("step", "steps", "samples", "batch"))
        rows.append((str(one["number"] + 1), *counts, f"2 x {one['global_size']}{local}", kept, f"{one['flop'] / 1e9:.3g}"))
    done, samples = sum(one["samples"] * one["flop"] for one in told), sum(one["samples"] for one in told)
    share = f"{done / (samples * told[-1]['whole']):.2g} of the last stage's whole crops throughout"
    steps = sum(one["steps"] for one in told)
    return [*rows, ("all", "", f"{steps:,}", f"{samples:,}", "", "", "", f"{done / samples / 1e9:.3g} ({share})")]


def _sentence(advice: str) -> str:
    """What people change, beginning with a capital: warnings continue after a colon."""
    return advice[:1].upper() + advice[1:]


def _about(run: Run) -> str:
    """'locatvit_tiny · dino + koleo · shards/*.tar': what was trained how on what, as far as the config says."""
    data = (run.config.get("data") or {}).get("train")
    return " · ".join(part for part in (backbone(run), recipe(run), data if isinstance(data, str) else "") if part)


def backbone(run: Run) -> str:
    return str((run.config.get("backbone") or {}).get("name") or "")


def recipe(run: Run) -> str:
    """The objectives, as in 'dino + koleo'."""
    found = run.config.get("objective") or []
    return " + ".join(str(o.get("name")) for o in (found if isinstance(found, list) else [found]) if isinstance(o, dict))


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ between the runs, each with its values."""
    flats = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    # run_dir differs by itself
    rows = [(key, [str(flat.get(key, "(not set)")) for flat in flats]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "run_dir"]
