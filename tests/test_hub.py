"""Pushing an export speaks the hub's HTTP API, here to a stand-in on loopback that keeps what it is sent."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

PUSH = "import sys; from pathlib import Path; from ssl_locat.hub import push; print(push(Path(sys.argv[1]), sys.argv[2]))"


class Hub(BaseHTTPRequestHandler):
    """The calls of an upload of small files: create, look, check the card, how to send each file, commit."""

    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer({"id": "me/model", "sha": "0" * 40, "siblings": [], "private": False})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer good":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path.endswith("/validate-yaml"):  # of the model card
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/repos/create"):
            return self.answer({"url": f"http://{self.headers['Host']}/me/model", "name": "me/model"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked]}
            )
        for line in body.splitlines():
            value = json.loads(line)
            if value["key"] == "file":
                type(self).files[value["value"]["path"]] = base64.b64decode(value["value"]["content"])
        host = f"http://{self.headers['Host']}"
        self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{host}/me/model/commit/{'1' * 40}", "hookOutput": ""})

    def answer(self, value: dict, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub():
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub, folder, token: str) -> subprocess.CompletedProcess:
    """In a process of its own: the hub's address is read when huggingface_hub is imported."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", PUSH, str(folder), "me/model"]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    (tmp_path / "README.md").write_text("# card")
    return tmp_path


def test_an_export_arrives_whole(hub, folder):
    done = push(hub, folder, "good")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "me/model"
    assert Hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_refusal_says_that_the_folder_is_written_and_how_to_log_in(hub, folder):
    done = push(hub, folder, "wrong")
    assert done.returncode == 1 and "is written, but could not be uploaded" in done.stderr and "hf auth login" in done.stderr
    assert Hub.files == {}
