"""The scoreboard in words: its results become the tables of docs/reliability.md, so that no figure there is typed.

python -m ssl_locat.benchmarks.reliability.tables docs/reliability.jsonl docs/reliability.md    # fills the page from the results
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ssl_locat.benchmarks.reliability.cells import CELLS

PEERS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("peers.yaml").read_text())
BEGIN, END = "<!-- scoreboard: made by ssl_locat/benchmarks/reliability/tables.py -->\n", "<!-- end of the scoreboard -->\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The newest result of each cell; a last line that a kill cut is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {(row["peer"], row["cell"]): row for row in map(json.loads, (line for line in lines if line.endswith("}")))}
    return list(rows.values())


def fill(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with what is between its two marks made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = (promises(), summary(rows, others()), HOW_TO_READ, details(rows), stops(rows))
    return before + BEGIN + "\n" + "\n\n".join(part for part in parts if part) + "\n\n" + END + after


def others() -> list[str]:
    """Ours on tars, and the other libraries; variants (ours on other kinds of shards) stand among the details."""
    return [peer for peer in PEERS if "_" not in peer]


def promises() -> str:
    text = [
        "What each promises, in our words, and the version that was measured:",
        "",
        "| Library | Version | Promise |",
        "|---|---|---|",
    ]
    for about in PEERS.values():
        text.append(
            f"| [{about['title']}]({about['link']}) | {', '.join(about['requires']) or 'this release'} | {about['promises']} |"
        )
    return "\n".join(text)


def summary(rows: list[dict[str, Any]], peers: Iterable[str] | None = None) -> str:
    """A line for each cell, a column for each of the libraries (None: those with results)."""
    found = {(row["peer"], row["cell"]): row for row in rows}
    peers = list(peers or (peer for peer in PEERS if any(row["peer"] == peer for row in rows)))
    text = [f"| | {' | '.join(PEERS[peer]['title'] for peer in peers)} |", "|---" * (len(peers) + 1) + "|"]
    for cell, about in CELLS.items():
        told = [outcome(found[peer, cell]) if (peer, cell) in found else _why_not(peer, cell) for peer in peers]
        text.append(f"| {about.words} (`{cell}`) | {' | '.join(told)} |")
    seconds = [found.get((peer, "kill"), {}).get("first_batch_seconds") for peer in peers]
    text.append(f"| s to the first batch after a kill | {' | '.join('-' if v is None else f'{v:.2f}' for v in seconds)} |")
    return "\n".join(text)


def _why_not(peer: str, cell: str) -> str:
    return PEERS[peer].get("otherwise", {}).get(cell, "not measured").partition(",")[0]


HOW_TO_READ = (
    "A field says how many of 1000 samples were lost / repeated / wrong, and n, the number of starts behind it. An error that ends the job is "
    "an answer, too: nobody trains on without knowing. 'Nothing said': samples were lost to damage, and neither the output nor a list told."
)


def outcome(row: dict[str, Any]) -> str:
    """lost / repeated / wrong in 1000 samples, of so many starts; how many passes hung or stopped; whether a loss from damage was told."""
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


def details(rows: list[dict[str, Any]]) -> str:
    """A line for each cell that was measured, in numbers of samples, and what measures it again."""
    heads = [
        "library:cell",
        "starts",
        "kills",
        "samples",
        "lost",
        "repeated",
        "wrong",
        "corrupt shown",
        "hung",
        "errors",
        "told",
        "s to first batch",
        "day",
    ]
    text = [
        "Each cell in numbers of samples. `ssl-locat bench reliability --install --only LIBRARY:CELL`, with the first column's name, does it "
        "again, with the same seed. A pass that hung or ended with an error counts no samples. Told: whether an error, a printed line or a list said that something "
        "was lost or damaged.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    order = [(peer, cell) for peer in PEERS for cell in CELLS]
    for row in sorted((row for row in rows if "failed" not in row), key=lambda row: order.index((row["peer"], row["cell"]))):
        first = row["first_batch_seconds"]
        values = [
            row[key] for key in ("episodes", "kills", "expected", "lost", "repeated", "wrong", "corrupt_delivered", "hangs")
        ]
        values += [sum(row["stops"].values()) - row["hangs"], _told(row)]
        values += ["-" if first is None else f"{first:.2f}", row["date"]]
        text.append(f"| `{row['peer']}:{row['cell']}` | {' | '.join(map(str, values))} |")
    return "\n".join(text)


def _told(row: dict[str, Any]) -> str:
    """Whether a user learnt of what was lost or damaged: by an error, a line that was printed, or a list. "-" where nothing was."""
    if not (row["lost"] or row["stops"] or CELLS[row["cell"]].corrupt):
        return "-"
    return "yes" if row["told"] else "no"


def stops(rows: list[dict[str, Any]]) -> str:
    """What those that ended with an error said, and why cells are empty."""
    text = [
        f"- `{row['peer']}:{row['cell']}`: `{words.replace('`', chr(39))}`"
        for row in rows
        if "failed" not in row
        for words in row["stops"]
        if words != "hang"
    ]
    reasons: dict[str, list[str]] = {}
    for about in PEERS.values():
        for cell, why in about.get("otherwise", {}).items():
            reasons.setdefault(f"{about['title']}: {why}", []).append(f"`{cell}`")
    empty = [f"- {why} ({', '.join(cells)})" for why, cells in reasons.items()]
    return "\n".join((["Errors, as far as they fit:", "", *text, ""] if text else []) + ["Why fields are empty:", "", *empty])


if __name__ == "__main__":
    results, page = map(Path, sys.argv[1:])
    page.write_text(fill(page.read_text(encoding="utf-8"), read(results)), encoding="utf-8")
