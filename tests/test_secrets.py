"""A secret that is planted in a data URL is found in no file and no line of a run, a report, an export or a failed run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import program  # noqa: F401  (the folder of tests on the path)

SECRET = "hunter2-planted-secret"
SMALL = [
    "backbone={name: vit_tiny_patch16_224, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "objective={name: dino, num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16}",
    "crops.global_size=32",
    "crops.local_size=16",
    "crops.num_local=2",
    "optim.epochs=1",
    "optim.global_batch_size=4",
    "data.workers=0",
    "device=cpu",
    "probes={}",
]


def serve(folder: Path):
    """A web server of ranges that wants the password and ignores the query, as for a presigned URL."""
    import threading
    from base64 import b64encode
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = folder / self.path.partition("?")[0].lstrip("/")
            if self.headers.get("Authorization") != "Basic " + b64encode(f"me:{SECRET}".encode()).decode():
                return self.send_error(401)
            if not path.is_file():
                return self.send_error(404)
            data = path.read_bytes()
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body = data[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def command(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder / "home")}
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "ssl_locat", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert SECRET not in done.stdout + done.stderr, words
    return done


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    import numpy as np
    import simplejpeg

    from ssl_locat.data.shards.pack import write_shard

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    coded = (simplejpeg.encode_jpeg(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(12))
    write_shard(folder / "x.tar", ((f"{i:03d}", {"jpg": data, "cls": b"%d" % (i % 2)}) for i, data in enumerate(coded)))
    return folder


def found_in(folder: Path) -> list[str]:
    """Files that hold the secret, in any encoding that a file of ours may have, or are named after it."""
    needles = [SECRET.encode(), SECRET.encode("utf-16-le")]
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if SECRET in path.name or (path.is_file() and any(needle in path.read_bytes() for needle in needles))
    )


@pytest.mark.slow  # eight commands, each of which starts torch
def test_a_planted_secret_is_found_nowhere(tmp_path, images):
    server = serve(images)
    try:
        url = f"http://me:{SECRET}@127.0.0.1:{server.server_port}/x.tar?X-Amz-Signature={SECRET}"
        given = [f"data.train={url}", f"data.test={url}", "data.num_classes=2", "run_dir=run", *SMALL]
        done = command(tmp_path, "pretrain", "quickstart", "data.make=null", *given)
        assert done.returncode == 0, done.stderr
        assert "config.yaml keeps them to resume" in done.stderr
        assert (tmp_path / "run" / "config.yaml").stat().st_mode & 0o777 == 0o600
        for words in (
            ("report", "run"),
            ("evaluate", "knn", "run/export", f"data.train={url}", f"data.test={url}", "k=[2]", "image_size=32", "--json"),
            ("shards", "check", url, "--json"),
        ):
            done = command(tmp_path, *words)
            assert done.returncode == 0, (words, done.stderr)
        # signatures rotate: the same run, finished, is no run with other settings
        rotated = [item.replace(f"Signature={SECRET}", f"Signature={SECRET}2") for item in given]
        assert "other settings" not in command(tmp_path, "pretrain", "quickstart", "data.make=null", *rotated).stderr
        for wrong in (
            f"http://me:{SECRET}@127.0.0.1:{server.server_port}/{{a,b.tar?sig={SECRET}",
            f"http://me:{SECRET}@127.0.0.1:{server.server_port}/none.tar",
            f"pipe:curl -u me:{SECRET} http://127.0.0.1/x.tar",
        ):
            failed = [f"data.train={wrong}", f"data.test={wrong}", "data.num_classes=2", "run_dir=failed", *SMALL]
            done = command(tmp_path, "pretrain", "quickstart", "data.make=null", "data.retry_minutes=0.01", *failed)
            assert done.returncode in (2, 4) and "Traceback" not in done.stderr, done.stderr
    finally:
        server.shutdown()
        server.server_close()
    assert [name for name in found_in(tmp_path) if name not in ("run/config.yaml", "failed/config.yaml")] == []


def test_a_redacted_url_asks_for_its_credentials():
    from ssl_locat.data.shards.index import open_dataset
    from ssl_locat.errors import DataError
    from ssl_locat.text.shown import redacted

    for url in (f"https://me:{SECRET}@host/a.tar", f"https://host/a.tar?sig={SECRET}"):
        with pytest.raises(DataError, match="which keep no credentials"):
            open_dataset(redacted(url))
