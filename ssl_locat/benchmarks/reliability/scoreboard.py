"""`ssl-locat bench reliability`: one matrix of kills, sizes and damage over seven libraries, and the table of docs/reliability.md.

Each cell is a process of its own in the environment of its library, which sees this one's packages too (torch is the same for all) behind
the versions that peers.yaml pins. Results are kept in FOLDER/results.jsonl: the command goes on where it stopped, and `--only` does a cell
again. Nothing here is a measurement of speed but the time to the first batch, which counts from the fork of the ranks.
"""

import json
import logging
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import yaml

from ssl_locat.benchmarks.reliability.cells import CELLS
from ssl_locat.errors import UserError
from ssl_locat.runs.log import console, progress

log = logging.getLogger(__name__)

PEERS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("peers.yaml").read_text())
PACKAGE_ROOT = Path(__file__).resolve().parents[3]
# of ours: 200 passes of 5 starts each, over the cells with kills
OUR_PASSES = {"kill": 60, "world": 80, "workers": 40, "mix": 20}
PARQUET_PASSES = {"kill": 20, "world": 20, "workers": 12, "mix": 8}  # 300 starts
FEW_PASSES = {"kill": 4, "world": 4, "workers": 4}  # 60
PASSES = {"kill": 6, "world": 6, "workers": 6, "mix": 4}
QUICK = 1


def scoreboard(folder: Path, only: list[str], install: bool, quick: bool) -> dict[str, Any]:
    """Measure what has no result yet -> {"rows": [one dict a cell, as episodes.play returns it]}; prints the table.

    only: PEER, PEER:CELL or :CELL; these are measured anew."""
    wanted = chosen(only)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    known = {(row["peer"], row["cell"]): row for row in read(results)}
    missing = []
    with progress("reliability", len(wanted), "cells") as bar:
        for peer, cell in wanted:
            if only or (peer, cell) not in known:
                python = environment(peer, folder / "env", install)
                if python is None:
                    missing.append(peer)
                else:
                    row = measure(python, peer, cell, folder, QUICK if quick else passes(peer, cell))
                    with open(results, "a") as file:
                        file.write(json.dumps(row) + "\n")
                    known[peer, cell] = row
            bar.update()
    for peer in dict.fromkeys(missing):
        log.warning("%s is not measured: it needs an environment of its own; make it with --install", peer)
    rows = [known[key] for key in known if key in set(wanted)]
    console().print(markdown(rows), markup=False, soft_wrap=True)
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
    return {"ours": OUR_PASSES, "ours_parquet": PARQUET_PASSES, "ours_zip": FEW_PASSES, "ours_raster": FEW_PASSES}.get(
        peer, PASSES
    ).get(cell, 4)


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


def measure(python: Path, peer: str, cell: str, folder: Path, count: int) -> dict[str, Any]:
    """A cell's row, or one that says why there is none."""
    room = folder / "cells" / f"{peer}-{cell}"
    command = [str(python), "-m", "ssl_locat.benchmarks.reliability.episodes", peer, cell, str(room), str(count), "0"]
    environ = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "1"}
    began = time.strftime("%Y-%m-%d")
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    row: dict[str, Any] = {"peer": peer, "cell": cell, "date": began}
    if done.returncode or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        log.error("%s, %s: not measured: %s", peer, cell, last)
        return row | {"failed": last[:300]}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


def read(path: Path) -> list[dict[str, Any]]:
    """Results so far; a last line that a kill cut is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: a line for each cell, a column for each library."""
    found = {(row["peer"], row["cell"]): row for row in rows}
    peers = [peer for peer in PEERS if any(row["peer"] == peer for row in rows)]
    text = [f"| | {' | '.join(PEERS[peer]['title'] for peer in peers)} |", "|---" * (len(peers) + 1) + "|"]
    for cell, about in CELLS.items():
        if any((peer, cell) in found for peer in peers):
            told = [outcome(found.get((peer, cell))) for peer in peers]
            text.append(f"| {about.words} (`{cell}`) | {' | '.join(told)} |")
    firsts = [[found.get((peer, cell), {}).get("first_batch_seconds") for peer in peers] for cell in ("kill",)]
    for values in firsts:
        text.append(f"| s to the first batch (`kill`) | {' | '.join('-' if v is None else f'{v:.2f}' for v in values)} |")
    return "\n".join(text)


def outcome(row: dict[str, Any] | None) -> str:
    """lost / repeated / wrong in 1000 samples, of so many starts; how many passes hung or stopped; whether a loss from damage was told."""
    if row is None:
        return "-"
    if "failed" in row:
        return "not measured"
    said = []
    stopped = sum(row["stops"].values()) - row["hangs"]
    if row["hangs"]:
        said.append(f"{row['hangs']} of {row['passes']} passes hung")
    if stopped:
        said.append(f"{stopped} of {row['passes']} passes ended with an error")
    if stopped + row["hangs"] < row["passes"]:
        shares = [1000 * row.get(key, 0) / row["expected"] for key in ("lost", "repeated", "wrong")]
        said.append(" / ".join(f"{share:.3g}" for share in shares))
        about = CELLS[row["cell"]]
        if row["lost"] and not row["told"] and (about.corrupt or about.cut or about.fault):
            said.append("nothing said")
    return ", ".join(said) + f" (n = {row['episodes']})"
