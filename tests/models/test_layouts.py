"""Checkpoints in released layouts: recognised by their keys, outputs equal to the source implementation's (golden2) or to transformers'."""

import json
import logging
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from ssl_locat.errors import CheckpointError, UserError
from ssl_locat.models import attach_locat, features, forward_tokens, last_blocks
from ssl_locat.models.backbone import create_backbone, init_weights, load_backbone
from ssl_locat.models.foreign import read_foreign
from ssl_locat.models.tokens import normalise

# golden file -> what the log says
LAYOUTS = {
    "fb_dinov2": "facebookresearch/dinov2,",
    "fb_dinov2_reg4_chunked": "facebookresearch/dinov2 with registers,",
    "fb_dinov3": "facebookresearch/dinov3,",
    "hf_dinov2": "transformers Dinov2Model,",
    "hf_dinov2_reg": "transformers Dinov2WithRegistersModel,",
    "hf_dinov3": "transformers DINOv3ViTModel,",
}
HEADS = "?num_heads=2"  # the golden networks have heads of 32, which a bare state dict cannot show


def check_outputs(model, file, tolerance=1e-4):
    """Class token, registers and patches after the last norm, and every block, at each size of the golden file."""
    for i in range(len(file.config["res"])):
        images = file[f"in.{i}.x"].float()
        with torch.no_grad():
            for index, block in enumerate(last_blocks(model, images, file.config["kw"].get("depth", 2))):
                given = torch.cat([block.prefix, block.patches], 1)
                torch.testing.assert_close(given, file[f"out.{i}.block{index}"], atol=tolerance, rtol=0)
            after = normalise(model, forward_tokens(model, images))
            torch.testing.assert_close(features(model, images), file[f"out.{i}.class"], atol=tolerance, rtol=0)
        torch.testing.assert_close(after.patches, file[f"out.{i}.patches"], atol=tolerance, rtol=0)
        if f"out.{i}.registers" in file:
            torch.testing.assert_close(after.prefix[:, 1:], file[f"out.{i}.registers"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("wrapped", ["bare", "training checkpoint"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_equal_the_source_at_every_size(golden, tmp_path, caplog, name, wrapped):
    file, path = golden(name), tmp_path / "weights.pth"
    state = file.state()
    if wrapped == "bare":
        torch.save(state, path)
    else:  # as DINOv2's and DINOv3's eval/*/teacher_checkpoint.pth; of transformers' layouts, a DDP-wrapped copy
        front = "backbone." if name.startswith("fb") else "module."
        inside = {f"{front}{key}": value for key, value in state.items()}
        torch.save({"teacher": {**inside, **({"dino_head.mlp.0.weight": torch.zeros(2, 2)} if "fb" in name else {})}}, path)
    caplog.set_level(logging.INFO)
    check_outputs(load_backbone(f"{path}{HEADS}"), file)
    (line,) = [record.message for record in caplog.records if "opened as" in record.message]
    assert f"{path}: {LAYOUTS[name]}" in line and "mean [0.485, 0.456, 0.406]" in line and "guess" not in line


@pytest.mark.parametrize("locat", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_starts_a_run_and_takes_locat(golden, tmp_path, name, locat):
    """`backbone.init=FILE` into a new model of the shape that fits, vanilla or with a GAug that starts at nothing."""
    file, path = golden(name), tmp_path / "weights.pth"
    torch.save(file.state(), path)
    foreign = read_foreign(path, {"num_heads": 2})
    attach = {"gaug": {"small_start": True}, "prr": False} if locat else {}
    target = create_backbone(foreign.name, **foreign.options, **attach).eval()
    missing = init_weights(target, str(path))
    assert bool(missing) == locat and all(".gaug." in key for key in missing)
    check_outputs(target, file, 1e-3 if locat else 1e-4)
    if locat:
        attached = attach_locat(load_backbone(f"{path}{HEADS}"), **attach)
        check_outputs(attached.eval(), file, 1e-3)


def test_masked_patches_take_the_mask_token_of_the_file(golden, tmp_path):
    """iBOT-style objectives replace patches before positions are added, as DINOv2 does."""
    file = golden("fb_dinov2")
    torch.save(file.state(), tmp_path / "w.pth")
    model = load_backbone(f"{tmp_path}/w.pth{HEADS}")
    token = file.state()["mask_token"].float()[0]
    with torch.no_grad():
        tokens = forward_tokens(model, file["in.0.x"].float()[:1], masks=file["in.mask"], mask_token=token)
        torch.testing.assert_close(normalise(model, tokens).patches, file["out.masked.patches"], atol=1e-4, rtol=0)


TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
CASES = {  # what is around the weights, what is beside them, what the log says, how positions are resized
    "dino": ({"dino_loss": {}, "epoch": 3, "fp16_scaler": None}, {}, "facebookresearch/dino,", "dino"),
    "ibot": ({"ibot_loss": {}, "epoch": 3}, {}, "bytedance/ibot,", "dino"),
    "mae": (
        {"epoch": 3, "scaler": {}},
        {
            "mask_token": torch.zeros(1, 1, 16),
            "decoder_pos_embed": torch.zeros(1, 17, 16),
            "decoder_embed.weight": torch.zeros(16, 32),
        },
        "facebookresearch/mae,",
        "timm",
    ),
}


def random_vit(**options):
    torch.manual_seed(0)
    model = VisionTransformer(**{**TINY, **options}, num_classes=0, dynamic_img_size=True).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", CASES)
def test_training_checkpoints_with_a_namespace_open(tmp_path, caplog, name):
    """As torch.save writes them in those trainings: args is an argparse.Namespace, the one class that is let in."""
    around, beside, said, resize = CASES[name]
    vanilla = random_vit(**({"init_values": 0.1} if name == "ibot" else {}))
    state = {k.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v for k, v in vanilla.state_dict().items()}
    args = Namespace(arch="vit_small", patch_size=8, lr=0.1, output_dir="x", local_crops_scale=(0.05, 0.4))
    if name == "mae":
        content = {"model": {**state, **beside}}
    else:
        teacher = {f"backbone.{k}": v for k, v in state.items()} | {"head.mlp.0.weight": torch.zeros(3, 3)}
        student = {f"module.backbone.{k}": torch.zeros_like(v) for k, v in state.items()}
        content = {"student": student, "teacher": teacher, "optimizer": {"state": {}}}
    torch.save({**content, **around, "args": args}, tmp_path / "checkpoint.pth")
    caplog.set_level(logging.INFO)
    model = load_backbone(f"{tmp_path}/checkpoint.pth{HEADS}")
    assert said in caplog.text and getattr(model, "pos_resize", "timm") == resize
    assert tuple(model.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), vanilla(images), atol=1e-5, rtol=0)


def test_a_namespace_that_holds_more_is_refused(tmp_path):
    args = Namespace(model=torch.nn.Linear(2, 2))
    torch.save({"model": random_vit().state_dict(), "args": args}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load_backbone(tmp_path / "w.pth")
    torch.save({"model": random_vit().state_dict(), "args": Namespace(lr=1)}, tmp_path / "w.pth")
    load_backbone(f"{tmp_path}/w.pth{HEADS}")
    assert Namespace not in torch.serialization.get_safe_globals()  # let in for that file alone


# --- the real checkpoint ----------------------------------------------------------------------------------------------------------


def test_the_real_checkpoint_opens_at_any_size(vits14, caplog):
    caplog.set_level(logging.INFO)
    model = load_backbone(vits14)
    assert "facebookresearch/dinov2, opened as vit_small (518x518 px; assumed: 6 heads of 64" in caplog.text
    assert model.patch_embed.grid_size == (37, 37) and model.pos_resize == "dino"
    state = load_file(vits14)
    assert torch.equal(model.pos_embed, state["pos_embed"].float())
    with torch.no_grad():
        for size in ((98, 98), (42, 126)):
            images = torch.randn(1, 3, *size)
            assert features(model, images).isfinite().all()
            if size[0] == size[1]:  # opened at that size: the table is resized once, the same way
                there = load_backbone(f"{vits14}?img_size={size[0]}")
                assert there.patch_embed.grid_size == (7, 7)
                torch.testing.assert_close(features(there, images), features(model, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "locat_vit_small_patch14_dinov2", "vit_small"])
def test_the_real_checkpoint_starts_a_run_in_one_step(vits14, name):
    options = {"patch_size": 14, "init_values": 1e-5} if name == "vit_small" else {}
    options |= {"gaug": {"small_start": True}, "prr": False} if name.startswith("locat") else {}
    backbone = create_backbone(name, img_size=98, **options).eval()
    missing = init_weights(backbone, str(vits14))
    assert all(".gaug." in key for key in missing) and bool(missing) == name.startswith("locat")
    images = torch.randn(1, 3, 98, 98)
    with torch.no_grad():
        torch.testing.assert_close(features(backbone, images), features(load_backbone(vits14), images), atol=2e-4, rtol=0)


def test_locat_attaches_to_the_real_checkpoint(vits14):
    model = load_backbone(f"{vits14}?img_size=98")
    images = torch.randn(1, 3, 70, 126)
    with torch.no_grad():
        before = features(model, images)
        attach_locat(model, gaug={"small_start": True}, prr=False)
        torch.testing.assert_close(features(model, images), before, atol=1e-3, rtol=0)
        attached = load_backbone(f"{vits14}?img_size=98&gaug={{small_start: true}}&prr=false")
        torch.testing.assert_close(features(attached, images), features(model, images), atol=1e-5, rtol=0)
    assert model.has_gaug and model.gaug_options["initial_grid"] == (7, 7)


def test_a_misfit_names_the_backbone_that_fits(vits14):
    with pytest.raises(
        CheckpointError, match=r"init_values.* They fit backbone.name=vit_small backbone.patch_size=14 .*init_values=1e-05"
    ):
        init_weights(create_backbone("vit_small", img_size=98, patch_size=14), str(vits14))


# --- normalisation, names, grids ----------------------------------------------------------------------------------------------------


def mean_of(model):
    return tuple(round(number, 3) for number in model.pretrained_cfg["mean"])


def test_normalisation_comes_from_the_file_the_name_or_is_called_a_guess(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_file(random_vit().state_dict(), tmp_path / "bare.safetensors")
    assert mean_of(load_backbone(f"{tmp_path}/bare.safetensors{HEADS}")) == (0.485, 0.456, 0.406)
    assert [r.levelname for r in caplog.records if "a guess" in r.message] == ["WARNING"]
    given = load_backbone(f"{tmp_path}/bare.safetensors{HEADS}&mean=[0.1, 0.2, 0.3]&std=[1, 1, 1]")
    assert mean_of(given) == (0.1, 0.2, 0.3) and tuple(given.pretrained_cfg["std"]) == (1, 1, 1)
    caplog.clear()
    named = load_backbone(f"{tmp_path}/bare.safetensors{HEADS}&name=vit_tiny_patch16_224&patch_size=8&embed_dim=32&depth=2")
    assert mean_of(named) == (0.5, 0.5, 0.5) and "of timm's vit_tiny_patch16_224" in caplog.text and "guess" not in caplog.text


def test_a_timm_file_beside_its_config_is_what_the_config_says(tmp_path):
    model = create_backbone("vit_tiny_patch16_224", **TINY)  # mean and std 0.5 in timm
    save_for_hf(model, tmp_path, safe_serialization=True)
    for spec in (tmp_path, tmp_path / "model.safetensors", f"{tmp_path}?num_classes=3"):
        assert mean_of(load_backbone(spec)) == (0.5, 0.5, 0.5)


def test_an_unknown_name_is_the_users_mistake(tmp_path):
    save_file(random_vit().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="Did you mean 'vit_small_patch16_224'"):
        load_backbone(f"{tmp_path}/w.safetensors?name=vit_small_patch16_225")


def test_the_run_is_told_when_its_images_are_normalised_differently(tmp_path, caplog):
    save_for_hf(create_backbone("vit_tiny_patch16_224", **TINY), tmp_path, safe_serialization=True)
    backbone = create_backbone("vit_tiny", **TINY)  # ImageNet's mean and std, as crops have them by default
    init_weights(backbone, str(tmp_path))
    assert "was trained on images with mean [0.5, 0.5, 0.5]" in caplog.text and "crops.mean" in caplog.text


@pytest.mark.parametrize(
    ("options", "spec", "grid"),
    [
        ({"img_size": (24, 40)}, "", None),  # 15 patches and the class token's position are no 4x4
        ({"img_size": (24, 40)}, "?img_size=[24, 40]", (3, 5)),
        ({"img_size": 16, "reg_tokens": 4}, "", None),  # 4 registers, the class token and 2x2 are no 3x3
        ({"img_size": 16, "reg_tokens": 4}, "?img_size=16", (2, 2)),
        ({"img_size": 24, "reg_tokens": 4, "no_embed_class": True}, "?img_size=24", (3, 3)),
        ({"img_size": (16, 64), "reg_tokens": 4}, "?img_size=[16, 64]", (2, 8)),
        ({}, "", (4, 4)),
        ({}, "?img_size=64", (4, 4)),
    ],
)
def test_the_trained_grid_is_known_or_asked_for(tmp_path, options, spec, grid):
    model = create_backbone("locatvit_tiny", **{**TINY, **options})
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    if grid is None:
        with pytest.raises(CheckpointError, match="Give the image size that the weights were trained at"):
            load_backbone(f"{tmp_path}/w.safetensors")
        return
    again = load_backbone(f"{tmp_path}/w.safetensors{spec}")
    assert again.gaug_options["initial_grid"] == grid == again.blocks[0].attn.gaug.initial_grid


# --- transformers itself, and timm's own DINO networks --------------------------------------------------------------------------------


def transformers_models():
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers is not installed")
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    yield transformers.Dinov2Model(transformers.Dinov2Config(**shape, use_swiglu_ffn=True))
    yield transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**shape, use_swiglu_ffn=True))
    dinov3 = {**shape, "intermediate_size": 256, "num_register_tokens": 4}
    yield transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**dinov3, use_gated_mlp=True, hidden_act="silu"))
    yield transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**shape))


