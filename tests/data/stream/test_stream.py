"""The stream: one order for any number of ranks and workers, exact resume, bounded reading, faults that say what to do."""

import ctypes
import fcntl
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from shards import as_list, fingerprint, write_parquets, write_shards

from ssl_locat.data.shards.index import open_dataset, open_mix
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream import workers as worker_processes
from ssl_locat.data.stream.plan import Plan, choose_plan, resume_plan
from ssl_locat.data.stream.quarantine import STUCK, Quarantine, QuarantineEntry
from ssl_locat.data.stream.read_ahead import ReadAhead, Share
from ssl_locat.data.stream.reader_process import Received
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import CorruptSample, DataBudgetExceeded, DataError, Outage, UserError

SIZES = {"global_batch_size": 24, "world_size": 1, "accumulate_steps": 1, "workers": 0}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(datasets, plan, positions: int, *, prepare=fingerprint, start=0, **options) -> dict[int, tuple]:
    """{position: sample} over all ranks."""
    options = SIZES | {"start_samples": start} | options
    batches = positions // options["global_batch_size"] * options["accumulate_steps"]
    found = {}
    for rank in range(options["world_size"]):
        with TrainStream(datasets, plan, prepare, as_list, rank=rank, **options) as stream:
            for batch in islice(stream, batches):
                found |= zip(batch.positions.tolist(), batch.payload, strict=True)
                assert batch.keys == [sample[0] for sample in batch.payload]
    return dict(sorted(found.items()))


@pytest.fixture
def shards(tmp_path):
    datasets, weights = open_mix(write_shards(tmp_path / "data", [90, 17, 60, 33, 41]))
    return datasets, choose_plan(datasets, weights, 11, SIZES["global_batch_size"])


# order --------------------------------------------------------------------------------------------------------------------------


def test_the_order_depends_on_neither_ranks_nor_workers_nor_batch_sizes(shards):
    expected = read(*shards, 480)
    assert list(expected) == list(range(480))
    for world, workers, batch, accumulate in [
        (1, 2, 24, 1),
        (2, 0, 24, 2),
        (3, 1, 24, 1),
        (4, 0, 48, 1),
        (1, 3, 96, 4),
        (2, 2, 12, 3),
    ]:
        options = {"world_size": world, "workers": workers, "global_batch_size": batch, "accumulate_steps": accumulate}
        assert read(*shards, 480, **options) == expected, options


def test_a_stream_is_one_rank_without_workers_unless_told_otherwise(shards, caplog):
    with TrainStream(*shards, fingerprint, as_list, start_samples=0, global_batch_size=24) as stream:
        batches = list(islice(stream, 20))
        assert stream.workers == 0 and stream.quarantined == 0
    seen = {p: sample for batch in batches for p, sample in zip(batch.positions.tolist(), batch.payload, strict=True)}
    assert seen == read(*shards, 480)
    assert "is read by" not in caplog.text, "one rank reads each part once"
    TrainStream(*shards, fingerprint, as_list, start_samples=0, global_batch_size=30, rank=0, world_size=30)
    assert "each part of the data is read by" in caplog.text
    caplog.clear()
    TrainStream(*shards, fingerprint, as_list, start_samples=0, global_batch_size=30, rank=1, world_size=30)
    assert not caplog.text, "one rank says it"
    waiting = TrainStream(*shards, fingerprint, as_list, start_samples=0, global_batch_size=24, workers=1)
    # a store may take its whole budget, and then the reader may need it once more
    assert waiting._loader_options["timeout"] == 2 * shards[0][0].store.budget_seconds + 120


def test_the_order_is_the_plans(shards):
    datasets, plan = shards
    keys = [sample.key for sample in datasets[0].read(0, len(datasets[0]))]
    for position, (key, _, seed) in read(datasets, plan, 96).items():
        assert key == keys[plan.locate(position)[1]] and seed == plan.augment_seed(position)


