"""`ssl-locat report RUN [RUN ...]`: one self-contained HTML page about a run, or about several side by side.

What the files of the run say is in runs/history.py, the charts in charts.py, the pictures made from checkpoints in
pictures.py, the page itself in page.html. Nothing is fetched from a network, by us or by the page.
"""

import logging
import math
import os
import re
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ssl_locat.config.yaml_files import dump_yaml
from ssl_locat.errors import UserError
from ssl_locat.report.charts import Line, Mark, chart
from ssl_locat.runs.history import Run, explain, flatten, is_run, open_run
from ssl_locat.runs.log import duration
from ssl_locat.text.shown import printable, redact, redacted

log = logging.getLogger(__name__)

# title, what it tells, metrics (those that are there are drawn), y label, logarithmic?
CHARTS = [
    ("Loss", "Cross-entropy between teacher and student. The dotted line is guessing; near it early is normal.", ["loss"], "nats", False),
    ("Teacher entropy and KL", "Entropy near 0 or near ln K means collapse; KL is what the student still has to learn.",
     ["teacher_entropy", "kl", "dino_teacher_entropy", "dino_kl"], "nats", False),
    ("Spread of features", "1: all directions are used evenly; 0: all images look the same. Patch-to-class similarity near 1 means that "
     "patches no longer say where things are.", ["feature_std", "patch_cls_similarity"], "", False),
    ("RankMe", "How many directions the features use.", ["rankme"], "dimensions", False),
    ("Learning rate", "As scheduled.", ["lr"], "", False),
    ("Weight decay and momentum", "As scheduled.", ["weight_decay", "momentum"], "", False),
    ("Gradient norm", "Before clipping.", ["grad_norm"], "", True),
    ("Throughput", "All ranks together.", ["images_per_second"], "images/s", False),
    ("Waiting for data", "Share of the time in which the model had nothing to do.", ["data_wait"], "share", False),
    ("Memory", "Largest so far, on rank 0.", ["memory_gb"], "GB", False),
]  # fmt: skip
CONNECTIONS, SILENCE = 16, 10  # of the served page: browsers at once; seconds after which one that says nothing is left
NOT_CURVES = {"step", "samples_seen", "time", "epoch", "quarantined"}
MARKED = ("branch", "change", "resume", "preempt", "requeue", "warning", "diverged", "outage", "fault", "quarantine")


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


def write(paths: list[Path], target: Path) -> None:
    """Beside and renamed, so that a browser never meets half a page."""
    page = render([open_run(path) for path in paths])
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def render(runs: list[Run], live: str = "") -> str:
    """The page as a string. `live`: the version that a served page is of; it asks its server for a newer one."""
    from ssl_locat.report.pictures import pictures  # imports torch

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_safe)
    template = environment.from_string(files("ssl_locat").joinpath("report/page.html").read_text(encoding="utf-8"))
    return template.render(
        live=live,
        title=", ".join(run.name for run in runs),
        runs=[_facts(number, run) for number, run in enumerate(runs)],
        charts=_charts(runs),
        pictures=[{"name": run.name, **pictures(run)} for run in runs],
        differences=_differences(runs),
        configs=[(run.name, dump_yaml(redacted(run.config))) for run in runs],
        environments=[(run.name, flatten(run.environment)) for run in runs],
        events=[(run.name, _event_rows(run)) for run in runs],
        quarantines=[(run.name, run.quarantine[:500], len(run.quarantine)) for run in runs if run.quarantine],
    )


def _safe(value: object) -> object:
    """Of everything that the page says: without credentials and control characters. SVG of our own passes as it is."""
    return value if hasattr(value, "__html__") or isinstance(value, int | float) else printable(redact(str(value)))


