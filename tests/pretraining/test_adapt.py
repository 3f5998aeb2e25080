"""`ssl-locat adapt MODEL IMAGES`: what is chosen and why, the run, and what is refused before any time is spent."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import Command, run_command
from tiny_run import losses

from ssl_locat.cli.process import run_command as here
from ssl_locat.config.schema import load
from ssl_locat.config.yaml_files import load_yaml
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError
from ssl_locat.models.backbone import create_backbone, load_backbone
from ssl_locat.models.tokens import features
from ssl_locat.objectives.heads import DINOHead
from ssl_locat.pretraining.adapt_choices import Machine, choose
from ssl_locat.pretraining.adapt_look import Images, look_at_images, look_at_model
from ssl_locat.pretraining.parts import build_model
from ssl_locat.pretraining.start_heads import heads_in
from ssl_locat.runs.log import read_jsonl

SHARED = Path(__file__).parents[4] / "shared"
REAL = SHARED / "weights/dinov2_vits14_saliency_fp16.safetensors"
QUICK = ["optim.total_steps=8", "data.workers=0", "log.tensorboard=false", "probes.held_out.workers=0", "crops.mode=cpu"]


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder / "set", num_train=96, num_test=60, image_size=32, progress=False)
    return folder / "set"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A file in DINOv2's layout: patches of 8, width 64, made for images of 48 px."""
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny", img_size=48, patch_size=8, embed_dim=64, depth=2, num_heads=1, init_values=1.0)
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save({**backbone.state_dict(), "mask_token": torch.zeros(1, 64)}, path)
    return str(path)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(run: str) -> dict:
    return load_yaml(f"{run}/adapt.yaml", "configs/pretrain").data


def test_the_command_end_to_end(weights, textures, capsys):
    assert here(["adapt", weights, str(textures), *QUICK, "run_dir=run"]) == 0
    said = capsys.readouterr().err
    assert "The start is exported, unchanged." in said or "It is exported." in said
    assert "Licence of the start's weights: Apache-2.0" in said and "ssl-locat compare run/start run/export" in said
    text, recipe = Path("run/adapt.yaml").read_text(), written("run")
    # from MODEL: patches, its own size, normalisation; from the images: where labels are; what moves has its reason
    assert (
        recipe["backbone"] | {"init": weights, "patch_size": 8, "img_size": [48, 48], "trainable": "last"} == recipe["backbone"]
    )
    assert recipe["data"]["validation"] == f"{textures}/*test*.tar" and "the guard judges by them" in text
    unexplained = [
        line for line in text.splitlines()[6:] if ": " in line and "#" not in line and not line.lstrip().startswith("- {")
    ]
    assert not unexplained, unexplained
    verdict = json.loads(Path("run/summary.json").read_text())["guard"]
    assert verdict["difference"]["images"] == 60 and Path("run/export/README.md").read_text().count(verdict["sentence"]) == 1
    # the same command again is a resume; the file is a config of `pretrain`; another MODEL is no resume
    assert here(["adapt", weights, str(textures), *QUICK, "run_dir=run"]) == 0
    assert load("run/adapt.yaml").optim.total_steps == 8
    assert here(["adapt", "timm:vit_tiny_patch16_224", str(textures), "run_dir=run"]) == 2
    assert "Give another run_dir" in capsys.readouterr().err


