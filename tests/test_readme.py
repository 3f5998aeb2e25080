"""Every command and every Python line of the README runs, in a folder of its own, on tiny sizes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_command

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "backbone.embed_dim=24",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "device=cpu",
    "data.workers=0",
    "log.tensorboard=false",
]
SHORT = ["optim.epochs=null", "optim.total_steps=2", "optim.global_batch_size=8", "optim.accumulate_steps=1"]
QUICK = ["data.make={folder: runs/textures, num_train: 60, num_test: 20}", "probes={every_epochs: 1, knn: {k: [5], workers: 0}}"]

# how each README command is made small; what is not listed fails the test
RUNS = {
    "make quickstart": None,  # tests/pretraining/test_quickstart.py
    "make test": None,
    "ssl-locat pretrain path/to/images": [*TINY, *SHORT],
    "ssl-locat pretrain images.yaml": [*TINY, *SHORT],
    "ssl-locat pretrain dino_locatvit_s16 data.train='s3://bucket/imagenet/train/shard-*.tar' run_dir=runs/mine": [
        *TINY,
        *SHORT,
        "data.train=path/to/images",
        "data.test=null",
        "probes={}",
        "crops={global_size: 32, local_size: 16, num_local: 2}",
        "objective={name: dino, num_prototypes: 16}",
        "precision=fp32",
        "export=false",
    ],
    "ssl-locat shards pack path/to/images shards/": [],
    "ssl-locat shards check 'shards/*.tar'": [],
    "torchrun --nproc-per-node 8 --no-python ssl-locat pretrain images.yaml": None,  # tests/pretraining/test_torchrun.py
    "ssl-locat pretrain images.yaml --on slurm": None,  # tests/cluster/test_slurm.py
    "ssl-locat adapt timm:vit_small_patch14_dinov2.lvd142m photos data.validation=photos/labelled": None,  # tests/pretraining/test_adapt.py
    "ssl-locat report runs/quickstart": [],
    "ssl-locat doctor runs/quickstart": [],
    "ssl-locat evaluate knn runs/quickstart data.train='runs/textures/textures-train-*.tar' data.test='runs/textures/textures-test-*.tar'": [
        "k=5",
        "workers=0",
    ],
    "ssl-locat export runs/quickstart backbone/": [],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split(" #")[0].split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: some photographs, and a quickstart run that is there already."""
    folder = tmp_path_factory.mktemp("readme")
    images = folder / "path" / "to" / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(images / f"{index:03}.jpg")
    run(folder, "ssl-locat pretrain quickstart", [*TINY, *SHORT, *QUICK, "optim.global_batch_size=64"])
    return folder


def run(folder: Path, command: str, more: list[str]) -> None:
    words = shlex.split(command)
    assert words[0] == "ssl-locat", command
    done = run_command(*words[1:], *more, folder=folder)
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"


def test_every_command_of_the_readme_is_known_here():
    assert commands() == list(RUNS)


@pytest.mark.timeout(600)
def test_readme_commands_run_in_their_order(folder):
    for command, more in RUNS.items():
        if more is not None:
            run(folder, command, more)


@pytest.mark.timeout(300)
def test_readme_python_runs(folder):
    if not (folder / "backbone").is_dir():
        run(folder, "ssl-locat export runs/quickstart backbone/", [])
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target
