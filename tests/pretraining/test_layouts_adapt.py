"""Every released layout, from a file on disk to an export: it opens with its source's outputs, `adapt` takes a step, and what is exported loads and
differs by that step alone. Weights are random, widths small; the full widths of DINOv3 are slow tests."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from ssl_locat.cli.process import run_command
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.models import features
from ssl_locat.models.backbone import create_backbone, load_backbone

MEAN, CLIP, HALF = (0.485, 0.456, 0.406), (0.481, 0.458, 0.408), (0.5, 0.5, 0.5)
NORMAL = {"imagenet": MEAN, "clip": CLIP, "half": HALF}
TINY = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 8, "img_size": 32}


def randomised(model):
    """Nothing near zero, so that a tensor in the wrong place shows."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        if name.endswith("norm.weight") or ("norm" in name and name.endswith("weight")):
            parameter.data += 1
    return model.eval()


def expected(images, outputs, patch, mean="imagenet", tolerance=1e-4):
    """What a case promises: images [B, 3, H, W] -> features [B, D] of the source, its patch size and whose mean its images have."""
    return SimpleNamespace(images=images, outputs=outputs.detach(), patch=patch, mean=mean, tolerance=tolerance)


# --- the layouts: each writes a file or folder as its source does ------------------------------------------------------------------


def of_golden(name, heads, wrap=lambda state: state, suffix="class", mean="imagenet"):
    def write(folder, golden):
        file = golden(name)
        torch.save(wrap(file.state()), folder / "weights.pth")
        key = f"out.0.{suffix}"
        patch = file.config["kw"]["patch_size"]
        return f"{folder}/weights.pth?num_heads={heads}", expected(file["in.0.x"].float(), file[key], patch, mean)

    return write


def dino_checkpoint(state):
    behind = {f"backbone.{name}": value for name, value in state.items()}
    student = {f"module.{name}": torch.zeros_like(value) for name, value in behind.items()}
    return {"teacher": behind | {"head.mlp.0.weight": torch.zeros(3, 3)}, "student": student, "dino_loss": {}, "epoch": 3}


def of_vit(wrap, **options):
    """Sources that are timm's or derived from its ViT, as iBOT and MAE."""

    def write(folder, golden):
        vit = randomised(VisionTransformer(**{**TINY, **options}, num_classes=0, dynamic_img_size=True))
        state = {k.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v for k, v in vit.state_dict().items()}
        torch.save(wrap(state), folder / "checkpoint.pth")
        images = torch.randn(2, 3, 32, 32)
        return str(folder / "checkpoint.pth"), expected(images, vit(images), 8)

    return write


def mae_checkpoint(state):
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_embed.weight": torch.zeros(16, 64),
    }
    return {"model": {**state, **decoder}, "epoch": 3, "scaler": {}}


def of_timm(name, mean, whole=True, **options):
    """A folder as timm saves it, and its bare file."""

    def write(folder, golden):
        model = randomised(create_backbone(name, **{**TINY, **options}))
        images = torch.randn(2, 3, model.patch_embed.img_size[0], model.patch_embed.img_size[1])
        if whole:
            save_for_hf(model, folder / "timm", safe_serialization=True)
        else:
            save_file(model.state_dict(), folder / "bare.safetensors")
        patch = model.patch_embed.patch_size[0]
        return str(folder / ("timm" if whole else "bare.safetensors")), expected(images, features(model, images), patch, mean)

    return write


def of_transformers(kind, mean, inner=lambda model: model, **shape):
    def write(folder, golden):
        transformers = pytest.importorskip("transformers", minversion="5", reason="transformers is not installed")
        shape_of = {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "image_size": 64,
            "patch_size": 16,
        }
        config = getattr(transformers, f"{kind}Config")
        if kind in ("CLIP", "Siglip"):
            text = {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "intermediate_size": 32,
                "vocab_size": 99,
            }
            model = getattr(transformers, f"{kind}Model")(config(text_config=text, vision_config={**shape_of, **shape}))
        else:
            model = getattr(transformers, f"{kind.replace('Config', '')}Model")(config(**{**shape_of, **shape}))
        randomised(model).save_pretrained(folder / "hf")
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            return str(folder / "hf"), expected(images, inner(model)(images).pooler_output, 16, mean)

    return write


def tower(model):
    return model.vision_model