def test_a_position_can_be_taken_by_itself(shards):
    expected = read(*shards, 48)
    with TrainStream(*shards, fingerprint, as_list, start_samples=0, **SIZES) as stream:
        for position in (0, 17, 47):
            assert stream.take(position) == (expected[position][0], expected[position])


def test_a_pass_contains_every_sample_once(shards):
    found = read(*shards, 241 * 3)
    for epoch in range(2):
        mine = [sample[0] for position, sample in found.items() if shards[1].locate(position)[2] == epoch]
        assert len(mine) == len(set(mine)) == 241


def test_a_resumed_stream_resumes_exactly(shards):
    expected = read(*shards, 480)
    for start in (24, 100, 333):
        resumed = read(*shards, 96, start=start, world_size=2, workers=1)
        assert resumed == {position: expected[position] for position in range(start, start + 96)}


def test_a_folder_of_images_obeys_the_same_plan(tmp_path):
    for i in range(50):
        (tmp_path / "images" / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"class{i % 3}" / f"{i}.jpg").write_bytes(random.Random(i).randbytes(50))
    datasets, weights = open_mix(str(tmp_path / "images"))
    plan = choose_plan(datasets, weights, 0, SIZES["global_batch_size"])
    assert read(datasets, plan, 240) == read(datasets, plan, 240, workers=2, world_size=2)


def test_rows_of_parquet_obey_the_same_plan(tmp_path):
    """Each once in a pass, for any ranks and workers, in a mix with tars too."""
    datasets, weights = open_mix(write_parquets(tmp_path / "data", [90, 17, 60, 33, 40]))
    plan = choose_plan(datasets, weights, 3, SIZES["global_batch_size"])
    found = read(datasets, plan, 240)
    assert len({sample[1] for sample in found.values()}) == 240
    assert found == read(datasets, plan, 240, workers=2, world_size=2) == read(datasets, plan, 240, world_size=3)
    tars = write_shards(tmp_path / "tars", [40, 40])
    parts = [{"shards": f"{tmp_path}/data/*.parquet", "weight": 3.0}, {"shards": tars}]
    datasets, weights = open_mix(parts)
    plan = choose_plan(datasets, weights, 3, SIZES["global_batch_size"])
    assert read(datasets, plan, 240) == read(datasets, plan, 240, workers=1, world_size=2)


def test_a_mix_is_read_in_its_proportions(tmp_path):
    big, small = write_shards(tmp_path / "big", [120]), write_shards(tmp_path / "small", [40, 40])
    datasets, weights = open_mix([{"shards": big, "weight": 0.75}, {"shards": small, "weight": 0.25}])
    plan = choose_plan(datasets, weights, 0, SIZES["global_batch_size"])
    assert plan.shares == (0.75, 0.25)
    found = read(datasets, plan, 480)
    assert found == read(datasets, plan, 480, world_size=3, workers=1)
    counts = [sum(plan.locate(position)[0] == number for position in found) for number in (0, 1)]
    assert counts == [360, 120]


# kill and resume -------------------------------------------------------------------------------------------------------------------


