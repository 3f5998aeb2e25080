"""What moves: last blocks, adapters, parts; and that adapters merge into the plain model's weights."""

import copy

import pytest
import torch
from torch import nn

from ssl_locat.errors import UserError
from ssl_locat.models.backbone import create_backbone
from ssl_locat.models.moving import adapters, choose_moving, first_moving_block, merged
from ssl_locat.models.packing import allow_packing, packed_tokens
from ssl_locat.models.tokens import features, forward_tokens
from ssl_locat.optim.optim import lr_scales, parameter_groups

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8}
# one of each kind of layers that adapters meet
KINDS = {
    "timm ViT": ("vit_tiny_patch16_224", SMALL),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", SMALL),
    "DINOv2, packed SwiGLU": ("vit_giant_patch14_dinov2", SMALL),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL),
    "DINOv3 with biases": ("vit_small_patch16_dinov3_qkvb", SMALL),
    "DINOv3, SwiGLU": ("vit_small_plus_patch16_dinov3_qkvb", SMALL),
    "EVA-02, separate projections": ("eva02_tiny_patch14_224", {**SMALL, "qkv_fused": False, "dynamic_img_size": True}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "img_size": 32, "window_size": 4},
    ),
    "LocAtViT": ("locatvit_tiny", SMALL),
    "LocAt on DINOv2": ("locat_vit_small_patch14_dinov2", SMALL),
    "LocAt on DINOv3 with biases": ("locat_vit_small_patch16_dinov3_qkvb", SMALL),
}
BEHIND = ("norm.", "fc_norm.")
VITS = [name for name in KINDS if name != "Swin"]


def make(kind: str) -> nn.Module:
    name, options = KINDS[kind]
    torch.manual_seed(0)
    backbone = create_backbone(name, **options)
    for parameter in backbone.parameters():  # biases and scales of zero would hide a gradient
        nn.init.normal_(parameter, std=0.1) if parameter.abs().max() < 1e-3 else None
    return backbone.eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_acts_and_merges_into_the_plain_model(kind):
    pytest.importorskip("peft")
    plain = make(kind)
    backbone = copy.deepcopy(plain)
    choose_moving(backbone, "lora", rank=2, alpha=3)
    found = adapters(backbone)
    assert found and not any(name.startswith("patch_embed") or ".gaug." in name for name in found)
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == {
        name for name, _ in backbone.named_parameters() if ".lora_" in name
    }
    torch.testing.assert_close(features(backbone, images()), features(plain, images()), rtol=1e-5, atol=1e-5)  # B is 0 at first

    for module in found.values():
        nn.init.normal_(module.lora_B["default"].weight, std=0.05)
    out = features(backbone, images())
    out.square().sum().backward()
    dead = [name for name, p in backbone.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
    assert not dead

    twin = make(kind)
    twin.load_state_dict(merged(backbone.state_dict(), 3 / 2))  # strict: names and shapes are the plain model's
    assert (features(plain, images()) - out).abs().max() > 1e-3  # the adapters changed something
    with torch.no_grad():
        torch.testing.assert_close(features(twin, images()), out, rtol=0, atol=1e-5 * float(out.detach().abs().max()))
        with torch.autocast("cpu", torch.bfloat16):
            low, adapted = (features(network, images()).float() for network in (twin, backbone))
        assert (low - adapted).norm() < 1e-2 * adapted.norm()


def test_merged_equals_peft():
    pytest.importorskip("peft")
    backbone = make("timm ViT")
    choose_moving(backbone, "lora", rank=4, alpha=8)
    for module in adapters(backbone).values():
        nn.init.normal_(module.lora_B["default"].weight)
    ours = merged(backbone.state_dict(), 2.0)
    for name, module in adapters(backbone).items():
        module.merge()
        torch.testing.assert_close(ours[f"{name}.weight"], module.base_layer.weight.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_last_blocks_leave_no_graph_below_them(kind):
    backbone = make(kind)
    choose_moving(backbone, "last", last_blocks=1)
    moving = {name for name, p in backbone.named_parameters() if p.requires_grad}
    last = "layers.1.blocks.1." if kind == "Swin" else "blocks.2."
    assert all(name.startswith((last, *BEHIND)) for name in moving)
    assert any(name.startswith(last) for name in moving) and any(name.startswith(BEHIND) for name in moving)
    seen = []
    for block in [m for m in backbone.modules() if hasattr(m, "norm1")]:
        block.register_forward_hook(lambda *args: seen.append(args[-1].requires_grad))
    forward_tokens(backbone, images())
    assert seen == [False, False, True]  # so that the backward pass, and what it keeps, begin at the last
    assert first_moving_block(backbone) == 2


def test_parts_and_what_is_new_move_besides():
    backbone = make("LocAtViT")
    new = [name for name, _ in backbone.named_parameters() if ".gaug." in name]
    choose_moving(backbone, "last", last_blocks=1, also=["norms", "class_token", "mask_token"], new=new)
    moving = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert {*new, "cls_token", "blocks.0.norm1.weight", "blocks.2.mlp.fc1.weight"} <= moving
    assert not {"blocks.0.mlp.fc1.weight", "pos_embed", "patch_embed.proj.weight"} & moving
    assert first_moving_block(backbone) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trainable": "last", "last_blocks": 4}, "has 3 blocks"),
        ({"trainable": "last", "also": ["layer_scale"]}, "layer_scale, of which this .* has none"),
        ({"trainable": "lora", "targets": ["qkw"]}, "lists 'qkw'.*Did you mean 'qkv'"),
    ],
)
def test_what_a_backbone_has_not_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        choose_moving(make("timm ViT"), **options)


