"""Row groups are read whole: training fetches each about once in a pass, whatever the plan shuffles, and holds a bounded part of them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from shards import as_list, fingerprint, write_parquets

from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.parquet import open_parquet
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.plan import Plan, choose_plan, resume_plan
from ssl_locat.data.stream.stream import TrainStream
from tests.data.stream.test_plan import Numbers

READS: Counter = Counter()  # of ranges


class Counting(Store):
    def read(self, url, start, end, stat=None):
        READS[url, start, end] += 1
        return super().read(url, start, end, stat)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """40 files of 10 row groups of 10 rows and one of 1: too large to be kept whole."""
    monkeypatch.setattr("ssl_locat.data.shards.parquet._KEPT_BYTES", 30_000)
    monkeypatch.setattr("ssl_locat.data.stream.read_ahead._AHEAD", 16)  # else the whole next pass is read, of so small a set
    data = write_parquets(tmp_path / "data", [101] * 40, per_group=10)
    READS.clear()
    return open_mix(data, store=Counting(), in_groups=True)


def test_a_pass_fetches_each_row_group_about_once_for_any_ranks(opened):
    datasets, weights = opened
    (dataset,) = datasets
    plan = choose_plan(datasets, weights, 3, 16, memory_bytes=480_000)  # of 2.4 MB
    assert dataset.together == 10 and plan.grids == (10,) and plan.lanes <= len(dataset) // 40
    groups = {(file.url, group.start, group.stop) for file in dataset.files for group in file.groups}
    whole = sum(stop - start for _, start, stop in groups)
    READS.clear()
    seen = []
    for rank in (0, 1):
        options = {
            "memory_bytes": 480_000,
            "global_batch_size": 16,
            "rank": rank,
            "world_size": 2,
            "start_samples": 0,
            "workers": 0,
        }
        with TrainStream(datasets, plan, fingerprint, as_list, **options) as stream:
            for _, batch in zip(range(len(dataset) // 16 + 1), stream, strict=False):
                places = [plan.locate(position) for position in batch.positions.tolist()]
                seen += [sample[1] for sample, (_, _, epoch) in zip(batch.payload, places, strict=True) if epoch == 0]
    assert len(seen) >= 0.98 * len(dataset) and len(set(seen)) == len(seen)
    fetched = sum(count * (read[2] - read[1]) for read, count in READS.items() if read in groups)
    # each once; those in which lanes end, and the short ones that lie on no grid, twice; and what is read ahead of the next pass
    assert fetched <= 1.3 * whole, fetched / whole


def test_without_the_grid_it_is_several_times(opened):
    """What the grid is for: the same plan turned off it."""
    datasets, weights = opened
    plan = choose_plan(datasets, weights, 3, 16)
    old = Plan.from_dict({**plan.to_dict(), "grids": [], "chunk": 8, "window": 8})
    reads = []
    for one in (plan, old):
        windows = [one.window_samples(0, 0, lane, w) for lane in range(one.lanes) for w in range(*_windows(one, lane))]
        # (window, row group) pairs: what is read if nothing is kept between windows
        reads.append(sum(len({int(sample) // 10 for sample in window}) for window in windows) / (len(datasets[0]) / 10))
    assert reads[0] < 1.5 < 2 < reads[1], reads


def _windows(plan: Plan, lane: int) -> tuple[int, int]:
    low, high = plan._lane_part(0, lane)
    return low // plan.window_of(0), (high - 1) // plan.window_of(0) + 1


def test_rows_are_numbered_by_whole_groups_for_training_only(opened, tmp_path):
    (dataset,), _ = opened
    (plain,), _ = open_mix(f"{tmp_path}/data/*.parquet")
    assert plain.together == 1 and [sample.key for sample in plain.read(97, 102)] == [
        *(f"row {n}" for n in range(97, 101)),
        "row 0",
    ]
    assert [sample.key for sample in dataset.read(99, 101)] == ["row 99", "row 0"]  # of the first file, then of the second
    assert sorted(dataset.key_crcs()) == sorted(plain.key_crcs()) and dataset.manifest_hash != plain.manifest_hash
    assert {sample.key for sample in dataset.read(40 * 100, len(dataset))} == {"row 100"}


def test_a_row_keeps_its_place_for_lists_that_count_file_after_file(opened, tmp_path):
    (dataset,), _ = opened
    (plain,), _ = open_mix(f"{tmp_path}/data/*.parquet")
    rows = np.array([0, 99, 100, 101, 202, 4039])
    for row, number in zip(rows.tolist(), dataset.numbers_of(rows).tolist(), strict=True):
        (one,), (other,) = dataset.read(number, number + 1), plain.read(row, row + 1)
        assert one == other
    assert (plain.numbers_of(rows) == rows).all()


@pytest.mark.parametrize("batch", [64, 256, 1024, 4096])
@pytest.mark.parametrize("group", [100, 1000])
def test_chunks_are_row_groups_as_far_as_memory_allows(batch, group):
    """ImageNet as the hub has it: 110 kB an image."""
    numbers = Numbers(1_281_167, 110_000)
    numbers.together = group
    plan = choose_plan([numbers], [1.0], 0, batch)
    (grid,) = plan.grids
    assert group % grid == 0 and plan.lanes * plan.window_of(0) * 110_000 <= 2**30
    assert grid == group or plan.lanes * grid * 2 * 110_000 > 0.4 * 2**30  # no smaller than they must be
    assert [plan.readers_per_lane(batch // world, world, 4) for world in (1, 2, 4, 8, 16, 32, 64)] == [1.0] * 7
    if batch <= 1024 and group == 100:
        assert grid == 100


def test_a_plan_with_grids_is_kept_and_one_without_is_written_as_before(opened):
    datasets, weights = opened
    plan = choose_plan(datasets, weights, 3, 16)
    assert resume_plan(plan.to_dict(), datasets, weights, 3) == plan
    plain = choose_plan([Numbers(1000)], [1.0], 0, 16)
    assert "grids" not in plain.to_dict() and Plan.from_dict(plain.to_dict()) == plain


def test_a_mix_keeps_the_grid_of_each(tmp_path):
    one, two = Numbers(100_000, 10_000), Numbers(50_000, 30_000)
    two.together = 100
    plan = choose_plan([one, two], [1, 1], 0, 64)
    assert plan.grids[0] == 0 and 100 % plan.grids[1] == 0 and plan.window % plan.chunk == 0
    narrow = replace(plan, window=64, grids=(0, 20))
    assert [narrow.window_of(dataset) for dataset in (0, 1)] == [64, 60]  # whole chunks
    met = Counter(plan.locate(position)[:2] for position in range(0, 2 * 100_000, 97))
    assert max(met.values()) <= 2 and {dataset for dataset, _ in met} == {0, 1}


def grouped(count: int, mean_bytes: float, together: int) -> Numbers:
    numbers = Numbers(count, mean_bytes)
    numbers.together = together
    return numbers


def test_grids_leave_small_sets_alone_and_a_mix_within_the_memory():
    # the order of 63 groups would be too little shuffling
    assert [choose_plan([grouped(count, 1e4, 100)], [1], 0, 64).grids for count in (6300, 6400)] == [(), (100,)]
    # what lies on no grid is in memory as well, and has lanes to fill
    mix = [Numbers(100_000, 1e5), grouped(100_000, 1e5, 100)]
    plan = choose_plan(mix, [1, 1], 0, 256)
    assert plan.grids == (0, 100)
    assert plan.lanes * sum(plan.window_of(place) * dataset.mean_bytes for place, dataset in enumerate(mix)) <= 2**30
    assert choose_plan([grouped(100_000, 1e4, 20), Numbers(200, 1e4)], [1, 1], 0, 64).lanes <= 200 // 8


def test_open_parquet_alone(tmp_path):
    data = write_parquets(tmp_path / "data", [10])
    assert open_parquet("one", Store(), Store().expand(data), in_groups=True).together == 10