def train(data: str, folder: Path, rank: int, world: int, workers: int, until: int, last: bool) -> None:
    """One rank of a training job that only reads: appends what it saw to a file; rank 0 keeps the progress like a checkpoint.

    At `until` it ends if this is the last turn, else waits there for the kill, however late that comes.
    """
    state = json.loads((folder / "state.json").read_text()) if (folder / "state.json").exists() else None
    datasets, weights = open_mix(data)
    sizes = SIZES | {"world_size": world, "workers": workers}
    plan = (
        resume_plan(state["plan"], datasets, weights, 5)
        if state
        else choose_plan(datasets, weights, 5, sizes["global_batch_size"])
    )
    start = samples = state["samples_seen"] if state else 0
    with (
        TrainStream(datasets, plan, fingerprint, as_list, start_samples=start, rank=rank, **sizes) as stream,
        open(folder / f"seen.{rank}.{start}.jsonl", "w") as seen,
    ):
        for batch in stream:
            seen.write(json.dumps([batch.positions.tolist(), batch.payload]) + "\n")
            seen.flush()
            samples += 24
            if rank == 0 and samples % 72 == 0:
                for other in range(world):  # where training would meet in a collective
                    while lines(folder / f"seen.{other}.{start}.jsonl") < (samples - start) // 24:
                        time.sleep(0.005)
                (folder / "state.tmp").write_text(json.dumps({"samples_seen": samples, "plan": plan.to_dict()}))
                (folder / "state.tmp").replace(folder / "state.json")
            if samples >= until:
                break
        while not last:
            time.sleep(1)


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def kill_and_resume(folder: Path, data: str, worlds: list[int], until: int) -> dict[int, list]:
    """Run ranks as processes, kill -9 them at random times, go on from the last state with another world size.

    Returns what was seen at each position; a position seen again, redone after a kill, must have shown the same.
    """
    rng = random.Random(len(worlds))
    # not fork: this process may hold event loops and threads of other tests, whose locks a forked copy would wait for for ever
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ssl_locat.data.stream.stream"])
    folder.mkdir()
    for turn, world in enumerate(worlds):
        workers, last = rng.randint(0, 2), turn == len(worlds) - 1
        end = until if last else until * (turn + 1) // len(worlds) // 72 * 72
        ranks = [context.Process(target=train, args=(data, folder, rank, world, workers, end, last)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        if not last:  # killed some time after its first checkpoint
            before = (folder / "state.json").stat().st_mtime_ns if turn else 0
            while not (folder / "state.json").exists() or (folder / "state.json").stat().st_mtime_ns == before:
                assert all(rank.is_alive() for rank in ranks), "a rank died"
                time.sleep(0.01)
            time.sleep(rng.random() * 0.2)
            for rank in ranks:
                rank.kill()
        for rank in ranks:
            rank.join(120)
        hung = [rank.pid for rank in ranks if rank.is_alive()]
        for rank in ranks:
            rank.kill()
        assert not hung, f"turn {turn}: ranks {hung} of {world} neither finished nor died"
    assert [rank.exitcode for rank in ranks] == [0] * world
    found: dict[int, list] = {}
    for path in folder.glob("seen.*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("]]]"):  # a kill may cut the last line
                for position, sample in zip(*json.loads(line), strict=True):
                    assert found.setdefault(position, sample) == sample
    return found


def expected_of(folder: Path, data: str, until: int) -> dict[int, list]:
    plan = Plan.from_dict(json.loads((folder / "state.json").read_text())["plan"])
    return {position: list(sample) for position, sample in read(open_mix(data)[0], plan, until).items()}


def test_killed_runs_resume_exactly_with_other_world_sizes(tmp_path):
    data = write_shards(tmp_path / "data", [90, 17, 60, 33, 41])
    assert kill_and_resume(tmp_path / "run", data, [2, 1, 3], 1440) == expected_of(tmp_path / "run", data, 1440)


def test_killed_runs_over_parquet_resume_exactly_with_other_world_sizes(tmp_path):
    data = write_parquets(tmp_path / "data", [90, 17, 60, 33, 41])
    assert kill_and_resume(tmp_path / "run", data, [2, 1, 3], 1440) == expected_of(tmp_path / "run", data, 1440)


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_shards, write_parquets])
def test_many_kills_over_many_passes(tmp_path, write):
    data = write(tmp_path / "data", [2000] * 5, size=200)
    worlds = [2, 3, 1, 2, 3, 1, 4, 2]
    assert kill_and_resume(tmp_path / "run", data, worlds, 48_000) == expected_of(tmp_path / "run", data, 48_000)


# damage ----------------------------------------------------------------------------------------------------------------------------


