"""Draws docs/images/house.svg from the floors that test_layout.py checks: `python tests/house_picture.py` after a change there."""

from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "house.svg"
WIDTH, HEIGHT, GAP, MARGIN, ROOF = 820, 40, 8, 20, 86  # of a floor, between floors and rooms, at the sides, above all; pixels

ABOUT = {
    "worker": "runs a queued command line",
    "cli": "commands and exit codes",
    "doctor": "doctor, init",
    "report": "report.html",
    "benchmarks": "bench",
    "cluster": "Slurm, torchrun, jobs",
    "pretraining": "the training loop; probes, replay",
    "tables": "models x protocols, trained where they must be",
    "evaluation": "evaluate, compare, online probes",
    "measure": "a machine, a step",
    "evaluation.protocols": "k-NN, linear, segmentation, ...",
    "evaluation.shared": "samples, features, metrics",
    "export": "timm, Hugging Face, ONNX",
    "objectives": "dino, ibot, koleo, gram, coding rate",
    "data.stream": "position \N{RIGHTWARDS ARROW} sample",
    "models": "timm + GAug + PRR",
    "data.shards": "tar, index, pack, check",
    "data.stores": "file, s3, gs, http, hf",
    "data.images": "decode, crops",
    "runs": "run folder, checkpoints, log, processes",
    "config": "the YAML's schema",
    "optim": "AdamW, schedules",
    "label_free": "RankMe, DSE, ...",
    "errors": "with exit codes",
    "text": "what may be shown",
    "intervals": "how sure a figure is",
}
BLUE, YELLOW, RED, GREEN, GREY = "#d7ebf7", "#fde7c7", "#f9d5cf", "#dcefd8", "#ececec"
COLOURS = {
    "data": BLUE, "models": YELLOW, "objectives": YELLOW, "optim": YELLOW, "pretraining": RED, "evaluation": GREEN, "label_free": GREEN,
    "export": GREEN, "report": GREEN, "tables": GREEN,
}  # fmt: skip


def draw(floors: list[set[str]]) -> str:
    """The SVG of these floors, the ground first."""
    middle, bottom = MARGIN + WIDTH / 2, ROOF + len(floors) * (HEIGHT + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 2 * MARGIN} {bottom + 30}" font-family="sans-serif" role="img">',
        "<title>The rooms of ssl_locat on their floors: a room imports only rooms below it</title>",
        '<rect width="100%" height="100%" fill="#ffffff" rx="8"/>',
        f'<path d="M{MARGIN} {ROOF - 6} L{middle:.0f} 16 L{MARGIN + WIDTH} {ROOF - 6} Z" fill="#f3f3f3" stroke="#555"/>',
        f'<text x="{middle:.0f}" y="{ROOF - 22}" text-anchor="middle" font-size="15" fill="#222">imports point down, never up or sideways</text>',
    ]
    for number, floor in enumerate(reversed(floors)):
        y, width = ROOF + number * (HEIGHT + GAP), (WIDTH - GAP * (len(floor) - 1)) / len(floor)
        for place, room in enumerate(sorted(floor)):
            x = MARGIN + place * (width + GAP)
            about = f'<tspan fill="#444"> \N{MIDDLE DOT} {escape(ABOUT[room])}</tspan>' if room in ABOUT else ""
            lines += [
                f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="4" fill="{COLOURS.get(room.split(".")[0], GREY)}" stroke="#555"/>',
                f'<text x="{x + width / 2:.0f}" y="{y + 25}" text-anchor="middle" font-size="{13 if len(floor) < 3 else 12}" fill="#111">'
                f'<tspan font-weight="bold">{room}</tspan>{about}</text>',
            ]
    return "\n".join(
        [*lines, f'<path d="M{MARGIN / 2} {bottom} H{WIDTH + 1.5 * MARGIN}" stroke="#555" stroke-width="3"/>', "</svg>\n"]
    )


if __name__ == "__main__":
    from test_layout import FLOORS

    PICTURE.write_text(draw(FLOORS))
