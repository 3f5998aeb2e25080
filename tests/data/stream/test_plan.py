"""The plan: every sample once per pass, for any sizes; stable for ever; the same for everyone."""

import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_locat.data.stream.plan import VERSION, Plan, Slot, choose_plan, choose_quotas, micro_batch_size, resume_plan
from ssl_locat.errors import CheckpointError, ConfigError
from ssl_locat.seeds import mix64, mix64_array


class Numbers:
    """A dataset as choose_plan sees it."""

    def __init__(self, count: int, mean_bytes: float = 1e5, manifest_hash: str = "a", by_range: bool = True):
        self.together = 1
        self.count, self.mean_bytes, self.manifest_hash, self.by_range, self.name = (
            count,
            mean_bytes,
            manifest_hash,
            by_range,
            "numbers",
        )

    def __len__(self):
        return self.count


@st.composite
def plans(draw, datasets: int = 1):
    sizes = tuple(draw(st.integers(1, 300)) for _ in range(datasets))
    chunk = draw(st.integers(1, 20))
    return Plan(
        seed=draw(st.integers(0, 2**63)),
        sizes=sizes,
        manifests=("x",) * datasets,
        quotas=tuple(draw(st.integers(1, 5)) for _ in range(datasets)),
        lanes=draw(st.integers(1, min(*sizes, 20) if datasets > 1 else min(sizes[0], 20))),
        unit=draw(st.integers(1, 9)),
        window=chunk * draw(st.integers(1, 6)),
        chunk=chunk,
    )


def passes(plan: Plan, positions: int) -> list[Counter]:
    """[pass over dataset 0] -> how often each sample was met"""
    met: list[Counter] = []
    for position in range(positions):
        dataset, sample, epoch = plan.locate(position)
        while len(met) <= epoch:
            met.append(Counter())
        if dataset == 0:
            met[epoch][sample] += 1
    return met


def positions_for(plan: Plan, epochs: int) -> int:
    """Enough positions for every lane to finish so many passes."""
    longest = -(-plan.sizes[0] // plan.lanes) * epochs
    return (longest // plan.unit + 1) * plan.unit * plan.lanes


@settings(max_examples=60, deadline=None)
@given(plans())
def test_each_pass_contains_every_sample_exactly_once(plan):
    met = passes(plan, positions_for(plan, 2))
    everything = Counter(range(plan.sizes[0]))
    assert met[0] == everything and met[1] == everything


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2).flatmap(plans), st.integers(0, 2**62 + 100), st.integers(1, 300))
def test_a_whole_batch_is_planned_as_its_positions_are(plan, start, length):
    positions = range(start, start + length)
    assert plan.slots(positions) == [plan.slot(position) for position in positions]
    assert plan.augment_seeds(positions) == [plan.augment_seed(position) for position in positions]


@settings(max_examples=25, deadline=None)
@given(plans(datasets=3))
def test_a_mix_keeps_its_proportions_and_each_dataset_its_passes(plan):
    block = sum(plan.quotas)
    positions = plan.lanes * plan.unit * -(-block // plan.unit) * 4
    found = [plan.locate(position) for position in range(positions)]
    shares = Counter(dataset for dataset, _, _ in found)
    for dataset, quota in enumerate(plan.quotas):
        # the last, partial block of each lane may lean either way
        assert abs(shares[dataset] - positions * quota / block) <= plan.lanes * block / 4 + 1
        # within a pass no sample comes twice
        per_pass = Counter((sample, epoch) for which, sample, epoch in found if which == dataset)
        assert max(per_pass.values()) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2).flatmap(plans))
def test_what_follows_a_window_is_what_its_lane_reads_next_of_the_same_data(plan):
    last: dict[tuple[int, int], tuple] = {}
    for slot in plan.slots(range(min(3 * sum(plan.sizes), 1500))):
        window, before = tuple(slot[:4]), last.get((slot.dataset, slot.lane))
        if before not in (None, window):
            assert plan.following(Slot(*before, 0)) == window
        last[slot.dataset, slot.lane] = window


def test_whole_blocks_of_a_mix_are_exact():
    plan = Plan(1, (500, 300, 40), ("a", "b", "c"), (70, 29, 1), lanes=4, unit=4, window=64, chunk=16)
    found = Counter(plan.locate(position)[0] for position in range(4 * 100 * 3))
    assert found == {0: 840, 1: 348, 2: 12}


