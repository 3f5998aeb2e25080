import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives.dino import DINO
from ssl_locat.pretraining.memory import KEPT, estimate_memory
from ssl_locat.pretraining.student_teacher import StudentTeacher

CROPS = {"global_size": 224, "local_size": 96, "num_local": 8}


def on_meta(name: str) -> StudentTeacher:
    with torch.device("meta"):
        return StudentTeacher(create_backbone(name), nn.ModuleDict({"dino": DINO()}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_kept_by_a_block_are_as_counted(precision):
    batch, tokens, width = 2, 65, 128
    block, kept = Block(width, 2, qkv_bias=True), {}
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    alive = []

    def count(tensor):
        alive.append(tensor)  # so that no address is used twice
        is_weight = tensor.untyped_storage().data_ptr() in weights or tensor.shape[0] in (width, 4 * width)
        if not is_weight:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(batch, tokens, width, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast:
        block(x)
    assert sum(kept.values()) / (batch * tokens * width) == pytest.approx(KEPT[precision], rel=0.02)


@pytest.mark.parametrize(
    ("name", "millions", "crops"),
    [("locatvit_large", 304, CROPS), ("vit_giant_patch14_224", 1012, {**CROPS, "local_size": 98})],
)
def test_large_models_are_counted_without_being_built(name, millions, crops):
    model = on_meta(name)
    assert sum(p.numel() for p in model.student.backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    alone = estimate_memory(model, images=16, **crops)
    sharded = estimate_memory(model, images=16, parallel="fsdp", world_size=64, activation_checkpointing=True, **crops)
    assert sharded.optimizer == pytest.approx(alone.optimizer / 64)
    assert sharded.activations < alone.activations / 6
    assert sharded.total < 0.25 * alone.total
