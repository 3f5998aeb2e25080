"""LocAt models under torch.compile and torch.export."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ssl_locat.models import features
from ssl_locat.models.backbone import create_backbone

SMALL = {"embed_dim": 24, "depth": 1, "patch_size": 8, "img_size": 32}
NAMES = {
    "locatvit_tiny": {"num_heads": 3},
    "locatregvit_tiny": {"num_heads": 3, "pos_resize": "dino"},
    "locatvit_tiny_rope_mixed": {"num_heads": 2},
    "locatjumbo_tiny": {"num_heads": 3, "num_class_tokens": 2},
}


def model_of(name):
    torch.manual_seed(0)
    return create_backbone(name, **SMALL, **NAMES[name]).eval()


QUICK = [name if name == "locatvit_tiny" else pytest.param(name, marks=pytest.mark.slow) for name in [*NAMES, "swin"]]


@pytest.mark.parametrize("name", QUICK[:-1])
def test_one_graph_per_resolution(name):
    model, counter = model_of(name), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: features(model, x), backend=counter, fullgraph=True, dynamic=False)
    sizes = [(32, 32), (16, 24)]
    with torch.autocast("cpu", torch.bfloat16):
        for size in [*sizes, *sizes]:
            images = torch.randn(2, 3, *size)
            # bfloat16: a graph may take another backend of attention than eager code does
            torch.testing.assert_close(compiled(images), features(model, images), rtol=0.05, atol=0.02)
    assert counter.frame_count == len(sizes)


def test_compiled_student_and_its_teacher_copy_train():
    """As in pretraining: the student is compiled, two resolutions in one step, gradients through both; the copy was made before."""
    torch._dynamo.reset()
    model = model_of("locatvit_tiny")
    plain = copy.deepcopy(model)
    model.compile(backend="eager", dynamic=False)
    for each in (model, plain):
        loss = sum(each(images).square().sum() for images in (torch.ones(2, 3, 32, 32), torch.ones(2, 3, 16, 24)))
        loss.backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_export_keeps_outputs(name):
    if name == "swin":
        model = create_backbone("locatswin_tiny", embed_dim=12, depths=(2, 2), num_heads=(2, 4), img_size=56).eval()
        images = torch.randn(2, 3, 56, 56)
    else:
        model, images = model_of(name), torch.randn(2, 3, 48, 32)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=8)}})
    more = torch.randn(3, *images.shape[1:])
    torch.testing.assert_close(program.module()(more), model(more))
