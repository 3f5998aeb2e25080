"""`ssl-locat report FOLDER` of a comparison's results: leaks before any number, the sentences, then tables and the picture."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ssl_locat.errors import UserError
from ssl_locat.evaluation.compare_text import leak_lines, sentences
from ssl_locat.report.embedding import encoded
from ssl_locat.report.page import save, template

NAME = "compare.json"
MOST_BYTES = 20_000_000  # of a picture: one that is larger is not of ours


def is_comparison(folder: Path) -> bool:
    return (folder / NAME).is_file()


def write_comparison(folder: Path, target: Path) -> None:
    """Beside and renamed, as every page. Raises UserError for a file that is not what `compare` writes."""
    try:
        result = json.loads((folder / NAME).read_text(encoding="utf-8"))
        page = _render(folder, result)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise UserError(f"{folder / NAME} is not what `ssl-locat compare` writes. Run it again, with results={folder}.") from None
    save(page, target)


def _render(folder: Path, result: dict[str, Any]) -> str:
    columns = list(next(iter(result["rows"].values())))
    rows = [(name, [_number(*figures[column]) for column in columns]) for name, figures in result["rows"].items()]
    differences = []
    for name, found in result["differences"].items():
        parts = [*(found["columns"][column] for column in columns), found["all"]]
        differences.append((name, [_number(part["value"], part["low"], part["high"], "+") for part in parts]))
    pictures = [("Accuracy against labels", "Each figure with its 95 % interval.", _inlined(folder / "compare.png"))]
    leaked = [
        ("Leaks", "In pairs: a test image, and the one it is like.", _inlined(folder / "leaks.png") if result["leaks"] else None)
    ]
    return template("comparison.html").render(
        title=folder.resolve().name,
        sentences=sentences(result),
        leaks=[line for line in leak_lines(result) if line],
        columns=columns,
        rows=rows,
        first=result["compared_with"],
        differences=differences,
        pictures=[(title, meaning, picture) for title, meaning, picture in pictures if picture],
        leaked=[(title, meaning, picture) for title, meaning, picture in leaked if picture],
    )


def _number(value: float, low: float, high: float, sign: str = "") -> tuple[str, str]:
    return f"{value:{sign}.2f}", f"{low:{sign}.1f} to {high:{sign}.1f}"


def _inlined(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        with Image.open(path, formats=["PNG"]) as file:
            picture = file.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return {"webp": encoded(picture), "width": picture.width, "height": picture.height}
