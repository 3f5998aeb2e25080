"""A step waits for the device nowhere: its operators are run on fake CUDA tensors, which have shapes but no values and need no GPU.

Reading a value (`.item()`, `if tensor:`, `nonzero`, boolean indexing) fails on them by itself; copies between CPU and device are noted.
Autograd wants a driver for CUDA's backward pass, so that this one part runs on fake CPU tensors, where reading a value fails just so.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ssl_locat.data.images.crops import MultiCrop
from ssl_locat.models import features
from ssl_locat.models.attention import forced_backend
from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives import Masks, Progress
from ssl_locat.objectives.dino import DINO
from ssl_locat.objectives.gram import Gram
from ssl_locat.objectives.ibot import IBOT
from ssl_locat.objectives.koleo import KoLeo
from ssl_locat.optim.optim import build_optimizer, clip_gradients, set_hyperparameters
from ssl_locat.pretraining.student_teacher import StudentTeacher

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


class RealOnCPU(TorchDispatchMode):
    """CPU tensors are computed with, CUDA tensors are fakes; notes what would make the CPU wait: copies that were not asked to be
    asynchronous, from memory that is not pinned, and CPU tensors (as indices, say) among an operator's CUDA ones."""

    def __init__(self):
        super().__init__()
        self.blocking: list[str] = []
        self.pinned = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.is_pinned.default:
            return args[0] in self.pinned
        if func is torch.ops.aten._pin_memory.default:  # wants a driver
            self.pinned[args[0]] = True
            return args[0]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        to_device = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not to_device and all(t.device.type == "cpu" for t in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        here = [t for t in given if t.device.type == "cpu" and (t.ndim or to_device)]
        if here and not (kwargs.get("non_blocking") and all(t in self.pinned for t in here)):
            self.blocking.append(str(func))
        return func(*args, **kwargs)


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
    masks = Masks(*(fake(tensor, mode, device) for tensor in (hidden, index)), cells=hidden.shape[1])
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


@pytest.mark.parametrize("mode", ["cpu", "device-photometric", "device"])
def test_crops_are_finished_without_waiting(mode):
    """What a step of prefetching launches while the batch before it trains."""
    crops, rng = MultiCrop(32, 16, 2, mode=mode), np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((300, 400), (200, 500), (130, 130), (300, 380))]
    payload = crops.collate([crops.cut(image, seed) for seed, image in enumerate(images)])
    with FakeTensorMode(allow_non_fake_inputs=True), RealOnCPU() as tensors:
        payload = {name: tensor.pin_memory() for name, tensor in payload.items()}  # by the stream
        finished = crops.finish(payload, torch.device("cuda"))
    assert tensors.blocking == []
    assert [tuple(t.shape) for t in finished[:2]] == [(8, 3, 32, 32), (8, 3, 16, 16)] and finished[2] is None  # no anchor's crops
    assert all(t.device.type == "cuda" for t in finished[:2])


@pytest.mark.parametrize(
    "copy",
    [
        lambda x, index: x[index],
        lambda x, index: x.index_copy(0, index.to("cuda"), x[:2]),
        lambda x, index: index.to("cuda", non_blocking=True),  # not pinned
        lambda x, index: index.pin_memory().to("cuda"),
    ],
)
def test_waiting_for_a_copy_would_be_noticed(copy):
    with FakeTensorMode(allow_non_fake_inputs=True), RealOnCPU() as tensors:
        x, index = torch.zeros(4, 2, device="cuda"), torch.tensor([1, 2])
        index.pin_memory().to("cuda", non_blocking=True)
        assert tensors.blocking == []
        copy(x, torch.tensor([1, 2]))
    assert len(tensors.blocking) == 1


def test_copies_would_be_noticed():
    with FakeTensorMode(), Copies() as copies:
        torch.randn(3, device="cuda").cpu()
        torch.ones(3).to("cuda")
    assert len(copies.seen) == 2
