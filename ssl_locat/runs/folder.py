"""A run's folder: the resolved config, the environment, where to resume from, the summary. Plain files that people read."""

import errno
import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ssl_locat.config.schema import Config, parse
from ssl_locat.config.yaml_files import LoadedYaml, load_yaml
from ssl_locat.errors import CheckpointError, ConfigError, UserError
from ssl_locat.runs.durable import make_folder, write_atomically
from ssl_locat.runs.marker import problem, read_marker, step_folders
from ssl_locat.text.shown import carries_credentials, redacted, to_json

log = logging.getLogger(__name__)

LOCK_PATIENCE = 300  # seconds; servers of network disks forget a dead node's locks after one to two minutes

# what may differ between the run that was stopped and the one that resumes: nothing in it changes what is learned
MAY_CHANGE: tuple[str, ...] = (
    "data.train",  # where the images lie; which they are is in the plan's manifest (data/stream/plan.py)
    "data.workers",
    "data.read_memory_gb",
    "data.max_bad",
    "data.retry_minutes",
    "data.cache",
    "data.test",
    "data.num_classes",
)
MAY_CHANGE += (
    "data.make",
    "run_dir",
    "device",
    "compile",
    "parallel",
    "activation_checkpointing",
    "optim.accumulate_steps",
    "crops.mode",
    "backbone.pack_crops",
)
MAY_CHANGE += ("checkpoint", "probes", "log", "stop_on", "stop_when", "guard", "export", "sweep")


class Difference(NamedTuple):
    """One setting of a run that is not what it was."""

    key: str
    saved: Any
    given: Any

    def __str__(self) -> str:
        return f"{self.key} was {redacted(self.saved)!r}, now {redacted(self.given)!r}"


def save_tensors(tensors: dict[str, Any], path: str | Path, **options: Any) -> None:
    """safetensors' save_file, but with the permissions that the umask asks for: it writes 0600."""
    from safetensors.torch import save_file  # imports torch, which the commands that only look at a run do without

    path = Path(path)
    # made by us first, it has the mode that the umask leaves
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, **options)
    path.chmod(mode)


def read_config(run_dir: str | Path) -> Config:
    """The resolved config of a run: config.yaml, or that of the newest checkpoint where a power cut left the file empty or took it."""
    path = Path(run_dir, "config.yaml")
    if path.is_file() and path.stat().st_size:
        return parse(Config, load_yaml(str(path)))
    for checkpoint in reversed(step_folders(Path(run_dir, "checkpoints"))):
        if not problem(checkpoint):
            return saved_config(checkpoint)
    raise UserError(f"{run_dir}: not a run folder (it has no config.yaml). Give the run_dir of a pretraining.")


def saved_config(checkpoint: Path) -> Config:
    """The config that a checkpoint was made with: what came later has its default. It has no credentials. CheckpointError if it is none."""
    values = read_marker(checkpoint)["meta"].get("config")
    try:
        return parse(Config, LoadedYaml(f"the config in {checkpoint}", values))
    except (ConfigError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint} holds no config that this version reads: {error}") from None


class RunFolder:
    """A run's folder while a process trains in it (rank 0 only): no other process does until `close`, or this one's end.

    Raises:
        UserError: the folder cannot be written, or another process trains in it.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir)
        with self._writable():
            make_folder(self.path)
            self._lock = acquire_lock(self.path)
        # by its inode: another folder of this name has a lock file of that name
        self._identity = os.fstat(self._lock.fileno()).st_ino

    def require_same_settings(self, config: Config) -> None:
        """UserError if the folder holds a run with other settings. For a run without a checkpoint: else the checkpoint's own count."""
        # without a step done it is what a mistake in the config left
        if not (self.path / "metrics.jsonl").exists() or not (self.path / "config.yaml").is_file():
            return
        if (self.path / "config.yaml").stat().st_size == 0:  # a power cut; without a checkpoint the run begins anew
            return
        if changed := list(differences(read_config(self.path).model_dump(mode="json"), config.model_dump(mode="json"))):
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(map(str, changed))}. "
                "Give another run_dir to start a new run, or the same settings to resume."
            )

    def write(self, config: Config) -> None:
        """config.yaml and environment.json."""
        private = carries_credentials(config.model_dump(mode="json"))
        if private:
            log.warning(
                "the config holds credentials (user, password or query of a URL): %s keeps them to resume, readable by you alone. Better "
                "leave them out: ~/.netrc, AWS_PROFILE, gcloud's login and HF_TOKEN are read as by every tool.",
                self.path / "config.yaml",
            )
        with self._writable():
            write_atomically(self.path / "config.yaml", config.to_yaml(), private)
            write_atomically(self.path / "environment.json", to_json(environment(), indent=1))

    def require_in_place(self) -> None:
        """UserError if the folder was moved or deleted, or another one was put in its place, while this run trains in it."""
        try:
            # by inode, not by name: a folder of the same name may have taken the place
            found = (self.path / "lock").stat().st_ino
        except FileNotFoundError:
            found = None
        except OSError:
            return  # of a disk that fails; whoever writes next is told
        if found != self._identity:
            what = "it is not there any more" if found is None else "another one is in its place"
            raise UserError(
                f"{self.path} was moved or deleted while this run trained in it: {what}. The run ends; where its checkpoints are, the "
                "same command resumes (run_dir=WHERE_IT_IS_NOW)."
            )

    def close(self) -> None:
        """Let others train here."""
        self._lock.close()

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written: {error.strerror or error}. Give another run_dir.") from None


