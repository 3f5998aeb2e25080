"""`backbone.pack_crops: auto`: whether the student's crops of both sizes go through in one pass, decided once for a run, with the reason in words."""

import time

import torch

from ssl_locat.config.schema import Config
from ssl_locat.models.packing import allow_packing, packed_tokens
from ssl_locat.models.tokens import forward_tokens
from ssl_locat.pretraining.parts import autocasts, make_backbone, why_not_packed

_STEPS = 5  # timed each way, in turn
_IMAGES = 32  # at most: what packing saves shows the more the fewer there are, and a large batch may not fit beside nothing
_GAIN = 1.02  # at least, so that noise decides nothing


def decide_packing(config: Config, device: torch.device, micro_batch: int) -> tuple[bool, str]:
    """(packed, why). Measured on CUDA, with this backbone, these crops and this precision; micro_batch: images of a rank."""
    with torch.device("meta"):
        reason = why_not_packed(config, make_backbone(config))
    if reason:
        return False, reason
    if device.type != "cuda":
        # a tenth at most was gained there (docs/performance.md), and steps that tell so little apart take minutes
        return False, f"not measured on {device.type}: docs/performance.md"
    images = min(micro_batch, _IMAGES)
    separate, packed = measure_both(config, device, images)
    words = f"forward and backward of {images} images: {1000 * packed:.1f} ms packed, {1000 * separate:.1f} ms in a pass for each size"
    return separate > _GAIN * packed, words


def measure_both(config: Config, device: torch.device, images: int) -> tuple[float, float]:
    """Seconds of the backbone's forward and backward over one batch of crops, (a pass for each size, packed): the best of some."""
    backbone = allow_packing(make_backbone(config).to(device))
    sizes = ((2, config.crops.global_size), (config.crops.num_local, config.crops.local_size))
    crops = [torch.randn(views * images, len(config.crops.mean), side, side, device=device) for views, side in sizes]
    _, autocast = autocasts(config, device)

    def seconds(packed: bool) -> float:
        _finish(device)
        began = time.perf_counter()
        with autocast:
            tokens = packed_tokens(backbone, crops) if packed else [forward_tokens(backbone, one) for one in crops]
            loss = sum((one.patches.float().mean() for one in tokens), torch.zeros((), device=device))
        loss.backward()
        _finish(device)
        return time.perf_counter() - began

    timings = [(seconds(False), seconds(True)) for _ in range(1 + _STEPS)][1:]  # the first makes buffers and loads kernels
    separate, packed = (min(way) for way in zip(*timings, strict=True))
    return separate, packed


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_packing(config: Config, packed: bool) -> Config:
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"pack_crops": packed})})