def _facts(number: int, run: Run) -> dict:
    facts, advice = explain(run)
    knn = run.summary.get("knn") or {}
    speed = run.summary.get("images_per_second") or run.last.get("images_per_second")
    cards = {
        "status": run.status,
        "steps": f"{run.last['step']:,}" + (f" of {run.total_steps:,}" if run.total_steps else ""),
        "images seen": f"{run.last['samples_seen']:,}",
        "time": duration(run.seconds),
        "images/s": f"{speed:.4g}" if speed else None,
        "k-NN top-1": f"{knn['trained']:.1f}" if knn.get("trained") is not None else None,
        "untrained": f"{knn['init']:.1f}" if knn.get("init") is not None else None,
        "raw pixels": f"{knn['raw_pixels']:.1f}" if knn.get("raw_pixels") is not None else None,
        "loss": f"{run.last['loss']:.3f}" if isinstance(run.last.get("loss"), float) else None,
        "quarantined": str(len(run.quarantine)),
        "restarts": str(run.restarts),
    }
    return {
        "name": run.name,
        "number": number,
        "status": run.status,
        "cards": {name: value for name, value in cards.items() if value is not None},
        "facts": facts,
        "advice": advice,
    }


# --- charts ---------------------------------------------------------------------------------------------------------------


def _charts(runs: list[Run]) -> list[dict]:
    batches = {run.metrics[0]["samples_seen"] / max(run.metrics[0]["step"], 1) for run in runs if run.metrics}
    axis, xlabel = ("step", "step") if len(batches) <= 1 else ("samples_seen", "images seen")
    drawn: list[dict] = []
    known = {name for _, _, names, _, _ in CHARTS for name in names} | NOT_CURVES
    others = sorted({name for run in runs for record in run.metrics for name in record} - known)
    wanted = [*CHARTS, *((name, "Logged by this run.", [name], "", False) for name in others)]
    for title, meaning, names, ylabel, logarithmic in wanted:
        lines = [line for number, run in enumerate(runs) for line in _lines(run, names, axis, number if len(runs) > 1 else None)]
        if lines:
            marks = _marks(runs[0], axis) if len(runs) == 1 else []
            drawn.append(
                _drawn(
                    len(drawn),
                    title,
                    meaning,
                    lines,
                    xlabel,
                    ylabel,
                    logarithmic,
                    marks,
                    _ln_k(runs) if title == "Loss" else None,
                )
            )
    for title, lines in sorted(_probe_lines(runs, axis).items(), reverse=True):
        meaning = "Measured on the teacher during training, by the same protocol as `ssl-locat evaluate`."
        drawn.insert(1, _drawn(len(drawn), title, meaning, lines, xlabel, "", False, [], None))
    return drawn


def _drawn(number, title, meaning, lines, xlabel, ylabel, logarithmic, marks, level) -> dict:
    svg = chart(f"chart{number}", lines, xlabel=xlabel, ylabel=ylabel, log=logarithmic, level=level, marks=marks)
    rows = [(line.label, _number(line.y[0]), _number(min(line.y)), _number(max(line.y)), _number(line.y[-1])) for line in lines]
    spoken = "; ".join(f"{label} from {first} to {last}" for label, first, _, _, last in rows)
    return {"title": title, "meaning": meaning, "svg": svg, "alt": f"{title} over {xlabel}: {spoken}.", "rows": rows}


def _number(value: float) -> str:
    return f"{value:.4g}"


def _lines(run: Run, names: list[str], axis: str, number: int | None) -> list[Line]:
    lines: list[Line] = []
    for offset, name in enumerate(names):
        points = [(record[axis], record[name]) for record in run.metrics if isinstance(record.get(name), int | float)]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if points:
            label = name if number is None else f"{run.name}: {name}" if len(names) > 1 else run.name
            x, y = zip(*points, strict=True)
            later = len(lines) % 2 == 1  # an objective's own names come in place of the plain ones
            lines.append(Line(label, x, y, color=offset if number is None else number, dashed=number is not None and later))
    return lines


def _probe_lines(runs: list[Run], axis: str) -> dict[str, list[Line]]:
    """One chart per kind of score that probes measured; top1_k10 and top1_k20 share one."""
    charts: dict[str, list[Line]] = {}
    for number, run in enumerate(runs):
        per_step = _per_step(run, axis)
        for protocol, records in run.probes.items():
            scores = sorted(
                {name for record in records for name, value in record.items() if isinstance(value, int | float)} - NOT_CURVES
            )
            for name in scores:
                points = [(record["step"] * per_step, record[name]) for record in records if name in record]
                x, y = zip(*points, strict=True)
                lines = charts.setdefault(f"{protocol}: {re.sub(r'_k[0-9]+$', '', name)}", [])
                label = name if len(runs) == 1 else f"{run.name}: {name}"
                color = len(lines) if len(runs) == 1 else number
                lines.append(Line(label, x, y, color=color, dots=True))
    return charts


