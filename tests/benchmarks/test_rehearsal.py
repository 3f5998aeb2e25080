"""The rehearsal: archives as ILSVRC has them, stages that are not run twice, and counts that add up."""

import json

import pytest

from ssl_locat.benchmarks import rehearsal
from ssl_locat.benchmarks.rehearsal_source import write_source
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.pack import pack
from ssl_locat.errors import UserError


def test_the_archives_are_packed_as_imagenets_are(tmp_path):
    write_source(tmp_path, train=203, test=20, classes=10)
    train = pack(str(tmp_path / "ILSVRC2012_img_train.tar"), tmp_path / "train", workers=1)
    test = pack(str(tmp_path / "ILSVRC2012_img_val.tar"), tmp_path / "val", workers=1, labels=str(tmp_path / "val.csv"))
    assert (train["samples"], len(train["classes"]), test["samples"]) == (203, 10, 20)
    for folder, count in (("train", 203), ("val", 20)):
        samples = open_dataset(str(tmp_path / folder), cache_dir=tmp_path / "cache").read(0, count)
        assert {int(sample.members["cls"]) for sample in samples} == set(range(10))
        assert len({sample.key for sample in samples}) == count


def test_a_finished_stage_is_not_run_again_and_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    ran = []

    def stages(self):
        for name in ("one", "two"):
            yield name, lambda name=name: ran.append(name) or {"samples": len(ran)}

    monkeypatch.setattr(rehearsal.Rehearsal, "stages", stages)
    first = rehearsal.rehearse(tmp_path, scale=0.5)
    again = rehearsal.rehearse(tmp_path, scale=0.5)
    assert ran == ["one", "two"] and first == again == json.loads((tmp_path / "rehearsal.json").read_text())
    with pytest.raises(UserError, match="give another folder"):
        rehearsal.rehearse(tmp_path, scale=1.0)


def test_counts_of_one_rank_are_scaled_to_an_epoch():
    row = {"used": 1000, "read_ahead": 600, "fetched_over_used": 1.0, "requests": 100, "megabytes": 176, "raw_peak_megabytes": 50}
    row["cpu_seconds_per_1000_images"] = 2.0
    [line] = rehearsal.scaled({"stream, 8 ranks, local": row}, 1000)
    assert "160,146 samples of an epoch in 10,009 requests, 17,616 MB" in line and "2.7 min on GPUs of 1000 images/s" in line
    assert rehearsal.scaled({}, None) == []
