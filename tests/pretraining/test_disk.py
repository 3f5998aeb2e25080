"""Disks that fill up and folders that go away under a run: one message, the documented exit code, nothing lost that was saved."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import Outage, Preempted, UserError
from ssl_locat.pretraining import summary
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.monitor import Monitor
from ssl_locat.runs import checkpoint


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    return folder / "set"


@pytest.fixture
def disk(tmp_path):
    """A real file system of 8 MB; `fill()` leaves it without a free byte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs to mount a small tmpfs, which takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    block = 1 << 16
    with open(disk / "filler", "ab", buffering=0) as filler:
        try:
            while block:
                written = filler.write(bytes(block))
                block = block if written == block else block >> 1
        except OSError:
            pass
        filler.truncate(max(0, filler.tell() - leave))


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(3, action)`: called once, after that step."""
    actions, plain = {}, Monitor.log

    def log(self, *arguments):
        plain(self, *arguments)
        actions.pop(self.run.step, lambda: None)()

    monkeypatch.setattr(Monitor, "log", log)
    return lambda step, action: actions.update({step: action})


@pytest.fixture
def config(textures, tmp_path):
    def make(folder: Path, *overrides: str):
        return load(str(write_config(textures, tmp_path)), [f"run_dir={folder}/run", *overrides])

    return make


@pytest.mark.parametrize("stage", ["metrics", "term", "end", "export"])
def test_a_full_disk_is_an_outage_in_words_at_every_stage_and_room_is_all_it_takes(disk, config, at_step, stage, monkeypatch):
    made = config(disk, "export=true", "log.every_steps=12" if stage in ("term", "end") else "log.every_steps=1")
    if stage == "metrics":
        at_step(6, lambda: fill(disk))
    elif stage == "term":
        at_step(6, lambda: (fill(disk), os.kill(os.getpid(), signal.SIGTERM)))
    elif stage == "end":
        at_step(12, lambda: fill(disk))
    else:
        whole = summary.export

        def export(*arguments):
            fill(disk)
            return whole(*arguments)

        monkeypatch.setattr(summary, "export", export)
    with pytest.raises(Outage, match=r"the disk is full.* Make room|the disk is full\. Make room") as caught:
        pretrain(made)
    assert caught.value.exit_code == 4 and "start the same command again" in str(caught.value)
    assert not (disk / "run/summary.json").exists()
    (disk / "filler").unlink()
    monkeypatch.undo()
    assert pretrain(made)["steps"] == 12
    assert list(losses(made.run_dir)) == list(range(1, 13)) and (disk / "run/export/model.safetensors").is_file()


def test_saves_that_fail_are_told_at_once_tried_again_and_end_the_run_in_a_stated_time(
    disk, config, at_step, monkeypatch, caplog
):
    """There is room for metrics, none for a checkpoint."""
    made = config(disk, "optim.epochs=100", "checkpoint.every_steps=1000", "checkpoint.asynchronous=true")
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(checkpoint, "UNSAVED_SECONDS", 2)
    monkeypatch.setattr("ssl_locat.pretraining.loop.SAVE_OR_END", checkpoint.SAVE_OR_END)
    made = made.model_copy(update={"checkpoint": made.checkpoint.model_copy(update={"every_steps": 5})})
    at_step(7, lambda: fill(disk, leave=60_000))
    with pytest.raises(
        Outage, match=r"could not be saved: the disk is full.*newest good checkpoint is .*step_00000005.*Make room"
    ):
        pretrain(made)
    assert caplog.text.count("could not be saved") >= 2 and "it is tried again soon" in caplog.text
    assert len(losses(made.run_dir)) < 500


def test_room_that_is_made_meanwhile_is_found_without_waiting_for_the_next_period(disk, config, at_step, monkeypatch):
    made = config(disk, "optim.epochs=4", "checkpoint.every_steps=10", "checkpoint.asynchronous=false")
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.05)
    at_step(9, lambda: fill(disk, leave=60_000))
    at_step(11, lambda: (disk / "filler").unlink())
    saved = []
    plain = checkpoint.Checkpointer._commit

    def commit(self, step, *rest):
        saved.append(step)
        return plain(self, step, *rest)

    monkeypatch.setattr(checkpoint.Checkpointer, "_commit", commit)
    pretrain(made)
    assert any(10 < step < 20 for step in saved), saved


@pytest.mark.parametrize("how", ["moved", "deleted", "exchanged"])
def test_a_run_folder_that_goes_away_ends_the_run_in_one_message(tmp_path, config, at_step, how):
    made = config(tmp_path)
    run = Path(made.run_dir)

    def go_away():
        run.rename(tmp_path / "elsewhere") if how != "deleted" else shutil.rmtree(run)
        if how == "exchanged":
            run.mkdir()
            (run / "lock").write_text("")

    at_step(7, go_away)
    with pytest.raises(UserError, match=r"run was moved or deleted while this run trained in it"):
        pretrain(made)
    assert how == "exchanged" or not run.exists(), "it came back"
    if how == "moved":
        moved = made.model_copy(update={"run_dir": str(tmp_path / "elsewhere")})
        assert pretrain(moved)["steps"] == 12


def test_a_stop_is_still_a_stop(tmp_path, config, at_step):
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="Stopped by SIGTERM at step 5"):
        pretrain(config(tmp_path))
