"""init writes a YAML that pretrain runs, from the images as they are."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from ssl_locat import cli
from ssl_locat.config.schema import load
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.tar import Damage
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.doctor.init import DataStats, choose_prototypes, choose_sizes, compose, init, usable_test
from ssl_locat.errors import DataError, UserError
from ssl_locat.measure import step as step_measure
from ssl_locat.pretraining.loop import pretrain


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(step_measure, "SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)


def save_images(folder: Path, count: int, size: tuple[int, int], mode: str = "RGB") -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / f"{number}.png")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_init_writes_is_what_pretrain_runs(tmp_path):
    source = save_images(tmp_path / "my photos", 48, (50, 40))
    path = init(str(source))
    assert path == Path("my_photos.yaml")
    text = path.read_text()
    assert "48 images" in text and text.count("#") > 10 and "on this machine, by a few measured steps" in text
    config = load(
        str(path), ["optim.epochs=1", "backbone.embed_dim=24", "backbone.depth=1", "data.workers=0", "log.tensorboard=false"]
    )
    assert config.crops.global_size == 32 and config.data.train == str(source)
    assert pretrain(config)["samples_seen"] == 48 // config.optim.global_batch_size * config.optim.global_batch_size
    assert Path("runs/my_photos/export/model.safetensors").is_file()


def test_train_and_test_folders_and_shards_are_told_apart(tmp_path):
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            save_images(tmp_path / "set" / part / label, 12, (70, 70))
    data = yaml.safe_load(init(str(tmp_path / "set")).read_text())
    assert data["data"]["train"].endswith("set/train") and data["data"]["test"].endswith("set/val")
    assert data["data"]["num_classes"] == 2 and data["crops"]["global_size"] == 64 and data["probes"]["knn"]["k"] == [20]

    make_textures(tmp_path / "shards", num_train=64, num_test=40, image_size=32, progress=False)
    data = yaml.safe_load(init(str(tmp_path / "shards"), str(tmp_path / "other.yaml")).read_text())
    assert data["data"]["train"].endswith("*train*.tar") and data["data"]["test"].endswith("*test*.tar")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gray_images_get_their_own_statistics_and_no_colour_changes(tmp_path):
    crops = yaml.safe_load(init(str(save_images(tmp_path / "xrays", 24, (40, 40), "L"))).read_text())["crops"]
    assert crops["gray_prob"] == 0 and crops["jitter"][2:] == [0, 0] and crops["mean"][0] == pytest.approx(0.5, abs=0.03)


def test_pretrain_takes_images_and_keeps_the_yaml(tmp_path, monkeypatch):
    source = save_images(tmp_path / "my photos", 48, (50, 40))
    tiny = ["optim.epochs=null", "optim.total_steps=1", "backbone.embed_dim=24", "backbone.depth=1", "data.workers=0"]
    tiny += ["log.tensorboard=false", "optim.warmup_epochs=0", "export=false"]
    assert cli.run_command(["pretrain", str(source), "optim.lrr=1"]) == 2 and not Path("my_photos.yaml").exists()
    assert cli.run_command(["pretrain", str(source), *tiny, "--dry-run"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my photos"]
    assert cli.run_command(["pretrain", str(source), *tiny]) == 0
    assert Path("my_photos.yaml").is_file() and Path("runs/my_photos/summary.json").is_file()
    written = Path("my_photos.yaml").read_text()
    assert cli.run_command(["pretrain", str(source), *tiny]) == 0 and Path("my_photos.yaml").read_text() == written
    assert cli.run_command(["pretrain", "runs/my_photos"]) == 2
    config = load("my_photos.yaml")
    assert 1 <= config.checkpoint.every_steps <= config.optim.epochs * 3 / 5 and not config.probes.options
    assert "k-NN" not in written


def test_few_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds 3 images"):
        init(str(save_images(tmp_path / "three", 3, (40, 40))))
    assert not list(tmp_path.glob("*.yaml"))


def test_test_images_without_labels_or_with_other_classes_are_not_measured_on(tmp_path):
    for part, labels in (("train", ("cat", "dog")), ("val", ("cat", "fox")), ("flat", (".",))):
        for label in labels:
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / part / label / "1.png")
    usable = lambda train, test: usable_test(str(tmp_path / train), str(tmp_path / test))  # noqa: E731
    assert usable("train", "train") == (str(tmp_path / "train"), "")
    assert "the test images have no labels" in usable("train", "flat")[1] and usable("train", "flat")[0] is None
    assert "dog/ is in one alone" in usable("train", "val")[1]


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path):
    Path("here.yaml").write_text("mine")
    source = str(save_images(tmp_path / "here", 8, (40, 40)))
    with pytest.raises(UserError, match="--out"):
        init(source)
    assert Path("here.yaml").read_text() == "mine"
    with pytest.raises(DataError):
        init(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        init(str(tmp_path / "empty"))
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["here.yaml"]


def test_a_folder_that_cannot_hold_the_yaml_is_named_before_the_images_are_looked_at(tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("nope/x.yaml", "file/x.yaml"):
        with pytest.raises(UserError, match=rf"{out} cannot be written: its folder is missing or read-only\. .*--out"):
            init(str(tmp_path / "absent"), str(tmp_path / out))


def test_choices_follow_the_images():
    assert choose_sizes([32], gpu=False).patch_size == 4 and choose_sizes([500], gpu=True).global_size == 224
    assert choose_sizes([500], gpu=False).global_size == 96
    assert [choose_prototypes(count) for count in (10, 10_000, 1_281_167)] == [64, 1024, 65536]


def test_links_to_nowhere_and_what_a_mac_leaves_stop_nothing(tmp_path):
    folder = save_images(tmp_path / "mac", 10, (40, 40))
    (folder / "._0.png").write_bytes(b"\0\5\26\7")
    for number in range(10):
        (folder / f"a{number}.png").symlink_to(folder / "nowhere.png")
    dataset = open_dataset(str(folder))
    assert len(dataset) == 20 and dataset.mean_bytes > 0
    assert sum(isinstance(sample, Damage) for sample in dataset.read(0, 20)) == 10


SEEN = DataStats(50_000, [300], [1.3], ["jpeg"], 0.0, 0.0, "", (0.48, 0.46, 0.41), (0.23, 0.22, 0.22), None, 60_000.0)


def written_for(monkeypatch, gpus: int, gigabytes: float = 80, count: int = 50_000, side: int = 300):
    """The config that init writes on such a machine."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=gigabytes * 1e9))
    text = compose(Path("images.yaml"), "images", None, SEEN._replace(count=count, short_sides=[side]), gpus)
    Path("images.yaml").write_text(text)
    return load("images.yaml"), text


