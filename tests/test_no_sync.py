"""A step waits for the device nowhere: its operators are run on fake CUDA tensors, which have shapes but no values and need no GPU.

Reading a value (`.item()`, `if tensor:`, `nonzero`, boolean indexing) fails on them by itself; copies between CPU and device are noted.
Autograd wants a driver for CUDA's backward pass, so that this one part runs on fake CPU tensors, where reading a value fails just so.
"""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_locat.backbone import create_backbone
from ssl_locat.models import features
from ssl_locat.models.attention import forced_backend
from ssl_locat.objectives import Masks, Progress
from ssl_locat.objectives.dino import DINO
from ssl_locat.objectives.gram import Gram
from ssl_locat.objectives.ibot import IBOT
from ssl_locat.objectives.koleo import KoLeo
from ssl_locat.optim import build_optimizer, clip_gradients, set_hyperparameters
from ssl_locat.student_teacher import StudentTeacher

SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32}
SWIN = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "img_size": 56}
HEAD = {"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}


class Copies(TorchDispatchMode):
    """Notes every operator whose tensors lie on more than one device; numbers (0-dim CPU tensors) travel with the launch."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({t.device.type for t in tensors if t.ndim or "copy" in str(func)}) > 1:
            self.seen.append(str(func))
        return result


def fake(tensor: torch.Tensor, mode: FakeTensorMode, device: str) -> torch.Tensor:
    made = mode.from_tensor(tensor)
    with mode:
        return made.detach().to(device)


def fake_module(module: nn.Module, mode: FakeTensorMode, device: str) -> nn.Module:
    """The module with a fake in the place of each parameter and buffer."""
    swaps: dict[torch.Tensor, torch.Tensor] = {}  # a head may be shared

    def swap(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in swaps:
            made = fake(tensor, mode, device)
            swaps[tensor] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return swaps[tensor]

    for part in module.modules():
        for store in (part._parameters, part._buffers):
            store.update({name: swap(tensor) for name, tensor in store.items() if tensor is not None})
    return module


def backward(loss: torch.Tensor, module: nn.Module) -> None:
    """By autograd on the CPU; on a device that is not there, gradients out of nowhere."""
    if loss.device.type == "cpu":
        return loss.backward()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("locatvit_tiny", SMALL),
        ("locatregvit_tiny", {**SMALL, "pos_resize": "dino", "gaug": {"kernel": "laplace", "alpha": "auto"}}),
        ("locatvit_tiny_rope_mixed", SMALL),
        ("locatjumbo_tiny", {**SMALL, "num_class_tokens": 2}),
        ("locatswin_tiny", SWIN),
    ],
)
def test_no_model_waits_for_the_device(name, options):
    model, mode = create_backbone(name, **options).train(), FakeTensorMode()
    fake_module(model, mode, "cuda")
    with mode, forced_backend("sdpa"):
        sizes = [(56, 56), (112, 56)] if "swin" in name else [(32, 32), (16, 24)]
        images = [torch.randn(2, 3, *size, device="cuda") for size in sizes]
        with Copies() as copies:
            found = [features(model, each) for each in images]
    assert copies.seen == [] and all(each.device.type == "cuda" for each in found)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_no_objective_waits_for_the_device(device):
    """Student and teacher, masks, all dense losses, clipping, AdamW, centres and the teacher's update."""
    losses = nn.ModuleDict(
        {"dino": DINO(**HEAD), "ibot": IBOT(**HEAD), "koleo": KoLeo(min_images=1), "gram": Gram(anchor_scale=2)}
    )
    model, mode = StudentTeacher(create_backbone("locatvit_tiny", **SMALL), losses), FakeTensorMode()
    hidden = losses["ibot"].make_masks([1, 2, 3, 4], 2, (4, 4))
    index = hidden.flatten().nonzero().squeeze(1)  # on the CPU, before anything is launched
    assert len(index)
    masks = Masks(*(fake(tensor, mode, device) for tensor in (hidden, index)))
    for module in (model, losses):
        fake_module(module, mode, device)
    with mode, forced_backend("sdpa"):
        crops, local = (torch.randn(8, 3, size, size, device=device) for size in (32, 16))
        optimizer = build_optimizer(model.student, (0.9, 0.999))
        with Copies() as copies:
            set_hyperparameters(optimizer, 1e-3, 0.04)
            targets, _ = model.targets(crops, 2, masks)
            views = model.student(crops, local, 2, masks)
            loss = sum(losses[name](views[name], targets[name], Progress(0, 0.0, 1.0))[0] for name in losses)
            backward(loss, model.student)
            clip_gradients(model.student.parameters(), 3.0)
            optimizer.step()
            for objective in losses.values():
                objective.finish_step()
            model.update_teacher(0.99)
    assert copies.seen == []


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.tolist()]
)
def test_waiting_would_be_noticed(wait):
    with FakeTensorMode(), Copies(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        wait(torch.randn(3, device="cuda"))


def test_copies_would_be_noticed():
    with FakeTensorMode(), Copies() as copies:
        torch.randn(3, device="cuda").cpu()
        torch.ones(3).to("cuda")
    assert len(copies.seen) == 2
