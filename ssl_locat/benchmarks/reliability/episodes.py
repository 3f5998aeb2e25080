"""Kill, resume, count: `python -m ssl_locat.benchmarks.reliability.episodes PEER FOLDER SEED CELL=PASSES...`, in the environment of the peer.

An episode is one start of all ranks (forked from a process that has imported the library: what is measured is no import) which read until
SIGKILL hits every one of their processes in the middle of a pass, or until the pass is over. What counts as seen is what lies behind the
newest state that all ranks had saved: the rest was trained for nothing and comes again, as after any crash. A pass counts its samples:
those of the data that were never seen are lost, those seen more than once repeated, those that are not what their number says wrong.
"""

import gc
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ssl_locat.benchmarks.reliability.cells import BATCH, CELLS, SAMPLES, Cell
from ssl_locat.benchmarks.reliability.rank import read
from ssl_locat.benchmarks.reliability.samples import SECOND, Job, cut, is_corrupt, make
from ssl_locat.benchmarks.reliability.server import failing

# seconds without a new batch, and without a process that only waits for its turn on a busy machine, that are a hang; some retry for 100
SILENCE = 120
LONGEST = 1800  # seconds without a new batch, whatever the processes do: an endless loop
# of what libraries print: signs that a loss was told
SIGNS = ("error", "warn", "corrupt", "damage", "truncat", "unexpected", "invalid", "cannot identify")


class Episode(NamedTuple):
    steps: int  # behind the newest common state; all of them if the pass is over
    numbers: list[int]
    wrong: int
    states: list[Path]  # one for each rank
    first: float | None  # seconds to rank 0's first batch
    ended: str | None  # None: killed; "hang"; "ended"; or an error in words
    output: list[str]  # lines that were printed and look like a sign of trouble


def start(peer: str, job: Job, target: int | None) -> Episode:
    """One episode; `target`: rank 0's step after which it is killed."""
    began = time.monotonic()
    job.folder.mkdir(parents=True)
    ranks = []
    for rank in range(job.world):
        if not (pid := os.fork()):
            state = job.state and job.state.with_name(job.state.name.replace("state.0.", f"state.{rank}."))
            # one state may serve all ranks: then a rank that was not there before takes rank 0's
            read(peer, job._replace(rank=rank, state=state if state and state.exists() else job.state), began)
        ranks.append(pid)
    ended = _watch(job, target, ranks)
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return _harvest(job, ended)


def _watch(job: Job, target: int | None, ranks: list[int]) -> str | None:
    """Until it is time to kill (None), all ranks ended, one of them failed, or nothing moves any more."""
    seen, lines, last, silent, looked = job.folder / "seen.0.jsonl", 0, time.monotonic(), 0.0, time.monotonic()
    ends = [job.folder / f"end.{rank}" for rank in range(job.world)]
    while True:
        # before the files are looked for: what is gone by now has left its word, if it ever will
        gone = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in ranks]
        said = [end.read_text() if end.exists() else None for end in ends]
        for words, exit in zip(said, gone, strict=True):
            if words not in (None, "ended"):
                return words
            if exit and words is None:
                return f"a rank died of signal {exit.si_status}"
        if None not in said:
            return "ended"
        now = seen.read_bytes().count(b"\n") if seen.exists() else 0
        if now > lines:
            lines, last, silent = now, time.monotonic(), 0.0
        if target is not None and lines >= target:
            return None
        if time.monotonic() - looked > 1:
            silent += 0 if _any_runs(ranks) else 1
            looked = time.monotonic()
        if silent > SILENCE or looked - last > LONGEST:
            return "hang"
        time.sleep(0.01)


