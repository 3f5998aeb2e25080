"""Training on a CPU in 16 bits on few tokens: unfused attention, since the fused kernel's backward pass takes many times as long there."""

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_locat.models.tokens import forward_tokens
from ssl_locat.runs.distributed import checkpoint_activations

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 1, "img_size": 32, "patch_size": 8, "num_classes": 0, "dynamic_img_size": True}
FEW, MANY = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 96, 96)  # 17 and 145 tokens


class Counted(TorchDispatchMode):
    """How often the fused kernel is called."""

    fused = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.fused += "scaled_dot_product_flash_attention_for_cpu" in str(function)
        return function(*args, **(kwargs or {}))


def made() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL)


def fused_calls(model, images, dtype=torch.bfloat16, grad=True):
    with torch.set_grad_enabled(grad), Counted() as counted:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = forward_tokens(model, images).patches.float().square().mean()
        if grad:
            out.backward()
    return counted.fused


def test_only_training_in_16_bits_on_few_tokens_is_unfused():
    model = made()
    assert fused_calls(model, FEW) == 0
    assert fused_calls(model, MANY) and fused_calls(model, FEW, torch.float32) and fused_calls(model, FEW, grad=False)


@pytest.mark.parametrize("how", ["timm's", "ours"])
def test_blocks_that_are_computed_again_are_the_same_there(how):
    model, plain = made(), made()
    model.set_grad_checkpointing() if how == "timm's" else checkpoint_activations(model.blocks)
    assert fused_calls(model, FEW)
    fused_calls(plain, FEW)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=0.02 * float(theirs.grad.abs().max()), rtol=0)


def test_gradients_are_those_of_float32():
    model, exact = made(), made()
    fused_calls(model, FEW)
    fused_calls(exact, FEW, torch.float32)
    ours, theirs = (one.blocks[0].attn.qkv.weight.grad for one in (model, exact))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
