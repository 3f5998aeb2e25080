"""Runs in which a part of given weights moves: resumed exactly, in several processes, opened again as the plain model; pulls to the start."""

import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from processes import Command, run_ranks
from tiny_run import losses, write_config

from ssl_locat.config.schema import Objective, load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError, UserError
from ssl_locat.export.export import export
from ssl_locat.models.backbone import create_backbone, load_backbone, read_plain
from ssl_locat.models.tokens import features
from ssl_locat.objectives import Progress
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.memory import memory_of
from ssl_locat.pretraining.parts import build_model, total_loss
from ssl_locat.pretraining.setup import set_up

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
HEADS = "num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16"
LOSSES = [
    f"{{name: dino, {HEADS}}}",
    f"{{name: ibot, {HEADS}}}",
    "{name: koleo, weight: 0.1, min_images: 2}",
    "{name: gram, anchor: start, weight: [1.0, 0.5]}",
    "{name: distill, anchor: start, project: false, local_crops: false, weight: [1.0, 0.0], weight_until: 0.5}",
]
MOVES = {
    "lora": ["backbone.trainable=lora", "backbone.lora.rank=2", "backbone.lora.alpha=4"],
    "last": ["backbone.trainable=last", "backbone.last_blocks=1"],
}


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder, num_train=64, num_test=16, image_size=40)
    return folder


@pytest.fixture
def tiny(textures, tmp_path):
    """A vanilla ViT's weights, and a config that goes on from them with LocAt attached and five losses."""
    torch.manual_seed(5)
    start = tmp_path / "start.pth"
    torch.save({"model": create_backbone("vit_tiny_patch16_224", **SHAPE).state_dict()}, start)
    path = write_config(textures, tmp_path)
    own = [f"backbone.init={start}?num_heads=2&mean=[0.485, 0.456, 0.406]&std=[0.229, 0.224, 0.225]", "backbone.depth=3"]
    own += ["backbone.gaug={small_start: true}", f"objective=[{', '.join(LOSSES)}]", "optim.epochs=null", "optim.total_steps=6"]

    def make(*overrides: str):
        return load(str(path), [*own, "checkpoint.every_steps=3", "log.every_steps=1", *overrides])

    return make


def moving_names(backbone) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("moves", ["lora", pytest.param("last", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_unbroken_one_and_opens_as_the_plain_model(tiny, tmp_path, moves):
    if moves == "lora":
        pytest.importorskip("peft")
    config = tiny(*MOVES[moves])
    pretrain(config)
    expected, run = losses(config.run_dir), Path(config.run_dir)
    weights = {which: load_backbone(run, which=which) for which in ("teacher", "student")}
    shutil.rmtree(run / "checkpoints/step_00000006")
    (run / "summary.json").unlink()
    pretrain(config)
    assert losses(run) == expected and len(expected) == 6
    start = load_backbone(config.backbone.init)
    for which, before in weights.items():
        again = load_backbone(run, which=which).state_dict()
        assert again.keys() == create_backbone("locatvit_tiny", **SHAPE).state_dict().keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in before.state_dict().items())
        changed = {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, again[name])}
        assert "pos_embed" not in changed and "blocks.2.mlp.fc1.weight" in changed
        assert ("blocks.0.mlp.fc1.weight" in changed) == (moves == "lora")
        assert ("blocks.2.mlp.fc1.bias" in changed) == (moves == "last")

    ready = set_up(config)  # stands at the end; the networks as they train
    networks = ready.model.student.backbone, ready.model.teacher.backbone
    ready.claim.close()
    assert any(".gaug." in name for name in moving_names(networks[0]))  # new: it moves in all blocks
    for (name, own), copied in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert (own is copied) == (not own.requires_grad), name  # once in memory
    images = torch.randn(2, 3, 32, 32)
    for network, which in zip(networks, ("student", "teacher"), strict=True):
        torch.testing.assert_close(
            features(load_backbone(run, which=which), images), features(network.eval(), images), rtol=1e-5, atol=1e-5
        )

    if moves == "last":
        return
    export(str(run), str(tmp_path / "out"))
    exported = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(features(exported, images), features(weights["teacher"].eval(), images), rtol=1e-5, atol=1e-5)
    mean = load_backbone(run, average=2).state_dict()  # of merged weights, not of factors
    both = [read_plain(run / f"checkpoints/step_0000000{step}", "teacher.backbone.") for step in (3, 6)]
    torch.testing.assert_close(mean["blocks.2.mlp.fc1.weight"], sum(one["blocks.2.mlp.fc1.weight"] for one in both) / 2)


def test_what_moves_is_refused_where_it_cannot_be(tiny):
    with pytest.raises(ConfigError, match=r"trainable is last, but backbone.init is not given"):
        pretrain(tiny(*MOVES["last"], "backbone.init=null"))
    config = tiny(*MOVES["last"], "optim.total_steps=3", "objective={name: dino, " + HEADS + "}")
    pretrain(config)
    with pytest.raises(UserError, match=r"what moves cannot change within a run.*backbone.init="):
        pretrain(
            config.model_copy(update={"backbone": config.backbone.model_copy(update={"last_blocks": 2})}),
            allow=["backbone.last_blocks"],
        )
    with pytest.raises(ConfigError, match=r"its anchor is the start, but backbone.init is not given"):
        pretrain(tiny("backbone.init=null", f"run_dir={config.run_dir}_b"))


def test_heads_train_alone_for_so_many_steps(tiny):
    pretrain(tiny("backbone.frozen_steps=3"))
    run = Path(tiny().run_dir)
    start = load_backbone(tiny().backbone.init).state_dict()
    after = [load_backbone(run, which="student", step=step).state_dict() for step in (3, 6)]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in start.items())
    assert not torch.equal(start["blocks.0.mlp.fc1.weight"], after[1]["blocks.0.mlp.fc1.weight"])


