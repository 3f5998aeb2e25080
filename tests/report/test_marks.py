"""What the report marks on the curves of a run: the checkpoints that it kept as its best ones, and its decay."""

import json
from pathlib import Path

import pytest
from tiny_run import write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.report.curves import curves
from ssl_locat.runs.best import FILE, read_best
from ssl_locat.runs.history import open_run


@pytest.fixture(scope="module")
def decayed(tmp_path_factory) -> Path:
    """A finished run of 12 steps whose last 6 are its decay, probed every 4."""
    folder = tmp_path_factory.mktemp("run")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    probes = "probes={every_steps: 4, unlabelled: {images: 16, views: 1, workers: 0}, knn: {k: [5], image_size: 32, workers: 0}}"
    keep = "checkpoint.keep_best=[dense, global]"
    pretrain(load(str(write_config(folder / "set", folder)), [probes, keep, "optim.schedule=wsd", "optim.decay_epochs=1"]))
    return folder / "run"


def test_kept_checkpoints_and_the_decay_are_marked_on_the_curves(decayed):
    best = read_best(decayed)
    assert set(best) == {"dense", "global"}
    charts = {chart.title: chart for _, charts in curves([open_run(decayed)]) for chart in charts}
    across = {(6, "decay begins", "")} | {(entry.step, f"best {choice}", "") for choice, entry in best.items()}
    rings = {"dse": (best["dense"].step, "best dense", "dse"), "top1_k5": (best["global"].step, "best global", "top1_k5")}
    ringed = {}
    for title, chart in charts.items():
        found = {tuple(mark) for mark in chart.marks}
        labels = {mark.label for mark in chart.marks if mark.curve}
        ours = {mark for mark in found if mark[1] in {label for _, label, _ in across}}  # warnings and the like are marked, too
        assert {mark for mark in ours if not mark[2]} == {mark for mark in across if mark[1] not in labels}, title
        for ring in ours - across:
            ringed[ring[2]] = ring
            line = next(line for line in chart.lines if line.name == ring[2])
            entry = best[ring[1].removeprefix("best ")]
            assert dict(zip(line.x, line.y, strict=True))[ring[0]] == entry.value, "the ring lies on the value that was the best"
    assert ringed == rings


@pytest.mark.parametrize("text", ["{", "[]", '{"dense": {}}', '{"dense": {"measure": "dse", "step": 1, "value": 2}}'])
def test_a_best_json_that_says_nothing_costs_no_page(tmp_path, text):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / FILE).write_text(text)
    assert read_best(tmp_path) == {}
    (tmp_path / "checkpoints" / FILE).write_text(json.dumps({"dense": {"measure": "u.dse", "step": 1, "value": 2}}))
    assert read_best(tmp_path) == {"dense": ("u.dse", 1, 2.0)}
