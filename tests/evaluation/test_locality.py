"""Locality scores and attention maps against slow loops, and both protocols on real files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_locat.errors import ConfigError, UserError
from ssl_locat.evaluation.protocols import attention, locality
from ssl_locat.models import last_blocks
from ssl_locat.models.backbone import create_backbone
from ssl_locat.models.maps import attention_maps

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 8, "img_size": 32}


@pytest.fixture
def folder(tmp_path):
    """Five images, without labels."""
    path = tmp_path / "images"
    path.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    return path


def small(name="locatvit_tiny", **options):
    torch.manual_seed(0)
    return create_backbone(name, **{**TINY, **options}).eval()


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (2, 2)])
def test_locality_score_equals_a_loop(grid):
    rows, cols = grid
    patches = torch.randn(2, rows * cols, 6)
    expected = []
    for image in patches:
        scores = []
        for y in range(rows):
            for x in range(cols):
                near = [
                    torch.cosine_similarity(image[y * cols + x], image[v * cols + u], dim=0).item()
                    for v in range(max(y - 1, 0), min(y + 2, rows))
                    for u in range(max(x - 1, 0), min(x + 2, cols))
                    if (v, u) != (y, x)
                ]
                scores.append(sum(near) / len(near))
        expected.append(sum(scores) / len(scores))
    torch.testing.assert_close(locality.locality_score(patches, grid), torch.tensor(expected))


def test_equal_patches_are_fully_local():
    assert locality.locality_score(torch.ones(1, 12, 4), (3, 4)).item() == pytest.approx(1)


def test_spread_is_mean_and_percentiles():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 10 + 0.1
    spread = locality.Spread(torch.device("cpu"))
    for part in values.chunk(7):
        spread.add(part)
    found = spread.summary()
    assert found["mean"] == pytest.approx(values.mean().item(), rel=1e-6)
    for percent in locality.PERCENTILES:
        assert found[f"p{percent}"] == pytest.approx(values.quantile(percent / 100).item(), rel=5e-3)


def test_locality_protocol(folder, tmp_path):
    model = small()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.gaug.log_var.weight)  # sigma 1 everywhere
        torch.nn.init.zeros_(block.attn.gaug.log_alpha.weight)  # alpha ln 2
    metrics = locality.evaluate(model, data={"test": str(folder)}, batch_size=2, workers=0, out=str(tmp_path / "out"))
    assert [metrics[f"sigma_layer{i}"] for i in (1, 2, 3)] == pytest.approx([1, 1, 1], rel=1e-4)
    assert metrics["alpha_layer2"] == pytest.approx(0.6931, rel=1e-4)
    assert -1 <= metrics["patch_cls"] <= 1 and metrics["locality"] == metrics["locality_layer3"]
    written = json.loads((tmp_path / "out" / "locality.json").read_text())
    assert written["images"] == 5 and written["gaug"][0]["sigma"]["p50"] == pytest.approx(1, rel=2e-3)
    assert (tmp_path / "out" / "locality.png").stat().st_size > 1000
    assert not any(m._forward_hooks for m in model.modules())  # nothing stays behind


def test_two_models_are_in_one_figure_and_every_image_counts(folder, tmp_path):
    vanilla = "timm:vit_tiny?" + "&".join(f"{name}={value}" for name, value in TINY.items())
    options = {"data": {"test": str(folder)}, "workers": 0}
    both = locality.evaluate(small(), **options, beside=vanilla, out=str(tmp_path / "both"))
    alone = locality.evaluate(small(), **options, out=str(tmp_path / "alone"))
    assert both["images"] == both["images_beside"] == 5
    assert all(both[name] == value for name, value in alone.items())
    assert {"locality_beside", "patch_cls_layer3_beside"} <= both.keys() and "sigma_layer1_beside" not in both
    written = json.loads((tmp_path / "both" / "locality.json").read_text())
    assert len(written["beside"]["locality"]) == 3 and written["locality"] != written["beside"]["locality"]
    sizes = [(tmp_path / name / "locality.png").stat().st_size for name in ("both", "alone")]
    assert sizes[0] > sizes[1]  # a second curve


def test_locality_of_models_without_class_token_or_gaug(folder):
    swin = create_backbone("locatswin_tiny", embed_dim=12, depths=(2, 2), num_heads=(2, 4), img_size=56)
    metrics = locality.evaluate(swin, data={"test": str(folder)}, workers=0, out=None)
    assert "patch_cls" not in metrics and {"locality_layer2", "sigma_layer4"} <= metrics.keys()
    metrics = locality.evaluate(small("vit_tiny"), data={"test": str(folder)}, images=2, workers=0, out=None)
    assert "sigma_layer1" not in metrics and "patch_cls_layer3" in metrics


@pytest.mark.parametrize("name", ["locatvit_tiny", "vit_tiny", "locatvit_tiny_rope_mixed", "locatregvit_tiny", "locatjumbo_tiny"])
def test_maps_are_the_weights_that_the_model_used(name):
    """weights @ v, projected, is what the attention returned."""
    model = small(name, num_heads=2 if "rope" in name else 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images, block = torch.randn(2, 3, 32, 48), model.blocks[1]
    seen = {}
    block.attn.register_forward_hook(lambda m, inputs, output: seen.update(x=inputs[0], output=output))
    (weights,) = attention_maps(model, images, [1])
    v = block.attn.qkv(seen["x"]).chunk(3, dim=-1)[2].unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
    output = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, seen["output"], rtol=1e-4, atol=1e-5)
    assert len(last_blocks(model, images, 3)) == 3


def test_attention_protocol(folder, tmp_path):
    model = small()
    metrics = attention.evaluate(
        model,
        data={"test": str(folder)},
        images=2,
        beside="timm:vit_tiny?embed_dim=24&depth=3&num_heads=3&patch_size=8&img_size=32",
        out=str(tmp_path / "out"),
    )
    assert set(metrics) == {"patch_distance", "cls_entropy", "patch_distance_beside", "cls_entropy_beside"}
    assert metrics["patch_distance"] < metrics["patch_distance_beside"]  # GAug draws patches' attention near, from the first step
    written = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert np.array(written["beside"]["maps"]).shape == (2, 3, 4, 4)
    assert written["model"]["queries"] == ["class token", [0.5, 0.5], [0.25, 0.25]]
    assert (tmp_path / "out" / "attention.png").stat().st_size > 1000


def test_what_cannot_be_shown_is_said(folder):
    with pytest.raises(UserError, match=r"layer 7.*3 blocks"):
        attention.evaluate(small(), data={"test": str(folder)}, layer=7, out=None)
    with pytest.raises(ConfigError, match="fraction"):
        attention.evaluate(small(), data={"test": str(folder)}, patches=[(3, 4)], out=None)
    swin = create_backbone("locatswin_tiny", embed_dim=12, depths=(2,), num_heads=(2,), img_size=28)
    with pytest.raises(UserError, match="SwinTransformer"):
        attention.evaluate(swin, data={"test": str(folder)}, image_size=32, out=None)