def reject_some(raw, seed):
    if raw.key.endswith("7"):
        raise CorruptSample("ends in seven")
    return fingerprint(raw, seed)


def quarantined(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_damaged_samples_are_replaced_listed_once_and_alike_for_all_worlds(shards, tmp_path):
    options = {"prepare": reject_some, "max_bad": 1.0}
    expected = read(*shards, 480, **options, quarantine_path=tmp_path / "one.jsonl")
    assert list(expected) == list(range(480)) and not any(sample[0].endswith("7") for sample in expected.values())
    assert expected == read(*shards, 480, **options, world_size=2, workers=1, quarantine_path=tmp_path / "two.jsonl")
    listed = [sorted((line["index"], line["key"]) for line in quarantined(tmp_path / f"{name}.jsonl")) for name in ("one", "two")]
    bad = sorted((i, s.key) for i, s in enumerate(shards[0][0].read(0, 241)) if s.key.endswith("7"))
    assert listed == [bad, bad]
    assert set(quarantined(tmp_path / "one.jsonl")[0]) == {"position", "dataset", "index", "shard", "key", "error"}
    # a restart lists nothing twice, and knows the count
    with TrainStream(
        *shards, reject_some, as_list, start_samples=480, max_bad=0.5, quarantine_path=tmp_path / "one.jsonl", **SIZES
    ) as stream:
        for _ in zip(range(5), stream, strict=False):
            pass
        assert stream.quarantined == len(bad) == len(quarantined(tmp_path / "one.jsonl"))


def loops_at_one(raw, seed):
    """As a decoder in C that does not come back, and lets no thread of Python run."""
    if raw.key == "002_00031":
        pow(3, 10**9)
    return reject_some(raw, seed)


def rejects_it(raw, seed):
    if raw.key == "002_00031":
        raise CorruptSample("as if it were damaged")
    return reject_some(raw, seed)


def test_a_sample_that_takes_no_end_is_named_and_left_out_from_the_next_start(shards, tmp_path, monkeypatch):
    """As if it were damaged: the same order for any world size; and nothing else is ever left out by the clock."""
    monkeypatch.setattr(worker_processes, "CPU_SECONDS", 1.0)
    path, options = tmp_path / "quarantine.jsonl", {"max_bad": 1.0, "workers": 2}
    stream = TrainStream(*shards, loops_at_one, as_list, start_samples=0, quarantine_path=path, **SIZES | options)
    with pytest.raises(Outage, match=r"002\.tar: 002_00031 took more than 1 s of CPU time to decode.*left out from now on"):
        list(islice(stream, 20))
    assert stream._batches is None and not stream._close.alive  # stopped by itself
    assert [line["key"] for line in quarantined(path) if line["error"].startswith(STUCK)] == ["002_00031"]
    expected = read(*shards, 480, prepare=rejects_it, max_bad=1.0)
    for world in (1, 2):
        assert read(*shards, 480, prepare=loops_at_one, quarantine_path=path, world_size=world, **options) == expected
    assert len({line["index"] for line in quarantined(path)}) == len(quarantined(path))
    with pytest.raises(DataError, match="002_00031 took more than 1 s of CPU time to decode: convert the image, or remove it"):
        read(*shards, 480, prepare=loops_at_one, **options)


def test_too_much_damage_stops_the_run(shards, tmp_path):
    with pytest.raises(DataBudgetExceeded, match=r"data\.max_bad allows 0\.1 %"):
        read(*shards, 480, prepare=reject_some, max_bad=0.001, quarantine_path=tmp_path / "q.jsonl")
    with pytest.raises(DataBudgetExceeded):
        read(*shards, 480, prepare=reject_some, max_bad=0.001, workers=1, quarantine_path=tmp_path / "q2.jsonl")


def test_a_handful_of_corrupt_samples_stops_no_run_unless_none_is_tolerated():
    bad = [QuarantineEntry(i, "d", i, "s", "k", "e") for i in range(10)]
    quarantine = Quarantine(None, 0.001, 1000)
    quarantine.add(bad)
    quarantine.check_budget(10)
    quarantine.add([QuarantineEntry(99, "d", 99, "s", "k", "e")])
    with pytest.raises(DataBudgetExceeded):
        quarantine.check_budget(10)
    strict = Quarantine(None, 0.0, 1000)
    strict.add(bad[:1])
    with pytest.raises(DataBudgetExceeded):
        strict.check_budget(10**6)


def test_more_than_a_handful_of_corrupt_samples_within_the_budget_stops_no_run(shards, tmp_path):
    """24 of 241 are: the share is of what was read by then, not of the first batch alone."""
    path = tmp_path / "q.jsonl"
    assert len(read(*shards, 480, prepare=reject_some, max_bad=0.25, quarantine_path=path)) == 480
    assert len(quarantined(path)) > 10


def test_only_what_took_no_end_is_never_tried_again(tmp_path):
    path = tmp_path / "q.jsonl"
    first = Quarantine(path, 1, 100)
    first.add([QuarantineEntry(0, "d", 1, "s", "k", "truncated"), QuarantineEntry(1, "d", 2, "s", "k", f"{STUCK} (1 s)")])
    assert Quarantine(path, 1, 100).stuck == {("d", 2)}


def test_the_sample_that_took_no_end_is_the_positions_own_or_the_one_that_stands_in(shards, tmp_path):
    stream = TrainStream(*shards, fingerprint, as_list, start_samples=0, quarantine_path=tmp_path / "q.jsonl", **SIZES)
    for number, listed in ((1, 1), (-1, shards[1].locate(0)[1])):
        assert isinstance(stream._left_out(0, number, 1.0), Outage)
        assert quarantined(tmp_path / "q.jsonl")[-1]["index"] == listed


def test_a_wholly_damaged_window_stops_the_run(shards):
    def never(raw, seed):
        raise CorruptSample("no")

    with pytest.raises(DataBudgetExceeded, match=r"all .* samples tried for position 0"):
        read(*shards, 24, prepare=never)


def test_quarantine_survives_a_line_cut_by_a_kill(tmp_path):
    path = tmp_path / "q.jsonl"
    first = Quarantine(path, 1, 100)
    first.add([QuarantineEntry(0, "d", 1, "s", "k", "e")])
    with open(path, "a") as file:
        file.write('{"position": 3, "da')
    again = Quarantine(path, 1, 100)
    again.add([QuarantineEntry(0, "d", 1, "s", "k", "e"), QuarantineEntry(5, "d", 2, "s", "k", "e")])
    assert again.added == 1
    assert len(Quarantine(path, 1, 100).known) == 2


def test_quarantines_of_several_ranks_list_a_sample_once(tmp_path):
    """The second waits for the lock of the first, and takes in what that one wrote."""
    path, entry = tmp_path / "a/run/q.jsonl", QuarantineEntry(0, "d", 1, "s", "k", "e")
    first, second = Quarantine(path, 1, 100), Quarantine(path, 1, 100)
    first.add([entry])
    second.add([entry, QuarantineEntry(5, "d", 2, "s", "k", "e")])
    first.add([QuarantineEntry(7, "d", 2, "s", "k", "e")])
    assert (first.added, second.added) == (1, 1) and [line["index"] for line in quarantined(path)] == [1, 2]
    ready, write = os.pipe()
    if not (other := os.fork()):  # another rank, slow, in the middle of its turn
        with open(path, "ab+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(write, b"!")
            time.sleep(0.3)
            file.write(json.dumps(entry._replace(index=3)._asdict()).encode() + b"\n")
        os._exit(0)
    os.read(ready, 1)
    second.add([entry._replace(index=3)])
    assert os.waitpid(other, 0)[1] == 0
    assert [line["index"] for line in quarantined(path)] == [1, 2, 3] and second.added == 1
    os.close(ready)
    os.close(write)


# workers ---------------------------------------------------------------------------------------------------------------------------


def die(raw, seed):
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return fingerprint(raw, seed)


def test_a_killed_worker_says_what_to_do(shards):
    with pytest.raises(Outage, match=r"a data worker was lost.*nothing is lost"):
        read(*shards, 24, prepare=die, workers=1)


def break_down(raw, seed):
    raise KeyError("a bug of ours")


def slow_at_first(raw, seed):
    time.sleep(0.3 * (torch.utils.data.get_worker_info().id == 0))
    return fingerprint(raw, seed)


def test_a_slow_worker_does_not_change_the_order(shards):
    expected = read(*shards, 96)
    with TrainStream(
        *shards, slow_at_first, as_list, start_samples=0, **SIZES | {"workers": 2, "global_batch_size": 3}
    ) as stream:
        batches = list(islice(stream, 6))
    assert [position for batch in batches for position in batch.positions.tolist()] == list(range(18))
    assert [sample for batch in batches for sample in batch.payload] == [expected[position] for position in range(18)]


def mistaken(raw, seed):
    raise UserError("a mistake of the user's")


def test_an_error_in_a_worker_ends_all_of_them(shards):
    for prepare, error in ((die, Outage), (mistaken, UserError)):
        stream = TrainStream(*shards, prepare, as_list, start_samples=0, **SIZES | {"workers": 2})
        with pytest.raises(error) as raised:
            list(islice(stream, 40))
        assert "Traceback" not in str(raised.value)  # in words, not torch's page of traces
        assert stream._batches is None and not stream._close.alive and not multiprocessing.active_children()


def test_workers_start_in_the_way_that_was_asked_for(shards):
    for asked in ("fork", "forkserver", "spawn"):
        stream = TrainStream(*shards, fingerprint, as_list, start_samples=0, context=asked, **SIZES | {"workers": 1})
        assert stream._loader_options["multiprocessing_context"] == asked


def test_other_errors_in_workers_keep_their_trace(shards):
    with pytest.raises(KeyError, match="break_down"):
        read(*shards, 24, prepare=break_down, workers=1)


def test_rank_0_counts_what_earlier_starts_listed_and_each_rank_its_own(shards, tmp_path):
    path = tmp_path / "q.jsonl"
    Quarantine(path, 1.0, 241).add([QuarantineEntry(i, "d", i, "s", "k", "e") for i in range(3)])
    for rank, expected in (0, 4), (1, 1):
        options = SIZES | {"world_size": 2}
        stream = TrainStream(*shards, fingerprint, as_list, start_samples=0, quarantine_path=path, rank=rank, **options)
        stream.quarantine.added += 1
        assert stream.quarantined == expected


def test_workers_leave_signals_to_the_trainer(shards):
    with TrainStream(*shards, fingerprint, as_list, start_samples=0, **SIZES | {"workers": 2}) as stream:
        batches = iter(stream)
        next(batches)
        workers = [*stream._batches._workers, *(child for child in multiprocessing.active_children() if child.name == "reader")]
        assert len(workers) == 3
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            for worker in workers:
                os.kill(worker.pid, name)
        for _ in range(8):
            next(batches)
        began = time.monotonic()
    # within milliseconds by themselves; a worker that is deaf would keep the loader for minutes
    assert not any(worker.is_alive() for worker in workers) and time.monotonic() - began < 30
    assert stream._batches is None and not stream._close.alive  # at once, not when nobody refers to the stream any more


def test_workers_end_when_the_trainer_forgets_to_close(tmp_path, shards):
    script = (
        "import sys, os; sys.path.insert(0, sys.argv[2])\n"
        "from shards import *; from ssl_locat.data.shards.index import open_mix; from ssl_locat.data.stream.plan import choose_plan\n"
        "from ssl_locat.data.stream.stream import TrainStream\n"
        "o = dict(global_batch_size=24, world_size=1, accumulate_steps=1, workers=2)\n"
        "d, w = open_mix(sys.argv[1]); s = TrainStream(d, choose_plan(d, w, 0, o['global_batch_size']), fingerprint, as_list, start_samples=0, **o)\n"
        "next(iter(s)); raise SystemExit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "data/*.tar"), str(Path(__file__).parents[2])], timeout=120
    )
    assert done.returncode == 7


def big(samples):
    return torch.zeros(1 << 20)


def in_small_shared_memory(shards, messages) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    private, recursive, new_mounts = 1 << 18, 1 << 14, 0x00020000
    if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, recursive | private, None):
        return messages.put("not permitted")
    if libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=2m"):
        return messages.put("not permitted")
    try:
        with TrainStream(*shards, fingerprint, big, start_samples=0, **SIZES | {"workers": 2}) as stream:
            next(iter(stream))
    except UserError as error:
        messages.put(str(error))


def test_full_shared_memory_says_what_to_do(shards):
    context = multiprocessing.get_context("fork")
    messages = context.Queue()
    process = context.Process(target=in_small_shared_memory, args=(shards, messages))
    process.start()
    try:
        message = messages.get(timeout=60)
    finally:
        process.kill()
    if message == "not permitted":
        pytest.skip("mounting a small /dev/shm needs root")
    assert message.startswith("/dev/shm has 1 MB left, one batch of a data worker needs 4 MB. Enlarge it")


def counted(datasets, plan, batches: int, *, rank=0, **options) -> tuple:
    """(counts, keys) of one rank's first micro-batches."""
    with TrainStream(datasets, plan, fingerprint, as_list, rank=rank, **SIZES | {"start_samples": 0} | options) as stream:
        keys = [key for batch in islice(stream, batches) for key in batch.keys]
        return stream.counts, keys


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """6400 samples of 2 kB in their archive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_mix(write_shards(tmp_path_factory.mktemp("many"), [1600] * 4, size=100))[0]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 10), (8, 3), (64, 16)])
def test_every_sample_is_read_once_however_many_read_and_decode(many, ranks, workers):
    """Nothing is fetched but what is used, and what lies in memory when the stream is closed."""
    batch, memory = 256, 2 << 20
    plan = choose_plan(many, [1.0], 0, batch, memory_bytes=memory)
    size = {"global_batch_size": batch, "world_size": ranks, "workers": workers, "memory_bytes": memory}
    counts, keys = counted(many, plan, 90, rank=ranks // 2, **size)
    assert len(keys) == 90 * batch // ranks <= counts.used + batch // ranks
    assert counts.fetched - counts.used <= 1.1 * memory / many[0].mean_bytes
    assert counts.dropped == 0 and counts.peak <= 1.1 * memory
    if ranks == 1:
        assert counts.fetched <= 1.05 * counts.used


def test_memory_stays_within_the_budget(many):
    """Invariant 11, counted where it arises; a plan made for more memory is obeyed all the same, its windows being what it takes."""
    small, large = 2 << 20, 16 << 20
    plan = choose_plan(many, [1.0], 0, 256, memory_bytes=small)
    for workers in (0, 4):
        counts, _ = counted(many, plan, 20, global_batch_size=256, workers=workers, memory_bytes=small)
        assert 0.3 * small < counts.peak <= 1.1 * small
    wide = choose_plan(many, [1.0], 0, 256, memory_bytes=large)
    assert wide.lanes * wide.window > plan.lanes * plan.window
    windows = wide.lanes * wide.window * many[0].mean_bytes
    counts, _ = counted(many, wide, 20, global_batch_size=256, memory_bytes=small)
    assert counts.peak <= 1.2 * max(windows, small)


def test_large_samples_reach_the_workers_whole(tmp_path):
    """Their bytes go through the pipe by themselves; small ones with their descriptions."""
    datasets, weights = open_mix(write_shards(tmp_path / "data", [30, 20], size=40_000))
    plan = choose_plan(datasets, weights, 0, SIZES["global_batch_size"])
    assert read(datasets, plan, 48, workers=2) == read(datasets, plan, 48)


def test_a_first_batch_reads_its_own_windows_and_the_next_batchs(many):
    plan = choose_plan(many, [1.0], 0, 64, memory_bytes=8 << 20)
    counts, _ = counted(many, plan, 1, global_batch_size=64, start_samples=6400)
    assert counts.fetched <= 2 * 64 // plan.unit * plan.window


def test_a_plan_of_before_is_continued_in_its_order(many):
    """Lanes that come back only every eighth batch, as earlier releases planned them: read once, too, by any number of workers."""
    saved = {"seed": 3, "sizes": [len(many[0])], "manifests": [many[0].manifest_hash], "quotas": [1]}
    plan = resume_plan(saved | {"lanes": 256, "unit": 4, "window": 32, "chunk": 16, "version": 1}, many, [1.0], 3)
    expected = [many[0].read(number, number + 1)[0].key for number in (plan.locate(position)[1] for position in range(1280))]
    for workers in (0, 3, 10):
        counts, keys = counted(many, plan, 10, global_batch_size=128, workers=workers)
        assert keys == expected
        assert counts.fetched <= 1280 + plan.lanes * plan.window * 2


def test_closing_ends_reads_that_wait_for_a_dead_store(tmp_path):
    """Else a stopped trainer would not end before the time for retries is over: its threads are waited for."""
    dataset = open_dataset(write_shards(tmp_path / "data", [800, 800]))
    plan = choose_plan([dataset], [1], 0, SIZES["global_batch_size"])
    (tmp_path / "data").rename(tmp_path / "gone")
    dataset.store = Store(budget_seconds=300)
    ahead = ReadAhead([dataset], plan, Share(0, 24, 0, 1), 1 << 30)
    with pytest.raises(TimeoutError):
        first = ahead.pool.submit(next, ahead.batch(0))
        first.result(timeout=0.3)
    ahead.close()
    began = time.monotonic()
    ahead.pool.shutdown(wait=True)
    assert time.monotonic() - began < 60  # at once, and not after the 300 s of the budget


def test_a_lost_reader_says_what_to_do(shards):
    with TrainStream(*shards, fingerprint, as_list, start_samples=0, **SIZES | {"workers": 2}) as stream:
        batches = iter(stream)
        next(batches)
        [reader] = [child for child in multiprocessing.active_children() if child.name == "reader"]
        reader.kill()
        with pytest.raises(Outage, match="the process that reads for the data workers was lost"):
            for _ in range(100):
                next(batches)
    assert not [child for child in multiprocessing.active_children() if child.name == "reader"]


def test_a_reader_lost_in_the_middle_of_a_message_is_lost():
    receiving, sending = multiprocessing.Pipe(duplex=False)
    os.write(sending.fileno(), (1000).to_bytes(4, "big") + b"the beginning")
    sending.close()
    with pytest.raises(Outage, match="the process that reads for the data workers was lost"):
        next(Received(receiving, Share(0, 24, 0, 1)).batch(0))


@pytest.mark.slow
def test_prepared_data_may_be_opened_under_forkserver(shards):
    assert read(*shards, 48, workers=1, context="forkserver") == read(*shards, 48)


def test_unreadable_settings_are_user_errors(shards):
    with pytest.raises(UserError, match="multiple of"):
        read(*shards, 24, world_size=5)


def test_open_dataset_is_what_the_stream_reads(shards, tmp_path):
    assert open_dataset(str(tmp_path / "data")).manifest_hash == shards[0][0].manifest_hash
