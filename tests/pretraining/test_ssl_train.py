"""Every combination of objectives trains, for ViT and LocAtViT; runs with masks and snapshots resume exactly."""

from pathlib import Path

import pytest
import torch
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError, UserError
from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives import Progress, build
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.parts import build_model
from ssl_locat.pretraining.student_teacher import Anchor, StudentTeacher
from ssl_locat.runs.checkpoint import read_weights
from ssl_locat.runs.log import read_jsonl

HEAD = "num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16"
DINO = f"{{name: dino, {HEAD}}}"
IBOT = f"{{name: ibot, {HEAD}}}"
KOLEO = "{name: koleo, weight: 0.1, min_images: 16}"
COMBINATIONS = {
    "dino_ibot": f"[{DINO}, {IBOT}]",
    "dino_ibot_shared": f"[{DINO}, {{name: ibot, shared_head: true}}]",  # the head's options are DINO's
    "dino_ibot_shared_refined_random": f"[{DINO}, {{name: ibot, {HEAD}, shared_head: true, refined: true, mask_shape: random}}]",
    "dinov2": f"[{{name: dino, {HEAD}, targets: sinkhorn, min_images: 16}}, {{name: ibot, {HEAD}, targets: sinkhorn, min_images: 16}}, {KOLEO}]",
    "dino_koleo": f"[{DINO}, {KOLEO}]",
    "ibot": IBOT,
    "dinov3": f"[{DINO}, {IBOT}, {KOLEO}, {{name: gram, weight: 2, anchor_every_steps: 1, anchor_scale: 2}}]",
    "distill": "{name: distill, hidden_dim: 32, anchor: 'timm:vit_tiny_patch16_224?img_size=32&patch_size=4&embed_dim=12&depth=1&num_heads=2'}",
}


@pytest.fixture(scope="session")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder / "set", num_train=64, num_test=10, image_size=32, progress=False)
    return folder / "set"


@pytest.fixture
def tiny(textures, tmp_path):
    def make(objective: str, *overrides: str):
        return load(str(write_config(textures, tmp_path)), [f"objective={objective}", "log.every_steps=1", *overrides])

    return make


