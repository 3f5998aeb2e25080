"""Which classes the last k-NN probe found, and which it took for which others: from RUN/probes/NAME_classes.json."""

import json
from typing import Any

from ssl_locat.runs.history import Run

SHOWN, CONFUSIONS = 30, 12  # rows; the rest of the classes is folded away


def by_class(run: Run) -> list[dict[str, Any]]:
    """One table a k-NN probe: {"title", "classes", "more", "confusions"}; rows (name, images, percent), the worst first."""
    tables = []
    for path in sorted((run.path / "probes").glob("*_classes.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            # the worst first: that is what one looks for
            rows = sorted(
                ((str(c["class"]), int(c["images"]), float(c["top1"])) for c in found["classes"]), key=lambda row: row[2]
            )
            totals = {name: images for name, images, _ in rows}
            confusions = [(str(c["class"]), str(c["taken_for"]), int(c["images"])) for c in found["confusions"]][:CONFUSIONS]
        except (OSError, ValueError, KeyError, TypeError):  # cut off, or of another version: the rest of the page stands
            continue
        if rows:
            tables.append(
                {
                    "probe": path.stem.removesuffix("_classes"),
                    "k": found.get("k"),
                    "classes": rows[:SHOWN],
                    "more": rows[SHOWN:],
                    "confusions": [(*row, totals.get(row[0])) for row in confusions],
                }
            )
    return tables
