"""Muon for matrices, AdamW for the rest: timm's numbers, which parameters it moves, and runs that resume through it and through coding rates."""

import shutil
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from tiny_run import losses, write_config
from torch import nn

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError
from ssl_locat.optim.optim import build_optimizer, set_hyperparameters
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.parts import build_model, check

RATE = "[{name: coding_rate, hidden_dim: 32, bottleneck_dim: 16, min_images: 16}, {name: patch_cosine}]"


WORDS = [f"objective={RATE}", "optim.name=muon", "optim.epochs=null", "optim.total_steps=8", "log.every_steps=1", "probes={}"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    make_textures(folder / "textures", num_train=64, num_test=20, image_size=40, progress=False)
    return write_config(folder / "textures", folder)


@pytest.fixture
def tiny(file):
    """tiny("run_dir=...") -> Config of a tiny run with Muon, coding rates and hidden patches."""
    return lambda *more: load(str(file), [*WORDS, *more])


class OneLayer(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(weight.shape[1], weight.shape[0], bias=False)])
        self.blocks[0].weight = nn.Parameter(weight)


@pytest.mark.parametrize("name", ["matrix", "tall"])
def test_a_matrix_moves_as_timms_muon_moves_it(golden, name):
    g = golden("muon")
    model = OneLayer(g[f"param.{name}"].clone())
    optimizer = build_optimizer(model, (0.9, 0.999), name="muon")
    for step in range(5):
        model.blocks[0].weight.grad = g[f"in.{step}.grad.{name}"].clone()
        set_hyperparameters(optimizer, 0.02, 0.0)
        optimizer.step()
        # Newton-Schulz runs in bfloat16: 2e-3 is what another machine's rounding may leave
        torch.testing.assert_close(model.blocks[0].weight.detach(), g[f"out.timm_default.{step}.{name}"], rtol=0, atol=2e-3)


def test_muon_moves_the_linear_layers_of_blocks_and_heads_alone(tiny):
    model, _ = build_model(tiny(), torch.device("cpu"))
    optimizer = build_optimizer(model.student, (0.9, 0.999), name="muon")
    names = {id(parameter): name for name, parameter in model.student.named_parameters()}
    moved = {names[id(p)] for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    block = {f"backbone.blocks.{b}.{layer}.weight" for b in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert moved == block | {f"heads.coding_rate.mlp.{layer}.weight" for layer in (0, 2, 4)}
    left = {names[id(p)] for group in optimizer.param_groups if not group["use_muon"] for p in group["params"]}
    assert {
        "backbone.pos_embed",
        "backbone.cls_token",
        "backbone.patch_embed.proj.weight",
        "backbone.blocks.0.attn.gaug.log_var.weight",
    } <= left
    set_hyperparameters(optimizer, 0.1, 0.4)
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "matrices": 0.4,
        "decayed": 0.4,
        "plain": 0.0,
    }


def test_a_run_that_was_cut_off_resumes_to_the_same_losses(tiny, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(tiny(f"run_dir={whole}"))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step_00000008")
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "export", ignore_errors=True)
    pretrain(tiny(f"run_dir={cut}"))
    assert losses(cut) == losses(whole) and len(losses(whole)) == 8


def _pretrain(file: Path, run: Path) -> dict[int, float]:
    pretrain(
        load(str(file), [*WORDS, "backbone.drop_path_rate=0", f"run_dir={run}"])
    )  # which blocks are left out is drawn by rank
    return losses(run)


@pytest.mark.slow
def test_two_processes_learn_as_one(file, tmp_path):
    together, *_ = run_ranks(_pretrain, 2, file, tmp_path / "two")
    # the order of sums, and bfloat16 in Newton-Schulz
    assert together == pytest.approx(_pretrain(file, tmp_path / "one"), rel=2e-3)


def test_shards_of_matrices_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"Muon orthogonalises whole matrices.*parallel=ddp"):
        check(tiny("parallel=fsdp"), 2, may_write=False)
