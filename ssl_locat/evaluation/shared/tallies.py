"""What each test image added to the figures of one network, in a file: two networks are compared on the same images later (intervals.py)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ssl_locat.intervals.paired import Tally


def write_tallies(path: str | Path, tallies: Mapping[str, Tally]) -> None:
    """column -> tally, into one .npz, beside and renamed. Hits of accuracies are single bits."""
    path, parts = Path(path), dict[str, Any]()
    for name, tally in tallies.items():
        parts[f"hits|{name}"] = tally.hits[..., 0].astype(bool) if tally.is_accuracy else tally.hits
        if not tally.is_accuracy:
            parts[f"of|{name}"] = tally.of
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    with open(beside, "wb") as file:
        np.savez_compressed(file, **parts)
    beside.replace(path)


def read_tallies(path: str | Path) -> dict[str, Tally] | None:
    """What `write_tallies` wrote; None where there is no such file, or none that can be read. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, BadZipFile):  # a cut file is no zip any more
        return None
    return {
        name: Tally(parts[f"hits|{name}"].astype(float), parts[f"of|{name}"].astype(float))
        if f"of|{name}" in parts
        else Tally.of_hits(parts[f"hits|{name}"])
        for name in dict.fromkeys(name.partition("|")[2] for name in parts)
    }
