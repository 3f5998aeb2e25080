"""The device's part of multi-crop: the same draws as on the CPU, applied to a whole batch at once.

Crops of 8-bit images are float [N, C, H, W] with whole values 0..255 throughout, rounded where the CPU's 8-bit operations round, so that both
give the same crops: resize within 1 of 255 of Pillow, photometric operations within 2, hue 2 on average (the CPU's HSV has 8 bits). What
depends on a choice is gathered by indices made on the CPU, where the draws are: nothing waits for the device.

Images of other types are float on the same scale, neither rounded nor clipped (`whole=False`); the loader's CPU then runs this very code.
"""

import math

import torch
from torch import Tensor

from ssl_locat.data.images import extras
from ssl_locat.data.images.draws import FIELDS, FIRST_OF_COLOUR, JITTER_ORDERS

_GRAY = (0.299, 0.587, 0.114)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


def photometric(crops: Tensor, draws: Tensor, whole: bool = True, mean: tuple[float, ...] | None = None) -> Tensor:
    """Jitter, grey, blur, solarise. `crops` float [N, C, H, W] in 0..255 (may be overwritten), `draws` [N, FIELDS] on the CPU.

    whole: of 8-bit images. mean: of the channels in 0..1, where `draws` have columns of extras.py behind theirs.
    """
    orders = torch.tensor([*JITTER_ORDERS, (-1,) * 4])[draws[:, FIELDS["jitter_order"]].long()]  # -1 picks the last row
    factors = draws[:, FIELDS["brightness"] : FIELDS["hue"] + 1]
    colours = crops.shape[1] == 3
    if not colours:
        orders = torch.where(orders < FIRST_OF_COLOUR, orders, -1)
    for turn in range(4):
        crops = _jitter(crops, orders[:, turn], factors, whole)
    flags = to_device(draws, crops.device)
    if colours:
        crops = torch.where(_flag(flags, "gray"), _gray(crops, whole), crops)
    if mean is not None:
        crops = extras.before_blur(crops, draws)
    blurred = draws[:, FIELDS["sigma"]].nonzero()[:, 0]
    if len(blurred):
        sigmas = draws[blurred, FIELDS["sigma"]]
        rows = to_device(blurred, crops.device)
        crops[rows] = _blur(crops[rows], sigmas, whole)
    crops = torch.where(_flag(flags, "solarize") & (crops >= 128), 255 - crops, crops)
    return crops if mean is None else extras.after_blur(crops, draws, mean)


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Small tensors on their way from the CPU. Pinned first: a copy out of ordinary memory may wait for all that its stream still has to do."""
    if device.type == "cuda":
        numbers = numbers.contiguous().pin_memory()
    return numbers.to(device, non_blocking=True)


def resized_crops(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """Antialiased bicubic crops of padded images by two matrix products, horizontal first and rounded in between, as Pillow does.

    Args:
        images: uint8 or float32 [n, H, W, C] on the device; padding is never read. Float ones are not rounded.
        draws: [n, V, FIELDS] on the device.

    Returns float [V, n, C, size, size].
    """
    count, height, width, channels = images.shape
    views = draws.shape[1]
    pixels = images.permute(0, 3, 1, 2).float().reshape(count, channels * height, width)
    field = {name: draws[..., index] for name, index in FIELDS.items()}
    across = _resize_weights(field["left"], field["width"], width, size, field["flip"])  # [n, V, size, W]
    down = _resize_weights(field["top"], field["height"], height, size, None)
    # all views side by side in one product: broadcasting the image over views would copy it for each
    narrow = torch.bmm(pixels, across.reshape(count, views * size, width).transpose(1, 2))
    narrow = narrow.round_().clamp_(0, 255) if images.dtype == torch.uint8 else narrow
    narrow = narrow.reshape(count, channels, height, views, size).permute(0, 3, 2, 1, 4)
    narrow = narrow.reshape(count * views, height, channels * size)
    crops = torch.bmm(down.reshape(count * views, size, height), narrow)
    crops = crops.round_().clamp_(0, 255) if images.dtype == torch.uint8 else crops
    return crops.reshape(count, views, size, channels, size).permute(1, 0, 3, 2, 4)


def _resize_weights(start: Tensor, length: Tensor, full: int, size: int, flip: Tensor | None) -> Tensor:
    """Row i holds what output pixel i takes from each of `full` input pixels: bicubic (a = -0.5), widened when it shrinks. [n, V, size, full]"""
    start, length = start[..., None, None], length[..., None, None]
    steps = torch.arange(size, device=start.device, dtype=torch.float32)[:, None]
    if flip is not None:
        steps = torch.where(flip[..., None, None] > 0, size - 1 - steps, steps)
    scale = length / size
    stretch = scale.clamp(min=1)
    centre = (steps + 0.5) * scale  # within the box
    at = torch.arange(full, device=start.device, dtype=torch.float32) - start
    low = (centre - 2 * stretch + 0.5).floor().clamp(min=0)
    high = torch.minimum((centre + 2 * stretch + 0.5).floor(), length)
    distance = ((at + 0.5 - centre) / stretch).abs()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where((at >= low) & (at < high), weights, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _flag(draws: Tensor, name: str) -> Tensor:
    return (draws[:, FIELDS[name]] > 0)[:, None, None, None]


def _gray(crops: Tensor, whole: bool) -> Tensor:
    """[N, 1, H, W]: of RGB, in whole values if `whole`; of other channels, their mean."""
    if crops.shape[1] != 3:
        return crops.mean(1, keepdim=True)
    red, green, blue = crops.unbind(1)
    gray = red * _GRAY[0] + green * _GRAY[1] + blue * _GRAY[2]
    return (gray.round_() if whole else gray)[:, None]


def _jitter(crops: Tensor, operation: Tensor, factors: Tensor, whole: bool) -> Tensor:
    """Apply to each crop the one operation named for it (-1: none). `operation` [N] and `factors` [N, 4] on the CPU.

    Brightness, contrast and saturation are one formula: a blend with black, with the mean grey, or with the crop's own grey."""
    device = crops.device
    rows = ((operation >= 0) & (operation != _HUE)).nonzero()[:, 0]
    if len(rows):
        kind = operation[rows]
        factor, kind, index = (to_device(numbers, device) for numbers in (factors[rows, kind], kind, rows))
        factor, kind = factor[:, None, None, None], kind[:, None, None, None]
        chosen = crops[index]
        gray = _gray(chosen, whole)
        mean = gray.mean((2, 3), keepdim=True)
        mean = (mean + 0.5).floor_() if whole else mean
        other = torch.where(kind == _SATURATION, gray, torch.where(kind == _CONTRAST, mean, 0.0))
        blend = other + (chosen - other) * factor
        if whole:
            blend = torch.where(kind == _SATURATION, blend.round(), blend.floor()).clamp_(
                0, 255
            )  # as the 8-bit operations of each do
        crops = crops.index_copy(0, index, blend)
    rows = (operation == _HUE).nonzero()[:, 0]
    if len(rows):
        shift = factors[rows, _HUE]
        shift = to_device((shift * 255).trunc() / 256 if whole else shift, device)
        index = to_device(rows, device)
        crops = crops.index_copy(0, index, _turn_hue(crops[index], shift[:, None, None], whole))
    return crops


