"""From the stream's payloads to finished crops on the device, one batch ahead of the one that trains."""

from collections.abc import Iterator

import torch

from ssl_locat.data.images.crops import Crops, MultiCrop
from ssl_locat.data.stream.stream import Batch, TrainStream


def prefetch(stream: TrainStream, crops: MultiCrop, device: torch.device) -> Iterator[tuple[Batch, Crops]]:
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


def _taken(batch: Batch, finished: Crops, event: torch.cuda.Event, stream: torch.cuda.Stream) -> tuple[Batch, Crops]:
    stream.wait_event(event)
    for tensor in finished:
        if tensor is not None:
            tensor.record_stream(stream)  # the side stream, whose memory it is, must not use it again before this one is done
    return batch, finished
