"""`ssl-locat report RUN [RUN ...]`, a folder of runs, or the results of a comparison: which page is written where, and whether it is served."""

import logging
from pathlib import Path

from ssl_locat.errors import UserError
from ssl_locat.report.comparison import is_comparison, write_comparison
from ssl_locat.report.live import serve
from ssl_locat.report.overview import write_overview
from ssl_locat.report.page import write
from ssl_locat.runs.history import find_runs, is_run, open_run

log = logging.getLogger(__name__)


def report(runs: list[str], out: str | None = None, watch: bool = False, port: int = 0) -> Path:
    """Write the page (RUN/report.html, or `out`) and return its path. With `watch`, serve it on loopback until Ctrl-C, always fresh.
    A folder that is no run but holds some gets a page of runs, FOLDER/report.html, and each of them its own.

    Args:
        port: of the server; 0 lets the system choose.
    """
    if not runs:
        raise UserError("report needs at least one run folder.")
    # a shell's pattern and a name may mean the same run: compared with itself, it would get two colours
    paths = [Path(run) for run in dict.fromkeys(runs)]
    if len(paths) == 1 and is_comparison(paths[0]):
        return _report_comparison(paths[0], Path(out) if out else paths[0] / "report.html", watch)
    many = find_runs(paths[0]) if len(paths) == 1 and paths[0].is_dir() and not is_run(paths[0]) else []
    for path in [] if many else paths:
        open_run(path)  # says what is wrong with it before anything else is
    target = Path(out) if out else paths[0] / "report.html"
    if many and watch:
        raise UserError(
            f"--watch serves runs, and {paths[0]} is a folder of them. Give those to watch: ssl-locat report {many[0]} --watch"
        )
    if many and target.resolve().parent != paths[0].resolve():
        raise UserError(f"the page of runs links to the runs below it: --out must be a file in {paths[0]}.")
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(
            f"{target} cannot be written: it is a folder, or its folder is missing. Give the path of a file with --out."
        )
    if many:
        write_overview(paths[0], many, target)
    else:
        write(paths, target)
    log.info("Report: %s", target)
    if watch:
        serve(paths, target, port)
    return target


def _report_comparison(folder: Path, target: Path, watch: bool) -> Path:
    if watch:
        raise UserError(f"--watch serves runs, and {folder} holds a comparison. Leave --watch out.")
    write_comparison(folder, target)
    log.info("Report: %s", target)
    return target