@pytest.mark.parametrize("backbone", ["vit_tiny", "locatvit_tiny"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_two_steps(tiny, name, backbone):
    finer = ["crops.anchor_size=64"] if "anchor_scale" in COMBINATIONS[name] else []
    config = tiny(COMBINATIONS[name], f"backbone.name={backbone}", "optim.epochs=null", "optim.total_steps=2", *finer)
    assert pretrain(config)["steps"] == 2
    records = read_jsonl(Path(config.run_dir) / "metrics.jsonl")
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records) and records[0]["grad_norm"] > 0


MODELS = {
    "vit_tiny": {},
    "locatvit_tiny": {},
    "locatvit_tiny without PRR": {"prr": False},
    "locatregvit_tiny": {},
    "locatvit_tiny_nopos": {},
    "locatvit_tiny_rope_mixed": {},
    "vit_tiny_patch16_224": {},
    "locatjumbo_tiny": {},
    "locatswin_tiny": {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "img_size": 56},
}


@pytest.mark.parametrize("loss", ["dino_koleo", "dino_ibot", "dinov3"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(tiny, name, loss):
    """What DDP relies on: it is told to look for unused parameters of other people's models and losses only."""
    if loss != "dino_koleo" and "swin" in name:
        pytest.skip("no losses on patches")
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    backbone = create_backbone(name.split()[0], **(MODELS[name] if "swin" in name else small | MODELS[name]))
    objectives = build(tiny(COMBINATIONS[loss]).objectives)
    model = StudentTeacher(backbone, objectives)
    side = 56 if "swin" in name else 32
    crops, local = torch.randn(32, 3, side, side), torch.randn(32, 3, 56 if "swin" in name else 16, side)
    masks = model.make_masks(objectives, list(range(16)), crops)
    targets, views = model.targets(crops, 2, masks)[0], model.student(crops, local, 2, masks)
    sum(objective(views[key], targets[key], Progress(0, 0.0, 1.0))[0] for key, objective in objectives.items()).backward()
    assert [key for key, value in model.student.named_parameters() if value.requires_grad and value.grad is None] == []


def test_distillation_has_projections_for_both_widths_of_jumbo(tiny):
    """Its class token is twice as wide as its patches here; as a teacher, too."""
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    jumbo, vit = (
        create_backbone("locatjumbo_tiny", num_class_tokens=2, **small),
        create_backbone("vit_tiny", **small | {"embed_dim": 12}),
    )
    objectives = build(tiny(COMBINATIONS["distill"]).objectives)
    for student, teacher, widths in ((jumbo, vit, (48, 24, 12, 12)), (vit, jumbo, (12, 12, 48, 24))):
        head = StudentTeacher(student, objectives, {"distill": teacher}).student.heads["distill"]
        found = (head.cls[0].in_features, head.patches[0].in_features, head.cls[2].out_features, head.patches[2].out_features)
        assert found == widths


def test_masked_losses_refuse_models_that_merge_patches(tiny):
    swin = create_backbone("locatswin_tiny", **MODELS["locatswin_tiny"])
    with pytest.raises(UserError, match="need a ViT"):
        StudentTeacher(swin, build(tiny(COMBINATIONS["dino_ibot"]).objectives))


def test_interrupted_run_with_masks_and_snapshots_is_exact(tiny, tmp_path):
    """Stopped at step 3 of 6 and gone on: drop path, masks, centres, the Gram snapshot (of step 2) are all as if nothing had been."""
    objective = f"[{DINO}, {IBOT}, {{name: gram, anchor_every_steps: 2}}]"
    length = ["optim.epochs=null", "optim.total_steps=6", "checkpoint.every_steps=3", "checkpoint.keep_last=9"]
    unbroken, broken = (tiny(objective, f"run_dir={tmp_path}/{name}", *length) for name in ("a", "b"))
    pretrain(unbroken)
    start = Path(unbroken.run_dir, "checkpoints", "step_00000003")
    pretrain(broken, resume=str(start))
    expected = {step: loss for step, loss in losses(unbroken.run_dir).items() if step > 3}
    assert losses(broken.run_dir) == expected and len(expected) == 3
    ends = [read_weights(Path(config.run_dir, "checkpoints", "step_00000006")) for config in (unbroken, broken)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(name.startswith("snapshot.gram.") for name in ends[0])


def test_accumulation_does_not_change_ibot_with_centring(tiny, tmp_path):
    objective, length = f"[{DINO}, {IBOT}]", ["optim.epochs=null", "optim.total_steps=3", "backbone.drop_path_rate=0"]
    whole, parts = (tiny(objective, f"run_dir={tmp_path}/{n}", f"optim.accumulate_steps={n}", *length) for n in (1, 2))
    pretrain(whole)
    pretrain(parts)
    assert list(losses(parts.run_dir).values()) == pytest.approx(list(losses(whole.run_dir).values()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(540)  # compiling takes two minutes of two idle cores
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_run_has_the_same_losses(tiny, tmp_path, device):
    """Student and teacher compiled, two resolutions, a number of hidden patches that changes from step to step, accumulation."""
    options = [
        "optim.epochs=null",
        "optim.total_steps=8",
        "optim.accumulate_steps=2",
        "backbone.drop_path_rate=0",
        f"device={device}",
    ]
    found = {}
    for mode in ("false", "true", "cuda-graphs"):
        torch._dynamo.reset()
        koleo = KOLEO.replace("16", "2")
        config = tiny(f"[{DINO}, {IBOT}, {koleo}]", f"run_dir={tmp_path}/{mode}", f"compile={mode}", "probes={}", *options)
        pretrain(config)
        found[mode] = list(losses(config.run_dir).values())
    assert found["true"] == pytest.approx(found["false"], rel=1e-4)
    assert found["cuda-graphs"] == pytest.approx(found["false"], rel=1e-4)


def test_gram_anchors_at_an_earlier_run(tiny, tmp_path):
    first = tiny(DINO, f"run_dir={tmp_path}/first", "optim.epochs=null", "optim.total_steps=1")
    pretrain(first)
    more = ["optim.epochs=null", "optim.total_steps=1", f"backbone.init={first.run_dir}", "crops.global_size=48"]
    second = tiny(f"[{DINO}, {{name: gram, anchor: {first.run_dir}}}]", f"run_dir={tmp_path}/second", *more)
    pretrain(second)
    assert not any(name.startswith("snapshot") for name in read_weights(Path(second.run_dir, "checkpoints", "step_00000001")))


@pytest.mark.parametrize(
    ("objective", "overrides", "words"),
    [
        (f"[{DINO}, {{name: koleo}}]", [], "expected at least 64"),
        (f"[{DINO}, {KOLEO}]", ["optim.accumulate_steps=2"], "of which there are 8"),
        (f"{{name: ibot, {HEAD}, shared_head: true}}", [], "shares the head of 'dino'"),
        (
            f"[{DINO}, {{name: ibot, num_prototypes: 48, shared_head: true}}]",
            [],
            "num_prototypes is 48.*head of 'dino', where it is 32. Leave",
        ),
        (
            f"[{DINO}, {{name: ibot, shared_head: true}}]",
            ["backbone={name: locatjumbo_tiny, img_size: 32, patch_size: 8}"],
            "class tokens of 1152 numbers, but patches of this LocAtJumbo have 192; leave shared_head out",
        ),
    ],
)
def test_what_cannot_work_is_refused(tiny, objective, overrides, words):
    with pytest.raises((ConfigError, UserError), match=words):
        build_model(tiny(objective, *overrides), torch.device("cpu"))


def test_an_anchor_is_shown_crops_that_were_cut_for_it(tiny, monkeypatch):
    seen, forward = [], Anchor.forward

    def note(self, images, num_global, grid, larger=None):
        seen.append((tuple(images.shape), tuple(larger.shape)))
        return forward(self, images, num_global, grid, larger)

    monkeypatch.setattr(Anchor, "forward", note)
    config = tiny(COMBINATIONS["dinov3"], "crops.anchor_size=64", "optim.epochs=null", "optim.total_steps=1")
    pretrain(config)
    assert seen == [((32, 3, 32, 32), (32, 3, 64, 64))]


def test_an_anchor_that_sees_finer_wants_crops_of_its_own(tiny):
    with pytest.raises(
        ConfigError, match=r"sees crops of 64 pixels, but the largest that are cut have 32. Set crops.anchor_size=64"
    ):
        build_model(tiny(COMBINATIONS["dinov3"]), torch.device("cpu"))
    with pytest.raises(ConfigError, match="anchor_size is 32, global_size 32: an anchor that sees no finer"):
        tiny(COMBINATIONS["dinov3"], "crops.anchor_size=32")


@pytest.mark.slow
def test_prototypes_in_stages_resume_exactly(tiny):
    """Killed before the stage that begins in the middle, and after it: the same losses, to the last bit."""
    objective = f"[{{name: dino, {HEAD}, prototype_block: 12, active_prototypes: [[0, 20], [0.5, 32]]}}, {{name: ibot, {HEAD}, prototype_block: 12}}]"
    length = ["optim.epochs=null", "optim.total_steps=6", "checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    config = tiny(objective, *length)
    pretrain(config)
    whole = losses(config.run_dir)
    records = read_jsonl(Path(config.run_dir) / "metrics.jsonl")
    assert [record["dino_active_prototypes"] for record in records] == [20, 20, 20, 32, 32, 32]
    for step in (2, 3, 4):
        resumed = config.model_copy(update={"run_dir": f"{config.run_dir}-{step}"})
        pretrain(resumed, resume=f"{config.run_dir}/checkpoints/step_{step:08d}")
        assert losses(resumed.run_dir) == {at: loss for at, loss in whole.items() if at > step}
