"""Several processes: the same command under torchrun goes on with a run of one process, and its losses agree."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_run import losses, write_config

from ssl_locat.data.shards.textures import make_textures
from ssl_locat.runs.log import read_jsonl

COMMON = ["backbone.drop_path_rate=0", "checkpoint.every_steps=4", "checkpoint.keep_last=10"]


def run(ranks: int, config: Path, *arguments: str) -> str:
    """`ssl-locat pretrain` on so many gloo processes; returns what it said."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [*launcher, "ssl_locat.cli", "pretrain", str(config), *arguments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    config = write_config(folder / "set", folder)
    run(1, config, *COMMON)
    return folder, config


@pytest.mark.parametrize("option", ["parallel=ddp", "optim.accumulate_steps=2", "parallel=fsdp"])
def test_two_ranks_resume_a_run_of_one(unbroken, tmp_path, option):
    folder, config = unbroken
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    (tmp_path / "run" / "summary.json").unlink()
    run(2, config, f"run_dir={tmp_path}/run", *COMMON, option)
    expected, found = losses(folder / "run"), losses(tmp_path / "run")
    assert list(found) == list(range(1, 13))
    assert found == pytest.approx(expected, rel=1e-4)


def test_one_rank_resumes_a_run_of_two(unbroken, tmp_path):
    _, config = unbroken
    run(2, config, f"run_dir={tmp_path}/run", *COMMON)
    whole = losses(tmp_path / "run")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "run" / "summary.json").unlink()
    run(1, config, f"run_dir={tmp_path}/run", *COMMON)
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-4)


def worker_of(torchrun: subprocess.Popen, rank: int) -> int:
    """Process id of a rank that torchrun started; 0 if it is not there (yet)."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent, environment = status.read_text().rpartition(")")[2].split()[1], status.with_name("environ").read_bytes()
            if int(parent) == torchrun.pid and f"\0RANK={rank}\0".encode() in environment:
                return int(status.parent.name)
    return 0


def steps_saved(run_dir: Path) -> list[int]:
    return sorted(int(path.parent.name[-8:]) for path in run_dir.glob("checkpoints/step_*/checkpoint.json"))


LONGER = [*COMMON, "optim.epochs=null", "optim.total_steps=48", "checkpoint.keep_last=20"]


@pytest.fixture(scope="module")
def unbroken_pair(unbroken, tmp_path_factory):
    """The run folder of 48 steps of two ranks."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    run(2, unbroken[1], f"run_dir={folder}", *LONGER)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of torchrun in /proc")
@pytest.mark.slow  # eight processes that import torch
@pytest.mark.parametrize("resume", ["path", "never"])
def test_a_worker_that_is_killed_costs_what_came_after_the_newest_checkpoint(unbroken, unbroken_pair, tmp_path, resume):
    """torchrun starts both ranks again with the same command line: `--resume PATH` and `never` were meant for the first start."""
    _, config = unbroken
    if resume == "path":
        shutil.copytree(unbroken_pair, tmp_path / "run")
        (tmp_path / "run" / "summary.json").unlink()
        for step in range(8, 49, 4):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
        resume = f"{tmp_path}/run/checkpoints/step_00000004"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    settings = [str(config), f"run_dir={tmp_path}/run", *LONGER, "--resume", resume]
    command = [*launcher, "-m", "ssl_locat.cli", "pretrain", *settings]
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + 120
            while max(steps_saved(tmp_path / "run"), default=0) < 12 and time.monotonic() < deadline and job.poll() is None:
                time.sleep(0.02)
            newest, lost = max(steps_saved(tmp_path / "run")), worker_of(job, 1)
            assert lost, (tmp_path / "said").read_text()[-4000:]
            os.kill(lost, signal.SIGKILL)
            assert job.wait(180) == 0, (tmp_path / "said").read_text()[-4000:]
        finally:
            job.kill()
    text, host = (tmp_path / "said").read_text(), socket.gethostname()
    assert f"rank 0 on {host} ends, because it lost rank 1 on {host}: it failed, was killed" in text
    starts = [
        (event["kind"], event["step"])
        for event in read_jsonl(tmp_path / "run" / "events.jsonl")
        if event["kind"] in ("start", "resume")
    ]
    again = starts[-1][1]
    assert starts[-2] == (("start", 0) if resume == "never" else ("resume", 4)) and starts[-1][0] == "resume"
    assert newest <= again < 48 and again % 4 == 0
    assert losses(tmp_path / "run") == losses(unbroken_pair)
