"""A real, tiny, finished run for tests of what people do with runs: report, export, doctor. `from trained import trained_run`."""

from pathlib import Path

import pytest
import yaml

from ssl_locat.config.schema import Config, load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.pretraining.loop import pretrain


def write_config(folder: Path, **changes) -> Path:
    """tiny.yaml in `folder`, for texture shards in `folder`/set: width 24, 12 steps of 16 images, seconds on one core."""
    settings = {
        "run_dir": str(folder / "run"),
        "data": {
            "train": f"{folder}/set/textures-train-*.tar",
            "test": f"{folder}/set/textures-test-*.tar",
            "num_classes": 10,
            "workers": 0,
        },
        "backbone": {"name": "locatvit_tiny", "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        "objective": {"name": "dino", "num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
        "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
        "optim": {"epochs": 2, "global_batch_size": 16, "lr": 0.01, "warmup_epochs": 0.5},
        "device": "cpu",
        "checkpoint": {"every_steps": 4},
        "probes": {"every_epochs": 1, "knn": {"k": [5], "image_size": 32, "workers": 0}},
        "log": {"every_steps": 2, "tensorboard": False},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
    return path


def make_run(folder: Path, **changes) -> Path:
    """Make the images, pretrain, and return the run folder."""
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    config: Config = load(str(write_config(folder, **changes)))
    pretrain(config)
    return Path(config.run_dir)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """The folder of a finished run. Read only: it is shared by the tests of a process."""
    return make_run(tmp_path_factory.mktemp("trained"))
