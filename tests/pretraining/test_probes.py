"""Probes cost little: subsets fixed by key, the baseline once, and nothing optional before the summary and the export."""

import json

import pytest
import torch
from scenes import write_split
from tiny_run import write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError
from ssl_locat.evaluation.probe_options import check_probes
from ssl_locat.evaluation.protocols import knn
from ssl_locat.evaluation.shared import features
from ssl_locat.intervals.figures import wilson
from ssl_locat.models.backbone import create_backbone
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.probe_costs import SHARE, costs, limits, shares
from ssl_locat.pretraining.probes import Probes, counted
from ssl_locat.runs.log import read_jsonl

IMAGENET = {"train": 1_281_167, "test": 50_000}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("probes.knn=5", "probes.knn is 5; expected its protocol's keys and values, or null"),
        ("probes.held_out=on it", "probes.held_out is 'on it'; expected"),
        # YAML reads braces around a bracket as text
        (
            "probes.knn.data={train: part-00000[0-1].tar}",
            "probes.knn.data is '{train: part-00000[0-1].tar}'; expected keys and values",
        ),
    ],
)
def test_a_probe_that_is_no_mapping_is_named(override, message):
    config = load("cifar10_cpu", [override])
    with pytest.raises(ConfigError) as error:
        check_probes(config)
    assert message in str(error.value)


@pytest.mark.parametrize("recipe", ["dino_locatvit_s16", "dinov2_locatvit_s16", "highres_gram"])
@pytest.mark.parametrize("divisor", [1, 100])
def test_probes_of_the_shipped_recipes_cost_at_most_a_twentieth(recipe, divisor):
    config = load(recipe)
    sizes = {name: count // divisor for name, count in IMAGENET.items()}
    steps_per_epoch = max(1, (config.data.epoch_samples or sizes["train"]) // config.optim.global_batch_size)
    steps = config.optim.total_steps or round(config.optim.epochs * steps_per_epoch)
    found = costs(config, steps_per_epoch, steps, sizes)
    decoded, forwards = shares(config, found, steps * config.optim.global_batch_size)
    assert 0 < decoded <= SHARE and 0 < forwards <= SHARE
    assert all(cost.images >= 1000 for cost in found)  # and still tell something


def test_a_protocol_that_reads_its_images_many_times_gets_fewer_of_them():
    config = load(
        "dino_locatvit_s16", ["probes.linear={epochs: 20}", "probes.kept={protocol: linear, epochs: 20, augment: false}"]
    )
    found = limits(config, 1251, 125_100 // 2)
    assert found["linear"]["train_images"] < found["kept"]["train_images"] == found["knn"]["train_images"] == 10_000


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder, num_train=96, num_test=40, image_size=32, progress=False)
    return folder


def run_config(textures, folder, *overrides):
    return load(
        str(write_config(textures, folder)),
        ["probes.every_steps=6", "probes.knn={k: [5], workers: 0}", "export=true", *overrides],
    )


def test_a_run_killed_in_its_last_probe_has_its_export_and_its_summary(textures, tmp_path, monkeypatch):
    config = run_config(textures, tmp_path)
    probe, raw = Probes.run, []

    def killed(self, step, *args):
        if step == 12:
            raise KeyboardInterrupt
        probe(self, step, *args)
        raw.append((tmp_path / "run/probes/raw_pixels.json").stat().st_mtime_ns)

    monkeypatch.setattr(Probes, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    run = tmp_path / "run"
    assert len(set(raw)) == 1  # the baseline was measured once, with the first probe
    assert (run / "export/model.safetensors").stat().st_mtime_ns <= (run / "summary.json").stat().st_mtime_ns
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {"steps", "samples_seen", "seconds", "images_per_second", "knn", "quarantined", "restarts"}
    assert set(summary["knn"]) == {"raw_pixels", "init", "trained"}
    assert [record["step"] for record in read_jsonl(run / "probes/knn.jsonl")] == [0, 6]


def test_the_sets_of_a_probe_are_fixed_by_key_and_stated(textures, tmp_path, capsys):
    from ssl_locat.pretraining.summary import print_summary

    config = run_config(textures, tmp_path, "probes.knn.data={train_images: 50, test_images: 20}", "export=false")
    summary = pretrain(config)
    records = read_jsonl(tmp_path / "run/probes/knn.jsonl")
    assert [record["step"] for record in records] == [0, 6, 12] and counted(tmp_path / "run") == (50, 20)
    assert all(record["train_images"] == 50 and record["test_images"] == 20 for record in records)
    assert summary["knn"]["trained"] == records[-1]["top1_k5"] and summary["knn"]["init"] == records[0]["top1_k5"]
    raw = json.loads((tmp_path / "run/probes/raw_pixels.json").read_text())
    assert (raw["train_images"], raw["test_images"], raw["top1"]) == (50, 20, summary["knn"]["raw_pixels"])
    print_summary(config, summary)
    low, high = wilson(summary["knn"]["trained"], 20)
    shown = capsys.readouterr().err
    assert "20 of them, by their neighbours among 50 training images" in shown and f"{low:.1f} to {high:.1f}" in shown


def test_few_labels_are_cut_before_features_are_extracted(tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    decoded, view = [], features.centre_view
    monkeypatch.setattr(features, "centre_view", lambda *args, **options: decoded.append(1) or view(*args, **options))
    scores = knn.evaluate(backbone, data=write_split(tmp_path), k=[5], train_fraction=0.25, workers=0)
    assert len(decoded) == 12 + 24 and scores["train_images"] == 12 and scores["test_images"] == 24


def test_the_interval_is_wilsons():
    assert wilson(50.0, 100) == pytest.approx((40.38, 59.62), abs=0.01)
    assert wilson(0.0, 100) == pytest.approx((0, 3.70), abs=0.01) and wilson(100.0, 20)[0] == pytest.approx(83.89, abs=0.01)


MEASURE = """
import resource, sys
from ssl_locat.evaluation.protocols.knn import raw_pixel_knn
from ssl_locat.runs import log
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = raw_pixel_knn(data={"train": sys.argv[1], "test": sys.argv[2]}, k=5, workers=0, most_images=10_000)
assert scores["train_images"] == scores["test_images"] == 10_000, scores
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_raw_pixels_of_twenty_thousand_images_take_less_than_a_gib(tmp_path):
    import io
    import subprocess
    import sys
    import tarfile

    import numpy as np

    rng, paths = np.random.default_rng(0), []
    for name in ("train", "test"):
        paths.append(str(tmp_path / f"{name}.tar"))
        with tarfile.open(paths[-1], "w") as archive:
            for index in range(12_000):
                stream = io.BytesIO()
                np.save(stream, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                for member, content in (("npy", stream.getvalue()), ("cls", b"%d" % (index % 100))):
                    info = tarfile.TarInfo(f"{index:06d}.{member}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0  # GiB, beyond what the interpreter and torch take
