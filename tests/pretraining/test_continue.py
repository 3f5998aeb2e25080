"""Going on from vanilla DINO-style weights with LocAt attached: what they know is not lost."""

from pathlib import Path

import pytest
import torch

from ssl_locat.config.schema import load
from ssl_locat.models.backbone import load_backbone
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.runs.log import read_jsonl

SMALL = [
    "data.make.num_train=2000",
    "data.make.num_test=500",
    "data.workers=0",
    "log.tensorboard=false",
    "export=false",
    "probes.every_epochs=1",
    "checkpoint.every_steps=1000",
]


def run(folder: Path, name: str, *overrides: str) -> list[float]:
    """A short run of the quickstart; -> k-NN top-1 in percent at the start and after each epoch."""
    shards = [f"data.{split}={folder}/set/textures-{split}-*.tar" for split in ("train", "test")]
    places = [f"run_dir={folder}/{name}", f"data.make.folder={folder}/set", *shards]
    config = load("quickstart", [*SMALL, *places, *overrides])
    pretrain(config)
    return [
        next(v for k, v in record.items() if k.startswith("top1")) for record in read_jsonl(folder / name / "probes/knn.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_knn_survives_further_pretraining_with_locat(tmp_path):
    vanilla = run(tmp_path, "vanilla", "backbone.name=vit_tiny", "optim.epochs=8")
    assert vanilla[-1] >= vanilla[0] + 8, vanilla  # otherwise there is nothing to lose
    state = load_backbone(tmp_path / "vanilla").state_dict()
    weights = tmp_path / "dino.pth"  # as facebookresearch/dino saves them
    torch.save({"teacher": {f"module.backbone.{name}": tensor for name, tensor in state.items()}, "epoch": 8}, weights)

    going_on = ["backbone.gaug={small_start: true}", f"backbone.init={weights}", "optim.epochs=3"]
    gentle = run(tmp_path, "gentle", *going_on, "backbone.frozen_epochs=1", "optim.lr=1e-3", "teacher.momentum=[0.99, 1.0]")
    assert gentle[1] == gentle[0], gentle  # frozen: only the heads moved
    floor = vanilla[0] + (vanilla[-1] - vanilla[0]) / 2
    assert gentle[0] > floor, (vanilla, gentle)  # PRR changes what is read, GAug is as good as not there
    assert min(gentle) >= gentle[0] - 3 and gentle[-1] >= gentle[0] - 2, (vanilla, gentle)
    print("k-NN, vanilla and going on:", vanilla, gentle)