def test_a_dry_run_shows_the_recipe_and_leaves_nothing(weights, textures, capsys):
    assert here(["adapt", weights, str(textures), *QUICK, "--locat", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "gaug: {small_start: true}   # --locat" in shown and "total_steps: 8   # as given on the command line" in shown
    assert not list(Path().iterdir())
    # where it will run is another machine: a GPU is taken for granted, and the job is shown
    assert here(["adapt", weights, str(textures), *QUICK, "--on", "slurm", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "precision: bf16" in shown and "#SBATCH" in shown and not list(Path().glob("runs/*/checkpoints"))


@pytest.mark.parametrize(
    ("model", "images", "more", "message"),
    [
        ("nowhere.pth", None, [], "nowhere.pth"),
        ("timm:resnet18", None, [], "choose a ViT"),
        ("timm:swin_tiny_patch4_window7_224", None, [], "is a LocAtSwin|is a SwinTransformer"),
        (None, "nowhere", [], "nowhere does not exist"),
        (None, None, ["optim.lrr=1"], "unknown key"),
        (None, None, ["data.validation=nowhere"], "nowhere does not exist"),
        (None, "tiny", [], "12 px on the shorter side"),
        (None, "few", [], "too few|Pretraining compares"),
        (None, None, ["data.validation=few", "optim.total_steps=2"], "neither labels|too few"),
    ],
)
def test_what_cannot_work_is_refused_with_one_message(weights, textures, capsys, model, images, more, message):
    from PIL import Image

    for name, side, count in (("tiny", 12, 20), ("few", 40, 10)):
        Path(name).mkdir()
        for number in range(count):
            Image.new("RGB", (side, side), (number * 9, 0, 0)).save(f"{name}/{number}.png")
    assert here(["adapt", model or weights, images or str(textures), *more]) == 2
    said = capsys.readouterr().err
    assert any(part in said for part in message.split("|")), said
    assert not Path("runs").exists() or not list(Path("runs").rglob("checkpoints"))


def test_more_images_and_larger_machines_move_more(weights):
    _, start = look_at_model(weights)
    cpu, gpu = Machine(0, 2, "here"), Machine(80, 16, "there")
    images = Images("images", "val", 1000, 128, False, False)
    made = {
        (count, machine): choose(weights, images._replace(count=count), start, machine, {}, False, "run").made
        for count in (1000, 50_000, 2_000_000)
        for machine in (cpu, gpu)
    }
    assert made[1000, cpu]["backbone.trainable"][0] == made[1000, gpu]["backbone.trainable"][0] == "last"
    assert made[50_000, gpu]["backbone.trainable"][0] == "full"
    large = start._replace(parameters=300_000_000)
    assert (
        choose(weights, images._replace(count=50_000), large, Machine(24, 8, ""), {}, False, "run").made["backbone.trainable"][0]
        == "lora"
    )
    assert made[1000, gpu]["precision"][0] == "bf16" and made[1000, cpu]["precision"][0] == "fp32"
    assert choose(weights, images, start, cpu._replace(bf16=True), {}, False, "run").made["precision"][0] == "bf16"
    small = choose(weights, images._replace(count=50_000), large._replace(depth=24), Machine(16, 8, ""), {}, False, "run").made
    assert small["optim.global_batch_size"][0] // small["optim.accumulate_steps"][0] >= 64
    rates = [made[count, gpu]["optim.lr"][0] for count in (1000, 50_000, 2_000_000)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 3
    # crops are whole patches, within the images; what the command line gives is followed by what depends on it
    assert made[1000, cpu]["crops.global_size"][0] == 112 and made[1000, gpu]["crops.local_size"][0] % 8 == 0
    given = choose(weights, images, start, cpu, {"optim": {"total_steps": 1000}}, False, "run").made
    assert given["probes.every_steps"][0] == 250 and given["teacher.momentum"][0] == [0.99, 0.995]


def test_labelled_training_images_are_held_out(weights, textures):
    backbone, start = look_at_model(weights)
    seen = look_at_images(f"{textures}/textures-train-*.tar", backbone)
    assert seen.labelled and seen.validation is None and seen.side == 32
    many = seen._replace(count=3000)
    made = choose(weights, many, start, Machine(0, 2, ""), {}, False, "run").made
    assert made["data.held_out"][0] == 1000 and "probes.held_out" in made
    few = choose(weights, many._replace(count=600), start, Machine(0, 2, ""), {}, False, "run").made
    assert few["data.held_out"][0] == 200
    unlabelled = choose(weights, many._replace(labelled=False), start, Machine(0, 2, ""), {}, False, "run").made
    assert "probes.held_out" not in unlabelled and "probes.unlabelled" in unlabelled


def test_heads_and_prototypes_come_along(textures, capsys):
    """Of a training checkpoint as facebookresearch/dino saves it, and of a run of ours."""
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    head = DINOHead(64, 40, hidden_dim=48, bottleneck_dim=24)
    state = {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"module.head.{name}": value for name, value in head.state_dict().items()}
    torch.save({"student": {}, "teacher": state, "epoch": 3}, "dino.pth")
    dry = [
        "optim.total_steps=2",
        "data.workers=0",
        "log.tensorboard=false",
        "probes.held_out.workers=0",
        "crops.mode=cpu",
        "export=false",
    ]
    assert here(["adapt", "dino.pth", str(textures), *dry, "run_dir=run"]) == 0, capsys.readouterr().err
    (dino, *_), asked = (written("run")[name] for name in ("objective", "backbone"))
    assert asked["init_heads"] and (dino["num_prototypes"], dino["hidden_dim"], dino["bottleneck_dim"]) == (40, 48, 24)
    model, _ = build_model(load("run/adapt.yaml"), torch.device("cpu"))
    for network in (model.student, model.teacher):
        assert all(torch.equal(value, head.state_dict()[name]) for name, value in network.heads["dino"].state_dict().items())
    assert heads_in("run")["dino"].keys() == head.state_dict().keys()
    with pytest.raises(ConfigError, match="num_prototypes: 40"):
        build_model(load("run/adapt.yaml", ["objective.0.num_prototypes=41"]), torch.device("cpu"))


def test_the_recipe_is_found_by_name_and_belongs_to_pretrain(capsys):
    config = load("adapt/default", ["data.validation=labelled"])
    assert config.guard and config.backbone.init == "timm:vit_small_patch14_dinov2.lvd142m" and config.export
    assert here(["pretrain", "adapt/default", "data.train=nowhere"]) == 2 and "nowhere does not exist" in capsys.readouterr().err
    assert here(["pretrain", "adapt/defalt"]) == 2 and "Did you mean 'adapt/default'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_adaptation_resumes_to_the_same_verdict(weights, textures):
    words = [
        "adapt",
        weights,
        str(textures),
        *QUICK,
        "optim.total_steps=24",
        "checkpoint.every_steps=2",
        "backbone.trainable=full",
    ]
    assert run_command(*words, "run_dir=whole").returncode == 0
    command = Command(*words, "run_dir=cut")
    while command.poll() is None and len(read_jsonl(Path("cut/probes/held_out.jsonl"))) < 3:
        time.sleep(0.02)
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert run_command(*words, "run_dir=cut").returncode == 0
    whole, cut = (json.loads(Path(run, "summary.json").read_text())["guard"] for run in ("whole", "cut"))
    assert whole == cut and losses("whole") == losses("cut")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(*(features(load_backbone(f"{run}/export"), images) for run in ("whole", "cut")))


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the shared weights are not here")
def test_real_weights_adapt_with_locat_and_without(capsys):
    images = f"{SHARED}/data/imagenette128/imagenette128-train-00000[0-1].tar"
    more = [
        "optim.total_steps=2",
        "optim.global_batch_size=32",
        "crops.global_size=56",
        "crops.local_size=28",
        "data.workers=1",
        "data.held_out=60",
    ]
    for locat in ([], ["--locat"]):
        run = f"run{len(locat)}"
        assert here(["adapt", str(REAL), images, *more, *locat, f"run_dir={run}"]) == 0, capsys.readouterr().err
        verdict = json.loads(Path(run, "summary.json").read_text())["guard"]
        assert verdict["licence"]["name"] == "Apache-2.0" and verdict["difference"]["images"] == 60
        start = load_backbone(REAL)
        if verdict["exported"] == "start":
            sample = torch.randn(1, 3, 56, 56)
            with torch.inference_mode():
                assert torch.equal(features(load_backbone(f"{run}/export"), sample), features(start, sample))
    assert yaml.safe_load(Path("run1/adapt.yaml").read_text())["backbone"]["gaug"] == {"small_start": True}
    assert os.path.isdir("run1/start")
