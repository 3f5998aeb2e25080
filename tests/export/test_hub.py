"""Pushing an export and reading shards speak the hub's HTTP API, here to a stand-in on loopback."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shards import write_shards

from ssl_locat.export.export import export
from ssl_locat.models import features
from ssl_locat.models.backbone import load_backbone

EXPORT = ["-m", "ssl_locat.cli", "export", "timm:vit_tiny?patch_size=8&img_size=32&depth=1&embed_dim=24&num_heads=2"]
PUSH = "import sys; from pathlib import Path; from ssl_locat.export.hub import push; print(push(Path(sys.argv[1]), sys.argv[2]))"


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
    yield from serve(Hub)


def serve(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_python(hub, token: str, *command: str) -> subprocess.CompletedProcess:
    """In a process of its own: the hub's address is read when huggingface_hub is imported."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run([sys.executable, *command], env={**os.environ, **settings}, capture_output=True, text=True, timeout=280)


def test_an_export_arrives_whole(hub, tmp_path):
    done = run_python(hub, "good", *EXPORT, str(tmp_path / "out"), "--push-to-hub", "me/model")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"config.json", "model.safetensors", "README.md"} <= Hub.files.keys()
    assert Hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_refusal_says_that_the_folder_is_written_and_how_to_log_in(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = run_python(hub, "wrong", "-c", PUSH, str(tmp_path), "me/model")
    assert done.returncode == 1 and "is written, but could not be uploaded" in done.stderr and "hf auth login" in done.stderr
    assert Hub.files == {}


# --- reading ------------------------------------------------------------------------------------------------------------------

READ = """
import json, sys, zlib
from ssl_locat.data.shards.index import open_dataset
dataset = open_dataset(sys.argv[1], split="train")
samples = dataset.read(0, len(dataset))
print(json.dumps([[s.key, zlib.crc32(b"".join(s.members[name] for name in sorted(s.members)))] for s in samples]))
"""


class Datasets(BaseHTTPRequestHandler):
    """A private data set as the hub serves one: a listing, and files that are redirected to another host, which must not see the token."""

    folder: Path
    seen: list[tuple[str, str, str | None]]  # host's role, path, Authorization
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, token = self.path.partition("?")[0], self.headers.get("Authorization")
        if path.startswith("/cdn/"):
            type(self).seen.append(("cdn", path, token))
            return self.send_part((self.folder / path.removeprefix("/cdn/")).read_bytes())
        type(self).seen.append(("hub", path, token))
        if token != "Bearer good":
            return self.answer({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]  # behind the revision
            if not (self.folder / name).exists():
                return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            other = f"http://localhost:{self.server.server_port}/cdn/{name}"  # 127.0.0.1 is the hub: another host
            return self.answer({}, 302, {"Location": other})
        if "/tree/" in path:
            return self.answer([self.entry(file) for file in sorted(self.folder.rglob("*"))])
        return self.answer({"id": "me/images", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]+)", body)
        self.answer([self.entry(self.folder / name) for name in names if (self.folder / name).exists()])

    def entry(self, file: Path) -> dict:
        found = {"path": file.relative_to(self.folder).as_posix(), "oid": "1" * 40}
        return found | ({"type": "directory"} if file.is_dir() else {"type": "file", "size": file.stat().st_size})

    def send_part(self, data: bytes) -> None:
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("ETag", '"a"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def answer(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def datasets(tmp_path):
    write_shards(tmp_path / "set", [7, 5])
    Datasets.folder, Datasets.seen = tmp_path / "set", []
    yield from serve(Datasets)


def read(hub, spec: str, token: str, cache: Path) -> subprocess.CompletedProcess:
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(cache),
    }
    command = [sys.executable, "-c", READ, spec]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=280)


@pytest.mark.store
@pytest.mark.parametrize("pattern", ["*.tar", "{000..001}.tar"])
def test_shards_of_the_hub_read_as_they_do_from_disk(datasets, tmp_path, pattern):
    done = read(datasets, f"hf://datasets/me/images/{pattern}", "good", tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    local = subprocess.run(
        [sys.executable, "-c", READ, f"{tmp_path}/set/{pattern}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout) == json.loads(local.stdout) and len(json.loads(done.stdout)) == 12
    assert any(role == "cdn" for role, _, _ in Datasets.seen)
    assert all(token == "Bearer good" for role, _, token in Datasets.seen if role == "hub")
    assert all(token is None for role, _, token in Datasets.seen if role == "cdn")


@pytest.mark.store
def test_a_closed_data_set_and_a_missing_shard_are_named(datasets, tmp_path):
    closed = read(datasets, "hf://datasets/me/images/{000..001}.tar", "wrong", tmp_path / "cache")
    assert closed.returncode == 1 and "DataError" in closed.stderr and "hf auth login" in closed.stderr, closed.stderr[-1500:]
    missing = read(datasets, "hf://datasets/me/images/{000..002}.tar", "good", tmp_path / "cache")
    assert missing.returncode == 1 and "002.tar does not exist" in missing.stderr, missing.stderr[-1500:]


@pytest.mark.store
def test_a_webdataset_repository_of_the_hub_opens_by_its_name(datasets, tmp_path):
    """Its shards in a folder, its splits in the header of its README: data.train means the one that is called so."""
    (tmp_path / "set/data").mkdir()
    (tmp_path / "set/000.tar").rename(tmp_path / "set/data/part-a.tar")
    (tmp_path / "set/001.tar").rename(tmp_path / "set/data/part-b.tar")
    files = "[{split: train, path: data/part-a.tar}, {split: validation, path: data/*-b.tar}]"
    (tmp_path / "set/README.md").write_text(f"---\nconfigs: [{{config_name: default, data_files: {files}}}]\n---\n# Images\n")
    done = read(datasets, "hf://datasets/me/images", "good", tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [key for key, _ in json.loads(done.stdout)] == [f"000_{i:05d}" for i in range(7)]


# --- models ------------------------------------------------------------------------------------------------------------------------


class Models(BaseHTTPRequestHandler):
    """Repositories of models as the hub serves them: what is in a repository, and its files."""

    folder: Path  # one folder for each repository: me/NAME
    protocol_version = "HTTP/1.1"
    commit = "1" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/me/([^/]+)(/revision/[^/]+)?", path):
            repository = self.folder / found[1]
            if not repository.is_dir():
                return self.reply(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
            files = [{"rfilename": file.name} for file in sorted(repository.iterdir())]
            answer = {"id": f"me/{found[1]}", "sha": self.commit, "siblings": files, "private": False}
            return self.reply(json.dumps(answer).encode())
        if found := re.fullmatch(r"/api/models/me/([^/]+)/tree/[^/]+", path):
            files = sorted((self.folder / found[1]).iterdir())
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "1" * 40} for f in files]
            return self.reply(json.dumps(entries).encode())
        if found := re.fullmatch(r"/me/([^/]+)/resolve/[^/]+/(.+)", path):
            file = self.folder / found[1] / found[2]
            if not file.is_file():
                return self.reply(b"{}", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})
            return self.reply(file.read_bytes(), headers={"ETag": f'"{file.name}"', "X-Repo-Commit": self.commit})
        return self.reply(b"{}", 404)

    def reply(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def models(tmp_path):
    Models.folder = tmp_path / "hub"
    Models.folder.mkdir()
    yield from serve(Models)


BACKBONE = """
import sys; sys.modules["ssl_locat"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoBackbone
expected = load_file(sys.argv[1])
model = AutoBackbone.from_pretrained("me/locat", trust_remote_code=True, out_indices=(0, -1)).eval()
with torch.inference_mode():
    maps = model(expected["images"]).feature_maps
assert len(maps) == 2 and model.channels == [24, 24], (len(maps), model.channels)
print((maps[-1] - expected["map"]).abs().max().item())
"""
OPEN = """
import sys, torch, ssl_locat
from safetensors.torch import load_file
expected = load_file(sys.argv[1])
with torch.inference_mode():
    print((ssl_locat.features(ssl_locat.load_backbone("hf-hub:me/" + sys.argv[2]), expected["images"]) - expected["class"]).abs().max().item())
"""


def from_hub(hub, tmp_path, *command: str) -> float:
    settings = {"HF_HOME": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    os.environ.update(settings)
    try:
        done = run_python(hub, "good", *command)
    finally:
        for name in settings:
            del os.environ[name]
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.splitlines()[-1])


@pytest.mark.store
def test_a_backbone_of_the_hub_opens_by_its_generated_code(models, tmp_path):
    """AutoBackbone.from_pretrained takes names of the hub alone; ssl_locat cannot be imported in that process."""
    pytest.importorskip("transformers", minversion="5", reason="transformers is not installed")
    spec = "timm:locatvit_tiny?patch_size=8&img_size=32&depth=2&embed_dim=24&num_heads=2"
    model = load_backbone(export(spec, str(Models.folder / "locat"), with_code=True))
    images = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        last = model.forward_intermediates(images, indices=[-1], norm=False, intermediates_only=True)[-1]
        save_file(
            {"images": images, "map": last.contiguous(), "class": features(model, images).contiguous()},
            tmp_path / "expected.safetensors",
        )
    assert from_hub(models, tmp_path, "-c", BACKBONE, str(tmp_path / "expected.safetensors")) <= 1e-6
    assert from_hub(models, tmp_path, "-c", OPEN, str(tmp_path / "expected.safetensors"), "locat") <= 1e-6


@pytest.mark.store
def test_a_repository_of_transformers_opens_by_its_name(models, tmp_path, golden):
    file = golden("hf_dinov2_reg")
    folder = Models.folder / "dinov2"
    folder.mkdir()
    save_file(file.state(), folder / "model.safetensors")
    (folder / "config.json").write_text(file.metadata["hf_config_json"])
    save_file({"images": file["in.1.x"].float(), "class": file["out.1.class"]}, tmp_path / "expected.safetensors")
    assert from_hub(models, tmp_path, "-c", OPEN, str(tmp_path / "expected.safetensors"), "dinov2") <= 1e-4
