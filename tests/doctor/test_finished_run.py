"""`ssl-locat doctor RUN` about a run that has ended: which of its checkpoints is the better backbone, by what its probes measured."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.doctor.doctor import doctor
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.runs.best import Measure, noise_of
from ssl_locat.runs.log import read_jsonl

PROBES = "probes={every_steps: 6, unlabelled: {images: 16, views: 1, image_size: 32, workers: 0}}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of two epochs of six steps, with checkpoints of both and the first kept or not."""
    folder = tmp_path_factory.mktemp("run")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    pretrain(load(str(write_config(folder / "set", folder)), [PROBES, "checkpoint={every_steps: 6, keep_best: [dense]}"]))
    return folder / "run"


def said_of(run: Path, values: list[float], capsys) -> str:
    """What the doctor says of this run, had its probes measured these values of DSE at steps 0, 6 and 12."""
    found = read_jsonl(run / "probes/unlabelled.jsonl")
    assert [record["step"] for record in found] == [0, 6, 12]
    lines = (json.dumps(record | {"dse": value}) + "\n" for record, value in zip(found, values, strict=True))
    (run / "probes/unlabelled.jsonl").write_text("".join(lines))
    assert doctor(str(run)) == 0
    return " ".join(capsys.readouterr().err.split())


def test_an_earlier_epoch_is_named_as_the_better_backbone(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    said = said_of(run, [0.9, 0.61, 0.35], capsys)
    assert "Epoch 1 (step 6) is the better backbone for segmentation (unlabelled.dse 0.61 against 0.35 at the last step)." in said
    assert f"Take it: ssl-locat export {run} OUT --step " in said
    shutil.rmtree(run / "checkpoints/step_00000006")
    assert "Its checkpoint is gone; a run keeps such ones with checkpoint.keep_best=[dense]." in said_of(
        run, [0.9, 0.61, 0.35], capsys
    )

    with open(run / "events.jsonl", "a") as log:
        log.write(
            json.dumps({"time": "", "kind": "branch", "step": 6, "parent": "runs/long/checkpoints/step_00000006", "changes": []})
            + "\n"
        )
    assert "It is what this run branched from: runs/long/checkpoints/step_00000006" in said_of(run, [0.9, 0.61, 0.35], capsys)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([0.9, 0.35, 0.61], "The last step is the best backbone for segmentation (by unlabelled.dse)."),
        (
            [0.9, 0.63, 0.61],
            "For segmentation epoch 1 (step 6) and the last step are alike (unlabelled.dse 0.63 against 0.61 at the last step",
        ),
    ],
)
def test_a_rise_to_the_end_and_differences_within_the_noise_are_told_as_such(trained, tmp_path, capsys, values, sentence):
    shutil.copytree(trained, tmp_path / "run")
    said = said_of(tmp_path / "run", values, capsys)
    assert sentence in said and "better backbone" not in said and "classification" not in said


def test_a_kept_checkpoint_is_exported_by_its_name(trained, capsys):
    """As the run itself measured: whatever it kept is what the advice names."""
    assert doctor(str(trained)) == 0
    said = " ".join(capsys.readouterr().err.split())
    kept = json.loads((trained / "checkpoints/best.json").read_text())["dense"]
    if "better backbone" in said:
        assert kept["step"] == 6 and "--step best-dense" in said
    else:
        assert "The last step is the best backbone" in said or "alike" in said


def test_the_noise_of_a_share_follows_from_the_number_of_images():
    record = {"step": 2, "top1_k20": 34.2, "test_images": 1000}
    assert noise_of(Measure("knn", "top1"), record) == pytest.approx(2.94, abs=0.01)
    assert noise_of(Measure("knn", "top1"), record | {"test_images": 50_000}) == pytest.approx(0.42, abs=0.01)
    assert noise_of(Measure("unlabelled", "dse"), record) == 0.04 and noise_of(Measure("unlabelled", "lidar"), record) == 0
