"""Backbones from names, files, exports and runs; foreign weights into LocAt twins."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from ssl_locat.errors import CheckpointError, UserError
from ssl_locat.models import features, forward_tokens
from ssl_locat.models.attach import locat_args
from ssl_locat.models.backbone import create_backbone, init_weights, load_backbone
from ssl_locat.runs.checkpoint import Checkpointer

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'locatvit_small'"):
        create_backbone("locatvit_smal")


def test_unknown_option_is_named():
    with pytest.raises(UserError, match="patchsize"):
        create_backbone("locatvit_tiny", patchsize=8)


def test_timm_names_take_locat_options_and_any_size():
    model = create_backbone("vit_tiny_patch16_224", depth=2, gaug=True)
    assert model.has_gaug and model.prr is None
    assert features(model, torch.randn(1, 3, 48, 96)).shape == (1, 192)


def test_image_size_is_in_the_config():
    assert create_backbone("locatvit_tiny", **TINY).pretrained_cfg["input_size"] == (3, 32, 32)


def export(model, folder):
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gaug": {"isotropic": True}, "pos_resize": "dino"},
        {"gaug": {"kernel": "laplace"}, "prr": False},
        {"gaug": False},
        {"prr": {"kind": "class_attention"}},
    ],
)
def test_export_and_reload_keep_outputs(tmp_path, options):
    model = create_backbone("locatvit_tiny", **TINY, **options).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    export(model, tmp_path)
    images = torch.randn(2, 3, 48, 32)
    for again in (load_backbone(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()):
        assert torch.equal(features(again, images), features(model, images))
        assert tuple(again.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_tiny_patch16_224", {"gaug": True, "prr": True}),
        ("deit_tiny_distilled_patch16_224", {"gaug": {"alpha": "auto"}}),
        ("vit_small_patch16_dinov3", {"prr": True, "gaug": True, "embed_dim": 64, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", {"gaug": True, "depths": (1, 1), "num_heads": (3, 6)}),
        ("locatjumbo_tiny", {"embed_dim": 24}),
        ("locatvit_tiny_rope_mixed", {}),
    ],
)
def test_export_of_any_attached_timm_model(tmp_path, name, options):
    model = create_backbone(name, **({} if "swin" in name else {"depth": 1}), img_size=64, **options).eval()
    export(model, tmp_path)
    images = torch.randn(2, 3, 64, 64)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(features(again, images), features(model, images))
    assert locat_args(again) == locat_args(model)


def test_opening_at_another_size_keeps_gaug_constants(tmp_path):
    model = create_backbone("locatvit_tiny", **TINY)
    export(model, tmp_path)
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64)
    assert larger.patch_embed.grid_size == (8, 8)
    for block in larger.blocks:
        assert block.attn.gaug.initial_grid == (4, 4)
        assert block.attn.gaug.constants == model.blocks[0].attn.gaug.constants
    export(larger, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_args"]["gaug"]["initial_grid"] == [4, 4]


OFFICIAL = [
    "locatvit_full",
    "locatregvit",
    "locatropevit",
    "locatvit_nopos",
    "dino_locatvit",
    "locatswin_static",
    "locatjumbo",
    "vit_plain",
]


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_official_state_dict_opens_without_a_config(golden, tmp_path, name, suffix):
    file, path = golden(name), tmp_path / f"weights{suffix}"
    state = file.state()
    if name == "vit_plain":  # heads of 12 cannot be seen in the shapes of a vanilla ViT; every published one has heads of 64
        state = create_backbone("vit_tiny", depth=2, img_size=32, num_classes=10).state_dict()
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    else:
        save_file(state, path)
    # what was trained without positions does not show its image size
    size = {"locatropevit": "?img_size=32", "locatvit_nopos": "?img_size=32", "locatswin_static": "?img_size=56"}.get(name, "")
    model = load_backbone(f"{path}{size}")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if "out.0.logits" in file and name != "vit_plain":
        torch.testing.assert_close(model(file["in.0.x"]), file["out.0.logits"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["locatvit_full", "locatjumbo"])
def test_official_state_dict_opens_with_timm(golden, tmp_path, name):
    file, path = golden(name), tmp_path / "weights.safetensors"
    save_file(file.state(), path)
    options = {**file.config["kw"], "checkpoint_path": str(path)}
    for key in ("locat", "no_embed_class"):
        options.pop(key, None)
    if "J" in options:
        options["num_class_tokens"] = options.pop("J")
    model = timm.create_model("locatjumbo_tiny" if "jumbo" in name else "locatvit_tiny", **options).eval()
    torch.testing.assert_close(model(file["in.0.x"]), file["out.0.logits"], rtol=1e-5, atol=2e-5)


def test_pickled_checkpoint_is_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": timm.create_model("test_vit")}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_backbone(path)


def test_damaged_file_is_refused(tmp_path):
    path = tmp_path / "half.safetensors"
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_backbone(path)


def dino_checkpoint(model, path):
    """As facebookresearch/dino saves: teacher's backbone and head under DDP's and the wrapper's names."""
    teacher = {f"module.backbone.{name}": value for name, value in model.state_dict().items()}
    teacher["module.head.mlp.0.weight"] = torch.zeros(3, 3)
    torch.save({"student": {"module.backbone.pos_embed": torch.zeros(1)}, "teacher": teacher, "epoch": 1, "args": None}, path)