def _any_runs(sessions: list[int]) -> bool:
    """Whether a process of these sessions computes, or would if it were its turn."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if state == "R" and int(session) in sessions:
                return True
    return False


def _harvest(job: Job, ended: str | None) -> Episode:
    saved = []
    for rank in range(job.world):
        names = [path.name for path in job.folder.glob(f"state.{rank}.*") if path.suffix != ".partial"]
        saved.append(max((int(name.rpartition(".")[2]) for name in names), default=0))
    common = min(saved)
    numbers: list[int] = []
    wrong, most, first = 0, 0, None
    for rank in range(job.world):
        path = job.folder / f"seen.{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            if not line.endswith("]"):
                continue  # cut by the kill
            step, found, bad, seconds = json.loads(line)
            first = seconds if rank == 0 and step == 1 else first
            if ended == "ended" or step <= common:
                numbers += found
                wrong += bad
                most = max(most, step)
    printed = "".join(path.read_text(errors="replace") for path in job.folder.glob("output.*"))
    output = [line for line in printed.splitlines() if any(sign in line.lower() for sign in SIGNS)]
    states = [job.folder / f"state.{rank}.{common}" for rank in range(job.world)] if common else []
    return Episode(most, numbers, wrong, states, first, ended, output)


def one_pass(peer: str, cell: Cell, data: list[str], folder: Path, rng: random.Random, state: Path | None) -> dict[str, Any]:
    """Start, kill and resume until the data are through. `state`: of the pass before, for streams without an end."""
    # after a cut there are fewer: a pass ends by itself, or (an endless stream) long before this
    total, done, kills = SAMPLES // BATCH * (2 if cell.cut else 1), 0, cell.kills
    numbers: list[int] = []
    found: dict[str, Any] = {"episodes": 0, "wrong": 0, "first": [], "stopped": None, "output": set(), "kills": 0}
    while True:
        world, workers = cell.sizes[found["episodes"] % len(cell.sizes)]
        left = total - done
        # in the middle: spread over what is left, so that the kills of a pass meet its beginning, middle and end
        target = rng.randint(1, max(1, 2 * left // (kills + 1) - 1)) if kills else None
        job = Job(
            data,
            list(cell.weights),
            0,
            world,
            workers,
            BATCH,
            SAMPLES,
            left,
            done * BATCH,
            state,
            folder / str(found["episodes"]),
        )
        episode = start(peer, job, target)
        found["episodes"] += 1
        found["kills"] += episode.ended is None
        found["wrong"] += episode.wrong
        found["output"] |= {_without_numbers(line) for line in episode.output}
        # where there are kills, only resumes count
        found["first"] += [episode.first] if episode.first is not None and (state or not cell.kills) else []
        numbers += episode.numbers
        done += episode.steps
        state = episode.states[0] if episode.states else state
        kills -= 1 if kills else 0
        if episode.ended is not None:
            found["stopped"] = None if episode.ended == "ended" else episode.ended
            break
    return found | {"numbers": numbers, "state": state}


def count(cell: Cell, numbers: list[int], expected: Counter) -> dict[str, int]:
    seen = Counter(numbers)
    extra = {"corrupt_delivered": 0}
    if cell.corrupt:
        extra["corrupt_delivered"] = sum(times for number, times in seen.items() if is_corrupt(number % SECOND, cell.corrupt))
        expected = Counter({number: times for number, times in expected.items() if not is_corrupt(number % SECOND, cell.corrupt)})
        seen = Counter({number: times for number, times in seen.items() if number in expected})
    return {
        "expected": expected.total(),
        "lost": (expected - seen).total(),
        "repeated": (seen - expected).total(),
        **extra,
    }


def data_of(cell: Cell, peer: Any, folder: Path) -> list[str]:
    """Write the sets of a cell; their folders."""
    made = []
    for place, share in enumerate(cell.weights):
        path = folder / f"data{place}"
        if not path.exists():
            samples = make(round(SAMPLES * share) if len(cell.weights) > 1 else SAMPLES, SECOND * place, cell.corrupt)
            # in a process of its own: threads that a writer starts must not stand still in the ranks, which are forked from this one
            if not (pid := os.fork()):
                try:
                    peer.write(path, samples)
                    os._exit(0)
                finally:
                    os._exit(1)
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError(f"{peer.__name__} could not write its data")
            if cell.cut:
                cut(path, peer.FORMAT, cell.cut)
        made.append(str(path))
    return made


def play(name: str, cell_name: str, folder: Path, passes: int, seed: int) -> dict[str, Any]:
    """All passes of a cell -> counts over them. FOLDER/so_far.json holds those of the passes that are done; a call goes on from there."""
    cell = CELLS[cell_name]
    peer = import_module(f"ssl_locat.benchmarks.reliability.peers.{name}")
    kept = folder / "so_far.json"
    row: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if row.get("seed") != seed or row.get("passes", 0) >= passes:
        row = {"seed": seed, "passes": 0, "bad_passes": 0, "stops": {}, "output": [], "first": [], "seconds": 0.0}
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else None
    os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"] = str(folder / "cache")
    data = data_of(cell, peer, folder)
    gc.freeze()  # else a collection in a fork copies most of what it shares with this process
    state = None
    with failing(folder, cell.fault, getattr(peer, "SECURE", False)) if cell.fault else nullcontext() as url:
        if url:
            shards = len(list((folder / "data0").glob(f"*{peer.FORMAT}")))
            data = [f"{url}/data0#{shards}"]
        expected = Counter(range(SAMPLES))
        if len(cell.weights) > 1:
            # of a mix: what the same library shows when nobody kills it
            calm = cell._replace(kills=0, sizes=cell.sizes[:1])
            expected = Counter(one_pass(name, calm, data, folder / "unbroken", random.Random(0), None)["numbers"])
        while row["passes"] < passes:
            began, room = time.monotonic(), folder / f"pass{row['passes']}"
            rng = random.Random(f"{cell_name} {seed} {row['passes']}")
            # a stream without an end goes on where the pass before it ended
            carried = state if name.startswith("ours") and len(data) == 1 and not cell.cut else None
            played = one_pass(name, cell, data, room, rng, carried)
            _add(row, played, count(cell, played["numbers"], expected))
            row["seconds"] = round(row["seconds"] + time.monotonic() - began, 1)
            kept.with_suffix(".partial").write_text(json.dumps(row))
            kept.with_suffix(".partial").rename(kept)
            if state:
                shutil.rmtree(state.parents[1], ignore_errors=True)
            state = None if played["stopped"] else played["state"]
    listed = any(folder.rglob("quarantine.jsonl"))
    # what a pass over whole data prints anyway is no sign
    usual = _usual_output(name, peer, cell, folder / "whole") if row["output"] else set()
    told = bool(set(row.pop("output")) - usual) or listed or bool(row["stops"].keys() - {"hang"})
    first = row.pop("first")
    median = round(statistics.median(first), 3) if first else None
    return {"peer": name, "cell": cell_name, **row, "told": told, "first_batch_seconds": median}


def _add(row: dict[str, Any], played: dict[str, Any], counted: dict[str, int]) -> None:
    """A pass to the sums."""
    stopped = played["stopped"]
    if stopped:
        words = " ".join(stopped.split())[:160]
        row["stops"][words] = row["stops"].get(words, 0) + 1
        # it said so, or hung: nobody trains on, and no share is counted of it
        counted["expected"] = counted["lost"] = counted["repeated"] = 0
    for key, value in (counted | {key: played[key] for key in ("episodes", "kills", "wrong")}).items():
        row[key] = row.get(key, 0) + value
    row["hangs"] = row["stops"].get("hang", 0)
    row["first"] += played["first"]
    row["output"] = sorted(set(row["output"]) | played["output"])
    row["bad_passes"] += bool(counted["lost"] or counted["repeated"] or played["wrong"] or stopped)
    row["passes"] += 1


def _usual_output(name: str, peer: Any, cell: Cell, folder: Path) -> set[str]:
    calm = cell._replace(kills=0, corrupt=0.0, cut="", fault="")
    played: dict[str, Any] = one_pass(name, calm, data_of(calm, peer, folder), folder / "pass", random.Random(0), None)
    return played["output"]


def _without_numbers(line: str) -> str:
    """The same message of another process, sample or place is no other message."""
    return re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "0", line.lower())


if __name__ == "__main__":
    peer, folder, seed, *wanted = sys.argv[1:]
    for cell, _, passes in (one.partition("=") for one in wanted):
        print(json.dumps(play(peer, cell, Path(folder) / f"{peer}-{cell}", int(passes), int(seed))), flush=True)
