"""How sure a figure measured on test images is: the interval of one figure, of a difference of two networks, and the verdict that follows.

What is resampled are test images, the same ones for both networks (a paired bootstrap): most of what makes an image hard is hard for both,
and leaves the difference. Where a figure comes from several draws of training labels, their spread is added: draws are few, so Student's t
speaks for them; resampling five of them would promise too much. Likewise for several seeds of a recipe, where it is the recipe that is judged.
Seeded, without SciPy, in bounded memory. numpy alone: nothing here knows
a backbone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ssl_locat.intervals.figures import LEVEL, wilson

RESAMPLES = 2000  # the ends of a 95 % interval are then the 50th values from both sides
MOST_WEIGHTS = 4_000_000  # of a piece of the matrix [resamples, images]: 32 MB, however many there are of both

Verdict = Literal["helped", "better, but not by a margin to speak of", "no difference that this data can show", "harmed"]


class Tally(NamedTuple):
    """What each test image adds to a figure, in each draw of labels: 100 * the mean over classes of sum(hits) / sum(of).

    Accuracy has one class; `of` is 1, and an image is hit or not. In mIoU `hits` are pixels of the intersection, `of` those of the union; a
    class that is in no image counts in no mean.
    """

    hits: np.ndarray  # [R, N, C] R draws, N images, C classes
    of: np.ndarray  # [R, N, C]

    @classmethod
    def of_hits(cls, hits: np.ndarray) -> "Tally":
        """Accuracy: bool [R, N], or [N] for a single draw."""
        hits = np.atleast_2d(np.asarray(hits))[..., None].astype(np.float64)
        return cls(hits, np.broadcast_to(np.ones(1), hits.shape))

    @property
    def is_accuracy(self) -> bool:
        return self.of.strides == (0, 0, 0)

    def figures(self) -> np.ndarray:
        """[R]: the figure of each draw, in percent."""
        return _ratios(self.hits.sum(1), self.of.sum(1))


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Of two networks, in points: the second minus the first, with its interval."""

    value: float
    low: float
    high: float
    verdict: Verdict
    images: int  # that it was measured on
    images_to_decide: (
        int | None
    )  # test images that would show a difference of this size (power 80 %); None: more of them would not
    draws: int
    seeds: int = 1  # of the side that has more


def interval(tally: Tally, *, seeds: int = 1, seed: int = 0) -> Interval:
    """A figure with its 95 % interval over test images, draws and seeds. Of accuracies it stays within 0..100.

    seeds: trainings of one recipe whose draws lie behind each other in the tally, as many of each."""
    value = float(tally.figures().mean())
    if tally.is_accuracy and len(tally.hits) == 1:
        return Interval(value, *wilson(value, tally.hits.shape[1]))
    if tally.is_accuracy:
        # two images that were hit and two that were not, as Agresti and Coull (1998) add them: no interval is empty at 0 or 100 %
        rows = np.concatenate([tally.hits.mean(0), [[1.0], [1.0], [0.0], [0.0]]])
        statistic = _mean_of(len(rows))
    else:
        rows, statistic = _rows_of([tally])
    images, draws = _deviations(rows, statistic, _per_draw([tally], seeds), RESAMPLES, seed)
    low, high = np.quantile(images + draws + _of_seeds([tally], seeds, RESAMPLES, seed), _ends(LEVEL))
    return Interval(value, max(0.0, value + float(low)), min(100.0, value + float(high)))


