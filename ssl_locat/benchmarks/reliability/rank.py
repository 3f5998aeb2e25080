"""One rank of a job that only reads: takes batches, writes down what it saw, saves its state every other step. Killed at any moment."""

import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

from ssl_locat.benchmarks.reliability.samples import Job, wrong

SAVE_EVERY = 2


def read(peer: str, job: Job, began: float) -> None:
    """Never returns. seen.RANK.jsonl: [step, numbers, how many are wrong, seconds since `began`]; state.RANK.STEP; end.RANK: how it ended."""
    os.setsid()  # with what it starts, so that all of it can be killed
    output = os.open(job.folder / f"output.{job.rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(job.rank),
        "WORLD_SIZE": str(job.world),
        "LOCAL_RANK": str(job.rank),
        "LOCAL_WORLD_SIZE": str(job.world),
    }
    try:
        _read(peer, job, began)
        ended = "ended"
    except BaseException as error:
        traceback.print_exc()
        # of an error that comes from a worker, torch puts the trace between the two
        lines = str(error).strip().splitlines() or [""]
        ended = f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}"[:300]
    sys.stdout.flush()
    _write(job.folder / f"end.{job.rank}", ended)
    os._exit(0)


def _read(peer: str, job: Job, began: float) -> None:
    reader = import_module(f"ssl_locat.benchmarks.reliability.peers.{peer}").Reader(job)
    with open(job.folder / f"seen.{job.rank}.jsonl", "w") as file:
        for step, batch in enumerate(reader, 1):
            line = [step, [int(number) for number in batch["number"]], wrong(batch), round(time.monotonic() - began, 4)]
            file.write(json.dumps(line) + "\n")
            file.flush()
            if step % SAVE_EVERY == 0:
                beside = job.folder / f"state.{job.rank}.{step}.partial"
                reader.save(beside)
                beside.rename(beside.with_suffix(""))
            if step >= job.steps:
                break


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(text)
    beside.rename(path)
