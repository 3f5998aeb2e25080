"""Every protocol on a real checkpoint of others, in one step: `ssl-locat evaluate PROTOCOL dinov2_vits14.pth image_size=98 ...`."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from scenes import write_split

from ssl_locat.cli import run_command
from ssl_locat.evaluation import PROTOCOLS

SIZE = 98  # pixels: 14 divides it
# protocol -> its options, for few images and few steps, and a metric with what it must be: above guessing, or as known
CASES = {
    "knn": (["k=[5]"], ("top1_k5", lambda x: x > 50)),
    "linear": (["epochs=4", "batch_size=24", "lr=0.05", "augment=false"], ("top1", lambda x: x > 50)),
    "linear_sweep": (["epochs=2", "batch_size=24", "lrs=[0.01, 0.1]", "augment=false"], ("top1", lambda x: x > 50)),
    "supervised": (["epochs=1", "warmup_epochs=0", "lr=1e-5", "batch_size=24", "precision=fp32"], ("top5", lambda x: x > 0)),
    "segmentation": (
        ["data.num_classes=5", "iterations=6", "batch_size=4", "scale=[196, 98]"],
        ("miou", lambda x: 0 < x <= 100),
    ),
    "hummingbird": (["data.num_classes=5", "neighbours=5"], ("miou", lambda x: x > 20)),
    "held_out": (["folds=4", "k=5"], ("linear", lambda x: 0 < x <= 100)),
    "locality": (["images=8", "out=null"], ("locality", lambda x: 0 < x <= 1)),
    "attention": (["images=2", "out=null"], ("patch_distance", lambda x: 0 < x < 10)),
    "efficiency": ([], ("params_backbone", lambda x: 21e6 < x < 23e6)),
    "metadata": (["member=cls", "values=[0, 1, 2, 3]", "k=5"], ("read_linear", lambda x: x > 50)),
    "unlabelled": (["images=8", "views=2"], ("rankme", lambda x: 1 < x <= 8)),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("scenes"), num_train=24, num_test=8, size=SIZE)


def test_every_protocol_is_a_case():
    assert set(CASES) == set(PROTOCOLS) - {"validate"}  # which takes a classifier


@pytest.mark.parametrize(
    "protocol", [pytest.param(name, marks=pytest.mark.slow) if name == "supervised" else name for name in CASES]
)
def test_it_takes_the_checkpoint_in_one_step(vits14, scenes, capsys, monkeypatch, tmp_path, protocol):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    options, (name, expected) = CASES[protocol]
    data = [f"data.{split}={path}" for split, path in scenes.items()]
    data = {
        "efficiency": [],
        "locality": data[1:],
        "attention": data[1:],
        "unlabelled": data[1:],
        "held_out": [data[0].replace("train", "test", 1)],
    }.get(protocol, data)
    workers = [] if protocol in ("efficiency", "attention") else ["workers=0"]
    assert run_command(["evaluate", protocol, str(vits14), f"image_size={SIZE}", *data, *workers, *options, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert expected(metrics[name]), metrics


def test_features_of_the_checkpoint_in_one_step(vits14, scenes, tmp_path):
    out = tmp_path / "features"
    arguments = [str(vits14), scenes["test"], str(out), f"image_size={SIZE}", "workers=0"]
    assert run_command(["features", *arguments]) == 0
    written = load_file(next(out.glob("features-*.safetensors")))
    assert {array.shape for array in written.values()} >= {(8, 384), (8, 49, 384)}
    assert all(np.isfinite(array).all() for array in written.values() if array.dtype.kind == "f")
