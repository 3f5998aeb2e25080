"""What version 0.1 wrote stays of use: its run folders resume and its exports load. `made_by_0_1` holds one of each, made by its code:
a run stopped at step 4 of 8, the losses of the same run unbroken, and the features of its export for one fixed image."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import losses

import ssl_locat
from ssl_locat.config.schema import load
from ssl_locat.pretraining.loop import pretrain

MADE = Path(__file__).parent / "made_by_0_1"
EXPECTED = json.loads((MADE / "expected.json").read_text())


def test_a_run_of_0_1_resumes_where_it_stopped(tmp_path, monkeypatch):
    shutil.copytree(MADE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")  # its paths are relative
    summary = pretrain(load("tiny.yaml"))
    assert summary["steps"] == 8 and summary["restarts"] == 1
    expected = {int(step): loss for step, loss in EXPECTED["losses"].items()}
    assert losses("run") == pytest.approx(expected, rel=1e-3)  # made on another CPU, perhaps: its float sums round differently


def test_an_export_of_0_1_loads_with_the_same_features():
    image = torch.linspace(-2, 2, 3 * 16 * 16).reshape(1, 3, 16, 16)
    found = ssl_locat.features(ssl_locat.load_backbone(str(MADE / "export")), image)[0]
    assert found.tolist() == pytest.approx(EXPECTED["features"], abs=1e-4)
