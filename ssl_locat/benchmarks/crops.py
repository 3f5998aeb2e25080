"""`ssl-locat bench crops`: from JPEG bytes to crops, images per second and core, against DINO's augmentation.

The baseline is DINO's recipe (arXiv:2104.14294) as its authors run it: Pillow and torchvision's transforms on Pillow images, written by us
from the published description. Our three modes do the same recipe; "device-photometric" and "device" are timed without what they leave
to the device, which is a row of its own where there is a GPU.
"""

import io
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ssl_locat.benchmarks import decoding
from ssl_locat.benchmarks.timing import make_rows, side_by_side, time_rows
from ssl_locat.data.images.crops import IMAGENET_MEAN, IMAGENET_STD, MultiCrop
from ssl_locat.data.images.decode import decode_image

BASELINE = "dino (Pillow, torchvision)"
MODES = ("cpu", "device-photometric", "device")


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """One core: 2 x 224 + 8 x 96 crops of photograph-sized JPEGs, and the CIFAR-sized case of small images."""
    threads, repeats = torch.get_num_threads(), 3 if quick else 9
    # a loader worker has one core
    torch.set_num_threads(1)
    try:
        for name, sizes, count, side in (
            ("500 x 375, 2 x 224 + 8 x 96", (224, 96, 8), 4 if quick else 12, (375, 500)),
            ("48 x 48, 2 x 32 + 4 x 16", (32, 16, 4), 32, (48, 48)),
        ):
            yield name, partial(_case, count, side, name, sizes, repeats)
        yield from decoding.cases(make_jpegs(2 if quick else 8, decoding.SIDE, decoding.SIDE), repeats)
        if torch.cuda.is_available():
            yield "on the device", lambda: _device_rows(make_jpegs(64, 375, 500), repeats)
    finally:
        torch.set_num_threads(threads)


def _case(count: int, side: tuple[int, int], name: str, sizes: tuple[int, int, int], repeats: int) -> list[dict]:
    jpegs = make_jpegs(count, *side)
    variants: dict[str, Callable[[], object]] = {BASELINE: partial(dino_batch, jpegs, dino_augmentation(*sizes))}
    for mode in MODES:
        # the same images, boxes of its own seeds: sizes of crops vary alike over the repeats
        variants[mode] = partial(our_batch, jpegs, MultiCrop(*sizes, mode=mode))
    timings = side_by_side(variants, repeats)
    speeds = {variant: len(jpegs) / timing.seconds for variant, timing in timings.items()}
    spreads = {variant: timing.spread for variant, timing in timings.items()}
    kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1000
    return make_rows("crops", f"{name}, {kilobytes:.0f} kB", "throughput", "images/s/core", speeds, BASELINE, spreads)


def our_batch(jpegs: list[bytes], crops: MultiCrop) -> Any:
    payload = crops.collate([crops.cut(decode_image(jpeg), seed) for seed, jpeg in enumerate(jpegs)])
    # the baseline's batch is normalised fp32, so on the CPU ours has to be too
    return crops.finish(payload, "cpu") if crops.mode == "cpu" else payload


def _device_rows(jpegs: list[bytes], repeats: int) -> list[dict]:
    """What `finish` costs on the GPU for a batch, copying included."""
    variants: dict[str, Callable[[], object]] = {}
    for mode in MODES:
        crops = MultiCrop(mode=mode)
        payload = crops.collate([crops.cut(decode_image(jpeg), seed) for seed, jpeg in enumerate(jpegs)])
        # as the loop has them: from pageable memory the copy would wait for the host
        payload = {name: tensor.pin_memory() for name, tensor in payload.items()}
        variants[mode] = partial(crops.finish, payload, "cuda")
    return time_rows("crops", f"on the device, {len(jpegs)} images", side_by_side(variants, repeats), "cpu")


def make_jpegs(count: int, height: int, width: int) -> list[bytes]:
    """Coloured noise with the spectrum of photographs (amplitude 1 / frequency), so that decoding costs about what it does for them."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1
    jpegs = []
    for _ in range(count):
        # [3, H, W]; dividing by the frequency makes large shapes strong and details weak, as in photographs
        noise = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
        image = np.fft.irfft2(noise, (height, width)).transpose(1, 2, 0)
        # mostly grey, with some colour: chroma of photographs is smoother than their light
        image = image[..., :1] + 0.35 * image[..., 1:2] * [1, 0, -1] + 0.2 * image[..., 2:] * [0, 1, 0]
        image = np.clip(127 + 55 * image / image.std(), 0, 255).astype(np.uint8)
        # 4:2:0, as cameras and ImageNet have it
        jpegs.append(simplejpeg.encode_jpeg(image, quality=78, colorsubsampling="420"))
    return jpegs


# --- the slow path: each crop a chain of Pillow operations ----------------------------------------------------------------


class PillowBlur:
    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class PillowSolarize:
    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.probability else image


def dino_augmentation(global_size: int, local_size: int, num_local: int) -> list:
    """One callable per crop: PIL image -> normalised tensor."""
    from torchvision import transforms

    def chain(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(0.5),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                transforms.RandomGrayscale(0.2),
                PillowBlur(blur),
                PillowSolarize(solarize),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    first = chain(global_size, (0.4, 1.0), 1.0, 0.0)
    second = chain(global_size, (0.4, 1.0), 0.1, 0.2)
    local = chain(local_size, (0.05, 0.4), 0.5, 0.0)
    return [first, second, *[local] * num_local]


def dino_batch(jpegs: list[bytes], augmentation: list) -> list[Tensor]:
    samples = []
    for jpeg in jpegs:
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        samples.append([transform(image) for transform in augmentation])
    return [torch.stack(view) for view in zip(*samples, strict=True)]
