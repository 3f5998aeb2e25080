"""Every deliberately broken or odd input ends as its README says: used, quarantined and counted, or refused with one message."""

import json
import os
import shutil

import numpy as np
import pytest
from shards import as_list, write_shards

from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.data.shards.check import check, check_command, show
from ssl_locat.data.shards.index import open_dataset, open_mix, write_index
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import DataError

SIZES = {"global_batch_size": 4, "world_size": 1, "accumulate_steps": 1, "workers": 0}

# file -> (keys that pretraining uses, keys it quarantines)
EXPECTED = {
    "truncated-tar": (["000000", "000001", "000002"], ["000003"]),
    "truncated-jpeg": (["000000", "000002"], ["000001"]),
    "zero-byte-image": (["000000", "000002"], ["000001"]),
    "cmyk-jpeg": (["000000", "000001", "000002"], []),
    "grayscale-png": (["000000", "000001", "000002"], []),
    "png-16bit": (["000000", "000001", "000002"], []),
    "palette-transparency-png": (["000000", "000001", "000002"], []),
    "animated-gif": (["000000", "000001", "000002"], []),
    "one-pixel": (["000000", "000001", "000002"], []),
    "wide-4000x3": (["000000", "000001", "000002"], []),
    "missing-label": (["000000", "000001", "000002"], ["000003"]),
    "duplicate-keys": (["000000", "000001", "000002"], []),
    "bomb-png-header": (["000000", "000002"], ["000001"]),
    "exif-rotated-jpeg": (["000000", "000001", "000002"], []),
    "path-traversal": (["../../evil", "000000", "000002"], []),
    "pickle-entry": (["000000", "000001", "000003"], ["000002"]),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def decode(raw, seed):
    return raw.key, decode_image(find_image(raw.members)).shape


@pytest.mark.parametrize("name", EXPECTED)
def test_odd_shards_end_as_documented(shared_data, tmp_path, monkeypatch, name):
    shutil.copy(shared_data("broken") / f"{name}.tar", tmp_path)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    datasets, weights = open_mix(str(tmp_path / f"{name}.tar"))
    plan = choose_plan(datasets, weights, 0, SIZES["global_batch_size"])
    used: set = set()
    options = SIZES | {"start_samples": 0, "max_bad": 0.5, "quarantine_path": tmp_path / "quarantine.jsonl"}
    with TrainStream(datasets, plan, decode, as_list, **options) as stream:
        for batch in stream:
            used |= set(batch.payload)
            if batch.positions[-1] >= 40:
                break
    good, bad = EXPECTED[name]
    assert sorted({key for key, _ in used}) == good
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines() if bad else []
    assert sorted(json.loads(line)["key"] for line in lines) == bad and stream.quarantined == len(bad)
    assert os.listdir() == [] and not list(tmp_path.rglob("evil*"))  # nothing executed, nothing unpacked


def test_what_is_no_tar_is_refused_by_name(shared_data):
    with pytest.raises(DataError, match=r"not-a-tar\.tar is not a tar archive .*shards check"):
        open_dataset(str(shared_data("broken") / "not-a-tar.tar"))


def test_members_of_two_samples_are_never_mixed(shared_data):
    labels = [
        (sample.key, sample.members["cls"])
        for sample in open_dataset(str(shared_data("broken") / "duplicate-keys.tar")).read(0, 5)
    ]
    images = [
        np.mean(decode_image(sample.members["jpg"]))
        for sample in open_dataset(str(shared_data("broken") / "duplicate-keys.tar")).read(0, 5)
    ]
    assert len(labels) == 5 and len(set(images)) == 5


def test_check_reports_all_damage_by_shard_and_key(shared_data):
    report = check(str(shared_data("broken")), decode=lambda sample: decode_image(find_image(sample.members)))
    damaged = sorted((bad.shard.rpartition("/")[2].removesuffix(".tar"), bad.key) for bad in report.damage)
    expected = [(name, key) for name, (_, bad) in EXPECTED.items() for key in bad] + [("not-a-tar", "")]
    assert damaged == sorted(expected)
    assert report.exit_code == 3 and report.shards == 17 and report.repeated_keys == 2
    assert "DAMAGED" in str(report) and any("missing-label" in line for line in report.unusual)


def test_check_finds_nothing_in_good_shards(shared_data, capsys):
    assert check_command(str(shared_data("cifar10") / "cifar10-mini-test-*.tar"), as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 1000
    assert check(str(shared_data("cifar10") / "cifar10-test-000000.tar.gz")).exit_code == 0


def test_show_and_index_tell_what_is_there(tmp_path):
    pattern = write_shards(tmp_path / "data", [4, 3])
    assert write_index(pattern) == [str(tmp_path / "data/shards.index")]
    text = show(open_dataset(pattern))
    assert "7 samples" in text and "001.tar  3 samples" in text and "[000_00000]  bin" in text
