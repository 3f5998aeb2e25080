"""Protocols over a store that is far away: few requests, each sample once, through the page cache, and workers that are not forked."""

import pytest
import torch
from scenes import write_shard
from servers import FaultProxy, free_port, program, running

from ssl_locat.data.stream import ordered, stream
from ssl_locat.errors import DataBudgetExceeded, Outage
from ssl_locat.evaluation.protocols import knn, linear, segmentation, supervised
from ssl_locat.models.backbone import create_backbone

QUICK = {"mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0, "drop_path": 0.0, "precision": "fp32", "warmup_epochs": 0}


def make():
    torch.manual_seed(0)
    return create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """(proxy, data): two shards of 96 training scenes and one of 24 for the test, 20 ms away."""
    if program("rclone") is None:
        pytest.skip("no rclone on this machine to serve the shards")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    folder, port = tmp_path / "served", free_port()
    folder.mkdir()
    for number in range(2):
        write_shard(folder / f"train-{number}.tar", [i % 4 for i in range(96)], number)
    write_shard(folder / "test-0.tar", [i % 4 for i in range(24)], 9)
    command = [program("rclone"), "serve", "http", "--addr", f"127.0.0.1:{port}", str(folder)]
    with running(command, port), FaultProxy(f"http://127.0.0.1:{port}", delay=0.02) as proxy:
        data = {"train": f"{proxy.url}/train-{{0..1}}.tar", "test": f"{proxy.url}/test-0.tar", "retry_minutes": 0.02}
        yield proxy, data, sum(path.stat().st_size for path in folder.iterdir())


def counted(proxy: FaultProxy, run) -> tuple[int, int]:
    """(requests, bytes of bodies) of a call."""
    requests, size = proxy.requests, proxy.body_bytes
    run()
    return proxy.requests - requests, proxy.body_bytes - size


@pytest.mark.store
def test_protocols_ask_a_store_a_few_times_and_read_each_sample_once(store):
    proxy, data, size = store
    settings = {"data": data | {"num_classes": 4}, "batch_size": 32, "workers": 0}
    knn.evaluate(make(), **settings, k=[5])  # indexes are scanned and kept
    requests, read = counted(proxy, lambda: knn.evaluate(make(), **settings, k=[5]))
    assert requests <= 20 and read <= 1.05 * size  # 216 samples; before, a request for each where data.max_bad was given
    assert counted(proxy, lambda: knn.evaluate(make(), **settings | {"data": data | {"max_bad": 0.1}}, k=[5]))[0] == requests
    for protocol, more in ((linear, {"epochs": 1}), (supervised, {"epochs": 1, **QUICK})):
        requests, read = counted(proxy, lambda: protocol.evaluate(make(), **settings, **more))  # noqa: B023
        # chunks of two samples, a 64th of so small a set; before, one request a sample, one after the other
        assert requests <= 0.8 * 216 and read <= 2 * size, protocol
    dense = settings | {"data": data | {"num_classes": 5}, "image_size": 32, "scale": (64, 32), "hidden": 8, "iterations": 6}
    requests, read = counted(proxy, lambda: segmentation.evaluate(make(), **dense))
    assert requests <= 0.8 * 216 + 24 and read <= 2 * size


@pytest.mark.store
def test_protocols_read_through_the_page_cache(store, tmp_path):
    proxy, data, _ = store
    data = data | {"num_classes": 4, "cache": {"folder": str(tmp_path / "pages"), "max_gb": 1}}
    first = knn.evaluate(make(), data=data, k=[5], workers=0)
    before = proxy.body_bytes
    assert knn.evaluate(make(), data=data, k=[5], workers=0) == first
    linear.evaluate(make(), data=data, epochs=1, batch_size=32, workers=0)
    assert proxy.body_bytes <= before + 1000 and list((tmp_path / "pages").iterdir())


@pytest.mark.store
@pytest.mark.parametrize("protocol", [linear.evaluate, knn.evaluate])
def test_a_store_that_falls_silent_is_an_outage(store, protocol):
    proxy, data, _ = store
    knn.evaluate(make(), data=data, k=[5], workers=0)
    proxy.rule = lambda number, line: "503" if "train" in line and line.startswith("GET") else None
    with pytest.raises(Outage, match="no answer within"):
        protocol(make(), data=data | {"num_classes": 4}, workers=1)


def test_damaged_training_samples_are_replaced_listed_and_limited(tmp_path):
    import io
    import tarfile

    paths = {name: write_shard(tmp_path / f"{name}.tar", [i % 4 for i in range(48)], 0) for name in ("train", "test")}
    with tarfile.open(tmp_path / "torn.tar", "w") as archive:
        for index in range(4):
            for member, content in (("png", b"no image"), ("cls", b"0")):
                info = tarfile.TarInfo(f"torn{index}.{member}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    data = {"train": [paths["train"], str(tmp_path / "torn.tar")], "test": paths["test"], "num_classes": 4}
    settings = {"epochs": 2, "batch_size": 16, "workers": 0, "resume_file": str(tmp_path / "progress.safetensors")}
    linear.evaluate(make(), data=data, **settings)  # 0.001 is tolerated where nothing is said, and ten of any small set
    listed = (tmp_path / "progress.quarantine.jsonl").read_text().splitlines()
    assert len(listed) == 4 and "torn.tar" in listed[0]
    with pytest.raises(DataBudgetExceeded, match="damaged"):
        linear.evaluate(make(), data=data | {"max_bad": 0}, **settings | {"resume_file": None})


@pytest.mark.slow
@pytest.mark.timeout(1800)  # each worker imports torch anew
def test_workers_of_a_process_that_holds_cuda_are_not_forked(tmp_path, monkeypatch):
    """Forkserver workers get everything pickled: datasets, views, augmentation."""
    monkeypatch.setattr(ordered, "context", lambda: "forkserver")
    monkeypatch.setattr(stream, "workers_context", lambda: "forkserver")
    data = {name: write_shard(tmp_path / f"{name}.tar", [i % 4 for i in range(32)], 0) for name in ("train", "test")}
    settings = {"batch_size": 16, "workers": 1}
    assert knn.evaluate(make(), data=data, k=[5], **settings) == knn.evaluate(make(), data=data, k=[5], workers=0, batch_size=16)
    linear.evaluate(make(), data=data, epochs=1, **settings)
    supervised.evaluate(make(), data=data, epochs=1, **settings, **QUICK)
    dense = {"data": data | {"num_classes": 5}, "image_size": 32, "scale": (64, 32), "hidden": 8, "iterations": 2}
    segmentation.evaluate(make(), **dense, **settings)
