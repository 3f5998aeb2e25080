from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from ssl_locat.benchmarks.memory import SIZES, size_rows
from ssl_locat.config.schema import load
from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives.dino import DINO
from ssl_locat.objectives.ibot import IBOT
from ssl_locat.pretraining.memory import KEPT, estimate_memory, memory_of
from ssl_locat.pretraining.student_teacher import StudentTeacher

CROPS = {"global_size": 224, "local_size": 96, "num_local": 8}


def on_meta(name: str, **losses: nn.Module) -> tuple[StudentTeacher, nn.ModuleDict]:
    with torch.device("meta"):
        objectives = nn.ModuleDict({"dino": DINO()} | losses)
        return StudentTeacher(create_backbone(name), objectives), objectives


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
    model, objectives = on_meta(name)
    assert sum(p.numel() for p in model.student.backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    alone = estimate_memory(model, objectives, images=16, **crops)
    sharded = estimate_memory(
        model, objectives, images=16, parallel="fsdp", world_size=64, activation_checkpointing=True, **crops
    )
    assert sharded.optimizer == pytest.approx(alone.optimizer / 64)
    assert sharded.activations < alone.activations / 6
    assert sharded.total < 0.25 * alone.total


def test_ibots_scores_are_those_of_hidden_patches():
    """A quarter of 2 x 196 patches of two networks: 98 rows an image beside DINO's 12."""
    dino = estimate_memory(*on_meta("vit_small_patch16_224"), images=16, **CROPS)
    both = estimate_memory(
        *on_meta("vit_small_patch16_224", ibot=IBOT(mask_probability=0.5, mask_ratio=(0.5, 0.5))), images=16, **CROPS
    )
    assert both.scores / dino.scores == pytest.approx((12 + 4 * 196 / 4) / 12)


def test_scores_of_blocks_do_not_grow_with_prototypes():
    counted = [
        estimate_memory(
            *on_meta("vit_tiny_patch16_224", dino=DINO(num_prototypes=count, prototype_block=block)), images=64, **CROPS
        ).scores
        for count, block in ((65536, 0), (131072, 0), (65536, 8192), (131072, 8192))
    ]
    assert counted[1] == 2 * counted[0]
    # what is added are prototypes: normalised for both networks, and their gradient
    assert counted[3] - counted[2] == 4 * 3 * 65536 * 256 < 0.5 * (counted[1] - counted[0])


@pytest.mark.parametrize("shared", [True, False])
def test_hidden_patches_are_as_many_as_counted(shared):
    ibot = IBOT(shared_head=shared)
    masks = ibot.make_masks(list(range(400)), 2, (14, 14))
    assert masks.float().mean() == pytest.approx(ibot.hidden_share, rel=0.15)


@pytest.mark.parametrize("name", ["locatswin_tiny", "locatjumbo_tiny"])
def test_other_shapes_are_counted_too(name):
    """Swin's stages have fewer and wider tokens; Jumbo's class token is wider than its patches."""
    model, objectives = on_meta(name)
    memory = estimate_memory(model, objectives, images=4, **CROPS, parallel="fsdp", world_size=2)
    assert min(memory) >= 0 and 2e8 < memory.activations < 4e9


def test_gram_and_its_anchor_are_counted():
    plain = memory_of(load("dinov2_locatvit_b16"), 8)
    config = load("highres_gram")
    anchored = memory_of(config, 8)
    # 16 images, two crops each, 33 x 33 patches; the frozen network is as large as the student, whole on each rank
    assert anchored.scores > 4 * 4 * 2 * 16 * 1089**2
    assert anchored.weights - plain.weights > 4 * 85e6
    assert anchored.crops == pytest.approx(2 * 4 * 16 * 3 * (2 * 528**2 + 8 * 112**2 + 2 * 800**2))


def test_the_docs_table_is_the_counted_one():
    counted = " | ".join(f"{row['value']:.2g}" for row in size_rows({"ViT-S/16": SIZES["ViT-S/16"]}))
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert f"| ViT-S/16 | {counted} |" in text, "ssl-locat bench memory"
