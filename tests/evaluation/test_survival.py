"""Long evaluations survive: saved at a signal, resumed by the same command; cells of a table are shared between jobs; numbers that are none."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from processes import Command, start_job
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scenes import write_split

from ssl_locat.evaluation.shared.heads import load_progress, save_progress
from ssl_locat.tables import table

MODEL = "timm:locatvit_tiny?img_size=32&patch_size=8&embed_dim=48&num_heads=3&depth=1"


@pytest.fixture
def command(tmp_path):
    """`command("evaluate", ...)` starts the real program in tmp_path; its progress lies in tmp_path/state."""
    started = []
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def start(*words: str) -> Command:
        started.append(Command(*words, folder=tmp_path, environment=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def wait_for(condition, process: Command, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < end
        time.sleep(0.05)


def training(data: dict, *more: str) -> list[str]:
    settings = ["epochs=40", "lr=0.1", "batch_size=16", "workers=1", f"data.train={data['train']}", f"data.test={data['test']}"]
    return ["evaluate", "linear", MODEL, *settings, "--json", *more]


def test_evaluate_saves_at_the_signal_and_the_same_command_resumes_within_an_epoch(tmp_path, command):
    data = write_split(tmp_path / "data", num_train=64, num_test=24)
    whole = command(*training(data, f"resume_file={tmp_path}/whole.safetensors"))
    progress = tmp_path / "state" / "ssl_locat" / "progress"
    first = command(*training(data))
    wait_for(lambda: list(progress.glob("linear-*.safetensors")), first)  # an epoch is done
    first.send_signal(signal.SIGUSR2)
    assert first.wait() == 4 and not first.stdout, first.stderr
    assert "Stopped by SIGUSR2 in linear, step" in first.stderr and "resumes" in first.stderr
    (kept,) = progress.glob("linear-*.safetensors")
    with safe_open(kept, "pt") as file:
        stopped_at = int(file.metadata()["step"])
    assert 4 <= stopped_at < 160
    second = command(*training(data))
    assert second.wait() == 0, second.stderr
    assert not list(progress.iterdir())  # finished: nothing to resume from
    assert whole.wait() == 0, whole.stderr
    assert json.loads(second.stdout)["metrics"] == json.loads(whole.stdout)["metrics"]


def test_a_scaler_and_a_plan_are_kept_with_the_progress(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    save_progress(tmp_path / "p.safetensors", 7, model, optimizer, {"a": 1}, {"seed": 3}, scaler)
    again = torch.amp.GradScaler("cpu")
    assert load_progress(tmp_path / "p.safetensors", model, optimizer, {"a": 1}, again) == (7, {"seed": 3})
    assert again.get_scale() == 512.0


TABLE = """
title: Shared
results: {results}
data:
  colours: {{train: {train}, test: {test}}}
columns:
  linear: {{protocol: linear, data: colours, metric: top1, seeds: [0, 1], options: {{epochs: 30, lr: 0.1, batch_size: 16, workers: 0}}}}
  k-NN: {{protocol: knn, data: colours, metric: top1_k3, options: {{k: [3], workers: 0}}}}
rows:
  ours: {{model: "{model}"}}