def of_open_clip(quick):
    def write(folder, golden):
        model = pytest.importorskip("open_clip", reason="open_clip is not installed")
        act = model.transformer.QuickGELU if quick else torch.nn.GELU
        visual = randomised(
            model.transformer.VisionTransformer(
                32, 8, 128, 2, 2, 4.0, output_dim=16, act_layer=act, pool_type="tok", output_tokens=False
            )
        )
        visual.proj = None  # class tokens, as ours
        images = torch.randn(2, 3, 32, 32)
        state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
        state |= {
            "visual.proj": torch.zeros(128, 16),
            "logit_scale": torch.zeros(()),
            "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(9, 3),
        }
        torch.save(state, folder / "open_clip_pytorch_model.bin")
        config = {
            "model_cfg": {"embed_dim": 16, "quick_gelu": quick},
            "preprocess_cfg": {"mean": [0.481, 0.458, 0.408], "std": [0.269, 0.261, 0.276]},
        }
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        return str(folder), expected(images, visual(images), 8, "clip")

    return write


def in_open_clips_names(folder, golden):
    """A tower of transformers', whose outputs are known, written as open_clip would."""
    model, promised = of_transformers("CLIP", "clip", tower, hidden_act="gelu")(folder, golden)
    state = load_file(f"{model}/model.safetensors")
    inside = {name.removeprefix("vision_model."): value for name, value in state.items() if name.startswith("vision_model.")}
    rules = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding": "conv1",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    rules |= {
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "self_attn": "attn",
        "fc1": "c_fc",
        "fc2": "c_proj",
    }
    named = {}
    for name, value in inside.items():
        for old, new in rules.items():
            name = name.replace(old, new)
        named[name] = value
    for block in range(2):
        front = f"transformer.resblocks.{block}.attn."
        for kind in ("weight", "bias"):
            named[f"{front}in_proj_{kind}"] = torch.cat([named.pop(f"{front}{part}_proj.{kind}") for part in "qkv"])
    torch.save(
        {f"visual.{name}": value for name, value in named.items()} | {"text_projection": torch.zeros(2, 2)}, folder / "laion.bin"
    )
    return f"{folder}/laion.bin", promised


def of_open_clip_trunk(folder, golden):
    """A SigLIP as open_clip has it: timm's tower."""
    model = randomised(create_backbone("vit_base_patch16_siglip_224", **TINY))
    images = torch.randn(2, 3, 32, 32)
    state = {f"visual.trunk.{name}": value for name, value in model.state_dict().items()}
    torch.save(state | {"logit_scale": torch.zeros(())}, folder / "open_clip.bin")
    return f"{folder}/open_clip.bin", expected(images, features(model, images), 8, "half")


def of_our_export(folder, golden):
    from ssl_locat.export.timm_folder import write_timm

    model = randomised(create_backbone("locatvit_tiny", **TINY))
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": MEAN, "std": (0.229, 0.224, 0.225)}
    images = torch.randn(2, 3, 32, 32)
    write_timm(model, folder / "export")
    return str(folder / "export"), expected(images, features(model, images), 8)


DINOV3 = {"patch_size": 16, "img_size": 64, "embed_dim": 128, "num_heads": 2, "global_pool": "token"}
LAYOUTS = {
    "dino": of_golden("dino_vit", 3, dino_checkpoint, "cls"),
    "dinov2": of_golden("fb_dinov2", 2),
    "dinov2 with registers": of_golden("fb_dinov2_reg4_chunked", 2),
    "dinov3, facebookresearch": of_golden("fb_dinov3", 2),
    "dinov3, transformers": of_transformers("DINOv3ViT", "imagenet", num_register_tokens=4),
    "dinov3, timm": of_timm("vit_small_patch16_dinov3", "imagenet", **DINOV3),
    "dinov2, transformers": of_golden("hf_dinov2", 2),
    "dinov2 with registers, transformers": of_golden("hf_dinov2_reg", 2),
    "supervised, timm": of_timm("vit_tiny_patch16_224", "half"),
    "mae": of_vit(mae_checkpoint),
    "ibot": of_vit(lambda state: {**dino_checkpoint(state), "ibot_loss": {}}, init_values=0.1),
    "clip, transformers": of_transformers("CLIP", "clip", tower),
    "clip of gelu, transformers": of_transformers("CLIP", "clip", tower, hidden_act="gelu"),
    "siglip, transformers": of_transformers("Siglip", "half", tower),
    "clip, timm": of_timm("vit_base_patch16_clip_quickgelu_224", "clip"),
    "clip, a bare file": of_timm("vit_base_patch16_clip_224", "clip", whole=False),
    "siglip, timm": of_timm("vit_base_patch16_siglip_224", "half"),
    "siglip, a bare file": of_timm("vit_base_patch16_siglip_224", "half", whole=False),
    "clip, open_clip's names": in_open_clips_names,
    "clip, open_clip": of_open_clip(quick=False),
    "clip of OpenAI, open_clip": of_open_clip(quick=True),
    "siglip, open_clip": of_open_clip_trunk,
    "locatvit, official": of_golden("locatvit_full", 3, suffix="logits", mean="half"),
    "our export": of_our_export,
}
QUICK = ("dinov3, transformers",)  # the others take their step in slow runs