def test_passes_differ_in_order_and_in_chunk_mates():
    plan = Plan(5, (4096,), ("a",), (1,), lanes=8, unit=4, window=128, chunk=32)
    first, second = ([plan.locate(n)[1] for n in range(start, start + 512)] for start in (0, 4096))
    assert first != second
    chunks = [{int(sample) // 32 for sample in plan.window_samples(0, epoch, 0, 0)} for epoch in (0, 1)]
    assert chunks[0] != chunks[1]


def test_a_window_needs_few_reads():
    plan = Plan(5, (100_000,), ("a",), (1,), lanes=8, unit=4, window=512, chunk=128)
    runs = [1 + np.count_nonzero(np.diff(np.sort(plan.window_samples(0, 0, 3, window))) != 1) for window in range(80, 90)]
    assert max(runs) <= 5  # four chunks; one may wrap around the end


def test_golden_order_never_changes():
    """If this fails, resumed runs would see other samples: raise plan.VERSION and say so in the release notes."""
    plan = Plan(42, (1013, 211), ("a", "b"), (3, 1), lanes=12, unit=4, window=64, chunk=16)
    positions = [7 * n * n + 13 * n for n in range(50)]
    assert [plan.locate(position)[:2] for position in positions] == GOLDEN
    assert [plan.augment_seed(position) for position in (0, 1, 2**40)] == GOLDEN_SEEDS


@pytest.mark.parametrize("mean_bytes", [2_500, 30_000, 110_000, 1_000_000])
def test_every_lane_has_one_reader_for_any_ranks_and_workers(mean_bytes):
    for batch in (64, 128, 192, 256, 320, 384, 448, 512, 960, 1024, 2048, 4096):
        plan = choose_plan([Numbers(1_281_167, mean_bytes)], [1.0], 0, batch)
        for world in (ranks for ranks in range(1, 65) if batch % ranks == 0):
            for workers in (0, 7, 16):
                assert plan.readers_per_lane(batch // world, world, workers) == 1.0
        # a single rank can hold a window of each lane
        assert plan.lanes * plan.window * mean_bytes <= 2**30


@pytest.mark.parametrize("count", [512, 1000, 4096])
@pytest.mark.parametrize("batch", [64, 256, 512, 1024])
def test_small_sets_are_not_read_by_every_rank(count, batch):
    plan = choose_plan([Numbers(count)], [1.0], 0, batch)
    assert [plan.readers_per_lane(batch // world, world, 4) for world in (1, 2, 4, 8, 16, 32, 64)] == [1.0] * 7
    assert passes(plan, positions_for(plan, 1))[0] == Counter(range(count))


def test_readers_per_lane_sees_misalignment():
    plan = choose_plan([Numbers(1_281_167)], [1.0], 0, 1024)
    assert plan.readers_per_lane(128, 8, 7) == 1.0
    assert plan.readers_per_lane(1020 // 6, 6, 4) > 2
    assert plan.readers_per_lane(plan.unit // 2, 4, 1) == 2.0


def chunk_mates(plan: Plan, batch: int) -> tuple[float, float]:
    """Other samples of a sample's chunk, on average: in its global batch, and less than 1000 positions away."""
    count = max(2048, 2 * batch)
    start = plan.sizes[0] // 3 // batch * batch
    chunks: dict[tuple, list[int]] = {}
    windows: dict[tuple, np.ndarray] = {}
    for position in range(start, start + count):
        slot = plan.slot(position)
        if slot[:4] not in windows:
            low, high = plan._lane_part(0, slot.lane)
            places = np.arange(max(low, slot.window * plan.window), min(high, (slot.window + 1) * plan.window))
            keys = mix64_array(mix64(plan.seed, 2, *slot[:4]), places)
            windows[slot[:4]] = places[np.argsort(keys, kind="stable")] // plan.chunk
        chunks.setdefault((slot.epoch, int(windows[slot[:4]][slot.offset])), []).append(position)
    same_batch = near = 0
    for positions in chunks.values():
        at = np.array(positions)
        same_batch += (at[:, None] // batch == at[None] // batch).sum() - len(at)
        near += (np.abs(at[:, None] - at[None]) < 1000).sum() - len(at)
    return same_batch / count, near / count


# (batch, mean bytes) -> what release 0.1 chose for ImageNet's count: lanes, unit, window, chunk
BEFORE = {
    (64, 110_000): (128, 4, 64, 16),
    (256, 110_000): (256, 8, 32, 16),
    (1024, 110_000): (1024, 8, 32, 16),
    (4096, 110_000): (4096, 8, 32, 16),
    (256, 5_000): (512, 4, 256, 128),
    (1024, 5_000): (2048, 4, 256, 128),
}


@pytest.mark.parametrize(("batch", "mean_bytes"), BEFORE)
def test_samples_are_shuffled_no_worse_than_before(batch, mean_bytes):
    lanes, unit, window, chunk = BEFORE[batch, mean_bytes]
    before = Plan(0, (1_281_167,), ("a",), (1,), lanes, unit, window, chunk)
    now = choose_plan([Numbers(1_281_167, mean_bytes)], [1.0], 0, batch)
    for old, new in zip(chunk_mates(before, batch), chunk_mates(now, batch), strict=True):
        assert new <= old * 1.05  # of the measurement


# (samples, mean bytes, batch) -> what a new run takes: lanes, unit, window, chunk
CHOICES = {
    (1_281_167, 110_000, 63): (504, 1, 16, 8),
    (1_281_167, 110_000, 64): (512, 1, 16, 8),
    (1_281_167, 110_000, 1024): (256, 4, 32, 16),
    (1_281_167, 110_000, 4096): (1024, 4, 8, 4),
    (1_281_167, 30_000, 1000): (400, 5, 64, 32),
    (1_281_167, 5_000, 256): (256, 4, 512, 256),
    (1_281_167, 2_000_000, 1024): (256, 4, 1, 1),
    (1_000_000_000, 50_000, 8192): (1024, 8, 16, 8),
    (50_000, 2_500, 192): (576, 1, 512, 256),
    (50_000, 2_500, 256): (256, 4, 1024, 512),
    (23_808, 1_500, 320): (640, 1, 768, 256),
    (1_000, 3_000, 250): (100, 5, 32, 8),
    (1_000, 3_000, 256): (64, 4, 32, 8),
    (96, 3_000, 16): (8, 2, 4, 1),
    (5, 3_000, 64): (1, 64, 4, 1),
}


def test_what_a_new_run_chooses_changes_only_on_purpose():
    """Resumed runs keep their plan; but two runs of one config are to see one order, whichever release started them."""
    found = {case: choose_plan([Numbers(*case[:2])], [1.0], 0, case[2]) for case in CHOICES}
    assert {case: (plan.lanes, plan.unit, plan.window, plan.chunk) for case, plan in found.items()} == CHOICES
    others = [
        choose_plan([Numbers(20_000, 100_000, by_range=False)], [1.0], 0, 256),
        choose_plan([Numbers(100_000, 1_000), Numbers(3_000, 20_000)], [1, 1], 0, 256),
        choose_plan([Numbers(1_281_167, 110_000)], [1.0], 0, 1024, memory_bytes=1 << 26),
    ]
    assert [(plan.lanes, plan.unit, plan.window, plan.chunk) for plan in others] == [
        (256, 4, 32, 8),
        (128, 4, 256, 128),
        (64, 16, 8, 4),
    ]


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_tiny_datasets_are_planned(count):
    plan = choose_plan([Numbers(count)], [1.0], 0, 64)
    met = passes(plan, positions_for(plan, 1))
    assert met[0] == Counter(range(count))


def test_a_window_of_a_huge_dataset_is_planned_without_a_table():
    """Told by the memory it takes, which other work on the machine does not change, as it would the seconds."""
    plan = choose_plan([Numbers(1_700_000_000, 5e4)], [1.0], 0, 8192)
    tracemalloc.start()
    for lane in range(100):
        plan.window_samples(0, 3, lane, plan._lane_part(0, lane)[0] // plan.window)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e6  # bytes; a table would have 1.7e9 rows


def test_quotas_follow_the_weights():
    assert choose_quotas([0.7, 0.29, 0.01]) == (70, 29, 1)
    assert choose_quotas([2, 1]) == (667, 333)
    assert choose_quotas([5]) == (1,)
    assert min(choose_quotas([1.0, 1e-9])) == 1
    with pytest.raises(ConfigError, match="above 0"):
        choose_quotas([1, 0])


def test_uneven_batches_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Nearest: 96 or 104"):
        micro_batch_size(100, 4, 2)
    assert micro_batch_size(96, 4, 2) == 12


def test_a_checkpoint_restores_the_plan_and_refuses_other_data():
    datasets = [Numbers(1000), Numbers(500, manifest_hash="b")]
    plan = choose_plan(datasets, [2, 1], 3, 64)
    saved = plan.to_dict()
    assert resume_plan(saved, datasets, [4, 2], 3) == plan
    assert json.loads(json.dumps(saved)) == saved
    for wrong, words in [
        ((saved, datasets, [2, 1], 4), "seed was 3"),
        ((saved, datasets[:1], [1], 3), "2 datasets"),
        ((saved, [Numbers(999, manifest_hash="c"), datasets[1]], [2, 1], 3), "manifest"),
        ((saved, datasets, [1, 1], 3), "weights"),
        ((saved | {"version": VERSION + 1}, datasets, [2, 1], 3), "version"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            resume_plan(*wrong)


GOLDEN = [
    (0, 229),
    (0, 638),
    (0, 149),
    (1, 180),
    (0, 641),
    (1, 50),
    (0, 475),
    (1, 51),
    (0, 423),
    (0, 851),
    (0, 908),
    (1, 115),
    (1, 59),
    (0, 162),
    (1, 138),
    (0, 107),
    (0, 980),
    (0, 847),
    (1, 45),
    (0, 815),
    (0, 387),
    (0, 858),
    (1, 79),
    (1, 101),
    (1, 54),
    (0, 399),
    (1, 103),
    (0, 558),
    (0, 713),
    (0, 77),
    (0, 950),
    (1, 207),
    (1, 18),
    (1, 89),
    (0, 276),
    (0, 846),
    (0, 536),
    (0, 514),
    (0, 333),
    (1, 42),
    (1, 132),
    (1, 5),
    (0, 874),
    (0, 762),
    (1, 85),
    (0, 250),
    (0, 874),
    (0, 476),
    (0, 864),
    (0, 145),
]
GOLDEN_SEEDS = [15020821697198379421, 13971438248871640370, 14508051998510920509]
