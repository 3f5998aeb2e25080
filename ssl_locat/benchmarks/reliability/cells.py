"""What is done to a job, cell by cell: the sizes it starts with, how often it is killed in a pass, and what is wrong with its data."""

from typing import NamedTuple

SAMPLES = 1920  # of a pass; a multiple of what our plan interleaves, so that a pass of ours ends at a position, too
BATCH = 24  # of all ranks: 1, 2 and 3 share it evenly


class Cell(NamedTuple):
    words: str  # heads the column
    sizes: tuple[tuple[int, int], ...]  # (ranks, workers of each) of one start after the other
    kills: int = 0  # of a pass
    weights: tuple[float, ...] = (1.0,)
    corrupt: float = 0.0
    cut: str = ""
    fault: str = ""


CELLS = {
    "kill": Cell("killed, same sizes", ((2, 1),), kills=9),
    "world": Cell("killed, 2, 1, 3 ranks", ((2, 1), (1, 1), (3, 1)), kills=9),
    "workers": Cell("killed, 1, 2, 0, 3 workers", ((1, 1), (1, 2), (1, 0), (1, 3)), kills=9),
    "mix": Cell("a mix of 3 to 1, killed", ((1, 1),), kills=9, weights=(0.75, 0.25)),
    "corrupt": Cell("1 % corrupt pictures", ((1, 2),), corrupt=0.01),
    "cut": Cell("a shard cut in the middle", ((1, 1),), cut="middle"),
    "border": Cell("a shard cut between samples", ((1, 1),), cut="border"),
    "503": Cell("5 % of answers are 503", ((1, 1),), fault="503"),
    "reset": Cell("5 % of answers break off", ((1, 1),), fault="reset"),
    "slow": Cell("5 % of answers pause 3 s", ((1, 1),), fault="slow"),
}
