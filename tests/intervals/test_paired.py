"""Intervals hold what they promise: on simulated networks whose true difference is known."""

import tracemalloc

import numpy as np
import pytest

from ssl_locat.intervals.figures import wilson
from ssl_locat.intervals.paired import Tally, difference, interval


def simulated(rng, gain=0.0, images=300, draws=5):
    """Hits of two networks [R, N]: images differ in difficulty, draws in luck, and each network has its own way with both. True gain: known."""
    hard, luck = rng.normal(size=images), rng.normal(scale=0.3, size=(draws, 1))
    own_luck = 0.2 if draws > 1 else 0.0  # of a single draw nobody can tell
    found = []
    for own in (0.0, gain):
        level = 0.4 + own + hard + luck + rng.normal(scale=0.6, size=images) + rng.normal(scale=own_luck, size=(draws, 1))
        found.append(Tally.of_hits(level + rng.normal(scale=0.5, size=(draws, images)) > 0))
    return found


def test_an_interval_holds_the_true_difference_as_often_as_its_level_says():
    truth = np.mean(
        [np.subtract(*[t.figures().mean() for t in simulated(np.random.default_rng(i), 0.3)][::-1]) for i in range(1500)]
    )
    found = [difference([a], [b], seed=i) for i in range(250) for a, b in [simulated(np.random.default_rng(9000 + i), 0.3)]]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.925 <= covered <= 0.995  # 0.95 less a good deviation of 250; draws make it wider than it must be


@pytest.mark.parametrize(("images", "draws"), [(300, 5), (60, 1), (30, 3)])
def test_two_of_the_same_kind_are_not_said_to_help_more_often_than_the_level_promises(images, draws):
    verdicts = [
        difference([first], [second], seed=i).verdict
        for i in range(400)
        for first, second in [simulated(np.random.default_rng(i), images=images, draws=draws)]
    ]
    # half of 5 % on each side; 400 nulls leave it by 0.8 % one time in six
    assert verdicts.count("helped") / 400 <= 0.025 + 2 * 0.0078
    assert verdicts.count("harmed") / 400 <= 0.025 + 2 * 0.0078


def trained(rng, seeds, images=400, spread=0.12, gain=0.0):
    """Hits [seeds, N] of trainings of one recipe: each is a little better or worse by the luck of its seed, on all images."""
    skill = gain + rng.normal(scale=spread, size=(seeds, 1))
    return Tally.of_hits(skill + 0.4 + rng.normal(size=(seeds, images)) > 0)


def test_seeds_of_one_recipe_are_told_from_recipes_by_their_spread():
    verdicts = {1: [], 3: []}
    for number in range(60):
        rng = np.random.default_rng(number)
        for seeds, found in verdicts.items():
            sides = [[trained(rng, seeds)] for _ in range(2)]
            found.append(difference(*sides, seeds=(seeds, seeds), seed=number).verdict)
    # one training of each: two networks do differ, and are said to, far more often than 1.5 of 60
    assert verdicts[1].count("helped") > 4
    assert max(verdicts[3].count(name) for name in ("helped", "harmed")) <= 4  # 2.5 % of 60 and a good deviation
    rng = np.random.default_rng(0)
    found = difference([trained(rng, 1)], [trained(rng, 4, gain=1.0)], seeds=(1, 4))  # a start has no seeds
    assert found.verdict == "helped" and found.seeds == 4
    assert found.value == pytest.approx(found.low / 2 + found.high / 2, abs=1.0)


def test_a_real_difference_is_found_and_its_sign_is_right():
    first, second = simulated(np.random.default_rng(0), 1.0, images=2000)
    found = difference([first], [second])
    assert found.verdict == "helped" and found.low > 0 and difference([second], [first]).verdict == "harmed"
    assert difference([first], [second], margin=found.value).verdict == "better, but not by a margin to speak of"
    assert difference([second], [first], margin=found.value).verdict == "harmed"  # a loss is believed sooner


def test_three_images_won_and_none_lost_are_no_proof_and_eight_are():
    before = Tally.of_hits(np.arange(1000) < 500)
    assert difference([before], [Tally.of_hits(np.arange(1000) < 503)]).low < 0
    assert difference([before], [Tally.of_hits(np.arange(1000) < 508)]).verdict == "helped"
    same = difference([before], [before])
    assert same.value == 0 and same.low < 0 < same.high and same.images_to_decide is None


def test_so_many_images_as_it_says_decide():
    rng = np.random.default_rng(3)
    small = next(d for d in (difference(*[[t] for t in simulated(rng, 0.12, draws=1)]) for _ in range(50)) if d.low < 0 < d.value)
    assert small.images_to_decide > small.images
    decided = [difference(*[[t] for t in simulated(rng, 0.3, 300, 1)]) for _ in range(100)]
    needed = int(np.median([one.images_to_decide for one in decided if one.images_to_decide]))
    again = [difference(*[[t] for t in simulated(rng, 0.3, needed, 1)]).verdict for _ in range(100)]
    assert 0.6 <= again.count("helped") / 100 <= 0.95  # four times out of five


def test_the_mean_of_columns_is_tighter_than_each_and_a_ratio_of_sums_is_no_mean_of_ratios():
    rng = np.random.default_rng(1)
    columns = [simulated(rng, 0.3) for _ in range(4)]
    first, second = ([pair[side] for pair in columns] for side in (0, 1))
    whole = difference(first, second)
    each = [difference([a], [b]) for a, b in columns]
    assert whole.value == pytest.approx(np.mean([one.value for one in each]))
    assert whole.high - whole.low < min(one.high - one.low for one in each)
    pixels = Tally(np.array([[[1.0, 0.0], [8.0, 0.0]]]), np.array([[[2.0, 0.0], [10.0, 4.0]]]))
    assert pixels.figures() == pytest.approx([100 * (9 / 12 + 0) / 2])


def test_miou_of_scenes_has_an_interval_that_holds_the_truth():
    def scenes(rng, number):
        union = rng.integers(0, 200, (1, number, 5)).astype(float)
        return Tally(np.floor(union * rng.beta(4, 2, (1, number, 1)).repeat(5, 2)), union)

    truth = scenes(np.random.default_rng(1), 100_000).figures()[0]
    found = [interval(scenes(np.random.default_rng(100 + i), 60), seed=i) for i in range(80)]
    assert 0.88 <= np.mean([one.low <= truth <= one.high for one in found]) <= 1
    first, second = scenes(np.random.default_rng(5), 80), scenes(np.random.default_rng(6), 80)
    assert difference([first], [first]).value == 0
    assert difference([first], [second]).low < 0 < difference([first], [second]).high


def test_the_interval_of_one_accuracy_is_wilsons_or_wider_where_draws_differ():
    hits = np.random.default_rng(0).random(400) < 0.7
    assert interval(Tally.of_hits(hits))[1:] == pytest.approx(wilson(100 * hits.mean(), 400))
    spread = interval(Tally.of_hits(np.stack([hits, np.roll(hits, 1) & hits, hits])))
    assert spread.high - spread.low > np.subtract(*wilson(spread.value, 400)[::-1])
    assert interval(Tally.of_hits(np.ones((3, 50), bool))).low < 100


def test_fifty_thousand_images_take_little_memory_and_the_same_seed_says_the_same():
    rng = np.random.default_rng(0)
    first, second = simulated(rng, 0.1, images=50_000, draws=5)
    scenes = Tally(rng.random((1, 50_000, 4)), np.ones((1, 50_000, 4)))
    tracemalloc.start()
    assert difference([first], [second]) == difference([first], [second])
    interval(scenes)
    # [50000, 2000] would be 800 MB
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()
