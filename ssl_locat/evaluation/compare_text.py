"""A comparison as Markdown, and its picture: accuracy against the share of labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_markdown(result: Mapping[str, Any]) -> str:
    """A table of figures, one of differences, leaks, the sentences last."""
    columns = list(next(iter(result["rows"].values())))
    lines = ["# Did it help?", "", *leak_lines(result), _line(["", *columns]), "|---" + "|---:" * len(columns) + "|"]
    for name, figures in result["rows"].items():
        lines.append(_line([name, *(_interval(*figures[column]) for column in columns)]))
    lines += ["", f"Differences from {result['compared_with']}, in points, and their 95 % intervals, column by column:", ""]
    lines += [_line(["", *columns, "all"]), "|---" + "|---:" * (len(columns) + 1) + "|"]
    for name, found in result["differences"].items():
        parts = [found["columns"][column] for column in columns] + [found["all"]]
        lines.append(_line([name, *(_interval(part["value"], part["low"], part["high"], "+") for part in parts)]))
    return "\n".join([*lines, "", *sentences(result)]) + "\n"


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The verdict on each MODEL, and once more without leaked test images where there are some."""
    lines = []
    for name, found in result["differences"].items():
        lines.append(found["sentence"])
        if kept := found.get("without_leaks"):
            shown = _interval(kept["value"], kept["low"], kept["high"], "+")
            lines.append(f"{name} without the test images that training has seen: {kept['verdict']}, {shown}.")
    return lines


def leak_lines(result: Mapping[str, Any]) -> list[str]:
    """What the leak check found, in words."""
    if result["leaks"] is None:
        return ["No leak check was made (leaks=false).", ""]
    lines = []
    for name, found in result["leaks"].items():
        what = f"{found['images']:,} test images are the same picture as one of the {found['of']:,} of data.{name}"
        lines.append(
            f"Leaks: {what}." if found["images"] else f"No test image was found among the {found['of']:,} of data.{name}."
        )
    return [*lines, ""]


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.2f} ({low:{sign}.1f} to {high:{sign}.1f})"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One panel for each protocol: the share of labels, and the figure with its interval, of every row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(result["protocols"]), figsize=(5.5 * len(result["protocols"]), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, protocol in zip(panels[0], result["protocols"], strict=True):
        for number, (name, figures) in enumerate(result["rows"].items()):
            points = [figures[f"{protocol} {100 * share:g} %"] for share in sorted(result["fractions"])]
            # a little apart, so that intervals do not hide each other
            x = [100 * share * (1 + 0.03 * number) for share in sorted(result["fractions"])]
            y = [point[0] for point in points]
            spread = [[value - low for value, low, _ in points], [high - value for value, _, high in points]]
            panel.errorbar(x, y, spread, marker="o", capsize=3, label=name[-40:])
        panel.set(xscale="log", xlabel="labels, %", title=protocol, ylabel="mIoU, %" if protocol == "hummingbird" else "top-1, %")
        shares = [100 * share for share in sorted(result["fractions"])]
        panel.set_xticks(shares, [f"{share:g}" for share in shares])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