@pytest.mark.parametrize(("gpus", "recipe"), [(0, "fast_cpu"), (1, "fast_one_gpu"), (8, "fast_8gpu")])
def test_the_fast_recipe_of_the_machine_is_taken_over(monkeypatch, gpus, recipe):
    config, text = written_for(monkeypatch, gpus)
    fast = load(recipe)
    assert f"as in {recipe}" in text and ("--on torchrun" in text) == (gpus == 8)
    assert config.objectives == fast.objectives and config.precision == fast.precision
    assert (config.optim.global_batch_size, config.optim.lr) == (fast.optim.global_batch_size, fast.optim.lr)
    mine, theirs = config.crops.resolved(), fast.crops.resolved()
    assert [stage.until for stage in mine] == [stage.until for stage in theirs]
    assert [stage.crops.keep_patches for stage in mine] == [stage.crops.keep_patches for stage in theirs]
    if gpus:  # photographs get the published sizes
        assert [stage.crops.global_size for stage in mine] == [stage.crops.global_size for stage in theirs] == [112, 224]


def test_stages_are_scaled_to_small_images_and_stay_multiples_of_the_patch(monkeypatch):
    config, _ = written_for(monkeypatch, 1, side=96)
    assert [(stage.crops.global_size, stage.crops.local_size) for stage in config.crops.resolved()] == [(48, 24), (96, 48)]


def test_few_images_in_a_batch_are_not_compared_with_each_other(monkeypatch):
    config, text = written_for(monkeypatch, 0, count=100)
    assert config.optim.global_batch_size == 16 and [objective.name for objective in config.objectives] == ["dino"]
    assert "ln(num_prototypes)" in text
    small, _ = written_for(monkeypatch, 1, gigabytes=8)
    assert small.optim.global_batch_size // small.optim.accumulate_steps < 64 and small.objectives[0].name == "dino"
