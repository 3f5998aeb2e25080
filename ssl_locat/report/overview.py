"""`ssl-locat report runs/`: a page of runs, with a table to sort and a link to each run's own page."""

import logging
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ssl_locat.errors import EXPECTED
from ssl_locat.report.page import backbone, recipe, save, template, write
from ssl_locat.runs.history import Run, open_run
from ssl_locat.runs.log import duration, progress
from ssl_locat.text.shown import shown

log = logging.getLogger(__name__)

# heading, what it says, and whether it is a number
COLUMNS = [
    ("run", "the folder; leads to the run's report", False),
    ("began", "UTC", False),
    ("status", "what became of it", False),
    ("recipe", "objectives", False),
    ("backbone", "", False),
    ("data", "the end of data.train", False),
    ("steps", "done", True),
    ("images seen", "", True),
    ("time", "worked", True),
    ("images/s", "mean of a finished run, else the last", True),
    ("loss", "the last", True),
    ("k-NN, %", "top-1 of the last probe", True),
    ("k-NN before, %", "of the untrained network", True),
]


def write_overview(folder: Path, runs: list[Path], target: Path) -> None:
    """The page of runs at `target`, and the page of each run that has none or has gone on since."""
    rows = []
    with progress("reports", total=len(runs), unit="runs") as bar:
        for path in runs:
            try:
                page = path / "report.html"
                if _outdated(page, path):
                    write([path], page)
                # a row needs the last line alone, and a folder of long runs holds millions
                rows.append(_row(open_run(path, every_line=False), folder, page))
            except (*EXPECTED, OSError) as error:  # one broken run must not cost the others
                log.warning("%s is left out: %s", path, error)
            bar.update()
    text = template("overview.html").render(title=shown(folder.resolve().name), columns=COLUMNS, rows=rows)
    save(text, target)


def _outdated(page: Path, run: Path) -> bool:
    # checkpoints and probes leave an event, too: these three tell every change
    files = [run / name for name in ("metrics.jsonl", "events.jsonl", "summary.json")]
    return not page.exists() or page.stat().st_mtime < max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _row(run: Run, folder: Path, page: Path) -> dict[str, Any]:
    """cells: (text, what it is sorted by) in the order of COLUMNS; '' sorts last."""
    last, knn = run.last, _knn(run)
    speed = run.summary.get("images_per_second") or last.get("images_per_second")
    data = (run.config.get("data") or {}).get("train")
    began = str(run.events[0].get("time", ""))[:16].replace("T", " ") if run.events else ""
    name = page.parent.relative_to(folder).as_posix()
    cells = [
        (name, name),
        (began, began),
        (run.status, run.status),
        (recipe(run), recipe(run)),
        (backbone(run), backbone(run)),
        # the end tells data sets apart; disk or bucket are mostly the same in every row
        ("/".join(data.rstrip("/").split("/")[-2:]) if isinstance(data, str) else "several", str(data)),
        (f"{last['step']:,}" + (f" of {run.total_steps:,}" if run.total_steps else ""), last["step"]),
        (f"{last['samples_seen']:,}", last["samples_seen"]),
        (duration(run.seconds), run.seconds),
        _number(speed, ".4g"),
        _number(last.get("loss"), ".4g"),
        _number(knn[-1] if knn else None, ".1f"),
        _number(knn[0] if knn else None, ".1f"),
    ]
    # quoted: names of run folders may hold spaces, # and %
    return {"cells": cells, "status": run.status, "link": quote(f"{name}/{page.name}")}


def _knn(run: Run) -> list[float]:
    """Top-1 of the k-NN probe over the run, by its first k."""
    records = run.probes.get("knn", [])
    name = next((name for record in records for name in record if name.startswith("top1")), "")
    return [record[name] for record in records if isinstance(record.get(name), int | float)]


def _number(value: Any, form: str) -> tuple[str, Any]:
    return (format(value, form), value) if isinstance(value, int | float) else ("", "")
