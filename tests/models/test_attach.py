"""LocAt on the variety of timm's ViTs: what it serves equals the vanilla model where GAug is off, and what it does not serve is said."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock, VisionTransformer

from ssl_locat.errors import UserError
from ssl_locat.models import attach_locat, class_token, features, forward_tokens, last_blocks, refine
from ssl_locat.models.attention import forced_backend
from ssl_locat.models.jumbo import Jumbo
from ssl_locat.models.registry import ROPE_MIXED
from ssl_locat.models.tokens import normalise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
DYNAMIC = {**SMALL, "dynamic_img_size": True}
AXIAL = {"use_rot_pos_emb": True, "global_pool": "token"}


class Gated(Attention):
    """timm's attention with its gate switched on."""

    def __init__(self, *args, **options):
        super().__init__(*args, gated=True, **options)


class Odd(Attention):
    """Computes something else."""

    def forward(self, x, **_):
        return x


MODELS = {
    "vit": lambda: VisionTransformer(**DYNAMIC),
    "vit_static": lambda: VisionTransformer(**SMALL),
    "deit_distilled": lambda: VisionTransformerDistilled(**SMALL),
    "registers": lambda: VisionTransformer(**DYNAMIC, reg_tokens=4),
    "registers_without_positions": lambda: VisionTransformer(**DYNAMIC, reg_tokens=2, no_embed_class=True),
    "no_class_token": lambda: VisionTransformer(**DYNAMIC, class_token=False, global_pool="avg"),
    "average_of_patches": lambda: VisionTransformer(**DYNAMIC, global_pool="avg"),
    "no_positions": lambda: VisionTransformer(**DYNAMIC, pos_embed="none"),
    "qk_norm": lambda: VisionTransformer(**DYNAMIC, qk_norm=True),
    "scaled_norms": lambda: VisionTransformer(**DYNAMIC, scale_attn_norm=True),
    "layer_scale": lambda: VisionTransformer(**DYNAMIC, init_values=0.1),
    "post_norm": lambda: VisionTransformer(**DYNAMIC, block_fn=ResPostBlock, init_values=0.5),
    "gated": lambda: VisionTransformer(**DYNAMIC, attn_layer=Gated),
    "parallel": lambda: VisionTransformer(**DYNAMIC, block_fn=ParallelThingsBlock),
    "padded": lambda: VisionTransformer(**DYNAMIC, dynamic_img_pad=True),
    "pre_norm": lambda: VisionTransformer(**DYNAMIC, pre_norm=True),
    "rope_axial": lambda: Eva(**DYNAMIC, **AXIAL),
    "rope_axial_rotate_half": lambda: Eva(**DYNAMIC, **AXIAL, attn_type="rope", rope_rotate_half=True),
    "rope_mixed": lambda: Eva(**{**ROPE_MIXED, **DYNAMIC}),
    "rope_registers_average": lambda: Eva(**DYNAMIC, use_rot_pos_emb=True, num_reg_tokens=3, use_abs_pos_emb=False),
    "dinov3_like": lambda: Eva(**DYNAMIC, **AXIAL, rope_type="dinov3", num_reg_tokens=4, use_abs_pos_emb=False, init_values=0.1),
    "eva_separate_qkv": lambda: Eva(**DYNAMIC, **AXIAL, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True),
    "eva_post_norm": lambda: Eva(**DYNAMIC, **AXIAL, use_post_norm=True),
    "grouped_queries": lambda: Eva(**{**DYNAMIC, "num_heads": 2}, **AXIAL, attn_type="rope", qkv_fused=False, num_kv_heads=1),
    "swin": lambda: SwinTransformer(img_size=28, patch_size=2, window_size=7, embed_dim=12, depths=(2, 2), num_heads=(2, 4), num_classes=5, strict_img_size=False, drop_path_rate=0.0),
    "jumbo": lambda: Jumbo(**DYNAMIC, num_class_tokens=2),
}  # fmt: skip
NEEDS_PATCH = {"swin": (28, 28)}
FLEXIBLE = [n for n in MODELS if n not in ("vit_static", "deit_distilled")]


