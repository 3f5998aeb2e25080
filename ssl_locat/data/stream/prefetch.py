"""From the stream's payloads to finished crops on the device, one batch ahead of the one that trains."""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch

from ssl_locat.data.stream.stream import Batch, TrainStream

Finished = TypeVar("Finished", bound=tuple)  # of tensors and None
Finished_co = TypeVar("Finished_co", bound=tuple, covariant=True)


class Finisher(Protocol[Finished_co]):
    """The last step on the device: `MultiCrop`'s, or that of a protocol that trains."""

    def finish(self, payload: Any, device: torch.device) -> Finished_co: ...


def prefetch(stream: TrainStream, crops: Finisher[Finished], device: torch.device) -> Iterator[tuple[Batch, Finished]]:
    """Batches with their crops, `MultiCrop.finish`ed.

    On a GPU the next batch is copied and finished on a CUDA stream of its own while this one trains: copying, jitter and blur overlap
    with the networks, for the memory of one more batch of crops. On a CPU there is nothing to overlap, and each is finished when asked for.
    """
    if device.type != "cuda":
        for batch in stream:
            yield batch, crops.finish(batch.payload, device)
        return
    side, ready = torch.cuda.Stream(device), None
    for batch in stream:
        with torch.cuda.stream(side):
            finished = crops.finish(batch.payload, device)
        coming = batch, finished, side.record_event()
        if ready is not None:
            yield _taken(*ready, torch.cuda.current_stream(device))
        ready = coming


def _taken(batch: Batch, finished: Finished, event: torch.cuda.Event, stream: torch.cuda.Stream) -> tuple[Batch, Finished]:
    stream.wait_event(event)
    for tensor in finished:
        if tensor is not None:
            tensor.record_stream(stream)  # the side stream, whose memory it is, must not use it again before this one is done
    return batch, finished
