"""Crops of two sizes in one pass equal a pass for each: attention, whole models, and the student's step with all that is random in it."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssl_locat.errors import UserError
from ssl_locat.models.attach import attach_locat
from ssl_locat.models.attention_packed import BACKENDS, Run, block_diagonal, packed_attention, unsupported_reason
from ssl_locat.models.packing import allow_packing, cannot_pack, packed_tokens
from ssl_locat.models.tokens import forward_tokens
from ssl_locat.objectives.dino import DINO
from ssl_locat.objectives.ibot import IBOT
from ssl_locat.pretraining.student_teacher import StudentTeacher

RUNS = [Run(2, 17), Run(3, 5)]


def packed_inputs(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(49, 2, 32, device=device, dtype=dtype, requires_grad=True) for _ in "qkv"]


def with_gradients(call, inputs):
    out = call(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


def test_packed_sequences_attend_within_themselves():
    inputs = packed_inputs()
    allowed = torch.block_diag(*(torch.ones(run.tokens, run.tokens) for run in RUNS for _ in range(run.batch))).bool()
    assert torch.equal(block_diagonal(RUNS), allowed)

    def slowly(q, k, v):
        logits = torch.einsum("shd,thd->hst", q, k) * 0.3
        return torch.einsum("hst,thd->shd", logits.masked_fill(~allowed, float("-inf")).softmax(-1), v)

    expected = with_gradients(slowly, inputs)
    for backend in ("auto", "blocks", "dense"):
        found = with_gradients(lambda *t, backend=backend: packed_attention(*t, RUNS, scale=0.3, backend=backend), inputs)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


def test_our_blocks_are_those_of_xformers_mask():
    """With the real package, whose masks need no GPU."""
    fmha = pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed: pip install 'ssl_locat[gpu]'")
    mask = fmha.BlockDiagonalMask.from_seqlens([run.tokens for run in RUNS for _ in range(run.batch)])
    theirs = mask.materialize((49, 49), dtype=torch.float32)
    assert torch.equal(theirs == 0, block_diagonal(RUNS)) and torch.equal(theirs.isneginf(), ~block_diagonal(RUNS))
    q, k, v = packed_inputs()
    biased = nn.functional.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), attn_mask=theirs).transpose(0, 1)
    torch.testing.assert_close(packed_attention(q, k, v, RUNS), biased, atol=2e-6, rtol=1e-5)


def test_a_backend_that_cannot_serve_says_why():
    for backend in ("xformers", "varlen"):
        with pytest.raises(UserError, match="these tensors are on 'cpu'"):
            packed_attention(*packed_inputs(), RUNS, backend=backend)
    with pytest.raises(UserError, match="Did you mean 'xformers'"):
        packed_attention(*packed_inputs(), RUNS, backend="xformer")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("auto", "blocks")])
def test_each_kernel_equals_the_blocks(backend):
    inputs = packed_inputs("cuda", torch.float16)
    if reason := unsupported_reason(backend, inputs[0]):
        pytest.skip(f"{backend} {reason}")
    found, expected = (
        with_gradients(lambda *t, name=name: packed_attention(*t, RUNS, backend=name), inputs) for name in (backend, "blocks")
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)  # half precision: eleven bits, squared and summed


OPTIONS = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 0,
    "dynamic_img_size": True,
}


def make(kind: str) -> nn.Module:
    """Models with all that a block may have: layer scale, norms of queries, registers, LocAt, pooled cells."""
    torch.manual_seed(0)
    more = {
        "registers": {"reg_tokens": 3, "init_values": 0.5, "no_embed_class": True},
        "normed": {"qk_norm": True, "global_pool": "avg", "class_token": False},
    }.get(kind, {})
    model = VisionTransformer(**OPTIONS, **more)
    gaug = {"locat": {}, "locat input": {"source": "input"}, "laplace": {"kernel": "laplace"}, "auto alpha": {"alpha": "auto"}}
    return attach_locat(model, gaug[kind]) if kind in gaug else model


KINDS = ("vanilla", "registers", "normed", "locat", "locat input", "laplace", "auto alpha")


def crops(device="cpu") -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 32, 32, device=device), torch.randn(6, 3, 16, 24, device=device)]


def tokens_and_gradients(model, images, packed: bool, **options) -> list[torch.Tensor]:
    first = {name: options.get(name) for name in ("masks", "mask_token")}
    if packed:
        found = packed_tokens(model, images, **first)
    else:
        found = [forward_tokens(model, images[0], **first), *(forward_tokens(model, one) for one in images[1:])]
    values = [tensor for tokens in found for tensor in (tokens.prefix, tokens.patches)]
    loss = sum((value * torch.linspace(-1, 1, value.shape[-1], device=value.device)).square().sum() for value in values)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert [tokens.grid for tokens in found] == [(4, 4), (2, 3)]
    return [*values, *(g for g in grads if g is not None)]


def close(found, expected, tolerance: float) -> None:
    """Within `tolerance` of each tensor's largest value: sums of the same numbers in another order."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=tolerance * max(1.0, theirs.abs().max().item() if theirs.numel() else 0), rtol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_pass_equals_a_pass_for_each_size(kind):
    """Positions, prefix tokens, hidden patches and the Gaussian on each size's own grid; outputs and gradients."""
    model = make(kind)
    hidden = {"masks": torch.rand(4, 16, generator=torch.manual_seed(2)) < 0.4, "mask_token": torch.full((32,), 0.3)}
    expected = tokens_and_gradients(model, crops(), packed=False, **hidden)
    before = {name: type(part).__name__ for name, part in model.named_modules()}
    found = tokens_and_gradients(allow_packing(model), crops(), packed=True, **hidden)
    close(found, expected, 2e-6)
    assert before == {name: type(part).__name__ for name, part in model.named_modules()}
    close(tokens_and_gradients(model, crops(), packed=False, **hidden), expected, 0)  # and others are what they were


