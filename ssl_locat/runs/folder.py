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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from ssl_locat.config.schema import Config, parse
from ssl_locat.config.yaml_files import load_yaml
from ssl_locat.errors import UserError
from ssl_locat.runs.durable import write_atomically
from ssl_locat.shown import carries_credentials, redacted, to_json

log = logging.getLogger(__name__)

LOCK_PATIENCE = 300  # seconds; servers of network disks forget a dead node's locks after one to two minutes

# what may differ between the run that was stopped and the one that goes on: nothing in it changes what is learned
MAY_CHANGE = (
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
)
MAY_CHANGE += ("checkpoint", "probes", "log", "stop_on", "export", "sweep")


def read_config(run_dir: str | Path) -> Config:
    """The resolved config of a run."""
    path = Path(run_dir, "config.yaml")
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run folder (it has no config.yaml). Give the run_dir of a pretraining.")
    return parse(Config, load_yaml(str(path)))


def prepare(config: Config) -> TextIO:
    """Create the folder, or check that what it holds is this very run; write config.yaml and environment.json.

    Returns the lock on the folder: no other process trains in it until the file is closed or this process ends.

    Raises:
        UserError: the folder holds a run with other settings, or cannot be written.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # without a step done it is what a mistake in the config left
        if (folder / "config.yaml").is_file() and any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            changed = list(differences(read_config(folder).model_dump(mode="json"), config.model_dump(mode="json")))
            if changed:
                raise UserError(
                    f"{folder} holds a run with other settings: {'; '.join(changed)}. "
                    "Give another run_dir to start afresh, or the same settings to go on."
                )
        lock = acquire_lock(folder)
        values = config.model_dump(mode="json")
        if private := carries_credentials(values):
            log.warning(
                "the config holds credentials (user, password or query of a URL): %s keeps them to resume, readable by you alone. Better "
                "leave them out: ~/.netrc, AWS_PROFILE, gcloud's login and HF_TOKEN are read as by every tool.",
                folder / "config.yaml",
            )
        write_atomically(folder / "config.yaml", config.to_yaml(), private)
        write_atomically(folder / "environment.json", to_json(environment(), indent=1))
    except OSError as error:
        raise UserError(f"run_dir {folder} cannot be written: {error.strerror or error}. Give another run_dir.") from None
    return lock


def acquire_lock(folder: Path) -> TextIO:
    """Hold `folder`/lock, which the kernel frees when this process ends, however it ends. UserError if another process keeps it.

    A network disk may take minutes to notice that a node has died: where the holder is on another machine, it is waited for.
    """
    lock = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115  stays open as long as the run
    patience = None
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX, not flock: forked loader workers must not inherit it
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.debug("%s: this file system has no locks (%s)", folder, error)
                return lock
        lock.seek(0)
        holder = lock.read().strip()
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


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """summary.json, which a finished run has; None without a whole one."""
    try:
        return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def differences(saved: Any, given: Any, key: str = "") -> Iterator[str]:
    """'optim.lr was 0.1, now 0.2' for each key of two configs, as plain values, that matters."""
    if key in MAY_CHANGE:
        return
    if isinstance(saved, dict) and isinstance(given, dict):
        for name in dict.fromkeys([*saved, *given]):
            yield from differences(saved.get(name), given.get(name), f"{key}.{name}".lstrip("."))
    elif redacted(saved, "") != redacted(given, ""):  # signed URLs rotate, and checkpoints keep none
        yield f"{key} was {redacted(saved)!r}, now {redacted(given)!r}"


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
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "gpus": devices, "threads": torch.get_num_threads()},
        "system": platform.platform(),
    }


def _commit() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
