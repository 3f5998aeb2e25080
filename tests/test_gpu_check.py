"""`make gpu-check` keeps what was measured when it is cut short, and its commands are ones that we take."""

import gzip
import json
import signal
import sys

from gpu_check import Stage, main, run, stages, track, unpacked

from ssl_locat.tables.jobs import TrainingJob, jobs
from ssl_locat.tables.schema import load_table


def test_a_stage_that_is_cut_leaves_what_it_printed(tmp_path):
    command = [sys.executable, "-u", "-c", "import time; print('measured', flush=True); time.sleep(60)"]
    ended = run(Stage("slow", command, 1), tmp_path, 1.0)
    assert ended["cut"] and ended["exit"] == -signal.SIGTERM and ended["seconds"] < 20
    assert (tmp_path / "slow.txt").read_text() == "measured\n"
    assert run(Stage("wrong", [sys.executable, "-c", "raise SystemExit(3)"], 9), tmp_path, 9.0)["exit"] == 3


def test_nothing_begins_when_no_time_is_left(tmp_path, capsys):
    assert main(["--minutes", "0.1", "--folder", str(tmp_path), "--cifar10", str(tmp_path)]) == 0
    ended = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert [(stage["stage"], stage["exit"], stage["cut"]) for stage in ended] == [
        (name, None, True) for name in ("tests", "attention", "step")
    ]
    assert "track: left out" in capsys.readouterr().out


def test_the_track_is_a_table_of_two_trainings(tmp_path):
    (tmp_path / "set").mkdir()
    for part in ("train", "test"):
        with gzip.open(tmp_path / f"set/cifar10-{part}-000000.tar.gz", "wb") as stream:
            stream.write(b"a tar")
    train, test = unpacked(tmp_path / "set", tmp_path / "plain", "")
    assert (tmp_path / "plain/cifar10-train-000000.tar").read_bytes() == b"a tar"
    for small in (False, True):
        name, *arguments = track(tmp_path, train, test, small)
        table = load_table(name, arguments)
        found = [job for job in jobs(table) if isinstance(job, TrainingJob)]
        assert [job.row for job in found] == ["LocAtViT", "ViT"]
        assert [job.config().backbone.name for job in found] == ["locatvit_tiny", "vit_tiny"]
    assert [stage.name for stage in stages(tmp_path, tmp_path / "plain", 10, small=False)] == [
        "tests",
        "attention",
        "step",
        "track",
    ]
