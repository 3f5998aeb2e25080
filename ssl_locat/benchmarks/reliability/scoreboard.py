"""`ssl-locat bench reliability`: one matrix of kills, sizes and damage over seven libraries, and the tables of docs/reliability.md.

Each library has a process of its own, in an environment of its own that sees this one's packages, too (torch is the same for all), behind the
versions that peers.yaml pins. Results are kept in FOLDER/results.jsonl: the command goes on where it stopped, and `--only` does a cell
again. Nothing here is a measurement of speed but the time to the first batch, which counts from the fork of the ranks.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl_locat.benchmarks.reliability.cells import CELLS
from ssl_locat.benchmarks.reliability.tables import PEERS, read, summary
from ssl_locat.errors import UserError
from ssl_locat.runs.log import console, progress

log = logging.getLogger(__name__)

PACKAGE_ROOT = Path(__file__).resolve().parents[3]
# A pass with kills is ten starts, nine of which are killed: 1000 starts of ours on tars, and besides 300 on Parquet, 80 on zips, 80 on windows.
# Without kills a pass is one start.
OUR_PASSES = {"kill": 30, "world": 40, "workers": 20, "mix": 10}
PARQUET_PASSES = {"kill": 10, "world": 10, "workers": 6, "mix": 4}
FEW_PASSES = {"kill": 2, "world": 2, "workers": 2}
PASSES = {"kill": 3, "world": 3, "workers": 3, "mix": 3}
QUICK = 1


def scoreboard(folder: Path, only: list[str], install: bool, quick: bool) -> dict[str, Any]:
    """Measure what has no result yet -> {"rows": [one dict a cell, as episodes.play returns it]}; prints the table.

    only: PEER, PEER:CELL or :CELL; these are measured anew."""
    wanted = chosen(only)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    known = {(row["peer"], row["cell"]): row for row in read(results)}
    with progress("reliability", len(wanted), "cells") as bar:
        for peer in dict.fromkeys(peer for peer, _ in wanted):
            cells = [cell for other, cell in wanted if other == peer]
            todo = {cell: QUICK if quick else passes(peer, cell) for cell in cells if only or (peer, cell) not in known}
            bar.update(len(cells) - len(todo))
            python = environment(peer, folder / "env", install) if todo else None
            if todo and python is None:
                log.warning("%s is not measured: it needs an environment of its own; make it with --install", peer)
            for row in measure(python, peer, todo, folder) if python else ():
                with open(results, "a") as file:
                    file.write(json.dumps(row) + "\n")
                known[peer, row["cell"]] = row
                bar.update()
    rows = [known[key] for key in known if key in set(wanted)]
    console().print(summary(rows), markup=False, soft_wrap=True)
    return {"rows": rows}


def chosen(only: list[str]) -> list[tuple[str, str]]:
    """(peer, cell) of all that is meant to be measured, ours first."""
    every = [(peer, cell) for peer, about in PEERS.items() for cell in about["cells"]]
    for name in only:
        peer, _, cell = name.partition(":")
        if (peer and peer not in PEERS) or (cell and cell not in CELLS):
            raise UserError(
                f"--only {name}: expected PEER, PEER:CELL or :CELL, of the peers {', '.join(PEERS)} and the cells {', '.join(CELLS)}"
            )
    parts = [name.partition(":") for name in only]
    return [
        (peer, cell)
        for peer, cell in every
        if not only or any(first in ("", peer) and last in ("", cell) for first, _, last in parts)
    ]


def passes(peer: str, cell: str) -> int:
    own = {"ours": OUR_PASSES, "ours_parquet": PARQUET_PASSES, "ours_zip": FEW_PASSES, "ours_raster": FEW_PASSES}
    return own.get(peer, PASSES).get(cell, 2)


def environment(peer: str, folder: Path, install: bool) -> Path | None:
    """The interpreter in which a peer runs; None where it would have to be made first. Ours needs none."""
    if peer.startswith("ours"):
        return Path(sys.executable)
    python, ready = folder / peer / "bin/python", folder / peer / "ready"
    pins = " ".join(PEERS[peer]["requires"])
    if ready.exists() and ready.read_text() == pins:
        return python
    if not install:
        return None
    venv.create(folder / peer, with_pip=True, clear=True)
    (packages,) = (folder / peer / "lib").glob("python*/site-packages")
    # last on the path, so that what a peer pins comes first
    (packages / "zz_parent.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PEERS[peer]["requires"]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{peer} could not be installed ({pins}): {done.stderr[-400:]}")
    ready.write_text(pins)
    return python


def measure(python: Path, peer: str, cells: dict[str, int], folder: Path) -> Iterator[dict[str, Any]]:
    """The row of each cell, of so many passes, as it is done; or one that says why there is none."""
    todo = [f"{cell}={count}" for cell, count in cells.items()]
    command = [str(python), "-m", "ssl_locat.benchmarks.reliability.episodes", peer, str(folder / "cells"), "0", *todo]
    environ = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "1"}
    done = 0
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            if line.startswith('{"peer"'):  # libraries print, too
                yield {**json.loads(line), "date": time.strftime("%Y-%m-%d"), "versions": PEERS[peer]["requires"]}
                done += 1
        errors.seek(0)
        said = errors.read().strip().splitlines() or ["nothing was said"]
    if done < len(cells):
        cell = list(cells)[done]
        log.error("%s, %s: not measured: %s", peer, cell, said[-1])
        yield {"peer": peer, "cell": cell, "date": time.strftime("%Y-%m-%d"), "failed": said[-1][:300]}