"""


def write_table(folder, **changes):
    data = write_split(folder / "data", num_train=48, num_test=12)
    path = folder / "shared.yaml"
    path.write_text(TABLE.format(results=folder / "results", model=MODEL, **data | changes))
    return path


def test_two_jobs_share_a_tables_cells_and_a_stopped_cell_resumes(tmp_path, command):
    path = write_table(tmp_path)
    first = command("table", str(path))
    cells = tmp_path / "results" / "cells"
    wait_for(lambda: list(cells.glob("linear-*.progress.safetensors")), first)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 4, first.stderr
    (progress,) = cells.glob("linear-*.progress.safetensors")
    with safe_open(progress, "pt") as file:
        step = int(file.metadata()["step"])
    assert 0 < step < 90 and not list(cells.glob("linear-*.json"))
    both = [command("table", str(path)) for _ in range(2)]
    for process in both:
        assert process.wait() == 0, process.stderr
    results = [json.loads(file.read_text()) for file in cells.glob("*.json")]
    assert len(results) == 3 and not list(cells.glob("*.progress.safetensors")) and not list(cells.glob("*.lock"))
    assert (tmp_path / "results" / "table.csv").read_text().count("linear") == 1


def tar_of_text(path, keys: str):
    """Samples whose images are none."""
    with tarfile.open(path, "w") as archive:
        for key in keys:
            for name, content in ((f"{key}.png", b"no image"), (f"{key}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("where", ["both", pytest.param("one", marks=pytest.mark.slow)])  # which waits 15 s for the other
def test_a_cell_that_fails_on_one_of_two_processes_ends_the_job_and_one_that_fails_on_both_only_itself(tmp_path, command, where):
    path = write_table(tmp_path)
    # each process's share is one half of these, in their order
    train = [str(tmp_path / "data" / "train-0.tar"), str(tar_of_text(tmp_path / "torn.tar", "ab"))]
    if where == "both":
        train.insert(0, str(tar_of_text(tmp_path / "also-torn.tar", "cd")))
    text = path.read_text().replace(
        "columns:", f"  torn: {{train: {json.dumps(train)}, test: {tmp_path}/data/test-0.tar}}\ncolumns:"
    )
    text = re.sub("  linear: .*", "  torn: {protocol: knn, data: torn, metric: top1_k3, options: {k: [3], workers: 0}}", text)
    path.write_text(text)
    job = start_job(2, "table", str(path), environment={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    codes = [process.wait() for process in job]
    said = "".join(process.stderr for process in job)
    assert any(codes) and "not an image" in said
    measured = list((tmp_path / "results" / "cells").glob("*.json"))
    if where == "both":
        assert len(measured) == 1 and "1 of 2 cells of the table could not be measured" in said, said
    else:
        assert not measured and "ours, torn: " in said, said


def test_a_cell_that_another_job_holds_is_left_to_it(tmp_path):
    path = tmp_path / "cells" / "knn-0123.json"
    held = table.Claim(path)
    assert held.take()
    other = "import sys; from pathlib import Path; from ssl_locat.tables.table import Claim; sys.exit(Claim(Path(sys.argv[1])).take())"
    assert subprocess.run([sys.executable, "-c", other, str(path)]).returncode == 0  # False: not taken
    held.release()
    assert subprocess.run([sys.executable, "-c", other, str(path)]).returncode == 1


# numbers that are none, and exit codes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """An export whose weights hold NaN."""
    from ssl_locat.export.export import export

    folder = tmp_path_factory.mktemp("spoiled")
    export(MODEL, str(folder / "export"))
    weights = load_file(folder / "export" / "model.safetensors")
    weights["blocks.0.mlp.fc2.weight"][:] = float("nan")  # what every protocol reads
    save_file(weights, folder / "export" / "model.safetensors")
    return folder / "export"


def test_a_metric_that_is_no_number_is_null_in_json_and_ends_with_code_2(tmp_path, command, spoiled):
    data = write_split(tmp_path / "data", num_train=24, num_test=12)
    process = command("evaluate", "locality", str(spoiled), f"data.test={data['test']}", "out=null", "workers=0", "--json")
    assert process.wait() == 2 and "not finite" in process.stderr, process.stderr
    assert None in json.loads(process.stdout, parse_constant=pytest.fail)["metrics"].values()


def test_a_table_ends_with_the_highest_code_of_its_cells(tmp_path):
    path = write_table(tmp_path)
    torn = tar_of_text(tmp_path / "torn.tar", "ab")
    text = path.read_text().replace(
        "linear: {", "torn: {protocol: knn, data: torn, metric: top1_k3, options: {k: [3], workers: 0}}\n  linear: {"
    )
    text = text.replace(
        "columns:",
        f"  torn: {{train: {tmp_path}/data/train-0.tar, test: [{tmp_path}/data/test-0.tar, {torn}], max_bad: 0.1}}\ncolumns:",
    )
    text = text.replace("epochs: 30", "epochs: 1").replace("rows:", f'rows:\n  worse: {{model: "{MODEL}&no_such_option=1"}}')
    path.write_text(text)
    folder, error = table.run(str(path))
    assert error.exit_code == 3 and "5 of 8 cells" in str(error)  # a model that cannot be made: 2; too much damage: 3
    assert len(list((folder / "cells").glob("*.json"))) == 3  # what could be measured is kept
    written = (folder / "table.md").read_text()
    assert "ours, torn: 2 of 14 images could not be read" in written and "worse, k-NN:" in written
