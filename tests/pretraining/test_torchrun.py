"""Several processes: the same command under torchrun goes on with a run of one process, and its losses agree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import losses, write_config

from ssl_locat.data.shards.textures import make_textures

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
