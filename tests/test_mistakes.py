"""What people meet on their first day: a wrong path, a damaged image, a run that stopped. Each answer says what to do."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError
from servers import FaultProxy, nginx, program
from trained import write_config

from ssl_locat import cli
from ssl_locat.config.schema import load
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.doctor.doctor import doctor
from ssl_locat.errors import CheckpointError, DataBudgetExceeded, DataError, Outage, UserError, disk_error_message
from ssl_locat.evaluation.evaluate import evaluate
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.parts import check
from ssl_locat.report.command import report
from ssl_locat.runs.history import open_run
from ssl_locat.runs.log import console, read_jsonl


@pytest.fixture
def photos(tmp_path):
    """Class folders of 40 and 20 images; one of the first cannot be read."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 10)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (36, 36, 3), dtype=np.uint8) + np.uint8(120 * label)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{number}.png")
    (tmp_path / "photos/train/cat/torn.png").write_bytes(b"\x89PNG and no more")
    return tmp_path / "photos"


def over_photos(folder, photos, **changes):
    data = {"train": f"{photos}/train", "test": f"{photos}/val", "num_classes": 2, "workers": 0, "max_bad": 0.1}
    return load(str(write_config(folder, data={**data, **changes})))


def test_a_damaged_image_costs_neither_the_run_nor_its_probe(tmp_path, photos):
    config = over_photos(tmp_path, photos)
    summary = pretrain(config)
    assert summary["quarantined"] >= 1 and set(summary["knn"]) == {"raw_pixels", "init", "trained"}
    assert len(read_jsonl(tmp_path / "run/probes/knn.jsonl")) == 3
    data = {"train": config.data.train, "test": config.data.test}
    with pytest.raises(
        DataError, match=r"cat/torn: not an image.* data\.max_bad=0\.01"
    ):  # a score of record leaves nothing out unasked
        evaluate(config.run_dir, "knn", data=data, k=[5], workers=0)
    again = evaluate(config.run_dir, "knn", data={**data, "max_bad": 0.1}, k=[5], workers=0)["top1_k5"]
    assert round(again, 2) == summary["knn"]["trained"]


def test_too_many_damaged_images_end_the_run_and_the_doctor_says_so(tmp_path, photos, capsys):
    for number in range(8):
        (photos / f"train/dog/{number}.png").write_bytes(b"")
    with pytest.raises(DataBudgetExceeded, match=r"9 of 41 images could not be read, more than data.max_bad = 0\.1"):
        pretrain(over_photos(tmp_path, photos))
    assert open_run(tmp_path / "run").status == "failed"
    console.cache_clear()
    doctor(str(tmp_path / "run"))
    said = capsys.readouterr().err
    assert "Failed: 0 of" in said and "9 of 41 images could not be read" in said
    console.cache_clear()


@pytest.mark.store
@pytest.mark.skipif(program("nginx") is None, reason="no nginx on this machine to serve the images")
def test_a_store_that_falls_silent_starves_the_run_and_it_resumes(tmp_path):
    make_textures(tmp_path / "set", num_train=96, num_test=40, image_size=32, progress=False)
    (tmp_path / "scratch").mkdir()
    run = tmp_path / "run"
    with nginx(tmp_path, tmp_path / "scratch") as target, FaultProxy(target) as proxy:
        (shard,) = sorted((tmp_path / "set").glob("textures-train-*.tar"))[:1]
        data = {"train": f"{proxy.url}/set/{shard.name}", "num_classes": 10, "workers": 0, "retry_minutes": 0.02}
        config = load(str(write_config(tmp_path, data=data, probes={})), ["optim.epochs=null", "optim.total_steps=40"])
        proxy.rule = lambda number, line: "503" if list(run.glob("checkpoints/step_0000000?")) else None
        with pytest.raises(Outage):
            pretrain(config)
        assert open_run(run).status == "starved" and open_run(run).last["step"] >= 4
        proxy.rule = lambda number, line: None
        assert pretrain(config)["restarts"] == 1
    assert open_run(run).status == "finished"


def test_a_path_that_is_not_there_names_its_neighbour(photos):
    with pytest.raises(DataError, match=r"photos/trian does not exist\. Did you mean 'train'\? Expected a folder of images"):
        open_dataset(f"{photos}/trian")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder; expected a run folder"):
        report([str(tmp_path / "nowhere")])


def test_a_run_without_a_checkpoint_cannot_be_evaluated_yet(tmp_path, photos):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(over_photos(tmp_path, photos).to_yaml())
    with pytest.raises(CheckpointError, match="holds no whole checkpoint yet; steps found: none"):
        evaluate(str(tmp_path / "run"), "knn", data={"train": f"{photos}/train", "test": f"{photos}/val"})


def test_an_override_written_as_an_option_is_corrected():
    command = [sys.executable, "-m", "ssl_locat.cli", "pretrain", "quickstart", "--optim.epochs=1"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 2 and "overridden without dashes: optim.epochs=1" in answer.stderr


def test_a_mistake_leaves_no_run_behind_and_a_run_is_not_mixed_with_another(tmp_path, photos):
    config = over_photos(tmp_path, photos)
    wrong = config.model_copy(update={"backbone": config.backbone.model_copy(update={"name": "locatvit_tny"})})
    with pytest.raises(UserError, match="locatvit_tny"):
        pretrain(wrong)
    pretrain(config)
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e-4})})
    with pytest.raises(UserError, match=r"is of a run with other settings: optim\.lr was .*, now 0\.0001\."):
        pretrain(other)


def test_a_full_disk_ends_in_one_message_and_leaves_nothing_half_written(tmp_path):
    model = "timm:vit_tiny_patch16_224?patch_size=8&img_size=32&depth=1&embed_dim=24&num_heads=2"
    command = f"ulimit -f 8; exec {sys.executable} -m ssl_locat export '{model}' out"  # a limit of 8 kB stands for the disk
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4 and "ssl-locat: the file grew beyond" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_the_machine_refuses_is_said_in_words_and_our_own_errors_are_not():
    assert "runs/a: the disk is full. Make room" in disk_error_message(OSError(28, "No space left on device", "runs/a"))
    assert "the disk is full" in disk_error_message(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert (
        disk_error_message(FileNotFoundError(2, "No such file")) is None
        and disk_error_message(SafetensorError("header too large")) is None
    )


def test_moved_data_resumes_and_other_data_does_not(tmp_path, photos, monkeypatch):
    """What counts is the manifest: which images, in which order; not where they lie, nor how the path is written."""
    summary = pretrain(over_photos(tmp_path, photos))
    moved = photos.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert pretrain(over_photos(tmp_path, "elsewhere")) == summary  # relative now; resumed, and nothing left to do
    (moved / "train/cat/3.png").unlink()
    with pytest.raises(CheckpointError, match=r"samples with manifest .* the run was started on 41 samples"):
        pretrain(over_photos(tmp_path, moved))


def test_a_run_without_a_step_is_refused_and_a_batch_above_the_images_warned_about(tmp_path, photos, caplog):
    config = over_photos(tmp_path, photos)
    for epochs, batch in ((0.01, 8), (1, 64)):
        optim = config.optim.model_copy(update={"epochs": epochs, "total_steps": None, "global_batch_size": batch})
        changed = config.model_copy(update={"optim": optim})
        if epochs < 1:
            with pytest.raises(UserError, match=r"optim\.epochs is 0\.01: .* not one step"):
                check(changed)
        else:
            check(changed)
            assert "data.train holds 41 images: every batch holds some of them twice" in caplog.text


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run_command(["pretrain", "quickstart", "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
