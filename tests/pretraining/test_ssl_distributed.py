"""Dense objectives on two processes: the training loop itself, with DDP and FSDP2, against one process."""

from pathlib import Path

import pytest
from processes import run_ranks
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.pretraining.loop import pretrain

HEAD = "num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16"
SHARED = f"[{{name: dino, {HEAD}, frozen_last_layer_epochs: 0}}, {{name: ibot, {HEAD}, shared_head: true}}, {{name: koleo, weight: 0.1, min_images: 16}}]"
BATCH_NORM = (
    f"[{{name: dino, {HEAD}, batch_norm: true, targets: sinkhorn, min_images: 16}}, {{name: koleo, weight: 0.1, min_images: 16}}]"
)
LENGTH = [
    "optim.epochs=null",
    "optim.total_steps=4",
    "backbone.drop_path_rate=0",
    "log.every_steps=1",
    "optim.lr=0.1",
    "optim.warmup_epochs=0",
]


def config_of(file: Path, objective: str, form: str):
    parallel = [] if form == "alone" else [f"parallel={form}"]
    overrides = [f"objective={objective}", *LENGTH, *parallel, f"run_dir={file.parent}/{form}"]
    return load(str(file), overrides)


def _both_forms(file: Path, objective: str) -> None:
    """In one go: starting processes is what takes time."""
    for form in ("ddp", "fsdp"):
        pretrain(config_of(file, objective, form))


@pytest.mark.parametrize("objective", [SHARED, BATCH_NORM])
def test_trains_alike_on_two_ranks(tmp_path, objective):
    """A shared head, through which class and patch scores pass in each step; and the quickstart's: BatchNorm in the head, Sinkhorn targets."""
    make_textures(tmp_path / "set", num_train=64, num_test=10, image_size=32, progress=False)
    file = write_config(tmp_path / "set", tmp_path)
    pretrain(config_of(file, objective, "alone"))
    expected = losses(tmp_path / "alone")
    assert max(expected.values()) - min(expected.values()) > 0.1  # it moves, so that a wrong gradient would show
    run_ranks(_both_forms, 2, file, objective)
    for form in ("ddp", "fsdp"):
        found = losses(tmp_path / form)
        assert list(found) == [1, 2, 3, 4]
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4), form
