"""A run's folder: the resolved config, the environment, where to resume from, the summary. Plain files that people read."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssl_locat.config import Config, parse
from ssl_locat.errors import UserError
from ssl_locat.yaml_files import load_yaml

# what may differ between the run that was stopped and the one that goes on: nothing in it changes what is learned
MAY_CHANGE = ("data.workers", "data.max_bad", "data.retry_minutes", "data.cache", "data.test", "data.num_classes", "data.make")
MAY_CHANGE += ("run_dir", "device", "compile", "parallel", "activation_checkpointing", "optim.accumulate_steps", "crops.mode")
MAY_CHANGE += ("checkpoint", "probes", "log", "stop_on", "export", "sweep")


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read_config(run_dir: str | Path) -> Config:
    """The resolved config of a run."""
    path = Path(run_dir, "config.yaml")
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run folder (it has no config.yaml). Give the run_dir of a pretraining.")
    return parse(Config, load_yaml(str(path)))


def prepare(config: Config) -> None:
    """Create the folder, or check that what it holds is this very run; write config.yaml and environment.json.

    Raises:
        UserError: the folder holds a run with other settings, or cannot be written.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # without a step done it is what a mistake in the config left
        if (folder / "config.yaml").is_file() and any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            changed = list(differences(read_config(folder), config))
            if changed:
                raise UserError(
                    f"{folder} holds a run with other settings: {'; '.join(changed)}. "
                    "Give another run_dir to start afresh, or the same settings to go on."
                )
        write_atomically(folder / "config.yaml", config.to_yaml())
        write_atomically(folder / "environment.json", json.dumps(environment(), indent=1))
    except OSError as error:
        raise UserError(f"run_dir {folder} cannot be written: {error.strerror or error}. Give another run_dir.") from None


def differences(saved: Config, given: Config):
    """'optim.lr was 0.1, now 0.2' for each key that matters."""
    yield from _differences(saved.model_dump(mode="json"), given.model_dump(mode="json"), "")


def _differences(saved: Any, given: Any, key: str):
    if key in MAY_CHANGE:
        return
    if isinstance(saved, dict) and isinstance(given, dict):
        for name in dict.fromkeys([*saved, *given]):
            yield from _differences(saved.get(name), given.get(name), f"{key}.{name}".lstrip("."))
    elif saved != given:
        yield f"{key} was {saved!r}, now {given!r}"


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
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpus": devices, "threads": torch.get_num_threads()},
        "system": platform.platform(),
    }


def _commit() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
