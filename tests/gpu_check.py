"""`make gpu-check`: what a new GPU must show first, in at most ten minutes, with every result on disk as soon as it is known.

    python tests/gpu_check.py [--minutes 10] [--folder build/gpu_check] [--cifar10 FOLDER] [--small]

The GPU tests, then `bench attention` and `bench step`, then the first epochs of the ledger's track "cifar10, one GPU" (LocAtViT-Ti/4 and ViT-Ti/4, a k-NN probe after each
epoch). Each stage has a share of the time, is asked to stop when it is over, and leaves FOLDER/NAME.txt; FOLDER/stages.jsonl says how each ended. --small (or GPU_CHECK_SMALL=1)
cuts everything to what a CPU does in two minutes: a trial of this file, whose numbers mean nothing.
"""

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GRACE = 20.0  # seconds from TERM, at which a training saves, to KILL


class Stage(NamedTuple):
    name: str
    command: list[str]
    seconds: float  # at most; what others leave is the last one's


def stages(folder: Path, cifar10: Path, minutes: float, small: bool) -> list[Stage]:
    python = [sys.executable, "-u", "-m"]
    bench = [*python, "ssl_locat", "bench"]
    shares = (60.0, 15.0, 15.0) if small else (120.0, 90.0, 150.0)
    found = [
        Stage("tests", [*python, "pytest", "-m", "gpu", "-v", "-rs", "-n0", "tests"], shares[0]),
        Stage("attention", [*bench, "attention", *["--quick"] * small], shares[1]),
        Stage("step", [*bench, "step", "--quick"], shares[2]),
    ]
    train, test = unpacked(cifar10, folder / "cifar10", "mini-" if small else "")
    if train:
        found.append(Stage("track", [*python, "ssl_locat", "table", *track(folder, train, test, small)], 60 * minutes))
    else:
        print(f"track: left out, {cifar10} holds no cifar10-train-*.tar; give --cifar10 FOLDER, or make gpu-check CIFAR10=FOLDER")
    return found


def track(folder: Path, train: str, test: str, small: bool) -> list[str]:
    """The track's two models, one seed, so short that both fit."""
    options = {
        "optim.epochs": 4,
        "optim.warmup_epochs": 1,
        "probes.every_epochs": 1,
        "probes.knn": {"k": [20], "image_size": 32},
        "data.workers": 8,
    }
    if small:
        options |= {
            "optim.epochs": 0.01, "optim.warmup_epochs": 0, "optim.global_batch_size": 8, "probes.every_epochs": None, "probes.knn": None,
            "backbone.embed_dim": 24, "backbone.depth": 1, "backbone.num_heads": 1, "data.workers": 0, "precision": "fp32",
            "objective": {"name": "dino", "num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
        }  # fmt: skip
    changed = {
        **{f"train.options.{key}": value for key, value in options.items()},
        **{f"rows.LocAtViT, 1/{part}.stage": 2 for part in (2, 4)},
        "train.seeds": [0],
        "data.cifar10.train": train,
        "data.cifar10.test": test,
        "results": str(folder / "track"),
        "ledger.track": "trial",
        "ledger.file": str(folder / "ledger.jsonl"),
        **(
            {"columns.linear.options.least_steps": 20, "columns.k-NN.options.workers": 0, "columns.linear.options.workers": 0}
            if small
            else {}
        ),
    }
    return ["speedrun_gpu_cifar10", *(f"{key}={json.dumps(value)}" for key, value in changed.items())]


def unpacked(source: Path, target: Path, mini: str) -> tuple[str, str]:
    """(train, test) patterns of plain tars; ('', '') where there are none. Those that lie there as .tar.gz are unpacked into `target`."""
    for packed in sorted(source.glob(f"cifar10-{mini}t*.tar.gz")):
        target.mkdir(parents=True, exist_ok=True)
        plain = target / packed.stem
        if not plain.exists():
            with gzip.open(packed) as stream, open(plain.with_suffix(".partial"), "wb") as out:
                shutil.copyfileobj(stream, out)
            plain.with_suffix(".partial").rename(plain)
    for where in (source, target):
        if list(where.glob(f"cifar10-{mini}train-*.tar")):
            return str(where / f"cifar10-{mini}train-*.tar"), str(where / f"cifar10-{mini}test-*.tar")
    return "", ""


def run(stage: Stage, folder: Path, seconds: float) -> dict:
    """Run it for so long at most; what it prints is in its file while it runs."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    with open(folder / f"{stage.name}.txt", "w") as out:
        # a group of its own: what it starts (readers, compilers) ends with it
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        cut = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            cut = True
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        except BaseException:  # this file itself is stopped
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return {"stage": stage.name, "exit": process.returncode, "cut": cut, "seconds": round(time.monotonic() - began, 1)}


def main(arguments: list[str]) -> int:
    small_default = bool(os.environ.get("GPU_CHECK_SMALL"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu_check")
    parser.add_argument("--cifar10", type=Path, default=os.environ.get("CIFAR10") or ROOT.parent / "shared" / "data" / "cifar10")
    parser.add_argument("--small", action="store_true", default=small_default)
    given = parser.parse_args(arguments)
    until = time.monotonic() + 60 * given.minutes
    folder, small = given.folder.resolve(), given.small
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "stages.jsonl"
    record.write_text("")
    failed = False
    for stage in stages(folder, Path(given.cifar10).resolve(), given.minutes, small):
        left = until - time.monotonic() - GRACE
        if left <= 0:
            ended = {"stage": stage.name, "exit": None, "cut": True, "seconds": 0.0}
        else:
            ended = run(stage, folder, min(stage.seconds, left))
        with open(record, "a") as lines:
            lines.write(json.dumps(ended) + "\n")
        # 5: pytest has nothing to run
        failed = failed or (not ended["cut"] and ended["exit"] not in (0, 5))
        how = "cut short, what it measured is kept" if ended["cut"] else f"exit code {ended['exit']}"
        print(f"{stage.name}: {how}, {ended['seconds']:g} s: {folder / stage.name}.txt", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
