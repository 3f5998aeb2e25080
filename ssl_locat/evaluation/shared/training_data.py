"""Batches for the protocols that train: the stream of pretraining, over labelled samples.

The same plan, read-ahead, page cache and quarantine; the state is the number of steps done, so that a training resumes within an epoch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.stream.plan import Plan, choose_plan, resume_plan
from ssl_locat.data.stream.prefetch import prefetch
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.data.stream.workers import choose_workers
from ssl_locat.evaluation.shared.samples import stack
from ssl_locat.runs.distributed import rank, world_size

MAX_BAD = 0.001  # as pretraining's: a training of days does not end at one torn file


def plan_for(dataset: Dataset, seed: int, batch_size: int, saved: dict | None) -> Plan:
    """The order of the samples: a new one, or that of the progress that the training resumes from."""
    return resume_plan(saved, [dataset], [1.0], seed) if saved else choose_plan([dataset], [1.0], seed, batch_size)


class _ToDevice:
    """What `prefetch` asks of pretraining's crops: here there is nothing to finish, only to copy."""

    def finish(self, payload: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
        return tuple(tensor.to(device, non_blocking=True) for tensor in payload)


@contextmanager
def training_batches(
    dataset: Dataset,
    plan: Plan,
    prepare: Callable[[Any, int], tuple],
    *,
    first: int,
    batch_size: int,
    device: torch.device,
    workers: int | None,
    data: Mapping[str, Any],
    progress_file: str | None = None,
) -> Iterator[Iterator[tuple[Tensor, ...]]]:
    """Endless batches of this process, the columns of `prepare` stacked on the device, from step `first` on.

    prepare: (RawSample, seed) -> tuple of tensors and numbers. batch_size: over all processes. On a GPU the next batch is copied while
    this one trains. Damaged samples are replaced as in pretraining, up to data.max_bad (default 0.001), and listed beside `progress_file`.

    Raises while iterating: DataBudgetExceeded, Outage, UserError.
    """
    max_bad = data.get("max_bad")
    with TrainStream(
        [dataset],
        plan,
        prepare,
        stack,
        # the number of steps done is the whole state: the plan turns it into samples
        start_samples=first * batch_size,
        global_batch_size=batch_size,
        rank=rank(),
        world_size=world_size(),
        workers=choose_workers(workers),
        max_bad=MAX_BAD if max_bad is None else max_bad,
        quarantine_path=Path(progress_file).with_suffix(".quarantine.jsonl") if progress_file else None,
        pin_memory=device.type == "cuda",
    ) as stream:
        yield (tensors for _, tensors in prefetch(stream, _ToDevice(), device))