def difference(
    first: Sequence[Tally], second: Sequence[Tally], *, seeds: tuple[int, int] = (1, 1), margin: float = 0.0, level: float = LEVEL,
    seed: int = 0,
) -> Difference:  # fmt: skip
    """The mean over columns of `second` minus `first`, measured on the same images by the same draws, and what may be said of it.

    first, second: one Tally for each column (a protocol at a share of the labels), over the same N images. Draw r of one column and draw r of
    another stand for the same labels, or for independent ones; columns without draws have one. margin: points that are no gain to speak of,
    such as two trainings of the same thing differ by: the whole interval of what "helped" lies above it. A loss needs none: it is believed
    sooner than a gain. seeds: trainings of one recipe, of each side, whose draws lie behind each other in its tallies: their spread is
    added, and the interval is one of the recipes' difference.
    """
    per_draw = _per_draw(second, seeds[1]) - _per_draw(first, seeds[0])
    value, number = float(per_draw.mean()), first[0].hits.shape[1]
    if all(tally.is_accuracy for tally in (*first, *second)):
        # linear in the images: of each only its mean difference over columns and draws is needed
        pairs = zip(second, first, strict=True)
        gained = np.mean([ours.hits.mean(0) - theirs.hits.mean(0) for ours, theirs in pairs], axis=0)  # [N, 1]
        # one image won and one lost, as Bonett and Price (2012) add them: three images won and none lost are no proof
        rows = np.concatenate([gained, [[1.0], [-1.0]]])
        statistic = _mean_of(len(rows))
    else:
        (ours, before), (theirs, after) = _rows_of(second), _rows_of(first)
        width = ours.shape[1]
        rows = np.concatenate([ours, theirs], axis=1)

        def statistic(sums: np.ndarray) -> np.ndarray:
            return before(sums[:, :width]) - after(sums[:, width:])

    # ends that lie further out are found by more resamples: 50 values beyond each end, as at 95 %
    resamples = round(RESAMPLES * min(20.0, max(1.0, (1 - LEVEL) / (1 - level))))
    images, draws = _deviations(rows, statistic, per_draw, resamples, seed)
    trainings = sum(
        _of_seeds(side, count, resamples, seed + at) for at, (side, count) in enumerate(zip((first, second), seeds, strict=True))
    )
    low, high = (value + float(end) for end in np.quantile(images + draws + trainings, _ends(level)))
    verdict: Verdict = "no difference that this data can show"
    if low > 0:
        verdict = "helped" if low > margin else "better, but not by a margin to speak of"
    elif high < 0:
        verdict = "harmed"
    # what more test images would not narrow: few draws of labels, few seeds
    spread = math.hypot(
        _standard_error(per_draw), *(_standard_error(_per_seed(side, n)) for side, n in zip((first, second), seeds, strict=True))
    )
    needed = _images_needed(value - margin if value > 0 else -value, float(images.std()), spread, number)
    return Difference(value, low, high, verdict, number, needed, len(per_draw), max(seeds))


def _images_needed(points: float, image_spread: float, draw_spread: float, number: int) -> int | None:
    """How many images would show a difference of so many points four times out of five, with the draws as they are."""
    wanted = max(points, 0.0) / 2.8  # 1.96 + 0.84: of the two-sided 95 % interval, and of a power of 80 %
    left = wanted * wanted - draw_spread * draw_spread
    # more than a billion images is as good as never
    return math.ceil(number * image_spread**2 / left) if left > number * image_spread**2 / 1e9 else None


def _per_draw(tallies: Sequence[Tally], seeds: int = 1) -> np.ndarray:
    """[R]: mean over columns and seeds of their figures, draw by draw; a column without draws has the same figure in all."""
    figures = [tally.figures().reshape(seeds, -1).mean(0) for tally in tallies]
    counts = {len(column) for column in figures}
    assert len(counts - {1}) <= 1, f"columns of {sorted(counts)} draws: all have the same number, or one"
    return np.mean([np.broadcast_to(column, max(counts)) for column in figures], axis=0)


def _per_seed(tallies: Sequence[Tally], seeds: int) -> np.ndarray:
    """[S]: mean over columns and draws of each seed's figures."""
    return np.mean([tally.figures().reshape(seeds, -1).mean(1) for tally in tallies], axis=0)