def test_weights_go_straight_by_samples_seen():
    fading = Objective(name="gram", weight=[1.0, 0.0], weight_until=0.5)
    assert [fading.weight_at(share) for share in (0, 0.25, 0.5, 1.0)] == [1.0, 0.5, 0.0, 0.0]
    assert Objective(name="gram", weight=[0.5, 2.0]).weight_at(0.5) == 1.25
    assert Objective(name="gram", weight=3).weight_at(0.7) == 3
    for wrong in ([0, 0], True, 0):
        with pytest.raises(ValueError, match="weight"):
            Objective(name="gram", weight=wrong)


def test_the_pull_to_the_start_and_its_gradient_are_the_formulas(tiny):
    """At the start's weights the pull is 0; elsewhere mean over global crops and patches of 1 - cosine, times the weight at that point."""
    objectives = "objective=[" + ", ".join(LOSSES[3:]) + "]"
    config = tiny(
        objectives, "backbone.gaug=false", "backbone.prr=false", "backbone.name=vit_tiny_patch16_224", "backbone.drop_path_rate=0"
    )
    model, built = build_model(config, torch.device("cpu"))
    assert model.anchors["gram"] is model.anchors["distill"]  # one copy, one pass
    images, local = torch.randn(8, 3, 32, 32), torch.randn(8, 3, 16, 16)

    def loss_at(share: float) -> torch.Tensor:
        targets, _ = model.targets(images, 2)
        return total_loss(built, config, model.student(images, local, 2), targets, Progress(0, share, 1.0))[0]

    assert loss_at(0.0).detach() < 1e-6
    with torch.no_grad():
        for parameter in model.student.backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = list(model.student.backbone.parameters())
    ours = torch.autograd.grad(loss_at(0.25), weights, allow_unused=True)
    start, backbone = load_backbone(config.backbone.init), model.student.backbone
    with torch.no_grad():
        target = start.forward_features(images)
    own = backbone.forward_features(images)
    cosines = (F.normalize(own, dim=-1) * F.normalize(target, dim=-1)).sum(-1)  # [8, 1 + N]
    pull = (1 - cosines[:, 0]).mean() + (1 - cosines[:, 1:]).mean()
    similar = [(t := F.normalize(tokens[:, 1:], dim=-1)) @ t.mT for tokens in (own, target)]
    expected = torch.autograd.grad((1.0 - 0.5 * 0.25) * F.mse_loss(*similar) + 0.5 * pull, weights, allow_unused=True)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_memory_counts_what_moves(tiny):
    pytest.importorskip("peft")
    plain = ["backbone.gaug=false", "backbone.prr=false"]
    found = {name: memory_of(tiny(*plain, *options)) for name, options in {"full": [], **MOVES}.items()}
    assert found["last"].activations == pytest.approx(found["full"].activations / 3)  # of one block in three
    assert found["lora"].activations == found["full"].activations
    assert max(found["last"].optimizer, found["lora"].optimizer) < found["full"].optimizer
    assert found["lora"].weights < found["full"].weights  # student and teacher have the frozen ones in common
    with_gaug = memory_of(tiny(*MOVES["last"]))
    assert with_gaug.activations == found["full"].activations  # GAug is new, in the first block, too


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moves", MOVES)
def test_killed_and_resumed_losses_are_bit_identical(tiny, tmp_path, moves):
    """SIGKILL in the middle, at a moment that may fall into a save: every step is saved."""
    pytest.importorskip("peft")
    longer = ["optim.total_steps=12", "checkpoint.every_steps=1"]
    expected = _train(tiny(*MOVES[moves], *longer, f"run_dir={tmp_path}/unbroken"))
    (tmp_path / "broken.yaml").write_text(tiny(*MOVES[moves], *longer, f"run_dir={tmp_path}/broken").to_yaml())
    process = Command("pretrain", str(tmp_path / "broken.yaml"))
    until = time.monotonic() + 300
    while not (tmp_path / "broken/checkpoints/step_00000004").is_dir() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(losses(tmp_path / "broken")) < len(expected)
    resumed = _train(load(str(tmp_path / "broken.yaml")))
    assert resumed == expected and len(expected) == 12


def _train(config) -> dict[int, float]:
    pretrain(config)
    return losses(config.run_dir)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(tiny, tmp_path, moves, parallel):
    pytest.importorskip("peft")
    quiet = ["backbone.drop_path_rate=0", f"parallel={parallel}"]  # stochastic depth is drawn for each rank
    alone = _train(tiny(*MOVES[moves], *quiet, f"run_dir={tmp_path}/alone"))
    both = run_ranks(_train, 2, tiny(*MOVES[moves], *quiet, f"run_dir={tmp_path}/both"))[0]
    assert len(both) == 6
    for step, value in alone.items():
        assert both[step] == pytest.approx(value, rel=2e-3), (alone, both)  # KoLeo looks for neighbours within a rank
    names = load_backbone(tmp_path / "alone").state_dict()
    together = load_backbone(tmp_path / "both").state_dict()
    assert together.keys() == names.keys()
