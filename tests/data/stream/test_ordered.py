"""An ordered pass: large ranges read ahead, damage that changes nothing around it, and samples chosen by their keys."""

from glob import glob

import numpy as np
import pytest
import torch
from shards import as_list, write_shards

from ssl_locat.data.shards.index import open_dataset, open_mix
from ssl_locat.data.shards.selections import Chosen, Joined, choose_by_key, some
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream import workers as worker_processes
from ssl_locat.data.stream.ordered import Unread, read_in_order
from ssl_locat.data.stream.workers import choose_workers
from ssl_locat.errors import CorruptSample, DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class CountingStore(Store):
    """Notes every range that is read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.ranges = []

    def read(self, url, start, end, stat=None):
        self.ranges.append((url, start, end))
        return super().read(url, start, end, stat)


def keyed(raw, index):
    if raw.key.endswith("13"):
        raise CorruptSample("thirteen")
    return index, raw.key


def unlucky(raw, index):
    if index == 7:
        raise DataError("seven is not for sale")
    return index


def endless(raw, index):
    if index == 70:
        pow(3, 10**9)  # in C, as a decoder
    return index


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "data", [90, 17, 60, 33])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_sample_comes_once_in_order_and_damage_keeps_its_place(shards, workers):
    dataset = open_dataset(shards)
    batches = list(read_in_order(dataset, np.arange(200), keyed, as_list, batch_size=16, workers=workers))
    assert [len(batch) for batch in batches] == [16] * 12 + [8]
    found = [item for batch in batches for item in batch]
    assert [item[0] for item in found] == list(range(200))
    damaged = [item for item in found if isinstance(item, Unread)]
    assert damaged and all(item.key.endswith("13") and item.reason == "thirteen" for item in damaged)


def test_a_damaged_sample_does_not_change_how_the_rest_is_read(shards):
    """Before, one damaged sample or any max_bad turned two requests into one for each sample."""
    requests = {}
    for prepare in (keyed, lambda raw, index: (index, raw.key)):
        dataset = open_dataset(shards, store=CountingStore())
        dataset.store.ranges.clear()
        list(read_in_order(dataset, np.arange(200), prepare, as_list, batch_size=50, workers=0))
        requests[prepare] = [one for one in dataset.store.ranges if one[0].endswith(".tar")]
    first, second = requests.values()
    assert sorted(first) == sorted(second) and len(first) <= 8  # 4 batches, over the borders of 4 shards
    assert sum(end - start for _, start, end in first) <= sum(shard.stat.size for shard in dataset.shards)


def test_an_error_of_the_user_arrives_as_it_was_raised(shards):
    for workers in (0, 2):
        with pytest.raises(DataError, match="seven is not for sale"):
            list(read_in_order(open_dataset(shards), np.arange(40), unlucky, as_list, batch_size=4, workers=workers))


def test_stopping_early_leaves_no_worker(shards):
    batches = read_in_order(open_dataset(shards), np.arange(200), keyed, as_list, batch_size=4, workers=2)
    next(batches)
    batches.close()
    assert not torch.multiprocessing.active_children()


def test_samples_are_chosen_by_their_keys_alone(tmp_path, shards):
    dataset = open_dataset(shards, store=CountingStore())
    dataset.store.ranges.clear()
    chosen = choose_by_key(dataset, 30)
    # the index alone is read: its blocks lie one after the other, and come in one read
    assert len(dataset.store.ranges) == 1 and not dataset.store.ranges[0][0].endswith(".tar")
    keys = {sample.key for index in chosen for sample in dataset.read(int(index), int(index) + 1)}
    assert len(keys) == 30 and (np.diff(chosen) > 0).all()
    again = some(Joined([open_dataset(shard) for shard in sorted(glob(shards), reverse=True)]), 30)
    assert {sample.key for sample in again.read(0, 30)} == keys and len(again) == 30  # other order, other places
    assert set(choose_by_key(dataset, 10)) < set(chosen)  # a larger set holds the smaller one
    assert some(dataset, None) is dataset and some(dataset, 1000) is dataset


def test_a_selection_reads_its_samples_and_near_ones_together(shards):
    store = CountingStore()
    dataset = open_dataset(shards, store=store)
    dense = Chosen(dataset, np.arange(0, 90, 2))  # one shard, every other sample: gaps cheaper than requests
    store.ranges.clear()
    whole = {index: dataset.read(index, index + 1)[0] for index in range(90)}
    store.ranges.clear()
    assert dense.read(0, len(dense)) == [whole[index] for index in range(0, 90, 2)]
    assert len(store.ranges) == 1 and dense.by_range
    assert dense.manifest_hash != Chosen(dataset, np.arange(1, 90, 2)).manifest_hash != dataset.manifest_hash


def test_joined_datasets_are_read_one_after_the_other(shards):
    parts = [open_dataset(shard) for shard in sorted(glob(shards))]
    joined, whole = Joined(parts), open_mix(shards)[0][0]
    assert joined.read(85, 115) == whole.read(85, 115) and len(joined) == len(whole) == 200
    assert (joined.key_crcs() == whole.key_crcs()).all()


def test_workers_are_chosen_from_the_cores(monkeypatch):
    for cores, ranks, workers in ((2, 1, 2), (1, 1, 0), (64, 8, 8), (64, 1, 16), (4, 8, 0)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert choose_workers(None) == workers
    assert choose_workers(5) == 5


def test_a_sample_that_takes_no_end_is_named(shards, monkeypatch):
    monkeypatch.setattr(worker_processes, "CPU_SECONDS", 1.0)
    options = {"batch_size": 16, "workers": 2}
    with pytest.raises(
        DataError, match="000_00070 took more than 1 s of CPU time to decode: convert the image, or remove it from the data"
    ):
        list(read_in_order(open_dataset(shards), np.arange(200), endless, as_list, **options))
