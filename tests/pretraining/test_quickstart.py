"""The main job as a new user runs it: `ssl-locat pretrain quickstart`, on its own images, on this machine."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_beats_raw_pixels_and_its_own_initialisation(tmp_path, seed):
    """By 15 points of k-NN each, on each seed."""
    command = [sys.executable, "-m", "ssl_locat.cli", "pretrain", "quickstart", f"seed={seed}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    knn = summary["knn"]
    assert knn["trained"] >= knn["raw_pixels"] + 15, knn
    assert knn["trained"] >= knn["init"] + 15, knn
    for words in ("k-NN top-1", "raw pixels", "random initialisation", "Run folder", "Next:"):
        assert words in done.stderr
