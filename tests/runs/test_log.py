import io
import json
import logging
import os
import pty
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssl_locat.errors import ConfigError
from ssl_locat.runs import log
from ssl_locat.runs.folder import commit_of


@pytest.fixture(autouse=True)
def one_quiet_console(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    yield
    logging.getLogger("ssl_locat").handlers.clear()
    logging.getLogger("ssl_locat").propagate = True
    logging.getLogger("ssl_locat").setLevel(logging.NOTSET)
    log._quiet = False


def test_metrics_take_tensors_and_write_flat_lines_every_so_many_steps(tmp_path):
    metrics = log.MetricsLog(tmp_path, every_steps=2, tensorboard=False)
    assert metrics.add(1, 8, loss=torch.tensor(2.5), lr=1e-3) == []
    assert log.read_jsonl(tmp_path / "metrics.jsonl") == []
    written = metrics.add(2, 16, loss=torch.tensor(1.1, dtype=torch.float32), nan=torch.tensor(float("nan")))
    assert [r["step"] for r in written] == [1, 2]
    first, second = log.read_jsonl(tmp_path / "metrics.jsonl")
    assert (first["step"], first["samples_seen"], first["loss"], first["lr"]) == (1, 8, 2.5, 1e-3)
    assert torch.tensor(second["loss"], dtype=torch.float32) == torch.tensor(1.1)  # exact: equal runs give equal files
    assert second["nan"] is None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "samples_seen": s, "loss": 0.0}) + "\n" for s in range(1, 8)) + '{"step": 8, "lo'
    )
    metrics = log.MetricsLog(tmp_path, resume_step=4, tensorboard=False, every_steps=1)
    metrics.add(5, 5, loss=1.0)
    metrics.close()
    records = log.read_jsonl(path)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5] and records[-1]["loss"] == 1.0


def test_tensorboard_events_hold_the_numbers(tmp_path):
    metrics = log.MetricsLog(tmp_path, every_steps=1)
    metrics.add(3, 24, loss=torch.tensor(2.0))
    metrics.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 2.0)]


def test_unknown_tracker_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"wandbb.*Did you mean 'wandb'"):
        log.MetricsLog(tmp_path, tensorboard=False, trackers=("wandbb",))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # what import sees of a package that is not there
    with pytest.raises(ValueError, match=rf"ssl_locat\[{name}\]"):
        log.MetricsLog(tmp_path, tensorboard=False, trackers=(name,))


def three_steps(folder: Path, tracker: str) -> None:
    folder.mkdir()
    metrics = log.MetricsLog(folder, tensorboard=False, trackers=(tracker,), every_steps=2, config={"seed": 3})
    for step in (1, 2, 3):
        metrics.add(step, 8 * step, loss=torch.tensor(1.0 / step), note=None)
    metrics.close()


def test_mlflow_writes_plain_files_into_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the mlflow extra is not installed: pip install 'ssl_locat[mlflow]'")
    monkeypatch.chdir(tmp_path)
    three_steps(tmp_path / "run", "mlflow")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing beside it
    found = list((tmp_path / "run" / "mlruns").glob("*/*/metrics/loss"))
    assert len(found) == 1
    rows = [line.split() for line in found[0].read_text().splitlines()]
    assert [(float(row[1]), int(row[2])) for row in rows] == [(pytest.approx(1.0 / step), step) for step in (1, 2, 3)]
    assert list((tmp_path / "run" / "mlruns").glob("*/*/params/seed"))


@pytest.mark.slow
def test_wandb_stays_offline_in_the_run_folder(tmp_path, monkeypatch):
    """Slow: its service process takes most of a minute to come and go."""
    wandb = pytest.importorskip("wandb", reason="the wandb extra is not installed: pip install 'ssl_locat[wandb]'")
    monkeypatch.chdir(tmp_path)
    three_steps(tmp_path / "run", "wandb")
    wandb.teardown()  # its service would wait for this process to end
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    found = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(found) == 1

    written = found[0].read_bytes()  # records with JSON values inside; their reader is not public
    assert all(value in written for value in (b"loss", b"0.5", b"0.33333334", b"samples_seen", b"24"))


def test_events_append_and_only_rank_0_writes(tmp_path, monkeypatch):
    log.EventLog(tmp_path).add("start", step=0, host="a")
    log.EventLog(tmp_path).add("resume", step=7)
    monkeypatch.setenv("RANK", "1")
    log.EventLog(tmp_path).add("start")
    assert log.MetricsLog(tmp_path).add(1, 1, loss=1.0) == [] and not (tmp_path / "metrics.jsonl").exists()
    events = log.read_jsonl(tmp_path / "events.jsonl")
    assert [(e["kind"], e["step"]) for e in events] == [("start", 0), ("resume", 7)] and events[0]["time"].endswith("+00:00")


