"""After a power cut at any moment the same command resumes, and no checkpoint is ahead of the metrics.

A disk is simulated that keeps only what was synced: file contents at their last fsync (a file that was never synced is empty), and names
either as its folder was at its last fsync (`strict`), or as they are (`lazy`: a journal that wrote names before data, as ext4 may). The state
is taken before and after each fsync and rename of a real run, and each state that differs is looked at; those of a kind are resumed once.
"""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.runs.checkpoint import COMMITTED, Checkpointer
from ssl_locat.runs.durable import flush, flush_folder, make_folder, write_atomically
from ssl_locat.runs.folder import read_config


class Disk:
    """Watches `root` through os.fsync, os.rename and os.replace; `.states` are {path: bytes, None for a folder}, in the order met."""

    def __init__(self, root: Path, monkeypatch):
        self.root = root
        self.contents: dict[int, bytes] = {}  # inode -> as synced
        self.names: dict[int, dict[str, int]] = {}  # inode of a folder -> {name: inode}, as synced
        self.folders = {root.stat().st_ino}
        self.states: list[dict[str, bytes | None]] = []
        self._kept: list[int] = []  # descriptors: an inode that is in use is not given to another file
        for name in ("fsync", "rename", "replace"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, function):
        def watched(*arguments, **options):
            self._take()
            result = function(*arguments, **options)
            if function.__name__ == "fsync":
                self._synced(arguments[0])
            self._take()
            return result

        return watched

    def _synced(self, descriptor: int) -> None:
        self._kept.append(os.dup(descriptor))
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self.folders.add(found.st_ino)
            with os.scandir(f"/proc/self/fd/{descriptor}") as entries:
                self.names[found.st_ino] = {entry.name: entry.inode() for entry in entries}
            for name, inode in self.names[found.st_ino].items():
                if Path(f"/proc/self/fd/{descriptor}", name).is_dir():
                    self.folders.add(inode)
        else:
            self.contents[found.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _take(self) -> None:
        strict = self.strict()
        lazy: dict[str, bytes | None] = {}
        for path in sorted(self.root.rglob("*")):
            inode = path.stat().st_ino
            lazy[str(path.relative_to(self.root))] = None if path.is_dir() else self.contents.get(inode, b"")
        self.states += [state for state in (strict, lazy) if state not in self.states]

    def strict(self) -> dict[str, bytes | None]:
        """What is there for sure if the power goes now."""
        found: dict[str, bytes | None] = {}
        self._walk(self.root.stat().st_ino, "", found)
        return found

    def _walk(self, folder: int, prefix: str, found: dict[str, bytes | None]) -> None:
        for name, inode in self.names.get(folder, {}).items():
            if inode in self.folders:
                found[prefix + name] = None
                self._walk(inode, f"{prefix}{name}/", found)
            else:
                found[prefix + name] = self.contents.get(inode, b"")

    def close(self) -> None:
        for descriptor in self._kept:
            os.close(descriptor)


def restore(state: dict[str, bytes | None], root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in sorted(state.items()):
        if content is None:
            (root / name).mkdir(exist_ok=True)
        else:
            (root / name).write_bytes(content)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc to see what is synced")


@needs_proc
def test_the_same_command_resumes_after_a_power_cut_at_any_moment(tmp_path, monkeypatch):
    make_textures(tmp_path / "set", num_train=96, num_test=40, image_size=32, progress=False)
    root = tmp_path / "disk"
    root.mkdir()
    options = [f"run_dir={root}/run", "optim.epochs=1", "checkpoint.every_steps=2", "checkpoint.keep_last=2", "log.every_steps=1"]
    config = load(str(write_config(tmp_path / "set", tmp_path)), options)
    with monkeypatch.context() as patches:
        disk = Disk(root, patches)
        pretrain(config)
    disk.close()
    expected = losses(config.run_dir)
    assert len(disk.states) > 20

    kinds, safe = {}, 0
    for state in disk.states:
        restore(state, root)
        newest = Checkpointer(config.run_dir).newest()
        step = int(newest.name[5:]) if newest else 0
        safe = max(safe, step) if state is disk.states[-1] else safe
        kept = losses(config.run_dir)
        assert {n: kept[n] for n in range(1, step + 1)} == {n: expected[n] for n in range(1, step + 1)}, (
            "metrics behind a checkpoint"
        )
        if newest:
            assert read_config(config.run_dir) == config
        file = root / "run/config.yaml"
        size = file.stat().st_size if file.exists() else None
        kinds[step, size if not size else 1, len(kept), (root / "run/summary.json").exists()] = state
    assert {0, 2, 4, 6} <= {kind[0] for kind in kinds}, "a checkpoint that never was the newest one on disk"
    for kind, state in kinds.items():
        restore(state, root)
        assert pretrain(config)["steps"] == 6, kind
        assert losses(config.run_dir) == expected, kind
        assert read_config(config.run_dir) == config


@needs_proc
def test_what_a_save_returned_from_is_on_disk_and_the_one_before_it_goes_only_then(tmp_path, monkeypatch):
    """Each sync on the way counts: without it the strict disk lacks a file, a name or a checkpoint that was promised."""
    root, module = tmp_path / "disk", torch.nn.Linear(2, 2)
    root.mkdir()
    optimizer, run = torch.optim.AdamW(module.parameters()), root / "a/run"
    promised: list[tuple[int, int, dict]] = []  # (states met so far, newest step, strict disk)
    with monkeypatch.context() as patches:
        disk = Disk(root, patches)
        make_folder(run)
        write_atomically(run / "config.yaml", "old")
        assert disk.strict() == {"a": None, "a/run": None, "a/run/config.yaml": b"old"}
        write_atomically(run / "config.yaml", "new")
        assert disk.strict()["a/run/config.yaml"] == b"new"
        checkpointer = Checkpointer(run, keep_last=2)
        for step in (1, 2, 3):
            for name in COMMITTED[:-1]:
                with open(run / name, "a") as file:
                    file.write(f"{step}\n")
            checkpointer.save(step, {"student": module}, optimizer, {}, block=True)
            promised.append((len(disk.states), step, disk.strict()))
        checkpointer.set_aside(checkpointer.folder / "step_00000002")
        set_aside = disk.strict()
    disk.close()
    assert all(state.get("a/run/config.yaml", b"old") in (b"old", b"new") for state in disk.states)
    for _, step, state in promised:
        restore(state, root)
        assert Checkpointer(run).newest() == run / f"checkpoints/step_{step:08d}"
        for name in COMMITTED[:-1]:
            assert (run / name).read_text() == "".join(f"{n}\n" for n in range(1, step + 1))
    for number, state in enumerate(disk.states):
        restore(state, root)
        newest = Checkpointer(run).newest()
        least = max((step for met, step, _ in promised[:2] if number >= met), default=0)
        assert (int(newest.name[5:]) if newest else 0) >= least, "the former checkpoint went before the new one was on disk"
    restore(set_aside, root)
    assert Checkpointer(run).newest() == run / "checkpoints/step_00000002"


def test_only_a_folder_that_cannot_be_synced_at_all_is_left_to_its_file_system(tmp_path, monkeypatch):
    def refuses(number: int):
        def fsync(descriptor):
            raise OSError(number, os.strerror(number))

        return fsync

    for number in (errno.EINVAL, errno.ENOTSUP):
        monkeypatch.setattr(os, "fsync", refuses(number))
        flush_folder(tmp_path)
    for number in (errno.EIO, errno.ENOSPC):  # a disk that fails, not one that has another way
        monkeypatch.setattr(os, "fsync", refuses(number))
        with pytest.raises(OSError) as raised:
            flush_folder(tmp_path)
        assert raised.value.errno == number
    flush(tmp_path / "nowhere")  # nothing was written there: nothing to sync


@pytest.mark.parametrize("damage", ["empty", "missing", "metrics empty"])
def test_config_and_metrics_that_a_power_cut_took_do_not_cost_the_run(tmp_path, damage):
    """As found on copied disk images: whole checkpoints, and empty files beside them."""
    make_textures(tmp_path / "set", num_train=96, num_test=40, image_size=32, progress=False)
    config = load(str(write_config(tmp_path / "set", tmp_path)), ["optim.epochs=1", "export=false"])
    pretrain(config)
    run = Path(config.run_dir)
    (run / "summary.json").unlink()
    shutil.rmtree(max((run / "checkpoints").glob("step_*")))
    if damage == "missing":
        (run / "config.yaml").unlink()
    else:
        (run / "config.yaml").write_text("")
    if damage == "metrics empty":
        (run / "metrics.jsonl").write_text("")
    assert read_config(run) == config
    assert pretrain(config)["steps"] == 6
    assert load(str(run / "config.yaml")) == config