def _standard_error(values: np.ndarray) -> float:
    """Of the mean of these values; 0 of a single one, which shows no spread."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _of_seeds(tallies: Sequence[Tally], seeds: int, resamples: int, seed: int) -> np.ndarray:
    """[b]: what the choice of seeds may have added to a figure. It counts once too often what seeds and test images share, to the safe side."""
    if seeds == 1:
        return np.zeros(resamples)
    rng = np.random.default_rng([seed, seeds])
    return _standard_error(_per_seed(tallies, seeds)) * rng.standard_t(seeds - 1, resamples)


def _ends(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def _ratios(hits: np.ndarray, of: np.ndarray) -> np.ndarray:
    """[..., C] sums -> [...]: 100 * the mean over the classes that are there."""
    there = of > 0
    ratios = np.divide(hits, of, out=np.zeros(hits.shape), where=there)
    return 100 * ratios.sum(-1) / np.maximum(there.sum(-1), 1)


Statistic = Callable[[np.ndarray], np.ndarray]  # sums over images [b, Q] -> figures [b]


def _mean_of(count: int) -> Statistic:
    return lambda sums: 100 * sums[:, 0] / count


def _rows_of(tallies: Sequence[Tally]) -> tuple[np.ndarray, Statistic]:
    """(what each image adds [N, Q], how the mean figure over columns and draws follows from sums of it)."""
    shapes = [(len(tally.hits), tally.hits.shape[2]) for tally in tallies]
    # [R, N, C] -> [N, R * C], hits and then `of`, column by column
    parts = [np.moveaxis(part, 0, 1).reshape(part.shape[1], -1) for tally in tallies for part in tally]

    def statistic(sums: np.ndarray) -> np.ndarray:
        found, start = [], 0
        for draws, classes in shapes:
            size = draws * classes
            hits, of = (
                sums[:, begin : begin + size].reshape(-1, draws, classes) for begin in (start, start + size)
            )  # [b, R, C] each
            found.append(_ratios(hits, of).mean(1))
            start += 2 * size
        return np.mean(found, axis=0)

    return np.concatenate(parts, axis=1), statistic


def _deviations(
    rows: np.ndarray, statistic: Statistic, per_draw: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """([b] by the choice of test images, [b] by the choice of labels): what chance may have added to a figure, `resamples` times.

    rows [N, Q]: what each image adds."""
    rng = np.random.default_rng(seed)
    number = len(rows)
    found = np.concatenate([statistic(sums) for sums in _resampled_sums(rows, resamples, rng)])
    images = found - statistic(rows.sum(0, keepdims=True))
    # as t has wider tails than the normal distribution: the spread itself is measured on few images
    images *= np.sqrt(number / rng.chisquare(number - 1, resamples)) if number > 1 else np.nan
    draws = np.zeros(resamples)
    if len(per_draw) > 1:
        # the labels' own spread over draws, test images held; counts what images and labels share once too often, to the safe side
        draws = _standard_error(per_draw) * rng.standard_t(len(per_draw) - 1, resamples)
    return images, draws


def _resampled_sums(rows: np.ndarray, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Sums [b, Q] over N images drawn with replacement, in pieces: exact, and never a matrix [resamples, N]."""
    number = len(rows)
    if rows.shape[1] == 1:
        # equal images are one: 50,000 of five draws have eleven different values
        values, counts = np.unique(rows[:, 0], return_counts=True)
        values = values[:, None]
        draw = lambda: rng.multinomial(number, counts / number)  # noqa: E731  # [K]
    else:
        values = rows
        # one count for each image; `multinomial` would take ten times as long for as many different ones
        draw = lambda: np.bincount(rng.integers(number, size=number), minlength=number)  # noqa: E731  # [N]
    at_once = max(1, MOST_WEIGHTS // len(values))
    for start in range(0, resamples, at_once):
        weights = np.stack([draw() for _ in range(min(at_once, resamples - start))])  # [b, K]
        yield weights.astype(np.float64) @ values
