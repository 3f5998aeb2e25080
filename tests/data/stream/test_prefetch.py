"""The batches that training sees: every one, once, in the stream's order, with its own crops."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssl_locat.data.images.crops import MultiCrop
from ssl_locat.data.stream.prefetch import prefetch

gpu = pytest.mark.gpu
CYCLES = 50_000_000  # some 30 ms


class Late:
    """Crops whose stream is busy with something else first."""

    def __init__(self, crops: MultiCrop):
        self.crops = crops

    def finish(self, payload, device):
        torch.cuda._sleep(CYCLES)
        return self.crops.finish(payload, device)


@pytest.mark.parametrize(
    ("device", "late"), [("cpu", None), pytest.param("cuda", "crops", marks=gpu), pytest.param("cuda", "training", marks=gpu)]
)
@pytest.mark.parametrize("mode", ["cpu", "device-photometric", "device"])
def test_order_and_values(mode, device, late):
    """On a GPU nothing here waits for it until the end. Late crops come out wrong if they are read before they are finished; late
    training reads crops that were dropped long ago, wrong ones if the next batches took their memory."""
    crops = MultiCrop(32, 16, 2, anchor_size=48, mode=mode)
    images = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)
    cut = [crops.cut(image, seed)._replace(metadata=(seed, -1)) for seed, image in enumerate(images)]
    payloads = [crops.collate(cut[2 * n : 2 * n + 2]) for n in range(6)]
    if device == "cuda":
        payloads = [{name: tensor.pin_memory() for name, tensor in payload.items()} for payload in payloads]
    stream = iter([SimpleNamespace(payload=payload, number=number) for number, payload in enumerate(payloads)])
    found = []
    for batch, seen in islice(prefetch(stream, Late(crops) if late == "crops" else crops, torch.device(device)), 5):
        if late == "training":
            torch.cuda._sleep(CYCLES)
        found.append((batch.number, [each.clone() for each in seen]))
        del seen
    assert [number for number, _ in found] == list(range(5))
    for number, seen in found:
        for tensor, expected in zip(seen, crops.finish(payloads[number], "cpu"), strict=True):
            torch.testing.assert_close(tensor.cpu(), expected, rtol=0, atol=0.05)