def randomised(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def images_for(name, batch=2, size=None):
    return torch.randn(batch, 3, *(size or NEEDS_PATCH.get(name, (32, 32))))


def switch_off(model):
    """alpha so small that the bias vanishes."""
    for module in model.modules():
        if hasattr(module, "log_alpha"):
            torch.nn.init.zeros_(module.log_alpha.weight)
            torch.nn.init.constant_(module.log_alpha.bias, -40.0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_without_alpha_it_is_the_vanilla_model(name):
    vanilla = randomised(name)
    twin = switch_off(attach_locat(copy.deepcopy(vanilla), prr=False))
    sizes = [NEEDS_PATCH.get(name, (32, 32))] + ([(48, 24)] if name in FLEXIBLE and name != "swin" else [])
    for size in sizes:
        images = images_for(name, size=size)
        torch.testing.assert_close(twin(images), vanilla(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(twin.forward_features(images), vanilla.forward_features(images), rtol=1e-5, atol=1e-5)
        for one, other in zip(
            twin.forward_intermediates(images, intermediates_only=True),
            vanilla.forward_intermediates(images, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gaug_changes_the_output_and_learns(name):
    vanilla = randomised(name)
    twin = attach_locat(copy.deepcopy(vanilla))
    images = images_for(name)
    output = twin(images)
    assert not torch.allclose(output, vanilla(images), atol=1e-4)
    output.square().sum().backward()
    for parameter_name, parameter in twin.named_parameters():
        if ".gaug." in parameter_name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_features_are_what_the_head_sees(name):
    model = attach_locat(randomised(name))
    images = images_for(name)
    if name == "deit_distilled":
        pytest.skip("has two heads, one per token")
    seen = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features(model, images), seen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in FLEXIBLE if n != "swin"])
def test_all_ways_to_the_tokens_agree(name):
    model = attach_locat(randomised(name))
    images = images_for(name, size=(40, 24))
    tokens = forward_tokens(model, images)
    assert tokens.grid == (5, 3) and tokens.patches.shape == (2, 15, 24)
    assert tokens.prefix.shape == (2, model.num_prefix_tokens, 24)
    (last,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
    torch.testing.assert_close(tokens.patches.mT.unflatten(-1, tokens.grid), last)
    normed = normalise(model, tokens)
    torch.testing.assert_close(torch.cat([normed.prefix, normed.patches], 1), model.forward_features(images))
    assert len(last_blocks(model, images, 2)) == 2


def test_one_instance_serves_crops_probes_and_strips():
    """224 and 96 px crops, not square, a 518 px probe, a single row of patches: each as a model made for that size alone gives it."""
    small = {"patch_size": 14, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    torch.manual_seed(0)
    model = attach_locat(VisionTransformer(**small, img_size=224, dynamic_img_size=True)).eval()
    for height, width in ((224, 224), (98, 98), (518, 518), (224, 126), (14, 112), (224, 224)):
        images = torch.randn(1, 3, height, width)
        options = {**small, "img_size": (height, width), "pos_embed": "none"}
        alone = attach_locat(VisionTransformer(**options), gaug={"initial_grid": (16, 16)}).eval()
        state = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
        alone.load_state_dict(state)
        kept, model.pos_embed = model.pos_embed, None
        with torch.no_grad(), forced_backend("reference"):
            expected = alone(images)
        with torch.no_grad():
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        model.pos_embed = kept
        with torch.no_grad():
            assert model(images).isfinite().all()


def test_every_named_model_is_there():
    """On the meta device: no memory, no time. What LocAt adds to each is GAug's projections (and Jumbo's norm of patches)."""
    for size in ("tiny", "small", "base", "large"):
        for name in (f"vit_{size}", f"regvit_{size}", f"vit_{size}_nopos", f"vit_{size}_rope_mixed"):
            with torch.device("meta"):
                counts = [sum(p.numel() for p in timm.create_model(n).parameters()) for n in (name, f"locat{name}")]
            assert counts[1] - counts[0] == 195 * (24 if size == "large" else 12), name
    for size in ("tiny", "base"):
        with torch.device("meta"):
            swin, jumbo, locat = (timm.create_model(f"{n}_{size}") for n in ("locatswin", "jumbo", "locatjumbo"))
        assert swin.has_gaug and locat.has_gaug and not jumbo.has_gaug


def test_resolutions_may_alternate_in_one_step():
    model = attach_locat(randomised("vit"))
    small, large = images_for("vit", size=(16, 16)), images_for("vit", size=(32, 48))
    alone = [copy.deepcopy(model), copy.deepcopy(model)]
    (features(model, large).sum() + features(model, small).sum()).backward()
    for each, images in zip(alone, (large, small), strict=True):
        features(each, images).sum().backward()
    for parameter, first, second in zip(*(m.parameters() for m in (model, *alone)), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, first.grad + second.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "rope_mixed", "rope_axial", "jumbo", "swin", "registers"])
def test_activation_checkpointing_keeps_gradients(name):
    """Recomputed while backward runs, after another resolution went through: nothing may be remembered from the last forward."""
    model = attach_locat(randomised(name)).train()
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing()
    sizes = [(28, 28), (56, 28)] if name == "swin" else [(32, 48), (16, 16)]
    inputs = [images_for(name, size=size) for size in sizes]
    for each in (model, plain):
        sum(features(each, images).square().sum() for images in inputs).backward()
    for (parameter_name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, msg=parameter_name)


def test_masked_patches_hide_their_content():
    for name in ("vit", "rope_mixed", "no_class_token", "vit_static"):
        model = attach_locat(randomised(name))
        images, other = images_for(name), images_for(name)
        masks = torch.zeros(2, 16, dtype=torch.bool)
        masks[:, 5] = True  # row 1, column 1 of a 4 x 4 grid
        mixed = images.clone()
        mixed[:, :, 8:16, 8:16] = other[:, :, 8:16, 8:16]
        token = torch.randn(24)
        one, two = (forward_tokens(model, i, masks=masks, mask_token=token) for i in (images, mixed))
        assert torch.equal(one.patches, two.patches)
        assert not torch.equal(forward_tokens(model, images).patches, one.patches)


@given(seed=st.integers(0, 1000), name=st.sampled_from(["vit", "registers", "rope_mixed", "swin", "no_class_token", "jumbo"]))
@settings(max_examples=12, deadline=None)
def test_permuting_the_batch_permutes_the_output(seed, name):
    model = attach_locat(randomised(name, seed))
    images, order = images_for(name, batch=3), torch.randperm(3)
    torch.testing.assert_close(features(model, images[order]), features(model, images)[order], rtol=1e-5, atol=1e-5)


def test_pooling_of_prr():
    """PRR refines all tokens; what pools them afterwards is the model's: class token or mean; or timm's attention with a learnt query."""
    images = images_for("vit")
    for name in ("vit", "average_of_patches"):
        vanilla = randomised(name)
        model = attach_locat(copy.deepcopy(vanilla), gaug=False)
        tokens = vanilla.forward_features(images)
        heads = tokens.unflatten(-1, (3, 8)).transpose(1, 2)
        refined = ((heads @ heads.mT / 8**0.5).softmax(-1) @ heads).transpose(1, 2).flatten(2)
        pooled = refined[:, 0] if name == "vit" else vanilla.fc_norm(refined[:, 1:].mean(1))
        torch.testing.assert_close(features(model, images), pooled)
    pooling = VisionTransformer(**DYNAMIC, global_pool="map").eval()
    attached = attach_locat(copy.deepcopy(pooling), gaug=False)
    tokens = attached.prr(pooling.forward_features(images))
    torch.testing.assert_close(attached(images), pooling.head(pooling.fc_norm(pooling.attn_pool(tokens[:, 1:]))))


def test_class_attention_pooling_equals_a_loop():
    vanilla = randomised("registers")
    model = attach_locat(copy.deepcopy(vanilla), gaug=False, prr={"kind": "class_attention"})
    images = images_for("registers", size=(40, 24))
    tokens, attn = vanilla.forward_features(images), model.prr.attn
    expected = []
    for x in tokens:
        gathered = []
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)
            query = attn.q(x[0])[part]
            scores = torch.stack([query @ attn.k(token)[part] / 8**0.5 for token in x]).softmax(0)
            gathered.append(sum(score * attn.v(token)[part] for score, token in zip(scores, x, strict=True)))
        expected.append(x[0] + attn.proj(torch.cat(gathered)))
    torch.testing.assert_close(features(model, images), torch.stack(expected))
    torch.testing.assert_close(refine(model, forward_tokens(model, images)).patches, tokens[:, 5:])  # patches pass as they are


def test_pooling_kinds_are_checked():
    with pytest.raises(UserError, match="Did you mean 'class_attention'"):
        attach_locat(VisionTransformer(**DYNAMIC), prr={"kind": "class-attention"})
    with pytest.raises(UserError, match="global_pool='token'"):
        attach_locat(VisionTransformer(**DYNAMIC, global_pool="avg"), prr={"kind": "class_attention"})


def test_twin_starts_at_the_vanilla_output():
    vanilla = randomised("registers")
    twin = attach_locat(copy.deepcopy(vanilla), gaug={"small_start": True}, prr=False)
    images = images_for("registers", size=(48, 40))
    torch.testing.assert_close(twin(images), vanilla(images), atol=1e-4, rtol=0)
    twin.forward_features(images).square().sum().backward()  # the class token alone gives the last GAug no gradient
    assert all(p.grad.abs().max() > 1e-8 for n, p in twin.named_parameters() if n.endswith("log_alpha.bias"))


def test_gaug_and_prr_attach_separately():
    model = VisionTransformer(**DYNAMIC)
    assert attach_locat(model, prr=False) is model and model.has_gaug and model.prr is None
    attach_locat(model, gaug=False)
    assert model.prr.num_heads == 3
    with pytest.raises(UserError, match="already"):
        attach_locat(model, prr=False)
    with pytest.raises(UserError, match="already"):
        attach_locat(model, gaug=False)


def test_prr_alone_serves_other_attentions():
    model = attach_locat(VisionTransformer(**{**DYNAMIC, "num_heads": 2}, attn_layer="diff"), gaug=False).eval()
    assert model.prr.num_heads == 2 and features(model, images_for("vit", size=(16, 40))).shape == (2, 24)


def test_deepcopy_is_independent():
    model = attach_locat(randomised("jumbo"))
    images = images_for("jumbo")
    other = copy.deepcopy(model)
    assert torch.equal(model(images), other(images))
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    assert not torch.equal(model(images), other(images))
    assert other.blocks[0].shared[0] is other.jumbo_mlp


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: timm.create_model("resnet18"), "ResNet.*VisionTransformer"),
        (lambda: timm.create_model("xcit_nano_12_p16_224", depth=1), "Xcit.*between channels"),
        (lambda: VisionTransformer(**DYNAMIC, attn_layer=Odd), "blocks.0.*Odd"),
        (lambda: VisionTransformer(**DYNAMIC, global_pool="prr"), "global_pool='prr'"),
    ],
)
def test_what_cannot_be_served_is_said(make, message):
    with pytest.raises(UserError, match=message):
        attach_locat(make())


def test_wrong_options_are_named():
    with pytest.raises(UserError, match="Did you mean 'isotropic'"):
        attach_locat(VisionTransformer(**DYNAMIC), gaug={"isotropc": True})
    with pytest.raises(UserError, match="initial_grid is 14"):
        attach_locat(VisionTransformer(**DYNAMIC), gaug={"initial_grid": 14})
    with pytest.raises(UserError, match="num_heads is 5"):
        attach_locat(VisionTransformer(**DYNAMIC), prr={"num_heads": 5})
    with pytest.raises(UserError, match="Did you mean 'dino'"):
        attach_locat(VisionTransformer(**DYNAMIC), pos_resize="dinov")


def test_attention_masks_are_refused():
    model = attach_locat(randomised("vit"))
    with pytest.raises(UserError, match="no attention mask"):
        model(images_for("vit"), attn_mask=torch.zeros(17, 17))


def test_swin_window_is_the_grid_of_its_gaug():
    model = attach_locat(MODELS["swin"]())
    assert model.layers[0].blocks[0].attn.gaug.initial_grid == (7, 7)
    tokens = forward_tokens(model.eval(), images_for("swin", size=(42, 30)))
    assert tokens.grid == (11, 8) and tokens.prefix.shape[1] == 0
    assert class_token(model, refine(model, tokens)).shape == (2, 24)


@pytest.mark.filterwarnings("ignore::UserWarning")  # from the way in which timm resizes the table of positions
def test_swin_may_change_its_window():
    model = attach_locat(MODELS["swin"]()).eval()
    model.set_input_size(img_size=(56, 56), window_size=14)
    assert model.layers[0].blocks[0].attn.gaug.initial_grid == (7, 7)  # the constants belong to the weights
    assert features(model, images_for("swin", size=(56, 56))).shape == (2, 24)
