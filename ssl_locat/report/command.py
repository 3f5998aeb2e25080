"""`ssl-locat report RUN [RUN ...]`: which page is written where, and whether it is served."""

import logging
from pathlib import Path

from ssl_locat.errors import UserError
from ssl_locat.report.live import serve
from ssl_locat.report.page import write
from ssl_locat.runs.history import open_run

log = logging.getLogger(__name__)


def report(runs: list[str], out: str | None = None, watch: bool = False, port: int = 0) -> Path:
    """Write the page (RUN/report.html, or `out`) and return its path. With `watch`, serve it on loopback until Ctrl-C, always fresh.

    Args:
        port: of the server; 0 lets the system choose.
    """
    if not runs:
        raise UserError("report needs at least one run folder.")
    paths = [Path(run) for run in dict.fromkeys(runs)]
    for path in paths:
        open_run(path)  # says what is wrong with it before anything else is
    target = Path(out) if out else paths[0] / "report.html"
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(
            f"{target} cannot be written: it is a folder, or its folder is missing. Give the path of a file with --out."
        )
    write(paths, target)
    log.info("Report: %s", target)
    if watch:
        serve(paths, target, port)
    return target
