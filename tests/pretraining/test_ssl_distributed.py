"""Every objective on two processes: the training loop itself, with DDP and FSDP2, in each precision and compiled, against one process."""

from pathlib import Path

import pytest
import torch
from processes import run_ranks
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.parts import build_model, check, distribute
from ssl_locat.runs.checkpoint import read_weights
from ssl_locat.runs.distributed import GATHERS_CAST
from ssl_locat.runs.log import read_jsonl

HEAD = "num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16"
DINO = f"{{name: dino, {HEAD}, frozen_last_layer_epochs: 0}}"
KOLEO = "{name: koleo, weight: 0.1, min_images: 16}"
ANCHOR = "timm:vit_tiny_patch16_224?img_size=32&patch_size=4&embed_dim=12&depth=1&num_heads=2"
DENSE = f"[{DINO}, {{name: ibot, {HEAD}}}, {KOLEO}, {{name: gram, weight: 2, anchor_every_steps: 2}}]"
LENGTH = [
    "optim.epochs=null",
    "optim.total_steps=4",
    "backbone.drop_path_rate=0",
    "log.every_steps=1",
    "optim.lr=0.1",
    "optim.warmup_epochs=0",
    "checkpoint.every_steps=2",
]
# Name -> objective, options, largest relative difference of a loss in four steps at a high lr. fp32: the order of sums; 16 bit: that order
# where the sums are rounded to 8 or 11 bits.
QUICK = {
    # the quickstart's
    "batch_norm": (f"[{{name: dino, {HEAD}, batch_norm: true, targets: sinkhorn, min_images: 16}}, {KOLEO}]", [], 1e-4),
    "dense": (DENSE, ["precision=bf16"], 5e-3),
    # a nuisance that is read from all ranks' images, and one that informs; the textures' own classes
    "metadata": (
        f"[{DINO}, {{name: metadata, nuisance: [number], informative: [kind], hidden_dim: 16, min_images: 16}}]",
        ["data.metadata={number: {member: cls, values: [0, 1, 2, 3, 4]}, kind: {member: cls, values: [3, 4, 5, 6, 7, 8, 9]}}"],
        1e-4,
    ),
}
SLOW = {
    # class and patch scores pass through one head in each step
    "shared": (f"[{DINO}, {{name: ibot, {HEAD}, shared_head: true}}, {KOLEO}]", [], 1e-4),
    # a block at a time, and more prototypes from the third step on
    "blocks": (
        f"[{{name: dino, {HEAD}, prototype_block: 12, active_prototypes: [[0, 20], [0.5, 32]]}}, "
        f"{{name: ibot, {HEAD}, targets: sinkhorn, min_images: 16, prototype_block: 12}}]",
        [],
        1e-4,
    ),
    "distill": (f"{{name: distill, hidden_dim: 32, anchor: '{ANCHOR}'}}", ["precision=bf16"], 1e-2),
    # a dozen steps are skipped, until the loss scale fits
    "half": (f"[{DINO}]", ["precision=fp16", "teacher.precision=fp32", "optim.total_steps=18"], 5e-3),
    "compiled": (f"[{DINO}, {{name: ibot, {HEAD}}}]", ["compile=true"], 1e-4),
}


def config_of(file: Path, cases: dict, name: str, form: str):
    objective, options, _ = cases[name]
    parallel = [] if form == "alone" else [f"parallel={form}"]
    return load(str(file), [f"objective={objective}", *LENGTH, *options, *parallel, f"run_dir={file.parent}/{name}/{form}"])


def _both_forms(file: Path, cases: dict) -> dict:
    """In one go: starting processes is what takes time."""
    for name in cases:
        for form in ("ddp", "fsdp"):
            pretrain(config_of(file, cases, name, form))
    if "dense" not in cases:
        return {}
    # what was sharded goes on unsharded
    on = config_of(file, cases, "dense", "ddp").model_copy(update={"run_dir": f"{file.parent}/dense/on"})
    pretrain(on, resume=f"{file.parent}/dense/fsdp/checkpoints/step_00000002")
    return gathered(config_of(file, cases, "dense", "fsdp"))


def gathered(config) -> dict[str, str]:
    """Types of parameters while they compute and while they wait, of a student under FSDP."""
    model, losses = build_model(config, torch.device("cpu"))
    student = distribute(model, config, torch.device("cpu"))
    block, found = student.backbone.blocks[0], {}
    layers = {"linear": block.attn.qkv, "norm": block.norm1, "gaug": block.attn.gaug}

    def note(name):
        return lambda layer, *_: found.update({name: str(next(layer.parameters()).dtype)})

    for name, layer in layers.items():
        layer.register_forward_hook(note(name))
    crops = torch.zeros(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        student(crops, None, 2, model.make_masks(losses, [0], crops))
    return found | {"waiting": str(block.attn.qkv.weight.dtype)}


def train_and_compare(cases: dict, folder: Path, seconds: float = 280) -> list:
    make_textures(folder / "set", num_train=64, num_test=10, image_size=32, progress=False)
    file = write_config(folder / "set", folder)
    for name in cases:
        pretrain(config_of(file, cases, name, "alone"))
    found = run_ranks(_both_forms, 2, file, cases, seconds=seconds)
    for name, (_, _, largest) in cases.items():
        # which steps fp16 skips depends on a rank's share of the batch: there FSDP is compared with DDP
        reference = "ddp" if name == "half" else "alone"
        expected = losses(folder / name / reference)
        norms = [record["grad_norm"] for record in read_jsonl(folder / name / reference / "metrics.jsonl")]
        assert norms[-1] is not None and norms[-2] is not None, (name, norms)  # finite: these steps were made
        assert max(expected.values()) - min(expected.values()) > 0.05, name  # it moves, so that a wrong gradient would show
        for form in ("ddp", "fsdp"):
            each = losses(folder / name / form)
            print(name, form, max(abs(each[step] / expected[step] - 1) for step in expected))
            assert list(each) == list(expected)
            assert list(each.values()) == pytest.approx(list(expected.values()), rel=largest), (name, form)
    return found


def test_trains_alike_on_two_ranks(tmp_path):
    linear = "torch.bfloat16" if GATHERS_CAST else "torch.float32"  # torch before 2.15 gathers all of a block in one type
    for types in train_and_compare(QUICK, tmp_path):
        assert types == {"linear": linear, "norm": "torch.float32", "gaug": "torch.float32", "waiting": "torch.float32"}
    sharded, on = (losses(tmp_path / "dense" / form) for form in ("fsdp", "on"))
    assert [on[step] for step in (3, 4)] == pytest.approx([sharded[step] for step in (3, 4)], rel=1e-2)
    weights = read_weights(tmp_path / "dense/fsdp/checkpoints/step_00000004")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.slow  # the compiler takes most of it
@pytest.mark.timeout(900)
def test_other_precisions_and_compiled_networks_train_alike_on_two_ranks(tmp_path):
    train_and_compare(SLOW, tmp_path, seconds=800)


def test_graphs_and_sharding_are_refused_together(tmp_path):
    config = config_of(write_config(tmp_path, tmp_path), {"x": (DINO, ["compile=cuda-graphs"], 0)}, "x", "fsdp")
    with pytest.raises(ConfigError, match=r"compile is cuda-graphs with parallel: fsdp.*Take compile: true, or parallel: ddp"):
        check(config, ranks=2)
