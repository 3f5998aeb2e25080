"""Ways in which other people's programs use a timm model: each works on a LocAt model as on its vanilla twin."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from ssl_locat.benchmarks.timing import peak_bytes
from ssl_locat.errors import UserError
from ssl_locat.models import attach_locat, features
from ssl_locat.models.attention import forced_backend
from ssl_locat.models.grid import Grid
from ssl_locat.models.registry import ROPE_MIXED

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "dynamic_img_size": True}
AXIAL = {"use_rot_pos_emb": True, "global_pool": "token"}
MAKE = {
    "vit": lambda **more: VisionTransformer(**SMALL, **more),
    "registers": lambda **more: VisionTransformer(**SMALL, reg_tokens=4, **more),
    "rope_axial": lambda **more: Eva(**SMALL, **AXIAL, **more),
    "rope_mixed": lambda **more: Eva(**{**ROPE_MIXED, **SMALL, **more}),
}


def locat(name, gaug=True, **more):
    torch.manual_seed(0)
    model = attach_locat(MAKE[name](**more), gaug=gaug)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images(*size, batch=2, seed=1):
    return torch.randn(batch, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(seed))


# ---- blocks one by one


def tokens_of(model, x):
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


@pytest.mark.parametrize("size", [(32, 32), (48, 24), (16, 64)])
def test_blocks_may_be_called_one_by_one(size):
    model, x = locat("registers"), images(*size)
    tokens = tokens_of(model, x)
    expected = model.forward_features(x)
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(model.norm(tokens), expected)
    torch.testing.assert_close(model.norm(model.blocks(tokens_of(model, x))), expected)
    torch.testing.assert_close(model.norm(checkpoint_seq(model.blocks, tokens_of(model, x))), expected)


def test_a_block_alone_never_guesses_the_grid():
    model = locat("vit")
    block = model.blocks[0]
    assert block(torch.randn(1, 17, 24)).shape == (1, 17, 24)  # as many as the grid that it is trained at has
    with pytest.raises(UserError, match=r"with 12 patches.*no image gave that many"):
        block(torch.randn(1, 13, 24))
    tokens = tokens_of(model, images(32, 24))
    torch.testing.assert_close(block(tokens), block(tokens, attn_mask=Grid(4, 3)))
    other = tokens_of(model, images(24, 32))  # 12 patches, too
    with pytest.raises(UserError, match="images of two grids had that many"):
        block(other)
    with pytest.raises(UserError, match="is not causal"):
        block(other, attn_mask=Grid(3, 4), is_causal=True)
    assert not torch.equal(block(other, attn_mask=Grid(3, 4)), block(other, attn_mask=Grid(4, 3)))
    torch.testing.assert_close(model(images(24, 32)), copy.deepcopy(model)(images(24, 32)))  # whole models are always told


# ---- less memory


DEEP = {"depth": 8, "img_size": 64, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
FAMILIES = {
    "locatvit_tiny": DEEP,
    "locatvit_tiny_rope_mixed": DEEP,
    "locatjumbo_tiny": {**DEEP, "num_class_tokens": 2},
    "locat_vit_tiny_patch16_224": DEEP,
    "locatswin_tiny": {
        "depths": (8, 1),
        "embed_dim": 24,
        "num_heads": (2, 2),
        "img_size": 64,
        "window_size": 8,
        "num_classes": 0,
    },
}


def shallow(name, options=None):
    """A model of a family, two blocks deep."""
    options = {**(options or FAMILIES[name])}
    options |= {"depths": (2, 1)} if "depths" in options else {"depth": 2}
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("through", ["forward_intermediates", "features_only", "forward_features"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_saves_memory(name, through):
    """Measured: what a step needs beyond its weights falls to less than half at depth 8."""
    peaks = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        maps = {"features_only": True, "out_indices": [-1]} if through == "features_only" else {}
        model = timm.create_model(name, **FAMILIES[name], **maps)
        getattr(model, "model", model).set_grad_checkpointing(recompute)  # a getter holds the model
        call = {
            "forward_intermediates": lambda x, m=model: m.forward_intermediates(x, intermediates_only=True, indices=2)[-1],
            "features_only": lambda x, m=model: m(x)[-1],
            "forward_features": lambda x, m=model: m.forward_features(x),
        }[through]
        x = torch.randn(8, 3, 64, 64)
        call(x).square().mean().backward()  # gradients are there before it is measured
        peaks[recompute] = peak_bytes(lambda c=call, x=x: c(x).square().mean().backward())
    assert peaks[True] < 0.5 * peaks[False], peaks


# ---- patch dropout


@pytest.mark.parametrize("backend", ["reference", "sdpa", "tiled"])
@pytest.mark.parametrize("name", MAKE)
def test_dropped_patches_are_as_if_masked_out(name, backend):
    """A step on kept patches equals one on all of them whose attention never looks at the others: the bias is the full matrix, cut."""
    model = locat(name, patch_drop_rate=0.5)
    x = images(40, 24)
    model.train()
    with forced_backend(backend):
        torch.manual_seed(3)
        short = model.forward_features(x)
    prefix = model.num_prefix_tokens
    assert short.shape[1] == prefix + 7  # of 15
    torch.manual_seed(3)
    kept = torch.argsort(torch.randn(2, 15), dim=-1)[:, :7]  # what timm's patch dropout draws
    model.eval()

    def only_kept(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        hidden = torch.ones(2, 15, dtype=torch.bool).scatter_(1, kept, False)
        hidden = F.pad(hidden, (prefix, 0))[:, None, None]
        return ((q @ k.mT / q.shape[-1] ** 0.5 + attn_mask).masked_fill(hidden, -torch.inf)).softmax(-1) @ v

    original = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = only_kept
        with forced_backend("sdpa"):
            whole = model.forward_features(x)
    finally:
        F.scaled_dot_product_attention = original
    torch.testing.assert_close(short[:, :prefix], whole[:, :prefix], rtol=1e-4, atol=1e-5)
    picked = whole[:, prefix:].gather(1, kept[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(short[:, prefix:], picked, rtol=1e-4, atol=1e-5)


def test_patch_dropout_trains_with_checkpointing_and_in_intermediates():
    model = locat("rope_mixed", patch_drop_rate=0.5).train()
    model.set_grad_checkpointing()
    maps = model.forward_intermediates(images(), output_fmt="NLC", intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 8, 24)] * 2
    maps[-1].square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if ".gaug." in n)
    pooled = locat("vit", gaug={"fast": "reference", "initial_grid": (32, 32)}, patch_drop_rate=0.5).train()
    with pytest.raises(UserError, match="patches were dropped"):
        pooled(images())


# ---- tracing, scripting, transforms


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
@pytest.mark.parametrize("name", MAKE)
def test_a_trace_serves_other_sizes(name):
    model = locat(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(24, 40))
        for size in ((24, 40), (32, 32), (16, 64), (64, 16)):
            torch.testing.assert_close(traced(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_of_every_family_serves_other_sizes(name):
    model = shallow(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(64, 96))
        for size in ((64, 96), (64, 64), (96, 32)):
            torch.testing.assert_close(traced(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-4)


VARIANTS = [{}, {"source": "input"}, {"isotropic": True}, {"sigma": 1.5}, {"alpha": "one"}, {"alpha": "auto"}, {"kernel": "laplace"}, {"kernel": "inverse", "disable_clamp": True}]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("gaug", VARIANTS)
def test_every_kind_of_gaug_scripts(gaug):
    model = locat("registers", gaug=gaug)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in ((32, 32), (24, 48)):
            torch.testing.assert_close(scripted(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", ["locatjumbo_tiny", "locatvit_tiny_rope_mixed", "locatswin_tiny"])
def test_every_family_scripts(name):
    options = {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 16} if "swin" in name else {"depth": 2, "num_classes": 0}
    model = timm.create_model(name, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(images(64, 96)), model(images(64, 96)), rtol=1e-4, atol=1e-4)


def test_plain_fx_traces_where_the_twin_does():
    """With a static image size; timm's resizing of positions needs timm's own tracer."""
    options = {key: value for key, value in SMALL.items() if key != "dynamic_img_size"}
    model = attach_locat(VisionTransformer(**options)).eval()
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(images()), model(images()))
    with pytest.raises(UserError, match="takes no attention mask"):
        graph(images(), torch.zeros(17, 17))


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_transforms_of_torch_func():
    model = locat("vit")
    stack = torch.stack([images(seed=s) for s in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(model)(stack), torch.stack([model(x) for x in stack]), rtol=1e-4, atol=1e-5)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = images(56, 56)  # 49 patches: more than are served by one call

    def loss(p):
        return torch.func.functional_call(model, p, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-3 * parameter.grad.abs().max().item())


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("name", FAMILIES)
def test_vmap_where_the_twin_has_it(name):
    twin = {"locatswin_tiny": "swin_tiny_patch4_window7_224"}.get(name, name.removeprefix("locat_").removeprefix("locat"))
    stack = torch.stack([images(64, 64, seed=s) for s in range(2)])
    with torch.no_grad():
        try:
            torch.vmap(shallow(twin, FAMILIES[name]))(stack)
        except RuntimeError as error:
            pytest.skip(f"the vanilla twin has none: {str(error).splitlines()[0]}")
        model = shallow(name)
        torch.testing.assert_close(torch.vmap(model)(stack), torch.stack([model(x) for x in stack]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)])
def test_any_dtype(dtype, bound):
    """bound: relative to the largest feature; the eight bits of bfloat16 pass two blocks."""
    model = locat("vit")
    x = images(56, 56)
    expected, other = features(model, x), copy.deepcopy(model).to(dtype)
    actual = features(other, x.to(dtype))
    assert actual.dtype == dtype and (actual.float() - expected).abs().max() <= bound * expected.abs().max()
    actual.sum().backward()
    assert other.blocks[0].attn.gaug.log_var.weight.grad.dtype == dtype


def test_float64_is_exact_to_float64():
    model = locat("vit").double()
    x = images(56, 56).double()
    with forced_backend("reference"):
        expected = features(model, x)
    torch.testing.assert_close(features(model, x), expected, rtol=1e-12, atol=1e-12)


def test_channels_last():
    model = locat("vit")
    x = images(40, 24)
    expected = model(x)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)


def test_features_only_of_a_twin_by_timms_name():
    getter = timm.create_model("locat_vit_tiny_patch16_224", depth=4, features_only=True, out_indices=(1, 3)).eval()
    assert [m.shape for m in getter(images(64, 96))] == [(2, 192, 4, 6)] * 2
    assert getter.model.has_gaug