def acquire_lock(folder: Path) -> TextIO:
    """Hold `folder`/lock, which the kernel frees when this process ends, however it ends. UserError if another process keeps it.

    A network disk may take minutes to notice that a node has died: where the holder is on another machine, it is waited for.
    """
    patience = None
    while True:
        lock = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115  stays open as long as the run
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX, not flock: forked loader workers must not inherit it
            if _is_at(folder / "lock", lock):
                break
            lock.close()  # the file was deleted while this waited; who came later locked another one of that name
            continue
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.debug("%s: this file system has no locks (%s)", folder, error)
                return lock
        lock.seek(0)
        # only for words and for whether it is on this machine: who holds the lock is the kernel's to say
        holder = lock.read().strip()
        lock.close()
        if patience is None:
            patience = time.monotonic() + (0 if holder.endswith(f" on {socket.gethostname()}") else LOCK_PATIENCE)
        if time.monotonic() >= patience:
            raise UserError(
                f"{folder} is in use: {holder} trains in it. Wait for that run, stop it, or give another run_dir. "
                f"(If that machine is dead, delete {folder / 'lock'}.)"
            )
        log.warning("%s is in use: %s trains in it; waiting for it to end", folder, holder)
        time.sleep(10)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _is_at(path: Path, file: TextIO) -> bool:
    """Whether the open file is still the one of this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """summary.json, which a finished run has; None without a whole one."""
    try:
        summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return summary
    except (FileNotFoundError, ValueError):
        return None


def differences(saved: Any, given: Any, key: str = "") -> Iterator[Difference]:
    """Each setting of two configs, as plain values, that is another one and matters for what is learned."""
    if key == "data.train" and (before := _filters(saved)) != (now := _filters(given)):
        yield Difference(key, f"filters {before}", f"filters {now}")  # what they make of a sample is no matter of where it lies
    if key in MAY_CHANGE or (key == "precision" and given == "auto"):  # auto: as it was
        return
    if isinstance(saved, dict) and isinstance(given, dict):
        # in the order of the file, and what is only in one of them, too
        for name in dict.fromkeys([*saved, *given]):
            yield from differences(saved.get(name), given.get(name), f"{key}.{name}".lstrip("."))
    elif redacted(saved, "") != redacted(given, ""):  # signed URLs rotate, and checkpoints keep none
        yield Difference(key, saved, given)


def _filters(train: Any) -> list[list[str]]:
    """Of each entry of data.train; [] where none has any: a config of before they came has no such key."""
    entries = train if isinstance(train, list) else [train]
    found = [list(entry.get("filters") or []) if isinstance(entry, dict) else [] for entry in entries]
    return found if any(found) else []


def environment() -> dict[str, Any]:
    """Versions, commit, hardware: what a number depends on."""
    import torch

    packages = (
        "ssl_locat",
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "pillow",
        "simplejpeg",
        "opencv-python-headless",
        "triton",
        "xformers",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "hardware": {
            "cpu": cpu_name(),
            "instructions": cpu_instructions(),
            "cores": os.cpu_count(),
            "gpus": devices,
            "threads": torch.get_num_threads(),
        },
        "system": platform.platform(),
    }


def commit_of(root: Path) -> str | None:
    """Commit of the checkout that a package runs from; None for an installed wheel. "-dirty" behind it: numbers of changed code must say so, but
    not those made while docs were written, of which the ledger that holds them is one."""
    if not (root / ".git").exists():
        return None
    run = partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10)
    try:
        found = run(["git", "describe", "--always"]).stdout.strip()
        changed = run(["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)docs"]).returncode == 1
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (found + "-dirty" if changed else found) or None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu_features() -> set[str]:
    """Instruction sets as Linux names them (avx2, avx512_bf16, amx_bf16; bf16 on ARM); empty elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, values = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(values.split())
    return set()


def cpu_instructions() -> list[str]:
    """['AVX-512', 'bf16']: those that ratios of times depend on, as people name them."""
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX", "bf16": "bf16"}
    features = cpu_features()
    found = [words for flag, words in names.items() if flag in features and not (flag == "avx2" and "avx512f" in features)]
    return list(dict.fromkeys(found))