def test_an_adapter_that_would_not_act_is_refused():
    pytest.importorskip("peft")
    backbone = make("timm ViT")
    proj = backbone.blocks[1].attn

    def around(x, **_):  # reads a weight itself, as Eva does
        return proj.proj(nn.functional.linear(x, proj.qkv.weight)[..., :32])

    proj.forward = around
    with pytest.raises(UserError, match=r"adapters on blocks.1.attn.qkv would have no effect"):
        choose_moving(backbone, "lora")


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("trainable", ["full", "last", "lora"])
def test_layer_decay_follows_the_blocks(kind, trainable):
    if trainable == "lora":
        pytest.importorskip("peft")
    student = nn.Module()
    student.backbone = make(kind)
    choose_moving(student.backbone, trainable, last_blocks=2, rank=2)
    scales = lr_scales(student, 0.5, 1.0)
    for name, scale in scales.items():
        inside = name.removeprefix("backbone.")
        if inside.startswith("blocks."):
            assert scale == 0.5 ** (3 - int(inside.split(".")[1])), name
        else:
            assert scale == (1.0 if inside.startswith(BEHIND) else 0.5**4), name
    grouped = {id(p) for group in parameter_groups(student, 0.5) for p in group["params"]}
    assert grouped == {id(p) for p in student.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["timm ViT", "LocAtViT"])
def test_adapters_act_in_packed_crops_and_in_compiled_blocks(kind):
    pytest.importorskip("peft")
    backbone = make(kind)
    choose_moving(backbone, "lora", rank=2)
    for module in adapters(backbone).values():
        nn.init.normal_(module.lora_B["default"].weight, std=0.05)
    crops = [images(), images()[..., :16, :16]]
    with torch.no_grad():
        apart = [forward_tokens(backbone, one) for one in crops]
        packed = packed_tokens(allow_packing(copy.deepcopy(backbone)), crops)
        for one, other in zip(apart, packed, strict=True):
            torch.testing.assert_close(one.patches, other.patches, rtol=1e-4, atol=1e-5)
        # captured as one graph, and run without a compiler, which would take most of a minute
        mlp, x = backbone.blocks[0].mlp, torch.randn(2, 5, 32)
        torch.testing.assert_close(torch.compile(mlp, backend="eager", fullgraph=True)(x), mlp(x))
