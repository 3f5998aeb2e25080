"""A web server that fails now and then: for stores that are read over HTTP. Serves ranges, as object stores do."""

import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

EVERY = 20  # of the answers one fails
PAUSE = 3.0  # seconds


@contextmanager
def failing(folder: Path, fault: str, secure: bool = False) -> Iterator[str]:
    """The URL of a folder whose every 20th answer is a 503, breaks off half-way, or pauses half-way. In a process of its own.

    secure: by https, for clients that take nothing else; with a certificate of its own, which SSL_CERT_FILE and AWS_CA_BUNDLE then name."""
    certificate = _certificate(folder) if secure else None
    context = get_context("fork")
    port = context.SimpleQueue()
    server = context.Process(target=_serve, args=(folder, fault, port, certificate), daemon=True)
    server.start()
    try:
        yield f"{'https' if secure else 'http'}://127.0.0.1:{port.get()}"
    finally:
        server.kill()
        server.join()


def _certificate(folder: Path) -> Path:
    """A file with a key and a certificate that it signed itself."""
    path = folder / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {path} -out {path}.public"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    os.environ["SSL_CERT_FILE"] = os.environ["AWS_CA_BUNDLE"] = f"{path}.public"
    path.write_text(path.read_text() + Path(f"{path}.public").read_text())
    return path


def _serve(folder: Path, fault: str, port, certificate: Path | None) -> None:
    lock, count = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(None)

        def do_GET(self) -> None:
            with lock:
                count[0] += 1
                fails = count[0] % EVERY == EVERY // 2
            self._answer(fault if fails else None)

        def _answer(self, fault: str | None) -> None:
            path = folder / self.path.lstrip("/")
            if fault == "503" or not path.is_file():
                self.send_response(503 if fault else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content, wanted = path.read_bytes(), self.headers.get("Range")
            size, start, stop = len(content), 0, len(content)
            if wanted:
                first, _, last = wanted.partition("=")[2].partition("-")
                start, stop = int(first), min(size, int(last) + 1 if last else size)
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            half = (start + stop) // 2
            self.wfile.write(content[start:half])
            self.wfile.flush()
            if fault == "reset":
                # closed with RST, as by a load balancer that goes away
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                self.connection.close()
                self.close_connection = True
                return
            if fault == "slow":
                time.sleep(PAUSE)
            self.wfile.write(content[half:stop])

        def log_message(self, *_: object) -> None:
            pass

        def finish(self) -> None:
            with suppress(OSError):  # a client that went, or whom we left
                super().finish()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    port.put(server.server_port)
    server.serve_forever()
