"""Intervals of a figure of which a value and a count are known, and no single answer: math alone, so that whoever only prints may import it."""

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95  # of every interval of this package, two-sided
NORMAL = 1.959964  # the 97.5 % quantile of the normal distribution


def wilson(percent: float, count: int) -> tuple[float, float]:
    """(low, high) in percent: the 95 % interval of a share that was measured on `count` images (Wilson 1927)."""
    share, z = percent / 100, NORMAL
    centre, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return 100 * (centre - spread) / (1 + z * z / count), 100 * (centre + spread) / (1 + z * z / count)


def share_noise(percent: float, count: int) -> float:
    """Points up to which two shares of the same `count` test images are alike: half of the interval of one.

    The interval of their difference would need each image's answers. It is as wide as that of one share where the answers of both networks
    are correlated by 1/2, and narrower above, as between checkpoints of one run (docs/evaluation.md has what was measured).
    """
    low, high = wilson(min(100.0, max(0.0, percent)), count)
    return (high - low) / 2


def one_more_run(deviation: float, runs: int) -> float:
    """Points from the mean of `runs` runs (2 or more) within which one more of the same kind falls in 95 of 100 cases: Student's prediction interval.

    deviation: of the runs, over runs - 1.
    """
    return student_t(LEVEL, runs - 1) * deviation * math.sqrt(1 + 1 / runs)


def of_runs(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean of a figure over runs (seeds) and its 95 % interval by Student's t; of a single run it has no bounds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    spread = student_t(LEVEL, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - spread, mean + spread


def student_t(level: float, freedom: int) -> float:
    """The t that |T| stays below with probability `level`, of a whole number of degrees of freedom: 12.71, 4.30, 3.18, ... at 0.95."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    if freedom % 2 == 0:
        for power in range(freedom // 2):
            total += term
            term *= cosine * cosine * (2 * power + 1) / (2 * power + 2)
        return math.sin(angle) * total
    term = cosine
    for power in range((freedom - 1) // 2):
        total += term
        term *= cosine * cosine * (2 * power + 2) / (2 * power + 3)
    return 2 / math.pi * (angle + math.sin(angle) * total)
