"""The report served on loopback while a run goes on: drawn again when a file of a run has changed and somebody looks."""

import logging
import os
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ssl_locat.errors import UserError
from ssl_locat.report.page import render, write
from ssl_locat.runs.history import is_run, open_run

log = logging.getLogger(__name__)

CONNECTIONS, SILENCE = 16, 10  # browsers at once; seconds after which one that says nothing is left


def serve(paths: list[Path], target: Path, port: int) -> None:
    """Serve the page on loopback until Ctrl-C; it is drawn again when a file of a run has changed and somebody looks."""
    server = make_server(paths, port)
    address = f"http://127.0.0.1:{server.server_port}/"
    log.warning("Serving the report at %s until Ctrl-C.", address)
    # over ssh, without a desktop, webbrowser would start a text browser in this terminal
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        # what stays on disk is the run as it was when the watching ended
        write(paths, target)


class _Server(ThreadingHTTPServer):
    """Serves so many at once and hangs up on more; a client that leaves or says nothing is no fault."""

    def __init__(self, *args):
        super().__init__(*args)
        self.free = threading.BoundedSemaphore(CONNECTIONS)

    def process_request(self, request, client_address) -> None:
        # each connection is a thread: without a bound, one visitor could take all memory
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
        # times of change tell it; a poll every few seconds must not read the files
        names = ("metrics.jsonl", "events.jsonl", "quarantine.jsonl", "summary.json", "checkpoints")
        return "-".join(str((path / name).stat().st_mtime_ns) for path in paths for name in names if (path / name).exists())

    def page() -> str:
        # one drawing at a time, which takes seconds; who asks meanwhile gets the same page
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
            # else a tab that is opened again shows the run as it was hours ago
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