def _ln_k(runs: list[Run]) -> tuple[float, str] | None:
    """Where guessing lies, if all runs have the one DINO objective and its K."""
    sizes = set()
    for run in runs:
        objectives = run.config.get("objective", {})
        for objective in objectives if isinstance(objectives, list) else [objectives]:
            sizes.add(objective.get("num_prototypes", 65536) if objective.get("name") == "dino" else None)
    size = sizes.pop() if len(sizes) == 1 else None
    return (math.log(size), f"ln K = {math.log(size):.2f}") if size else None


def _marks(run: Run, axis: str) -> list[Mark]:
    events = [event for event in run.events if event["kind"] in MARKED and "step" in event]
    return [Mark(event["step"] * _per_step(run, axis), event["kind"]) for event in events]


def _per_step(run: Run, axis: str) -> float:
    return run.last["samples_seen"] / max(run.last["step"], 1) if axis == "samples_seen" else 1


# --- tables ---------------------------------------------------------------------------------------------------------------


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ between the runs, each with its values."""
    flats = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    rows = [(key, [str(flat.get(key, "(not set)")) for flat in flats]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "run_dir"]


def _event_rows(run: Run) -> list[tuple[str, str, str, str]]:
    rows = []
    for event in run.events[-200:]:
        rest = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "kind", "step"))
        rows.append((event["time"][:19].replace("T", " "), event["kind"], str(event.get("step", "")), rest))
    return rows


# --- live -----------------------------------------------------------------------------------------------------------------


def serve(paths: list[Path], target: Path, port: int) -> None:
    """Serve the page on loopback until Ctrl-C; it is drawn again when a file of a run has changed and somebody looks."""
    server = make_server(paths, port)
    address = f"http://127.0.0.1:{server.server_port}/"
    log.warning("Serving the report at %s until Ctrl-C.", address)
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        write(paths, target)


class _Server(ThreadingHTTPServer):
    """Serves so many at once and hangs up on more; a client that leaves or says nothing is no fault."""

    def __init__(self, *args):
        super().__init__(*args)
        self.free = threading.BoundedSemaphore(CONNECTIONS)

    def process_request(self, request, client_address) -> None:
        if not self.free.acquire(blocking=False):
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request, client_address) -> None:
        error = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
        if not isinstance(error, OSError):
            log.error("the page could not be drawn: %s: %s", type(error).__name__, error)


def make_server(paths: list[Path], port: int = 0) -> ThreadingHTTPServer:
    """The server, bound but not yet serving. Two addresses: `/` the page, `/version` a number that changes with the run's files."""
    lock, drawn = threading.Lock(), {"version": "", "page": ""}

    def version() -> str:
        names = ("metrics.jsonl", "events.jsonl", "quarantine.jsonl", "summary.json", "checkpoints")
        return "-".join(str((path / name).stat().st_mtime_ns) for path in paths for name in names if (path / name).exists())

    def page() -> str:
        with lock:
            if drawn["version"] != (now := version()):
                drawn.update(version=now, page=render([open_run(path) for path in paths if is_run(path)], live=now))
            return drawn["page"]

    class Handler(BaseHTTPRequestHandler):
        timeout = SILENCE

        def do_GET(self) -> None:
            # a page of another site must not read ours through a name that it points at loopback
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
                return self.send_error(403)
            known = {"/": (page, "text/html"), "/version": (version, "text/plain")}
            if self.path not in known:
                return self.send_error(404)
            make, kind = known[self.path]
            body = make().encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args) -> None:
            log.debug(*args)

    try:
        return _Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} cannot be used ({getattr(error, 'strerror', error)}); leave --port out and the system chooses a free one."
        ) from None