def test_plain_progress_is_sparse_and_says_rate_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    log.console.cache_clear()
    with log.progress("indexing", total=600, unit="shards") as bar:
        for _ in range(100):
            now[0] += 1
            bar.update(2, loss=2.31234)
    log.console.cache_clear()
    lines = out.getvalue().splitlines()
    assert lines[0] == "indexing: 10/600 shards  loss 2.312  2 shards/s  ETA 4 min 55 s"
    assert len(lines) == 5 and lines[-1].startswith("indexing: 200/600")  # after 5, 15, 35, 75 s, and the end


def test_the_eta_leaves_out_a_slow_start_and_counts_probes_to_come(monkeypatch):
    """100 steps of 1 s after a first one of 30 s; a probe of 20 s before them, every 50 steps and at the end."""
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    bar = log._Bar("pretraining", 100, "steps", 0)
    now[0] += 20
    bar.pause(20, "probe", every=50)
    now[0] += 30
    bar.update()
    for _ in range(30):  # the first minute is over
        now[0] += 1
        bar.update()
    left = 69 * 1 + 2 * 20
    assert bar.words().endswith(f"ETA {log.duration(left)}"), bar.words()


@pytest.mark.parametrize("step", [0.05, 0.4, 2.0])
@pytest.mark.parametrize("resumed_at", [0, 130])
def test_the_eta_after_a_minute_is_right_within_a_quarter_on_a_steady_machine(monkeypatch, step, resumed_at):
    """Steps that vary by a third, the first one slow; probes and saves at the same period, which the length is no multiple of; a save in
    the midst of the first minute, whose like must be counted to the end."""
    now, draws = [0.0], random.Random(7)
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    total, every = resumed_at + round(600 / step) + 7, max(1, round(50 / step))
    bar, told = log._Bar("pretraining", total, "steps", resumed_at), None

    def pause(kind, seconds):
        now[0] += seconds
        bar.pause(seconds, kind, every)

    pause("probe", 9)
    for number in range(resumed_at + 1, total + 1):
        now[0] += step * draws.uniform(0.67, 1.33) + 15 * (number == resumed_at + 1)
        bar.update()
        if number % every == 0 or number == total:
            pause("save", 1)
            pause("probe", 9)
        if told is None and now[0] > 60 + 9 + 15:
            told = bar.words().rpartition("ETA ")[2], now[0]
    minutes, seconds = re.fullmatch(r"(\d+) min (\d+) s", told[0]).groups()
    assert 60 * int(minutes) + int(seconds) == pytest.approx(now[0] - told[1], rel=0.25)


@pytest.mark.parametrize("setting", ["quiet", "rank"])
def test_progress_is_silent_when_asked_and_on_other_ranks(setting, monkeypatch, capsys):
    log.setup(quiet=True) if setting == "quiet" else monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(log, "_PLAIN_EVERY_SECONDS", (0, 0))
    with log.progress("x", total=2) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_faults_carry_rank_and_host(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    log.setup()
    logging.getLogger("ssl_locat.x").info("not seen")
    logging.getLogger("ssl_locat.x").warning("seen")
    error = capsys.readouterr().err
    assert "[rank 2 on " in error and "seen" in error and "not seen" not in error


NESTED = """
from ssl_locat.runs import log
from ssl_locat.runs.folder import commit_of
log.setup()
import logging, time
with log.progress("outer", total=3, unit="steps", start=1) as outer:
    outer.update(1, loss=1.5)
    with log.progress("inner", total=2) as inner:
        inner.update(2)
        logging.getLogger("ssl_locat").info("a line between")
        time.sleep(0.3)
    outer.update(1)
"""


@pytest.mark.parametrize("no_color", [False, True])
def test_bars_nest_on_a_terminal_and_respect_no_color(no_color):
    reader, writer = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140"} | ({"NO_COLOR": "1"} if no_color else {})
    process = subprocess.Popen([sys.executable, "-c", NESTED], stdin=writer, stdout=writer, stderr=writer, env=env)
    os.close(writer)
    seen = b""
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # how Linux says that the other side of a pty is closed
            break
        if not piece:
            break
        seen += piece
    os.close(reader)
    assert process.wait() == 0
    text = seen.decode()
    assert "outer" in text and "inner" in text and "a line between" in text and "3/3 steps" in text and "loss 1.5" in text
    assert ("\x1b[38;5;" in text or "\x1b[32m" in text or "\x1b[38;2;" in text) is not no_color


def test_a_commit_is_marked_when_code_changed_and_not_when_docs_did(tmp_path):
    assert commit_of(tmp_path) is None  # no checkout

    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True
        )

    (tmp_path / "docs").mkdir()
    for name in ("code.py", "docs/page.md"):
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    clean = commit_of(tmp_path)
    (tmp_path / "docs/page.md").write_text("2")
    assert clean and "dirty" not in clean and commit_of(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert commit_of(tmp_path) == clean + "-dirty"