def dinov2_state(model):
    """As the DINOv2 hub: mask_token, register_tokens, a position for the class token."""
    state = dict(model.state_dict())
    patches = state.pop("pos_embed")
    cls = state.pop("cls_token")
    position = torch.randn_like(cls)
    return {
        **state,
        "cls_token": cls - position,
        "pos_embed": torch.cat([position, patches], 1),
        "register_tokens": state.pop("reg_token"),
        "mask_token": torch.zeros(1, 32),
    }


@pytest.mark.parametrize("layout", ["timm", "dino", "dinov2"])
def test_vanilla_weights_start_a_twin_that_equals_vanilla(tmp_path, layout):
    extra = {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1} if layout == "dinov2" else {}
    vanilla = VisionTransformer(**TINY, **extra, num_classes=0, dynamic_img_size=True).eval()
    for parameter in vanilla.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "weights.pth"
    if layout == "dino":
        dino_checkpoint(vanilla, path)
    else:
        torch.save(dinov2_state(vanilla) if layout == "dinov2" else vanilla.state_dict(), path)
    twin = create_backbone("locatvit_tiny", **TINY, **extra, gaug={"small_start": True}, prr=False).eval()
    missing = init_weights(twin, str(path))
    assert missing and all(".gaug." in name for name in missing)
    for size in ((32, 32), (48, 24)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(twin(images), vanilla(images), atol=1e-4, rtol=0)


def test_positions_and_patches_are_resized(tmp_path):
    vanilla = create_backbone("vit_tiny", **TINY)
    save_file(vanilla.state_dict(), tmp_path / "w.safetensors")
    twin = create_backbone("locatvit_tiny", **{**TINY, "img_size": 64, "patch_size": 16})
    init_weights(twin, str(tmp_path / "w.safetensors"))
    assert twin.pos_embed.shape == (1, 17, 32)
    assert twin.blocks[0].attn.gaug.initial_grid == (4, 4)


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_file(create_backbone("vit_tiny", **TINY, init_values=0.1).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"have besides blocks.0.ls1.gamma.*init_values"):
        init_weights(create_backbone("locatvit_tiny", **TINY), str(tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError, match="differ in shape"):
        init_weights(
            create_backbone("locatvit_tiny", **{**TINY, "embed_dim": 64}, init_values=0.1), str(tmp_path / "w.safetensors")
        )


def write_run(folder, model):
    module = torch.nn.ModuleDict({"backbone": model, "heads": torch.nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    saver = Checkpointer(folder, asynchronous=False)
    for step in (1, 2):
        torch.nn.init.constant_(model.pos_embed, step)
        saver.save(step, {"teacher": module, "student": module}, optimizer, {})
    text = """
backbone: {name: locatvit_tiny, drop_path_rate: 0.1, init: null, frozen_epochs: 0, embed_dim: 32, depth: 2, num_heads: 2, patch_size: 8}
crops: {global_size: 32, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
"""
    (folder / "config.yaml").write_text(text)


def test_run_folder_and_checkpoint(tmp_path):
    model = create_backbone("locatvit_tiny", **TINY)
    write_run(tmp_path, model)
    newest = load_backbone(tmp_path)
    images = torch.randn(1, 3, 40, 32)
    assert torch.equal(forward_tokens(newest, images).patches, forward_tokens(model.eval(), images).patches)
    assert newest.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert load_backbone(tmp_path, which="student", step=1).pos_embed.unique() == 1
    assert load_backbone(tmp_path / "checkpoints" / "step_00000002").pos_embed.unique() == 2
    with pytest.raises(CheckpointError, match="step 7; steps found: 1, 2"):
        load_backbone(tmp_path, step=7)


def test_random_timm_models_by_query():
    model = load_backbone("timm:locatvit_tiny?depth=2&gaug=false")
    assert len(model.blocks) == 2 and not model.has_gaug
    model = load_backbone("timm:locatvit_tiny?depth=1&gaug={kernel: laplace, alpha: one}")
    assert (model.blocks[0].attn.gaug.kernel, model.blocks[0].attn.gaug.alpha) == ("laplace", "one")
    with pytest.raises(UserError, match="expected YAML"):
        load_backbone("timm:locatvit_tiny?gaug={kernel")
    with pytest.raises(UserError, match="'resnet18' has no patch_embed"):
        load_backbone("timm:resnet18")


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run folder"):
        load_backbone(tmp_path)