def test_transformers_folders_and_state_dicts_open(tmp_path):
    """SwiGLU in each layout, names on disk and in memory, and a task's head around the model, which is left out."""
    for model in transformers_models():
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        folder, file = tmp_path / type(model).__name__, tmp_path / f"{type(model).__name__}.pth"
        model.eval().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
        )
        torch.save(model.state_dict(), file)
        inner = getattr(model, "dinov2", model)
        for images in (torch.randn(1, 3, 56, 56), torch.randn(1, 3, 42, 84)):
            with torch.no_grad():
                expected = inner(images).last_hidden_state
                for spec in (folder, folder / "model.safetensors", file):
                    backbone = load_backbone(spec)
                    given = normalise(backbone, forward_tokens(backbone, images))
                    torch.testing.assert_close(
                        torch.cat([given.prefix, given.patches], 1),
                        expected,
                        atol=1e-4,
                        rtol=0,
                        msg=lambda m, s=spec: f"{s}: {m}",
                    )
                    assert mean_of(backbone) == ((0.485, 0.456, 0.406) if spec == file else (0.1, 0.2, 0.3))


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"])
@pytest.mark.parametrize("locat", [False, True])
def test_timms_own_dino_networks_open_as_bare_files(tmp_path, name, locat):
    patch = 14 if "14" in name else 16
    options = {"img_size": 4 * patch, "depth": 2, "embed_dim": 128, "num_heads": 2, "global_pool": "token"}
    torch.manual_seed(0)
    model = create_backbone(name, **options, **({"gaug": True, "prr": True} if locat else {})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    size = f"?img_size={4 * patch}" if locat else ""  # no positions, or none for the class token: GAug's grid does not show
    again = load_backbone(f"{tmp_path}/w.safetensors{size}")
    for images in (torch.randn(1, 3, 4 * patch, 4 * patch), torch.randn(1, 3, 3 * patch, 5 * patch)):
        with torch.no_grad():
            torch.testing.assert_close(features(again, images), features(model, images), atol=1e-5, rtol=0)


def test_keys_of_none_are_listed(tmp_path):
    save_file({"layer1.0.conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match=r"no layout that is known here, such as layer1.0.conv1.weight; known: .*dinov3"):
        load_backbone(tmp_path / "resnet.safetensors")