def _turn_hue(crops: Tensor, shift: Tensor, whole: bool) -> Tensor:
    """RGB -> HSV, hue turned by `shift` (fraction of the circle) -> RGB."""
    red, green, blue = crops.unbind(1)
    value, lowest = crops.amax(1), crops.amin(1)
    chroma = value - lowest
    safe = chroma.clamp(min=1 if whole else 1e-6)  # a chroma of 0, which whole values have below 1, has no hue
    sixth = torch.where(
        value == red, (green - blue) / safe, torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    )
    sixth = sixth + 6 * shift
    parts = []
    for offset in (5, 3, 1):  # red, green, blue
        k = (sixth + offset).remainder(6)
        parts.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    turned = torch.stack(parts, 1)
    return turned.round_() if whole else turned


def _blur(crops: Tensor, sigmas: Tensor, whole: bool) -> Tensor:
    """Gaussian, standard deviation `sigmas` [N] (on the CPU) in pixels, edges repeated; one banded matrix per crop and axis."""
    height, width = crops.shape[-2:]
    reach = math.ceil(3 * float(sigmas.max()) + 1)
    sigmas = to_device(sigmas, crops.device)
    across = _blur_weights(sigmas, reach, width)
    down = across if height == width else _blur_weights(sigmas, reach, height)
    shape = crops.shape
    crops = torch.bmm(crops.reshape(len(crops), -1, width), across.transpose(1, 2)).reshape(shape)
    crops = torch.matmul(down[:, None], crops)
    return crops.round_().clamp_(0, 255) if whole else crops


def _blur_weights(sigmas: Tensor, reach: int, size: int) -> Tensor:
    """[N, size, size]: row i holds what output pixel i takes; kernels end at 3 sigma, as cv2's do for 8-bit images."""
    offsets = torch.arange(-reach, reach + 1, device=sigmas.device)
    radius = (((6 * sigmas + 1).round().long() | 1) // 2)[:, None]
    kernels = torch.exp(-0.5 * (offsets / sigmas[:, None]) ** 2) * (offsets.abs() <= radius)
    kernels = kernels / kernels.sum(1, keepdim=True)
    sources = (torch.arange(size, device=sigmas.device)[:, None] + offsets).clamp(0, size - 1)  # [size, 2 * reach + 1]
    weights = torch.zeros(len(sigmas), size, size, device=sigmas.device)
    return weights.scatter_add_(2, sources.expand(len(sigmas), -1, -1), kernels[:, None].expand(-1, size, -1))


def assemble(buckets: list[tuple[Tensor, Tensor]], draws: Tensor, size: int) -> Tensor:
    """Crops [V * B, C, size, size], view-major, out of buckets of padded images ([n, H, W, C], their numbers [n]); all on the device."""
    batch, views = draws.shape[:2]
    device = buckets[0][0].device
    crops = torch.empty(views, batch, buckets[0][0].shape[3], size, size, device=device)
    for images, numbers in buckets:
        crops[:, numbers] = resized_crops(images, draws[numbers], size)
    return crops.flatten(0, 1)