def opened(folder, golden, name):
    model, promised = LAYOUTS[name](folder, golden)
    backbone = load_backbone(model)
    with torch.no_grad():
        given = features(backbone, promised.images)
    if given.shape == promised.outputs.shape:
        torch.testing.assert_close(given, promised.outputs, atol=promised.tolerance, rtol=1e-4)
    else:  # a classifier's golden numbers are behind its head
        torch.testing.assert_close(backbone.head(given), promised.outputs, atol=promised.tolerance, rtol=1e-4)
    patch = backbone.patch_embed.patch_size
    assert patch in (promised.patch, (promised.patch,) * 2)
    assert [round(value, 3) for value in backbone.pretrained_cfg["mean"]] == pytest.approx(NORMAL[promised.mean])
    return model, backbone, promised


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_released_layout_opens_with_its_sources_outputs(tmp_path, golden, name):
    opened(tmp_path, golden, name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS])
def test_a_released_layout_is_adapted_by_one_step_and_differs_by_that_step_alone(tmp_path, golden, name, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapt_by_one_step(*opened(tmp_path, golden, name), images)


def adapt_by_one_step(model, backbone, promised, images):
    keys = ["optim.total_steps=1", "data.workers=0", "log.tensorboard=false", "crops.mode=cpu", "guard.unverified=trained"]
    assert (
        run_command(["adapt", model, str(images), *keys, "backbone.trainable=last", "backbone.last_blocks=1", "run_dir=run"]) == 0
    )
    start, end = load_backbone("run/start"), load_backbone("run/export")
    backbone_of = {key for key in start.state_dict() if not key.startswith("head.")}  # a classifier of the source's stays behind
    assert type(start) is type(end) and backbone_of == end.state_dict().keys()
    assert (
        end.pretrained_cfg["mean"] == pytest.approx(backbone.pretrained_cfg["mean"])
        and end.patch_embed.patch_size == backbone.patch_embed.patch_size
    )
    with torch.no_grad():
        before, after = (features(network, promised.images) for network in (start, end))
        torch.testing.assert_close(before, features(backbone, promised.images), atol=1e-5, rtol=1e-5)
    # the mean of a weight with itself is rounded: what stayed differs by less than a millionth
    far = {key: float((value - start.state_dict()[key]).abs().max()) for key, value in end.state_dict().items()}
    moved = {key for key, distance in far.items() if distance > 1e-6}
    assert moved and all("blocks.1." in key or "norm" in key or "pool" in key for key in moved), sorted(moved)
    # AdamW moves a weight by its rate at most, and the teacher follows the student by a part of that
    assert max(far.values()) < 1e-2 and not torch.equal(before, after) and (before - after).abs().max() < 1


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    make_textures(folder / "set", num_train=48, num_test=8, image_size=64, progress=False)
    return f"{folder}/set/*train*.tar"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "width"), [("small", 384), ("base", 768), ("large", 1024)])
@pytest.mark.parametrize("source", ["transformers", "timm"])
def test_dinov3_of_full_width_opens_and_is_adapted(tmp_path, golden, monkeypatch, images, size, width, source):
    """Width, heads and registers of ViT-S, B and L; two blocks, for depth repeats what two show."""
    monkeypatch.chdir(tmp_path)
    heads = width // 64
    made = (
        of_transformers(
            "DINOv3ViT",
            "imagenet",
            num_register_tokens=4,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
        if source == "transformers"
        else of_timm(
            f"vit_{size}_patch16_dinov3", "imagenet", patch_size=16, img_size=64, depth=2, embed_dim=width, num_heads=heads
        )
    )
    monkeypatch.setitem(LAYOUTS, "wide", made)
    model, backbone, promised = opened(tmp_path, golden, "wide")
    assert backbone.embed_dim == width and backbone.num_prefix_tokens == 5
    adapt_by_one_step(model, backbone, promised, images)
