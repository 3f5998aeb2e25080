"""Real stores on loopback for tests, and a proxy that makes them fail. Each is a context manager that yields a URL."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def program(name: str) -> str | None:
    """A program of this environment, or of the system."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


@contextmanager
def running(command: list[str], port: int, **options):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def s3_server(folder: Path):
    """rclone over a folder: its sub-folders are the buckets. Yields the endpoint; credentials devkey, devsecret."""
    port = free_port()
    command = [program("rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "devkey,devsecret", str(folder)]
    with running(command, port, env=os.environ | {"RCLONE_CONFIG": os.devnull}):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def gcs_server(bucket: str):
    """Google's storage API, in memory. Yields the endpoint; the bucket is there, empty."""
    port = free_port()
    options = ["--host=127.0.0.1", f"--port={port}", "--in-memory", f"--default-bucket={bucket}"]
    with running([program("gcp-storage-emulator"), "start", *options], port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def nginx(folder: Path, scratch: Path):
    """Yields the URL of a folder served by nginx."""
    port = free_port()
    config = scratch / "nginx.conf"
    temporary = "".join(f"{kind}_temp_path {scratch}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    config.write_text(
        f"daemon off; pid {scratch}/pid; error_log /dev/null; worker_processes 1; user root; events {{}} http {{ access_log off; {temporary} "
        f"autoindex on; server {{ listen 127.0.0.1:{port}; location / {{ root {folder}; }} }} }}"
    )
    with running([program("nginx"), "-c", str(config), "-p", str(scratch)], port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def range_server(folder: Path):
    """(URL, log): files of a folder by ranges, and as a data set repository `me/set` of a Hugging Face hub at the same address. log: (path, bytes)
    of each answer with content."""
    import hashlib
    import json
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    log: list[tuple[str, int]] = []
    commit = "0" * 40

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:  # paths-info: the form names one path
            from urllib.parse import parse_qs

            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            names = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            self._json([self._entry(folder / name) for name in names if (folder / name).exists()])

        def _entry(self, path: Path) -> dict:
            about = {"type": "directory" if path.is_dir() else "file", "path": str(path.relative_to(folder))}
            size = 0 if path.is_dir() else path.stat().st_size
            return about | {"oid": hashlib.sha1(str(path).encode()).hexdigest(), "size": size}

        def _json(self, found: object) -> None:
            self._send(json.dumps(found).encode(), 200, {"Content-Type": "application/json"})

        def _send(self, body: bytes, code: int, headers: dict) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/datasets/me/set/tree/"):
                top = folder / path.removeprefix("/api/datasets/me/set/tree/").partition("/")[2]
                found = sorted(
                    top.rglob("*") if "recursive=True" in self.path or "recursive=true" in self.path else top.iterdir()
                )
                return self._json([self._entry(one) for one in found])
            if path.startswith("/api/datasets/me/set"):
                return self._json({"id": "me/set", "sha": commit, "siblings": []})
            if path.startswith("/datasets/me/set/resolve/"):
                path = "/" + path.removeprefix("/datasets/me/set/resolve/").partition("/")[2]
            file = folder / path.lstrip("/")
            if not file.is_file():
                return self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
            content, asked = file.read_bytes(), self.headers.get("Range")
            about = {"ETag": f'"{file.stat().st_mtime_ns}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if not asked:
                return self._send(content, 200, about)
            start, _, last = asked.removeprefix("bytes=").partition("-")
            part = content[int(start) : int(last) + 1 if last else None]
            log.append((path, len(part)))
            about["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
            self._send(part, 206, about)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", log
    finally:
        http.shutdown()
        http.server_close()


class FaultProxy:
    """TCP proxy for HTTP/1.1 that spoils responses.

    `faults` maps a rule to each response: a function (number of the response, first request line) -> fault or None:
        "503"         canned answer             "404", "403"
        "cut"         half of the body, then the connection ends   "cut512": the same on a multiple of 512 bytes
        "reset"       half of the body, then RST
        "stall"       half of the body, then silence
        "ignore"      Range is taken out of the request: the server answers 200 with everything
        "short"       Content-Length and body are half as long, so the answer looks complete
    """

    def __init__(self, target: str, delay: float = 0.0):
        host, port = target.removeprefix("http://").split(":")
        self.target, self.delay = (host, int(port)), delay
        self.rule = lambda number, line: None
        self.requests, self.body_bytes = 0, 0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        serve = asyncio.start_server(self._client, "127.0.0.1", self.port, limit=1 << 20)
        self.server = asyncio.run_coroutine_threadsafe(serve, self.loop).result(10)
        return self

    def __exit__(self, *_):
        async def stop():
            self.server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    async def _client(self, reader, writer):
        up_writer = None
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.target, limit=1 << 20)
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                number, self.requests = self.requests, self.requests + 1
                fault = self.rule(number, head.split(b"\r\n", 1)[0].decode())
                if self.delay:
                    await asyncio.sleep(self.delay)
                if fault in ("503", "404", "403"):
                    writer.write(f"HTTP/1.1 {fault} Injected\r\nContent-Length: 0\r\n\r\n".encode())
                    await writer.drain()
                    continue
                if fault == "ignore":
                    head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"range:"))
                if b"100-continue" in head.lower():  # the client waits for this before it sends a body
                    head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    await writer.drain()
                up_writer.write(head + await reader.readexactly(_length(head)))
                if not await self._answer(up_reader, writer, fault, head.startswith(b"HEAD")):
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            if up_writer:
                up_writer.close()

    async def _answer(self, up_reader, writer, fault, head_only: bool) -> bool:
        """Pass one response on; False if the connection is to end."""
        head = await up_reader.readuntil(b"\r\n\r\n")
        if b"chunked" in head.lower():
            writer.write(head)
            while True:
                line = await up_reader.readline()
                writer.write(line + await up_reader.readexactly(int(line, 16) + 2))
                if int(line, 16) == 0:
                    await writer.drain()
                    return True
        length = 0 if head_only or b" 304 " in head[:20] else _length(head)
        stop = (
            length // 2 if fault in ("cut", "reset", "stall", "short") else length // 1024 * 512 if fault == "cut512" else length
        )
        if fault == "short":
            head = head.replace(f"ength: {length}\r\n".encode(), f"ength: {stop}\r\n".encode())
        writer.write(head)
        left = length
        while left:
            piece = await up_reader.read(min(left, 1 << 18))
            if not piece:
                return False
            before = length - left
            if before < stop:
                writer.write(piece[: stop - before])
                self.body_bytes += len(piece[: stop - before])
                await writer.drain()
            left -= len(piece)
        if fault == "stall" and length:
            await asyncio.sleep(3600)
        if fault == "reset" and length:
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            writer.transport.abort()
        await writer.drain()
        return not (fault in ("cut", "cut512", "reset") and length)


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0
