"""Runs whose student gets a share of the global crops' patches (`crops.keep_patches`): every objective, resumed, on two ranks, counted."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Command, run_command, run_ranks
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError, UserError
from ssl_locat.models.tokens import at_places
from ssl_locat.objectives import Progress
from ssl_locat.objectives.masking import Keep
from ssl_locat.pretraining import student_teacher
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.memory import memory_of, without_memory
from ssl_locat.pretraining.operations import operations_of_stages
from ssl_locat.pretraining.parts import build_model, check, mask_seeds, total_loss
from ssl_locat.pretraining.stages import in_words, keep_at, stages_of, told
from ssl_locat.runs.log import read_jsonl

HEAD = "num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16"
# all that reads patches: hidden ones before and after PRR, similarities, an anchor's own
DENSE = f"[{{name: dino, {HEAD}}}, {{name: ibot, {HEAD}}}, {{name: gram, anchor_every_steps: 2}}]"
# 12 steps of 16: the share rises over the first half, then all patches of finer crops
STAGES = "crops.stages=[{until: 0.5, keep_patches: [0.25, 0.75], keep_shape: block}, {until: 0.75, keep_patches: 0.5, global_size: 48}, {until: 1.0}]"


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    return folder / "set"


@pytest.fixture
def tiny(textures, tmp_path):
    path = write_config(textures, tmp_path)
    return lambda *overrides, run="run": load(str(path), ["backbone.patch_size=4", f"run_dir={tmp_path}/{run}", *overrides])


def test_the_share_goes_straight_over_a_stage(tiny):
    stages = stages_of(tiny(STAGES), 192)
    assert [keep_at(stages, samples) for samples in (0, 48, 95)] == [
        Keep(0.25, "block"), Keep(0.5, "block"), Keep(pytest.approx(0.75, abs=0.01), "block"),
    ]  # fmt: skip
    assert keep_at(stages, 96) == keep_at(stages, 143) == Keep(0.5) and keep_at(stages, 144) is None
    whole = stages_of(tiny("crops.keep_patches=[0.5, 1.0]"), 100)
    assert (keep_at(whole, 0), keep_at(whole, 50), keep_at(whole, 100)) == (Keep(0.5), Keep(0.75), None)


def test_a_resumed_run_keeps_the_same_patches(tiny):
    """In the middle of a rising share, and where it changes; with masks and a snapshot."""
    options = [STAGES, f"objective={DENSE}", "checkpoint.every_steps=1", "checkpoint.keep_last=20", "log.every_steps=1"]
    whole = tiny(*options, run="whole")
    pretrain(whole)
    records = read_jsonl(Path(whole.run_dir) / "metrics.jsonl")
    assert [round(record["student_patches"], 3) for record in records] == [
        *(0.25, 0.333, 0.417, 0.5, 0.583, 0.667), *[0.5] * 3, *[1.0] * 3,
    ]  # fmt: skip
    again = tiny(*options, run="from4")
    pretrain(again, resume=f"{whole.run_dir}/checkpoints/step_00000004")
    assert losses(again.run_dir) == {step: loss for step, loss in losses(whole.run_dir).items() if step > 4}


def one_loss(config, keep: Keep | None, change=lambda model: None):
    model, objectives = build_model(config, torch.device("cpu"))
    change(model)
    torch.manual_seed(0)
    large, small = torch.randn(16, 3, 32, 32), torch.randn(16, 3, 16, 16)
    model.student.backbone.eval()  # no stochastic depth
    masks = model.make_masks(objectives, mask_seeds(config, range(8)), large, keep)
    targets, tokens = model.targets(large, 2, masks)
    views = model.student(large, small, 2, masks)
    loss, parts = total_loss(objectives, config, views, targets, Progress(0, 0.0, 1.0))
    loss.backward()
    return loss, parts, tokens, masks, model


@pytest.mark.parametrize(("shape", "packed"), [("random", True), ("block", False)])
def test_every_patch_loss_trains_on_kept_patches(tiny, shape, packed):
    anchor = "timm:locatvit_tiny?img_size=32&patch_size=4&embed_dim=24&depth=2&num_heads=2"
    everything = (
        DENSE[:-1] + f", {{name: distill, hidden_dim: 32, anchor: '{anchor}'}}, {{name: patch_cosine, shared_head: false}}]"
    )
    config = tiny(f"objective={everything}", f"backbone.pack_crops={str(packed).lower()}")
    loss, _, tokens, masks, model = one_loss(config, Keep(0.5, shape))
    assert loss.isfinite() and tokens.patches.shape[1] == 64 and masks.kept.shape == (16, 32) and masks.hidden.shape == (16, 32)
    assert all(parameter.grad is not None for parameter in model.student.parameters() if parameter.requires_grad)


def test_losses_compare_the_same_places(tiny, monkeypatch):
    """Where no patch hears of another, the student's kept patches are the anchor's at those places, and Gram finds no difference."""

    def deaf(model) -> None:
        for network in (model.student.backbone, model.teacher.backbone, model.snapshots["gram"].backbone):
            for block in network.blocks:
                torch.nn.init.zeros_(block.attn.proj.weight)
                torch.nn.init.normal_(block.mlp.fc1.bias, generator=torch.Generator().manual_seed(1))

    config = tiny(f"objective=[{{name: dino, {HEAD}}}, {{name: gram}}]")
    same = one_loss(config, Keep(0.4), deaf)[1]["gram"]
    monkeypatch.setattr(student_teacher, "at_places", lambda patches, kept: at_places(patches, (kept + 1) % 64))
    other = one_loss(config, Keep(0.4), deaf)[1]["gram"]
    assert same < 1e-12 < 1e-3 * other


def test_all_patches_are_what_there_was_before(tiny):
    config = tiny(f"objective={DENSE}")
    assert torch.equal(one_loss(config, None)[0], one_loss(config, Keep(1.0))[0])
    # without masks there is nothing to tell
    model, objectives = build_model(tiny(), torch.device("cpu"))
    assert model.make_masks(objectives, [1, 2], torch.zeros(4, 3, 32, 32), Keep(1.0)) is None
    assert model.make_masks(objectives, [1, 2], torch.zeros(4, 3, 32, 32), Keep(0.5)).hidden is None


def test_operations_and_memory_fall_with_the_share(tiny):
    config, half, rising = tiny(), tiny("crops.keep_patches=0.5"), tiny("crops.keep_patches=[0.2, 0.8]")
    whole, least = operations_of_stages(config), operations_of_stages(half)
    assert whole.stages == [whole.whole] and least.whole == whole.whole > least.stages[0]
    # a mean over a rising share is that of its middle, and a little of attention's square
    assert least.stages[0] < operations_of_stages(rising).stages[0] < 1.02 * least.stages[0]
    networks = without_memory(config)
    assert (
        memory_of(half, 1, networks).activations
        < memory_of(rising, 1, networks).activations
        < memory_of(config, 1, networks).activations
    )
    stage, everything = in_words(told(rising, 192, *operations_of_stages(rising)))
    assert "of which the student gets 20 to 80 % of the large ones' patches" in stage
    assert "of what the last stage's whole crops would cost throughout" in everything


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["crops.keep_patches=0"], r"keep_patches: is 0; expected a share above 0 and up to 1, or \[first, last\] of such"),
        (["crops.keep_patches=[0.5, 1.5]"], r"is \[0\.5, 1\.5\]; expected a share"),
        (["crops.keep_patches=50"], r"is 50; expected a share"),
        (["crops.keep_patches=true"], r"keep_patches is True; expected|is True; expected a share"),
        (["crops.keep_patches=[0.5, 1.0]", "compile=true"], "goes from 0.5 to 1: each number of patches would be compiled anew"),
        (["crops.keep_shape=circle"], "keep_shape is 'circle'"),
        (["crops.keep_patches=0.5", "backbone.patch_drop_rate=0.5"], "patch_drop_rate both leave patches out"),
        (["crops.keep_patches=0.5", "backbone={name: swin_tiny_patch4_window7_224, window_size: 4, img_size: 32}"], "cannot leave patches out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(textures, tmp_path, overrides, words):
    path = write_config(textures, tmp_path)
    whole = path.read_text()
    if any("swin" in override for override in overrides):
        path.write_text("\n".join(line for line in whole.splitlines() if not line.startswith("backbone")))
    with pytest.raises((ConfigError, UserError), match=words):
        check(load(str(path), overrides))


def on_ranks(path: str, runs: list[list[str]]) -> None:
    for overrides in runs:
        pretrain(load(path, overrides))


@pytest.mark.slow
def test_two_ranks_keep_what_one_keeps(textures, tmp_path):
    path = str(write_config(textures, tmp_path))
    common = ["backbone.patch_size=4", STAGES, f"objective={DENSE}", "backbone.drop_path_rate=0", "log.every_steps=1"]
    pretrain(load(path, [*common, f"run_dir={tmp_path}/one"]))
    forms = ("ddp", "fsdp")
    run_ranks(on_ranks, 2, path, [[*common, f"parallel={form}", f"run_dir={tmp_path}/{form}"] for form in forms])
    one = losses(tmp_path / "one")
    for form in forms:
        two = losses(tmp_path / form)
        assert list(one) == list(two) and all(two[step] == pytest.approx(one[step], rel=1e-4) for step in one)


COMBINED = {
    "simdino": ["objective=[{name: coding_rate, min_images: 16, hidden_dim: 32, bottleneck_dim: 16}, {name: patch_cosine}]", "optim.name=muon"],
    "active": [
        f"objective=[{{name: dino, {HEAD}, active_prototypes: [[0, 16], [0.4, 32]]}}, {{name: koleo, weight: 0.1, min_images: 16}}]",
        *("optim.schedule=wsd", "precision=bf16"),
    ],
    "packed": [
        f"objective=[{{name: dino, {HEAD}}}, {{name: ibot, {HEAD}, shared_head: true}}]",
        *("optim.accumulate_steps=2", "activation_checkpointing=true", "backbone.pack_crops=true"),
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINED)
def test_combined_with_what_else_makes_runs_cheaper_a_resumed_run_is_exact(tiny, name):
    """Stages of another batch size and of kept patches with SimDINO and Muon, fewer prototypes at first, WSD, bf16, packed and recomputed passes."""
    stages = "{until: 0.5, global_size: 16, local_size: 8, batch_size: 32, keep_patches: [0.5, 1.0]}, {until: 0.75, keep_patches: 0.5}, {until: 1.0}"
    options = [
        f"crops.stages=[{stages}]",
        *COMBINED[name],
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=20",
        "log.every_steps=1",
    ]
    whole, again = tiny(*options, run="whole"), tiny(*options, run="again")
    pretrain(whole)
    pretrain(again, resume=f"{whole.run_dir}/checkpoints/step_00000004")
    assert len(losses(whole.run_dir)) == 9
    assert losses(again.run_dir) == {step: loss for step, loss in losses(whole.run_dir).items() if step > 4}


@pytest.mark.slow
def test_killed_while_the_share_rises_and_resumed_losses_are_bit_identical(textures, tmp_path):
    config = str(write_config(textures, tmp_path))
    common = ["backbone.patch_size=4", STAGES, f"objective={DENSE}", "optim.epochs=4", "data.workers=2"]
    assert run_command("pretrain", config, *common, f"run_dir={tmp_path}/whole").returncode == 0
    expected, run, rng = losses(tmp_path / "whole"), tmp_path / "broken", random.Random(0)
    common += ["checkpoint.every_steps=1", f"run_dir={run}"]
    for step in (5, 11, 17):  # stages change at 12 and 18
        process = Command("pretrain", config, *common)
        while process.poll() is None and len(losses(run)) < step:
            time.sleep(0.02)
        time.sleep(0.05 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run_command("pretrain", config, *common).returncode == 0
    assert losses(run) == expected and len(expected) == 24
