"""`ssl-locat table main` whole, made tiny: 20 trainings and 120 cells on real small images, killed in the middle and resumed; DINO's likewise."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.fixture
def command(tmp_path):
    """`command("table", ...)` starts the real program in tmp_path."""
    started = []

    def start(*words: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "XDG_STATE_HOME": str(tmp_path / "state"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path, "env": environment}
        started.append(subprocess.Popen([sys.executable, "-m", "ssl_locat", *words], **pipes))
        return started[-1]

    yield start
    for process in started:
        with process:  # waits, and closes what is open of its pipe
            process.kill()


def wait_for(condition, process: subprocess.Popen, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def rows(folder) -> list[dict]:
    return list(csv.DictReader((folder / "table.csv").open()))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_main_table_in_miniature_killed_and_resumed(tmp_path, command, shared_data):
    scenes, animals, pictures = (shared_data(name) for name in ("camvid", "voc-animals", "imagenette128"))
    sets = {
        "imagenet": (f"{pictures}/imagenette128-train-*.tar", f"{pictures}/imagenette128-val-*.tar"),
        "ade20k": (f"{scenes}/camvid-train-*.tar", f"{scenes}/camvid-val-*.tar"),
        "pascal_context": (f"{animals}/voc-animals-train-*.tar", f"{animals}/voc-animals-val-*.tar"),
        "coco_stuff": (f"{scenes}/camvid-train-*.tar", f"{scenes}/camvid-test-*.tar"),
    }
    words = [
        "table",
        "miniature",
        *(
            f"data.{name}.{part}={path}"
            for name, pair in sets.items()
            for part, path in zip(("train", "test"), pair, strict=True)
        ),
    ]
    plan = command(*words, "--dry-run").communicate(timeout=600)[0]
    assert (
        plan.count("to do ") == 20 * (1 + 5)
        and plan.count("as above") == 20
        and "FLOP" in plan
        and not (tmp_path / "runs").exists()
    )
    results = tmp_path / "runs" / "tables" / "miniature"
    first = command(*words)
    # into the third row: a training that has begun, and cells before it
    wait_for(
        lambda: len(list(results.glob("trained/*.json"))) == 2 and list(results.glob("trained/*.progress.safetensors")), first
    )
    first.send_signal(signal.SIGKILL)
    first.communicate()
    finished = {file: file.stat().st_mtime_ns for file in (*results.glob("cells/*.json"), *results.glob("trained/*.json"))}
    weights = {file: file.stat().st_mtime_ns for file in results.glob("trained/*/model.safetensors")}
    assert len(finished) >= 2 + 5 and len(rows(results)) == 120  # the table is there before its end
    second = command(*words)
    out = second.communicate(timeout=2400)[0]
    assert second.returncode == 0, out
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert {
        file: weights[file] for file in weights if json.loads(file.parent.with_name(f"{file.parent.name}.json").read_text())
    } == {file: file.stat().st_mtime_ns for file in weights}
    assert len(list(results.glob("trained/*.json"))) == 20 and all(row["mean"] for row in rows(results))
    assert len(list(csv.DictReader((results / "figure.csv").open()))) == 2 * 10  # published and ours
    assert (results / "figure.png").stat().st_size > 20_000 and (results / "table.tex").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_dino_table_in_miniature_from_pretraining_to_number(tmp_path, command, shared_data):
    pictures = shared_data("imagenette128")
    data = [f"data.imagenet.{part}={pictures}/imagenette128-{name}-*.tar" for part, name in (("train", "train"), ("test", "val"))]
    options = [
        "optim.total_steps=12", "optim.global_batch_size=16", "data.epoch_samples=128", "data.workers=1", "backbone.embed_dim=48",
        "backbone.depth=4", "backbone.num_heads=3", "objective.num_prototypes=256", "crops.global_size=64", "crops.local_size=32", "crops.num_local=2",
        "crops.mode=cpu", "precision=fp32", "checkpoint.every_steps=4", "optim.warmup_epochs=0.1", "probes.every_epochs=null",
    ]  # fmt: skip
    small = ["data.imagenet.num_classes=10", "data.imagenet.train_images=200", "data.imagenet.test_images=50"]
    columns = [f"columns.{name}.options.workers=0" for name in ("linear", "linear 4 blocks")]
    columns += [f"columns.{name}.options.epochs=2" for name in ("linear", "linear 4 blocks")]
    words = [
        "table",
        "dino",
        *data,
        *small,
        *columns,
        *(f"train.options.{option}" for option in options),
        "trained=trained",
        "results=results",
    ]
    first = command(*words)
    wait_for(lambda: list((tmp_path / "trained").glob("*/checkpoints/step_*/checkpoint.json")), first)
    first.send_signal(signal.SIGTERM)
    out = first.communicate(timeout=300)[0]
    assert first.returncode == 4, out
    second = command(*words)
    out = second.communicate(timeout=800)[0]
    assert second.returncode == 0, out
    ours = [row for row in rows(tmp_path / "results") if row["mean"]]
    assert {row["row"] for row in ours} == {"ViT-S/16", "LocAtViT-S/16"} and len(ours) == 2 * 6
    (restarts,) = {json.loads(file.read_text())["restarts"] for file in (tmp_path / "trained").glob("dino-vit-*/summary.json")}
    assert restarts == 1  # resumed, not begun again
