"""The guard: a run hands back the weights that it began with, unless a checkpoint is better by more than the noise."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError, DataError, UserError
from ssl_locat.evaluation.online import probe
from ssl_locat.evaluation.probe_options import own_data
from ssl_locat.evaluation.shared.samples import open_split
from ssl_locat.evaluation.shared.tallies import write_tallies
from ssl_locat.export.licences import DINOV3, UNKNOWN, licence_of
from ssl_locat.intervals.paired import Tally
from ssl_locat.models.backbone import create_backbone, load_backbone
from ssl_locat.models.tokens import features
from ssl_locat.pretraining.guard import UNVERIFIED, judge, source_of
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.parts import check
from ssl_locat.pretraining.probes import tallies_of
from ssl_locat.report.curves import curves
from ssl_locat.runs.history import explain, open_run
from ssl_locat.runs.log import read_jsonl

HELD_OUT = "probes={every_steps: 5, held_out: {workers: 0}}"
WIDTHS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder / "set", num_train=96, num_test=200, image_size=32, progress=False)
    return folder / "set"


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    """`plain`: a network as it is made. `blind`: the same, but hardly an image reaches it, so that nearly any training is better."""
    folder, found = tmp_path_factory.mktemp("starts"), {}
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny", **WIDTHS)
    for name in ("plain", "blind"):
        found[name] = folder / f"{name}.pth"
        torch.save(backbone.state_dict(), found[name])
        with torch.no_grad():
            backbone.patch_embed.proj.weight.mul_(0)
    return found


@pytest.fixture
def guarded(textures, starts, tmp_path):
    """`guarded(START, "key=value", ...)`: 10 steps from it, judged at 5 and 10 by the labels of 200 images."""

    def make(start: str, *overrides: str):
        given = ["backbone.name=vit_tiny", f"backbone.init={starts[start]}?num_heads=2", "guard={}", "export=true", HELD_OUT]
        given += [
            f"data.validation={textures}/textures-test-*.tar",
            "data.test=null",
            "optim={total_steps: 10, global_batch_size: 16}",
        ]
        return load(str(write_config(textures, tmp_path)), [*given, "teacher.momentum=[0.5, 0.9]", *overrides])

    return make


def outputs(model: str | Path) -> torch.Tensor:
    with torch.inference_mode():
        return features(load_backbone(model), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_destroyed_weights_come_back_as_the_start(guarded, starts):
    config = guarded("plain", "optim.lr=3.0")
    summary = pretrain(config)
    verdict, run = summary["guard"], Path(config.run_dir)
    assert verdict["verdict"] != "helped" and verdict["exported"] == "start"
    assert "The start is exported, unchanged." in verdict["sentence"]
    for folder in ("start", "export"):
        assert torch.equal(outputs(run / folder), outputs(f"{starts['plain']}?num_heads=2")), folder
    card = (run / "export/README.md").read_text()
    assert "unchanged" in card and "200 images" in card and f"**{UNKNOWN.name}**" in card and verdict["sentence"] in card
    # the start is step 0 of the curves, and what the last one says is told by the report
    records = read_jsonl(run / "probes/held_out.jsonl")
    assert [record["step"] for record in records] == [0, 5, 10]
    assert verdict["sentence"] in explain(open_run(run))[0]
    levels = [chart.level for _, charts in curves([open_run(run)]) for chart in charts if chart.title.startswith("held_out")]
    assert levels and all(level and level[1].startswith("the start: ") for level in levels)


def test_what_is_better_by_more_than_the_noise_is_exported(guarded, starts):
    config = guarded("blind", "optim.lr=2e-2")
    verdict = pretrain(config)["guard"]
    run, gained = Path(config.run_dir), verdict["difference"]
    assert verdict["verdict"] == "helped" and gained["low"] > 0, verdict
    assert gained["checkpoints"] == 2 and gained["level"] == 0.975 and gained["images"] == 200
    step = verdict["best"]["step"]
    assert verdict["exported"] == f"step {step}" and verdict["steps"] == step
    assert not torch.equal(outputs(run / "export"), outputs(run / "start"))
    card = (run / "export/README.md").read_text()
    assert f"{gained['low']:+.2f} to {gained['high']:+.2f}" in card and "adapted without labels from" in card
    # the same call again changes nothing, and a lost export comes back
    before = outputs(run / "export")
    shutil.rmtree(run / "export")
    assert pretrain(config)["guard"] == json.loads(json.dumps(verdict))
    assert torch.equal(outputs(run / "export"), before)


@pytest.mark.slow
def test_a_run_that_refuses_ends_with_an_error_each_time(guarded):
    config = guarded("plain", "optim.lr=3.0", "guard.otherwise=refuse")
    for _ in range(2):
        with pytest.raises(UserError, match=r"Nothing is exported, as guard\.otherwise=refuse asks"):
            pretrain(config)
    assert not Path(config.run_dir, "export").exists()
    assert json.loads(Path(config.run_dir, "summary.json").read_text())["guard"]["exported"] is None


@pytest.mark.slow
def test_without_labels_nothing_is_called_better(guarded):
    plain = ["data.validation=null", "checkpoint={keep_best: [dense]}"]
    plain += ["probes={every_steps: 5, unlabelled: {images: 16, views: 2, image_size: 32, workers: 0}}", "optim.lr=2e-2"]
    config = guarded("blind", *plain)
    verdict, run = pretrain(config)["guard"], Path(config.run_dir)
    assert verdict["verdict"] == UNVERIFIED and verdict["exported"] == "start" and verdict["verified_by"] is None
    assert torch.equal(outputs(run / "export"), outputs(run / "start"))
    # told otherwise, also afterwards, it exports what was trained, and calls it no better
    verdict = pretrain(guarded("blind", *plain, "guard.unverified=trained"))["guard"]
    assert verdict["verdict"] == UNVERIFIED and verdict["exported"].startswith("step")
    assert not torch.equal(outputs(run / "export"), outputs(run / "start"))
    card = (run / "export/README.md").read_text().lower()
    assert UNVERIFIED in card and "better than the start by" not in card


def test_held_out_images_are_not_trained_on(guarded, textures):
    config = guarded("plain", "data.validation=null", "data.held_out=40")
    (dataset,), _, length = check(config)
    assert len(dataset) == 56 and length.epoch_samples == 56
    (whole,), *_ = check(guarded("plain"))
    kept = {sample.key for sample in dataset.read(0, 56)}
    assert len(kept) == 56 and kept < {sample.key for sample in whole.read(0, 96)}
    backbone = create_backbone("vit_tiny", **WIDTHS)
    assert probe(backbone, "held_out", {"workers": 0}, own_data(config))["test_images"] == 40
    judged = open_split({"train": config.data.train, "train_images": 40}, "train")
    assert not kept & {sample.key for sample in judged.read(0, 40)}
    with pytest.raises(ConfigError, match="more than half"):
        check(guarded("plain", "data.validation=null", "data.held_out=60"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (["backbone.init=null"], ConfigError, "give backbone.init"),
        (["data.validation=null"], ConfigError, "data.validation=IMAGES, or data.held_out=N"),
        (
            ["checkpoint.keep_best={global: unlabelled.lidar}", "probes.unlabelled={}"],
            ConfigError,
            "the guard chooses by held_out.score",
        ),
    ],
)
def test_a_guard_that_cannot_judge_is_refused_at_once(guarded, change, error, message):
    with pytest.raises(error, match=message):
        check(guarded("plain", *change))


def test_images_without_labels_cannot_judge(guarded, tmp_path):
    from PIL import Image

    for number in range(24):
        Image.new("RGB", (32, 32), (number * 9, 0, 0)).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match="holds neither labels"):
        check(guarded("plain", f"data.validation={tmp_path}"))


def judged_of(config, before: dict[str, np.ndarray], after: list[dict[str, np.ndarray]]) -> dict:
    """The verdict on made-up hits of step 0 and of the steps after it."""
    records = []
    for step, hits in enumerate([before, *after]):
        write_tallies(tallies_of(config.run_dir, "held_out", step), {name: Tally.of_hits(found) for name, found in hits.items()})
        figures = {name: 100 * float(found.mean()) for name, found in hits.items()}
        records.append({"step": step, **figures, "score": sum(figures.values()) / len(figures), "test_images": 1000})
    return judge(config, {"held_out": records}, 96)


def test_more_checkpoints_must_show_more(guarded):
    """The best of many is the best by luck, too: what one checkpoint proves, one among forty does not."""
    config, before = guarded("plain"), np.arange(1000) < 500
    better = before.copy()
    better[500:530], better[:12] = True, False  # 30 won, 12 lost: 2.8 standard errors
    found = {count: judged_of(config, {"knn": before}, [{"knn": better}] * count) for count in (1, 40)}
    assert found[1]["verdict"] == "helped" and found[40]["verdict"] == "no difference that this data can show"
    assert found[40]["difference"]["low"] < found[1]["difference"]["low"]


@pytest.mark.parametrize(("images", "shows", "hides"), [(200, 6.0, 4.5), (1000, 2.8, 2.0), (5000, 1.3, 0.9)])
def test_how_many_labels_show_which_gain(guarded, images, shows, hides):
    """What the guide says: one image in ten changes sides, four checkpoints are looked at."""
    before = np.arange(images) < images // 2
    found = []
    for gain in (shows, hides):
        won = round(images * (10 + gain) / 200)
        after = before.copy()
        after[images // 2 : images // 2 + won], after[: images // 10 - won] = True, False
        found.append(judged_of(guarded("plain"), {"knn": before}, [{"knn": after}] * 4)["verdict"] == "helped")
    assert found == [True, False]


def test_a_figure_that_falls_outweighs_one_that_rises(guarded):
    config, before = guarded("plain"), np.arange(1000) < 500
    up, down = np.arange(1000) < 620, np.arange(1000) < 460
    verdict = judged_of(config, {"knn": before, "linear": before}, [{"knn": up, "linear": down}])
    assert verdict["difference"]["low"] > 0 and verdict["exported"] == "start" and "linear fell (-4.00" in verdict["sentence"]
    # a loss is believed sooner than a gain: 1.8 standard errors, which would prove no gain
    down = before.copy()
    down[:58], down[500:540] = False, True
    verdict = judged_of(config, {"knn": before, "linear": before}, [{"knn": up, "linear": down}])
    assert verdict["exported"] == "start" and "linear fell (-1.80" in verdict["sentence"] and "at 80 %" in verdict["sentence"]


def test_the_best_of_equals_is_called_better_no_more_often_than_its_level_says(guarded):
    """1000 images, 5 checkpoints that differ from the start by luck alone: 97.5 % of such runs must get their start back."""
    config, rng, wrong = guarded("plain"), np.random.default_rng(0), 0
    for _ in range(40):
        truth = rng.random(1000) < 0.7

        def noisy(truth=truth):
            return truth ^ (rng.random(1000) < 0.05)

        wrong += judged_of(config, {"knn": noisy()}, [{"knn": noisy()} for _ in range(5)])["verdict"] == "helped"
    assert wrong <= 4  # expected 1 at most; 5 or more of 40 at 2.5 % have a probability of 0.3 %


@pytest.mark.parametrize(
    ("model", "layout", "name"),
    [
        ("timm:vit_small_patch16_dinov3.lvd1689m", "", DINOV3.name),
        ("/models/x.pth", "facebookresearch/dinov3", DINOV3.name),
        ("hf-hub:facebook/dinov3-vits16-pretrain-lvd1689m", "", DINOV3.name),
        ("timm:vit_base_patch14_dinov2.lvd142m", "", "Apache-2.0"),
        ("timm:vit_base_patch16_224.mae", "", "cc-by-nc-4.0"),
        ("/dinov3/mine.pth", "timm", UNKNOWN.name),
    ],
)
def test_whose_licence(model, layout, name):
    assert licence_of(model, layout).name == name


def test_timm_names_mean_their_weights():
    assert source_of("timm:vit_tiny") == "timm:vit_tiny?pretrained"
    assert source_of("timm:vit_tiny?patch_size=8") == "timm:vit_tiny?patch_size=8&pretrained"
    assert source_of("runs/a") == "runs/a" and source_of("timm:a?pretrained") == "timm:a?pretrained"