@pytest.mark.parametrize("precision", [torch.bfloat16])
def test_half_precision_stays_near(precision):
    model = make("locat")
    expected = tokens_and_gradients(model, crops(), packed=False)
    with torch.autocast("cpu", precision):
        found = tokens_and_gradients(allow_packing(model), crops(), packed=True)
    close([one.float() for one in found], expected, 0.05)


@pytest.mark.parametrize("kind", ["vanilla", "locat"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_students_step_is_the_same_with_all_that_is_random(kind, recompute):
    """Stochastic depth leaves out the same blocks of the same crops; iBOT hides the same patches; recomputed or not."""
    losses = nn.ModuleDict({"dino": DINO(num_prototypes=32, hidden_dim=16), "ibot": IBOT(num_prototypes=32, hidden_dim=16)})
    backbone = VisionTransformer(**OPTIONS, drop_path_rate=0.5)
    backbone = attach_locat(backbone) if kind == "locat" else backbone
    backbone.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    whole, local = torch.randn(8, 3, 32, 32), torch.randn(12, 3, 16, 16)
    results = []
    for packs in (False, True):
        model = StudentTeacher(copy.deepcopy(backbone), losses, pack_crops=packs)
        torch.manual_seed(3)
        for heads in (model.student.heads, model.teacher.heads):
            for parameter in heads.parameters():
                nn.init.normal_(parameter, std=0.1)
        model.student.backbone.set_grad_checkpointing(recompute)
        masks = model.make_masks(losses, [1, 2, 3, 4], whole)
        torch.manual_seed(4)
        outputs = model.student(whole, local, 2, masks)
        flat = [value for name in sorted(outputs) for value in leaves(outputs[name])]
        after = torch.rand(3)  # as many numbers were drawn
        grads = torch.autograd.grad(
            sum(value.square().sum() for value in flat),
            [p for p in model.student.parameters() if p.requires_grad],
            allow_unused=True,
        )
        results.append([*flat, after, *(g for g in grads if g is not None)])
    close(results[1], results[0], 5e-6)


def leaves(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    return [leaf for one in value for leaf in leaves(one)] if isinstance(value, tuple | list) else []


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("swin_tiny_patch4_window7_224", {}, "is no VisionTransformer"),
        ("vit_tiny_patch16_224", {"proj_drop_rate": 0.1}, "at random"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.1}, "at random"),
        (
            "vit_tiny_patch16_224",
            {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
            "ParallelScalingBlock as blocks.0",
        ),
    ],
)
def test_what_cannot_be_packed_is_named(name, options, expected):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    assert expected in cannot_pack(model)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["vanilla", "locat"])
def test_packed_equals_separate_on_a_gpu(kind):
    model = make(kind).cuda()
    expected = tokens_and_gradients(model, crops("cuda"), packed=False)
    close(tokens_and_gradients(allow_packing(model), crops("cuda"), packed=True), expected, 1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        close([one.float() for one in tokens_and_gradients(model, crops("cuda"), packed=True)], expected, 0.1)
