"""The batches that training sees: every one, once, in the stream's order, with its own crops."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssl_locat.data.crops import MultiCrop
from ssl_locat.data.prefetch import prefetch


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", ["cpu", "device-photometric", "device"])
def test_order_and_values(mode, device):
    crops = MultiCrop(32, 16, 2, mode=mode)
    images = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)
    payloads = [crops.collate([crops.cut(images[2 * n + k], 2 * n + k) for k in (0, 1)]) for n in range(6)]
    if device == "cuda":
        payloads = [{name: tensor.pin_memory() for name, tensor in payload.items()} for payload in payloads]
    stream = iter([SimpleNamespace(payload=payload, number=number) for number, payload in enumerate(payloads)])
    found = []
    for batch, seen in islice(prefetch(stream, crops, torch.device(device)), 5):
        busy = torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)  # work that reads memory late
        found.append((batch.number, [(each + 0 * busy[0, 0]).cpu() for each in seen]))
    assert [number for number, _ in found] == list(range(5))
    for number, seen in found:
        for tensor, expected in zip(seen, crops.finish(payloads[number], "cpu"), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0.05)
