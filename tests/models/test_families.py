"""LocAt on every kind of ViT that timm has: the share of its names that is served, and for each kind that the start is the vanilla model, that
output and gradients then change, and that bumps lie where the patches lie."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models import list_models
from torch import nn

from ssl_locat.errors import UserError
from ssl_locat.models import attach_locat, class_token, features, forward_tokens, refine
from ssl_locat.models.families.front import GaugFront
from ssl_locat.models.families.hiera import places
from ssl_locat.models.gaug import GAug
from ssl_locat.models.served import MODULES, SMALL, attached, images_of, names_of, small, table, why_not

# by timm's name: at least one of each class of attention, of each kind of position, pooling and block
KINDS = {
    "vision_transformer": ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_pwee_patch16_reg1_gap_256", "vit_dlittle_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"],
    "vision_transformer_hybrid": ["vit_tiny_r_s16_p8_224"],
    "vision_transformer_relpos": ["vit_relpos_base_patch16_cls_224", "vit_srelpos_small_patch16_224", "vit_relpos_small_patch16_rpn_224"],
    "vision_transformer_sam": ["samvit_base_patch16", "samvit_base_patch16_224"],
    "deit": ["deit3_small_patch16_224", "deit_tiny_distilled_patch16_224"],
    "eva": ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224"],
    "beit": ["beitv2_base_patch16_224"],
    "cait": ["cait_xxs24_224"],
    "swin_transformer": ["swin_tiny_patch4_window7_224"],
    "swin_transformer_v2": ["swinv2_tiny_window8_256"],
    "swin_transformer_v2_cr": ["swinv2_cr_tiny_ns_224"],
    "naflexvit": ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_map"],
    "hiera": ["hiera_tiny_224", "hiera_small_abswin_256"],
    "gcvit": ["gcvit_xxtiny"],
    "davit": ["davit_tiny"],
    "twins": ["twins_svt_small", "twins_pcpvt_small"],
    "volo": ["volo_d1_224"],
    "pit": ["pit_ti_224", "pit_s_distilled_224"],
}  # fmt: skip
PAIRS = [(module, name) for module, names in KINDS.items() for name in names]


def test_at_least_three_quarters_of_timms_names_are_served(capsys):
    reasons = {(module, name): why_not(module, name) for module in MODULES for name in names_of(module)}
    refused = {pair: why for pair, why in reasons.items() if why is not None}
    share = 1 - len(refused) / len(reasons)
    with capsys.disabled():
        print(f"\nLocAt serves {len(reasons) - len(refused)} of timm's {len(reasons)} names: {share:.1%}")
    assert set(MODULES) == set(SMALL) and share >= 0.75
    # reasons of geometry alone: what asks does not lie anywhere
    assert {module for module, _ in refused} == {"xcit"}
    assert all("neither a query nor a key of it lies anywhere" in why for why in refused.values())


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the table is of timm 1.0.31")
def test_the_docs_table_of_served_names_is_current():
    page = (Path(__file__).parents[2] / "docs/locat-on-timm.md").read_text(encoding="utf-8")
    assert page.partition("<!-- table -->\n")[2].partition("\n<!-- end of table -->")[0] == "\n".join(table()), (
        "write the output of `python -m ssl_locat.models.served` between the marks of docs/locat-on-timm.md"
    )


def test_every_kind_of_attention_is_among_those_whose_numbers_are_checked():
    """So that the few models below stand for all names."""
    checked = {kind for pair in PAIRS for kind in attached(*pair)[1]}
    for module in set(MODULES) - {"xcit"}:
        for name in names_of(module):
            assert attached(module, name)[1] <= checked, name


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_it_starts_as_the_vanilla_model_and_learns(module, name):
    check(module, name)


@pytest.mark.slow
@pytest.mark.parametrize("module", [m for m in SMALL if m != "xcit"])
def test_every_served_name_starts_as_the_vanilla_model_and_learns(module):
    for name in list_models(module=module):
        check(module, name)


def check(module: str, name: str) -> None:
    vanilla, images = small(module, name), images_of(module)
    expected = vanilla(images)
    twin = switch_off(attach_locat(copy.deepcopy(vanilla), prr=False))
    scale = expected.abs().max().item()
    torch.testing.assert_close(twin(images), expected, rtol=0, atol=2e-5 * scale, msg=name)
    locat = attach_locat(copy.deepcopy(vanilla))
    output = locat(images)
    assert (output - expected).abs().max() > 1e-4 * scale, name
    output.square().sum().backward()
    for parameter_name, parameter in locat.named_parameters():
        if ".gaug." in parameter_name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name}: {parameter_name}"
    missing = set(locat.state_dict()) - set(vanilla.state_dict())
    assert all(".gaug.log_" in key for key in missing) and set(vanilla.state_dict()) <= set(locat.state_dict())


def switch_off(model):
    """alpha so small that the bias vanishes."""
    for gaug in gaugs(model):
        nn.init.zeros_(gaug.log_alpha.weight)
        nn.init.constant_(gaug.log_alpha.bias, -40.0)
    return model


def gaugs(model):
    return [module for module in model.modules() if isinstance(module, GAug)]


# bumps of two kinds of timm's blocks are those of plain.py; their values pass through more than `proj`
ELSEWHERE = ("vit_pwee_patch16_reg1_gap_256", "vit_dlittle_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256")


@pytest.mark.parametrize(("module", "name"), [pair for pair in PAIRS if pair[1] not in ELSEWHERE and "_r_" not in pair[1]])
def test_bumps_lie_where_the_patches_lie(module, name):
    """With bumps tall enough each patch sees the nearest place alone, in whatever order the tokens of its attention lie: it gets its own value."""
    model, images = attach_locat(small(module, name), prr=False), images_of(module)
    for gaug in gaugs(model):
        for layer, bias in (
            (gaug.log_var, 3.0),
            (gaug.log_alpha, 1e5),
        ):  # wide enough that the nearest place is higher by thousands
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, bias)
    seen = []
    for attention in (m for m in model.modules() if isinstance(m, GaugFront)):
        if hasattr(attention, "proj_w"):  # heads do not talk about what they found
            nn.init.eye_(attention.proj_w.weight)
            nn.init.zeros_(attention.proj_w.bias)
        if getattr(attention, "q_stride", 1) > 1:  # of the four places that are equally near, none is preferred
            nn.init.zeros_(attention.qkv.weight[: attention.dim_out].data)
            nn.init.zeros_(attention.qkv.bias[: attention.dim_out].data)
        attention.register_forward_hook(lambda *call: seen.append(call))
    model(images)
    assert seen
    for attention, (x, *_), output in seen:
        expected = attention.proj(own_values(attention, x))
        prefix = getattr(attention, "num_prefix_tokens", 0) if x.ndim == 3 else 0
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            output[:, prefix:], expected[:, prefix:], rtol=0, atol=2e-3 * scale, msg=type(attention).__name__
        )


def own_values(attention, x):
    """What each place of x [B, ..., D] has to give: the last third of the projection (half, where queries come from elsewhere)."""
    if hasattr(attention, "kv"):  # Twins: the cell that the patch lies in
        maps = x.mT.unflatten(2, [round(x.shape[1] ** 0.5)] * 2)
        cells = attention.norm(attention.sr(maps).flatten(2).mT) if attention.sr is not None else x
        value = attention.kv(cells).chunk(2, -1)[1].mT.unflatten(2, [maps.shape[2] // attention.sr_ratio] * 2)
        return value.repeat_interleave(attention.sr_ratio, 2).repeat_interleave(attention.sr_ratio, 3).flatten(2).mT
    if attention.qkv is None:
        value = attention.v_proj(x)
    else:
        width = attention.proj.in_features
        value = attention.qkv(x)[..., -width:]
    if getattr(attention, "v_bias", None) is not None:
        value = value + attention.v_bias
    if getattr(attention, "q_stride", 1) > 1:  # Hiera: a query that is pooled of four lies between them
        value = value.unflatten(1, (attention.q_stride, -1)).mean(1)
    return attention.norm(value) if isinstance(getattr(attention, "norm", None), nn.LayerNorm) else value


def test_hieras_places_are_those_of_its_unrolled_tokens():
    model = attach_locat(small("hiera", "hiera_tiny_224"))
    rows, cols = model.tokens_spatial_shape
    where = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1).view(1, -1, 2).float()
    y, x = model.unroll(where)[0].unbind(-1)
    whole = [b.attn for b in model.blocks if not b.attn.use_mask_unit_attn]
    assert whole[0].gaug.initial_grid == (4, 6) and model.blocks[0].attn.gaug.initial_grid == (8, 8)
    units = (rows // 8, cols // 8)
    own_x, own_y = places(units, ((2, 2),) * 3, x.device)
    assert torch.equal(own_x, x) and torch.equal(own_y, y)
    with pytest.raises(UserError, match=r"leaves out mask units"):
        model(images_of("hiera"), mask=torch.tensor([[True, False, False, False, False, True]] * 2))


def test_naflexvit_of_patches_with_coordinates_equals_that_of_images():
    """Two images of different grids in one batch, padded: each as if alone."""
    for name in ("naflexvit_base_patch16_gap", "naflexvit_base_patch16_map"):
        model = attach_locat(small("naflexvit", name)).eval()
        images = [torch.randn(1, 3, 24, 40), torch.randn(1, 3, 32, 16)]
        patches, coordinates = torch.zeros(2, 17, 8 * 8 * 3), torch.zeros(2, 17, 2, dtype=torch.long)
        valid = torch.zeros(2, 17, dtype=torch.bool)
        for i, image in enumerate(images):
            rows, cols = image.shape[2] // 8, image.shape[3] // 8
            own = image.unflatten(3, (cols, 8)).unflatten(2, (rows, 8)).permute(0, 2, 4, 3, 5, 1).reshape(rows * cols, -1)
            patches[i, : rows * cols], valid[i, : rows * cols] = own, True
            coordinates[i, : rows * cols] = torch.stack(
                torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1
            ).view(-1, 2)
        together = model({"patches": patches, "patch_coord": coordinates, "patch_valid": valid})
        torch.testing.assert_close(
            together, torch.cat([model(image) for image in images]), rtol=1e-4, atol=1e-4 * together.abs().max().item()
        )
        with pytest.raises(UserError, match="patch_coord"):
            model.forward_features(patches)


@pytest.mark.parametrize(("module", "name"), [pair for pair in PAIRS if pair[0] != "deit"])
def test_features_are_what_the_head_sees(module, name):
    model, images = attach_locat(small(module, name)), images_of(module)
    if name == "pit_s_distilled_224":
        pytest.skip("has two heads, one per token")
    seen = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features(model, images), seen, rtol=1e-4, atol=1e-4 * seen.abs().max().item())
    tokens = forward_tokens(model, images)
    assert tokens.patches.shape[1] == tokens.grid.rows * tokens.grid.cols
    if module in ("vision_transformer", "eva", "beit", "vision_transformer_relpos", "naflexvit", "swin_transformer_v2", "gcvit"):
        vector = class_token(model, refine(model, tokens))
        torch.testing.assert_close(vector, seen, rtol=1e-4, atol=1e-4 * seen.abs().max().item())


def test_what_a_family_cannot_do_is_said():
    with pytest.raises(UserError, match="between channels"):
        attach_locat(small("xcit", "xcit_nano_12_p16_224"))
    with pytest.raises(UserError, match=r"fast='reference'.*off for Beit"):
        attach_locat(small("beit", "beit_base_patch16_224"), gaug={"fast": "reference"})
    with pytest.raises(UserError, match="patch dropout"):
        attach_locat(small("vision_transformer_sam", "samvit_base_patch16_224", patch_drop_rate=0.5))


@pytest.mark.parametrize(("module", "name"), [(m, names[0]) for m, names in KINDS.items() if m not in ("gcvit", "volo")])
def test_a_twin_is_saved_and_opened_again(module, name, tmp_path):
    model = small(module, f"locat_{name}")
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.has_gaug and again.prr is not None
    images = images_of(module)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
