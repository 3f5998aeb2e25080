"""docs/images/curves.png: what normal and sick curves look like, from the files of two real runs.

    python docs/images/curves.py runs/normal runs/sick curves.png
"""

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(runs: list[str], out: str, prototypes: int = 128) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for run, name, colour in zip(runs, ("normal", "sick"), ("tab:blue", "tab:red"), strict=True):
        metrics = lines(Path(run, "metrics.jsonl"))
        steps = [record["step"] for record in metrics]
        axes[0].plot(steps, [record.get("dino", record["loss"]) for record in metrics], colour, label=name)
        entropy = [record.get("teacher_entropy", record.get("dino_teacher_entropy")) for record in metrics]
        axes[1].plot(steps, entropy, colour, label=name)
        ranks = [(record["step"], record["rankme"]) for record in metrics if "rankme" in record]
        axes[2].plot(*zip(*ranks, strict=True), colour, label=name)
        probes = lines(Path(run, "probes/knn.jsonl"))
        axes[3].plot([record["step"] for record in probes], [record["top1_k20"] for record in probes], colour, marker="o", label=name)
    for axis, title in zip(axes, ("loss (DINO)", "teacher entropy", "RankMe", "k-NN top-1, %"), strict=True):
        axis.set(title=title, xlabel="step")
    for axis in axes[:2]:
        axis.axhline(math.log(prototypes), color="grey", linestyle=":", label="ln K")
    axes[0].legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(sys.argv[1:3], sys.argv[3])
