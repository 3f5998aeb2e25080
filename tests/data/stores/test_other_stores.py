"""Stores that fsspec knows and we have no reader of our own for, on real servers: FTP and SFTP, served by rclone."""

import os
import sys
from contextlib import contextmanager

import pytest

from ssl_locat.data.shards.index import open_dataset, open_mix, write_index
from ssl_locat.data.stores.objects import SCHEMES, others, scheme_of
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import DataError, Outage
from tests import servers
from tests.shards import as_list, fingerprint, write_shards

KINDS = ("ftp", "sftp")


@contextmanager
def served(kind: str, folder):
    """URL of a folder, with user and password in it."""
    port = servers.free_port()
    command = [
        servers.program("rclone"),
        "serve",
        kind,
        "--addr",
        f"127.0.0.1:{port}",
        "--user",
        "me",
        "--pass",
        "secret",
        str(folder),
    ]
    if kind == "sftp":
        pytest.importorskip("paramiko", reason="fsspec's sftp needs paramiko: pip install 'ssl_locat[dev]'")
    with servers.running(command, port, env=os.environ | {"RCLONE_CONFIG": os.devnull}):
        yield f"{kind}://me:secret@127.0.0.1:{port}"


def read(spec: str, workers: int = 0) -> list:
    datasets, weights = open_mix(spec, store=Store(20, 10))
    plan = choose_plan(datasets, weights, 3, 5)
    with TrainStream(datasets, plan, fingerprint, as_list, start_samples=0, global_batch_size=5, workers=workers) as stream:
        return [one for _, batch in zip(range(6), stream, strict=False) for one in batch.payload]


@pytest.mark.store
@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_what_any_store_serves(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pattern = write_shards(tmp_path / "root/data", [9, 4, 8])
    expected = read(pattern)
    with served(kind, tmp_path / "root") as url:
        assert read(f"{url}/data/*.tar") == expected
        assert read(f"{url}/data") == expected  # a folder
        assert read(f"{url}/data/{{000..002}}.tar", workers=2) == expected
        (written,) = write_index(f"{url}/data/*.tar")
        assert (
            (tmp_path / "root/data/shards.index").stat().st_size > 100
            and "secret" not in caplog.text
            and written == f"{url}/data/shards.index"
        )
        assert sorted(path.name for path in (tmp_path / "root/data").iterdir()) == [
            *(f"00{i}.tar" for i in range(3)),
            "shards.index",
        ]
        with pytest.raises(DataError, match=r"009\.tar does not exist") as error:
            open_dataset(f"{url}/data/009.tar")
        assert "secret" not in str(error.value)
        refused = url.replace("secret", "wrong")
        with pytest.raises((DataError, Outage), match="access denied") as error:
            Store(2, 2).read(f"{refused}/data/000.tar", 0, 10)
        assert "wrong@" not in str(error.value)
    with pytest.raises(Outage, match="no answer within 1 s"):
        Store(1, 1).read(f"{url}/data/000.tar", 0, 10)


def test_a_scheme_opens_if_fsspec_knows_it_and_it_opens_nothing_behind_it():
    assert {"az", "abfs", "sftp", "ftp", "hdfs", "smb", "webdav", "oss"} <= others()
    assert all(scheme_of(f"{scheme}://host/a.tar") == scheme for scheme in (*SCHEMES, *others()))
    for url in (
        "zip://a.tar",
        "simplecache://x",
        "reference://x",
        "dir://x",
        "local:///x",
        "pipe:cat x",
        "az://c/a.tar::file:///x",
    ):
        with pytest.raises(DataError, match="cannot be read"):
            scheme_of(url)
    with pytest.raises(DataError, match="Did you mean 'sftp'"):
        scheme_of("sftpp://host/a.tar")


@pytest.mark.parametrize(("scheme", "module", "package"), [("az", "adlfs", "adlfs"), ("sftp", "paramiko", "paramiko")])
def test_a_missing_package_is_named(scheme, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith("fsspec.implementations.sftp")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)  # opened before, by another test
    with pytest.raises(DataError, match=rf"{scheme}:// needs a package that is not installed: .*{package}"):
        Store().read(f"{scheme}://host/a.tar", 0, 1)


def test_a_setting_that_no_url_holds_is_asked_for():
    """webdav's own needs a base URL, which fsspec reads from its configuration."""
    import fsspec

    class Odd(fsspec.AbstractFileSystem):
        protocol = "oddstore"

        def __init__(self, base_url, **options):
            super().__init__(**options)

    fsspec.register_implementation("oddstore", Odd, clobber=True)
    others.cache_clear()
    try:
        with pytest.raises(DataError, match=r"base_url.*FSSPEC_ODDSTORE_NAME=VALUE"):
            Store().read("oddstore://x/a.tar", 0, 1)
    finally:
        sys.modules["fsspec.registry"]._registry.pop("oddstore")
        others.cache_clear()
