"""A network that gets some of an image's patches: the same as dense attention in which nobody sees the others, positions and GAug included."""

import random

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssl_locat.errors import UserError
from ssl_locat.models.attach import attach_locat
from ssl_locat.models.gaug import GAug
from ssl_locat.models.packing import allow_packing, packed_tokens
from ssl_locat.models.prr import prr
from ssl_locat.models.tokens import at_places, forward_tokens, refine
from ssl_locat.objectives.masking import Keep, Masks, one_block

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 4, "num_classes": 0, "dynamic_img_size": True}
ROPE = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 4, "num_classes": 0, "dynamic_img_size": True}
MODELS = {
    "ViT": lambda: attach_locat(timm.create_model("vit_tiny_patch16_224", reg_tokens=2, **SMALL)),
    "laplace": lambda: attach_locat(timm.create_model("vit_tiny_patch16_224", **SMALL), gaug={"kernel": "laplace"}),
    "rope": lambda: attach_locat(timm.create_model("vit_small_patch16_dinov3", **ROPE)),
    "mixed": lambda: attach_locat(timm.create_model("vit_small_patch16_rope_mixed_224", **ROPE)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # far from what they start as: positions and Gaussians that differ
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model


def some(count: int, cells: int, n: int) -> torch.Tensor:
    return torch.stack([torch.randperm(cells)[:n].sort().values for _ in range(count)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_kept_patches_equal_dense_attention_masked_to_them(name, size, monkeypatch):
    model, images = made(name), torch.randn(2, 3, *size)
    cells = size[0] * size[1] // 16
    kept = some(2, cells, 2 * cells // 5)
    found = forward_tokens(model, images, kept=kept)
    prefix = found.prefix.shape[1]
    there = torch.zeros(2, prefix + cells, dtype=torch.bool)
    there[:, :prefix] = True
    there.scatter_(1, prefix + kept, True)
    unseen = torch.zeros(2, 1, 1, prefix + cells).masked_fill(~there[:, None, None], float("-inf"))
    attend = GAug.attend
    monkeypatch.setattr(GAug, "attend", lambda *a, **k: attend(*a, **{**k, "extra_bias": unseen}))
    whole = forward_tokens(model, images)
    torch.testing.assert_close(found.prefix, whole.prefix, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.patches, at_places(whole.patches, kept), atol=2e-5, rtol=1e-4)
    # PRR refines what is there
    tokens = torch.cat([whole.prefix, whole.patches], 1)
    refined = prr(model.norm(tokens), model.prr.num_heads, there)
    torch.testing.assert_close(refine(model, found).prefix, refined[:, :prefix], atol=2e-5, rtol=1e-4)


def test_gradients_are_those_of_the_masked_network_and_plain_vits_keep_too():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    images, kept = torch.randn(2, 3, 32, 32), some(2, 64, 20)
    weights = list(model.parameters())
    found = torch.autograd.grad(forward_tokens(model, images, kept=kept).patches.square().mean(), weights, allow_unused=True)
    mask = torch.zeros(2, 65, dtype=torch.bool).scatter_(1, 1 + kept, True)
    mask[:, 0] = True
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks:
        x = block(x, attn_mask=mask[:, None, None])
    wanted = torch.autograd.grad(at_places(x[:, 1:], kept).square().mean(), weights, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["ViT", "laplace"])
def test_packed_passes_keep_the_same_patches(name):
    model = made(name)
    large, small, kept = torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16), some(4, 64, 16)
    masks, token = torch.rand(4, 64) < 0.3, torch.randn(24)
    apart = [forward_tokens(model, large, masks=masks, mask_token=token, kept=kept), forward_tokens(model, small)]
    packed = packed_tokens(allow_packing(model), [large, small], masks=masks, mask_token=token, kept=kept)
    for one, other in zip(apart, packed, strict=True):
        torch.testing.assert_close(one.prefix, other.prefix, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(one.patches, other.patches, atol=2e-5, rtol=1e-4)


def test_models_that_cannot_say_so():
    images, kept = torch.randn(1, 3, 32, 32), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(UserError, match="patch_drop_rate both leave patches out"):
        forward_tokens(attach_locat(timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5, **SMALL)), images, kept=kept)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2)
    )
    with pytest.raises(UserError, match="cannot leave patches out"):
        forward_tokens(swin, images, kept=kept)


# --- which patches ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 0.99), st.sampled_from(["random", "block"]), st.integers(0, 1 << 60))
def test_each_crop_keeps_as_many_different_patches_by_its_own_seed(rows, cols, share, shape, seed):
    keep = Keep(share, shape)
    kept = keep.draw([seed, seed + 1, seed], 2, (rows, cols))
    if kept is None:
        assert keep.count(rows * cols) == rows * cols
        return
    assert kept.shape == (6, keep.count(rows * cols)) and kept.min() >= 0 and kept.max() < rows * cols
    assert (kept.diff(dim=1) > 0).all()
    assert torch.equal(kept[0], kept[2]) and torch.equal(kept[3], kept[5])
    assert torch.equal(kept[1::3], keep.draw([seed + 1], 2, (rows, cols)))  # whatever else is in the batch


@given(st.integers(1, 12), st.integers(1, 12), st.data(), st.integers(0, 1 << 60))
def test_a_block_is_as_tight_as_its_cells_allow(rows, cols, data, seed):
    count = data.draw(st.integers(1, rows * cols))
    cells = one_block(random.Random(seed), (rows, cols), count)
    assert len(set(cells)) == count
    height, width = (max(side) - min(side) + 1 for side in zip(*(divmod(cell, cols) for cell in cells), strict=True))
    assert (height - 1) * width < count <= height * width


def test_masks_and_kept_patches_agree_on_places():
    """Hidden patches of the student are those of the teacher, one by one, in one order."""
    torch.manual_seed(0)
    hidden, kept = torch.rand(6, 20) < 0.4, some(6, 20, 7)
    masks = Masks.of(hidden, kept=kept)
    patches = torch.arange(6 * 20).view(6, 20, 1).float()
    chosen = at_places(patches, kept).flatten()[masks.index].long()
    both = torch.zeros(6, 20, dtype=torch.bool).scatter_(1, kept, True) & hidden
    assert torch.equal(chosen, both.flatten().nonzero()[:, 0])
    assert torch.equal(masks.on_grid(), both)
    assert torch.equal(masks.on_grid(kept_out=True), hidden | ~torch.zeros(6, 20, dtype=torch.bool).scatter_(1, kept, True))
    alone = Masks.of(None, kept=kept, cells=20)
    assert alone.on_grid() is None and alone.on_grid(kept_out=True).sum() == 6 * 13
