"""Multi-crop: DINO's asymmetric augmentation of one image into two global and n local crops (arXiv:2104.14294, section 4 and its code).

    cut(image, seed)          in a loader worker: uint8 [H, W, C] -> one sample
    collate(samples)          in a loader worker: samples -> a dict of tensors, view-major, still uint8 (4x less to move than fp32)
    finish(payload, device)   in the training process: -> normalised float crops on the device

All random choices of an image come from its own seed and are made in one place (`draw`), so crops depend on nothing else: not on the
worker, not on the mode. Three modes of one recipe: "cpu" does everything in the worker; "device-photometric" cuts uint8 crops in
the worker and jitters, blurs and solarises on the device; "device" only decodes in the worker (crops_device.py has the device's part).

Differences from Pillow + torchvision, per value of 255: resize <= 1 but for one value in 1000 (beside clipped highlights); brightness, contrast,
solarise, grey, saturation <= 1; hue 0.6 on average, <= 10; blur: ours is a true Gaussian of the published sigma, Pillow's
three box blurs that approximate it (2 on average at most). tests/data/images/test_crops.py measures them on photographs.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_locat.data.images import crops_device
from ssl_locat.data.images.draws import FIELDS, FIRST_OF_COLOUR, JITTER_ORDERS, Draw, draw_box
from ssl_locat.data.images.extras import Extras, turn_all, turned
from ssl_locat.errors import ConfigError, did_you_mean

# cv2's own threads do not survive the fork of a loader worker, and each worker has one core anyway
cv2.setNumThreads(0)

MODES = ("auto", "cpu", "device-photometric", "device")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_FIRST_FACTOR = FIELDS["brightness"]
_BUCKET = 128  # pixels: sides of images are padded to multiples, so that few sizes make a batch
_TRUNCATE = -0.499  # added where cv2 rounds and Pillow truncates; a little less than half, so that whole values stay
_GRAY = np.tile([0.299, 0.587, 0.114], (3, 1))  # RGB -> its grey, thrice (ITU-R BT.601, as Pillow has it)
_SOLARIZE = np.array([v if v < 128 else 255 - v for v in range(256)], np.uint8)


class Sample(NamedTuple):
    """One image on its way to a batch."""

    pixels: list[np.ndarray]  # uint8, or float32 on the same scale: its crops; in mode "device" the whole image alone
    draws: np.ndarray  # float32 [V, FIELDS], and columns of extras.py where an option asks for such
    metadata: tuple[int, ...] = ()  # of data.metadata, in its order: the number of the value, -1 where it is unknown


class Crops(NamedTuple):
    """What the networks see. View-major: crop v of image i is row `v * B + i`."""

    global_crops: Tensor  # float [2 * B, C, H, W]
    local_crops: Tensor | None  # float [num_local * B, C, h, w]
    anchor_crops: Tensor | None = None  # float [2 * B, C, A, A]: the global crops again, cut larger
    metadata: Tensor | None = None  # int64 [B, M], of the images: `Sample.metadata`; None without data.metadata


class Group(NamedTuple):
    """Crops of one size."""

    name: str  # in a payload
    views: slice  # of an image's draws
    cut: int  # pixels, as they are cut
    size: int  # pixels, as the networks see them: fewer where only low frequencies are kept
    finer: float  # pixels for each of the size that the draws' blur is meant for

    def draws(self, table: Tensor) -> Tensor:
        """[B, V, FIELDS] of all views -> of these, with the blur in their own pixels."""
        table = table[:, self.views].clone()
        table[..., FIELDS["sigma"]] *= self.finer
        return table


class MultiCrop:
    """Two global and `num_local` local crops per image.

    Args:
        global_size, local_size: pixels, square.
        low_frequencies_of: pixels of (global, local) crops as they are cut and coloured, of whose spectrum the lowest frequencies make crops of
            `global_size` and `local_size` (EfficientTrain++); None: they are cut at these sizes.
        anchor_size: pixels of a third kind, for a frozen anchor that sees finer than the student: the two global crops, their boxes cut from
            the image at this size, with the same colours, so that they show what enlarged crops have lost.
        global_scale, local_scale: fraction of the image's area that a crop covers, (lowest, highest).
        jitter: strengths of brightness, contrast, saturation and hue; applied together with `jitter_prob`, in random order.
        blur_prob, solarize_prob: for the first global, the second global and every local crop.
        blur_sigma: (lowest, highest) standard deviation in pixels of the crop.
        mode: one of MODES; "auto" is "cpu" on a CPU and "device-photometric" on a GPU. A run measures instead (measure/crop_mode.py).
        device: type of the device that `finish` will be given; only read by "auto".
        mean, std: of the normalisation, for channels in 0..1; as many as the images have channels. Saturation, hue and grey are made
            of RGB: with another number of channels they do nothing.
        stage: number that `collate` adds to its payload, where a run has several of these (`StagedCrops`).
        extra: options of extras.Extras, by name.

    Images are uint8, or float32 on the scale of 0..255 (bands.py), which stay float: nothing is rounded or clipped.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 8,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        *,
        anchor_size: int | None = None,
        low_frequencies_of: tuple[int, int] | None = None,
        flip_prob: float = 0.5,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_prob: float = 0.8,
        gray_prob: float = 0.2,
        blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0),
        mode: str = "auto",
        device: str = "cpu",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        stage: int | None = None,
        **extra: Any,
    ):
        if mode not in MODES:
            raise ConfigError(f"crops.mode is {mode!r}; known: {', '.join(MODES)}.{did_you_mean(mode, MODES)}")
        for name, (low, high) in {"global_scale": global_scale, "local_scale": local_scale}.items():
            if not 0 < low <= high <= 1:
                raise ConfigError(f"crops.{name} is [{low}, {high}]; expected two fractions of the area, 0 < low <= high <= 1")
        self.num_local, self.stage = num_local, stage
        cut_global, cut_local = low_frequencies_of or (global_size, local_size)
        self.groups = [Group("global", slice(0, 2), cut_global, global_size, 1.0)]
        if num_local:
            self.groups.append(Group("local", slice(2, 2 + num_local), cut_local, local_size, 1.0))
        if anchor_size:
            self.groups.append(Group("anchor", slice(0, 2), anchor_size, anchor_size, anchor_size / cut_global))
        self.global_scale, self.local_scale = (global_scale[0], global_scale[1]), (local_scale[0], local_scale[1])
        self.flip_prob, self.gray_prob = flip_prob, gray_prob
        self.jitter, self.jitter_prob = tuple(jitter), jitter_prob
        self.blur_prob, self.blur_sigma, self.solarize_prob = tuple(blur_prob), tuple(blur_sigma), tuple(solarize_prob)
        auto = "device-photometric" if device == "cuda" else "cpu"
        self.mode = auto if mode == "auto" else mode
        self.mean, self.std = tuple(mean), tuple(std)
        self.extras = Extras(**extra)
        # asked once: properties and named tuples' `_replace` for each crop took 2 to 5 % of a small image's time
        self.turns, self.changes = self.extras.turns, self.extras.values
        self.drawn = self.turns or self.changes  # whether there are columns of them

    def draw(self, height: int, width: int, seed: int) -> list[Draw]:
        """The choices for all crops of one [height, width] image, globals first; a pure function of its arguments."""
        rng = random.Random(seed)
        views = [0, 1] + [2] * self.num_local
        return [self._draw_view(rng.random, view, height, width) for view in views]

    def cut(self, image: np.ndarray, seed: int) -> Sample:
        """[H, W, C], uint8 or float32 -> what is done with it in the worker."""
        height, width = image.shape[:2]
        draws = self.draw(height, width, seed)
        table = np.array(draws, np.float32)
        if self.drawn:
            table = np.concatenate([table, self.extras.draw(seed, len(draws), image.shape[2])], axis=1)
        whole = image.dtype == np.uint8
        if self.changes and whole:
            whole, image = False, image.astype(np.float32)  # gains of a few percent would be lost in whole values
        if self.mode == "device":
            return Sample([image], table)
        # all are cut before any is changed: the image stays in the core's cache meanwhile
        parts = [[resized_crop(image, draw, group.cut) for draw in draws[group.views]] for group in self.groups]
        crops: list[np.ndarray] = []
        for group, cut in zip(self.groups, parts, strict=True):
            if self.turns:
                cut = [turned(crop, row) for crop, row in zip(cut, table[group.views], strict=True)]
            if self.mode == "cpu" and whole:
                chosen = draws[group.views]
                if group.finer != 1:
                    chosen = [draw._replace(sigma=draw.sigma * group.finer) for draw in chosen]
                cut = [photometric(crop, draw) for crop, draw in zip(cut, chosen, strict=True)]
            elif self.mode == "cpu":
                cut = self._photometric_floats(cut, group.draws(torch.from_numpy(table)[None])[0])
            crops += cut
        return Sample(crops, table)

    def _photometric_floats(self, crops: list[np.ndarray], draws: Tensor) -> list[np.ndarray]:
        """As the device does it, so that the modes do not differ: crops of one size as one batch."""
        batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
        batch = crops_device.photometric(batch, draws, False, self._mean_of_extras())
        return list(batch.permute(0, 2, 3, 1).numpy())

    def _mean_of_extras(self) -> tuple[float, ...] | None:
        return self.mean if self.drawn else None

    def collate(self, samples: list[Sample]) -> dict[str, Tensor]:
        """B samples -> a flat dict of tensors, view-major.

        "global" uint8 [2 * B, H, W, C], "local" [num_local * B, h, w, C], "anchor" [2 * B, A, A, C]; with photometric work left, their draws
        too; in mode "device" padded images and "draws" [B, V, FIELDS] instead. "metadata" int64 [B, M] where samples have some.
        """
        draws = torch.from_numpy(np.stack([sample.draws for sample in samples]))
        metadata = {"metadata": torch.tensor([sample.metadata for sample in samples])} if samples[0].metadata else {}
        payload = metadata if self.stage is None else {"stage": torch.tensor(self.stage), **metadata}
        if self.mode == "device":
            return payload | _stack_images([sample.pixels[0] for sample in samples]) | {"draws": draws}
        start = 0
        for group in self.groups:
            stop = start + group.views.stop - group.views.start
            payload[group.name] = _stack_views([sample.pixels[start:stop] for sample in samples])
            if self.mode == "device-photometric":
                payload[f"{group.name}_draws"] = group.draws(draws).transpose(0, 1).flatten(0, 1).contiguous()
            start = stop
        return payload

    def finish(self, payload: dict[str, Tensor], device: torch.device | str) -> Crops:
        """Payload of `collate` -> normalised float32 crops on `device`. Reads nothing back from the device."""
        if self.mode == "device":
            finished = self._finish_images(payload, torch.device(device))
        else:
            finished = {group.name: self._finish_views(payload, group, device) for group in self.groups}
        metadata = payload["metadata"].to(device, non_blocking=True) if "metadata" in payload else None
        return Crops(finished["global"], finished.get("local"), finished.get("anchor"), metadata)

    def _finish_views(self, payload: dict[str, Tensor], group: Group, device: torch.device | str) -> Tensor:
        pixels = payload[group.name].to(device, non_blocking=True).permute(0, 3, 1, 2)
        crops = torch.empty(pixels.shape, device=pixels.device).copy_(pixels)
        if self.mode == "device-photometric":
            whole = pixels.dtype == torch.uint8
            crops = crops_device.photometric(crops, payload[f"{group.name}_draws"], whole, self._mean_of_extras())
        return low_frequencies(self._normalize(crops), group.size)

    def _finish_images(self, payload: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        numbers = sorted(name.removeprefix("rows.") for name in payload if name.startswith("rows."))
        buckets = [
            (payload[f"images.{n}"].to(device, non_blocking=True), crops_device.to_device(payload[f"rows.{n}"], device))
            for n in numbers
        ]
        finished = {}
        for group in self.groups:
            draws = group.draws(payload["draws"])
            crops = crops_device.assemble(buckets, crops_device.to_device(draws, device), group.cut)
            table = draws.transpose(0, 1).flatten(0, 1)
            crops = turn_all(crops, table) if self.turns else crops
            crops = crops_device.photometric(crops, table, buckets[0][0].dtype == torch.uint8, self._mean_of_extras())
            finished[group.name] = low_frequencies(self._normalize(crops), group.size)
        return finished

    def _normalize(self, crops: Tensor) -> Tensor:
        """float [N, C, H, W] in 0..255, overwritten."""
        std, mean = torch.tensor(self.std), torch.tensor(self.mean)
        # as numbers, which travel with the launch: a tensor of them would be a copy to wait for
        for channel, factor, shift in zip(crops.unbind(1), (1 / (255 * std)).tolist(), (mean / std).tolist(), strict=True):
            channel.mul_(factor).sub_(shift)
        return crops

    def _draw_view(self, uniform: Callable[[], float], view: int, height: int, width: int) -> Draw:
        """`uniform()` gives floats in [0, 1). Every view consumes choices in the same order as DINO's transforms apply them."""
        box = draw_box(uniform, height, width, self.local_scale if view == 2 else self.global_scale)
        flip = uniform() < self.flip_prob
        order, factors = -1, (1.0, 1.0, 1.0, 0.0)
        if uniform() < self.jitter_prob:
            order = int(uniform() * len(JITTER_ORDERS))
            brightness, contrast, saturation = (max(0.0, 1 - s) + uniform() * (1 + s - max(0.0, 1 - s)) for s in self.jitter[:3])
            factors = brightness, contrast, saturation, (2 * uniform() - 1) * self.jitter[3]
        gray = uniform() < self.gray_prob
        low, high = self.blur_sigma
        sigma = low + uniform() * (high - low) if uniform() < self.blur_prob[view] else 0.0
        return Draw(*box, flip, order, *factors, gray, sigma, uniform() < self.solarize_prob[view])


class StagedCrops:
    """The crops of a run's stages, in their order: `stages[n]` cuts and collates those of stage n; `finish` reads from the payload whose it is."""

    def __init__(self, stages: Sequence[dict[str, Any]], device: str = "cpu"):
        """stages: options of MultiCrop of each."""
        several = len(stages) > 1
        self.stages = [
            MultiCrop(**options, device=device, stage=number if several else None) for number, options in enumerate(stages)
        ]

    def finish(self, payload: dict[str, Tensor], device: torch.device | str) -> Crops:
        stage = int(payload["stage"]) if "stage" in payload else 0  # on the CPU always: nothing waits for it
        return self.stages[stage].finish(payload, device)


def low_frequencies(crops: Tensor, size: int) -> Tensor:
    """float [N, C, H, H] -> [N, C, size, size]: the middle of the spectrum, on the same scale of values; the crops themselves at their own size.

    EfficientTrain++ (arXiv:2405.08768, section 3.1): unlike an average over pixels nothing above the new limit is mixed in, and all below it is kept.
    """
    side = crops.shape[-1]
    if side == size:
        return crops
    spectrum = torch.fft.fftshift(torch.fft.fft2(crops), dim=(-2, -1))
    first = side // 2 - size // 2  # the constant part lies at side // 2, and must lie at size // 2
    spectrum = spectrum[..., first : first + size, first : first + size]
    # both transforms sum over pixels, of which there are fewer now
    smaller: Tensor = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real * (size / side) ** 2
    return smaller


def resized_crop(image: np.ndarray, draw: Draw, size: int) -> np.ndarray:
    """[H, W, C] -> the same type [size, size, C]: cut first, then antialiased bicubic (never reads outside the box), then flip."""
    box = image[draw.top : draw.top + draw.height, draw.left : draw.left + draw.width]
    if box.shape[:2] != (size, size):
        # batch first, then permute: the other order of the two misses ATen's channels-last uint8 kernel
        pixels = torch.from_numpy(box)[None].permute(0, 3, 1, 2)
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        box = pixels.permute(0, 2, 3, 1)[0].numpy()
    if box.shape[2] != 3 or box.dtype != np.uint8:  # cv2 drops an axis of one
        return np.ascontiguousarray(box[:, ::-1] if draw.flip else box)
    return cv2.flip(box, 1) if draw.flip else np.ascontiguousarray(box)


def photometric(crop: np.ndarray, draw: Draw) -> np.ndarray:
    """uint8 [h, w, C] -> the same shape: jitter, grey, blur, solarise, as drawn."""
    shape, colours = crop.shape, crop.shape[2] == 3
    if draw.jitter_order >= 0:
        for operation in JITTER_ORDERS[draw.jitter_order]:
            if colours or operation < FIRST_OF_COLOUR:
                crop = JITTER[operation](crop, draw[_FIRST_FACTOR + operation])
    if draw.gray and colours:
        crop = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if draw.sigma > 0:
        crop = _blur(crop, draw.sigma)
    return (cv2.LUT(crop, _SOLARIZE) if draw.solarize else crop).reshape(shape)


def _blur(crop: np.ndarray, sigma: float) -> np.ndarray:
    # GaussianBlur with the same kernel takes two to four times as long on uint8, and errs more: it rounds between the two directions
    kernel = cv2.getGaussianKernel(round(6 * sigma + 1) | 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(crop, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def _brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    return cv2.convertScaleAbs(crop, alpha=factor, beta=_TRUNCATE)


def _contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    gray = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY) if crop.shape[2:] == (3,) else crop
    mean = int((cv2.mean(gray)[0] if gray.ndim == 2 else gray.mean()) + 0.5)
    return cv2.addWeighted(crop, factor, crop, 0, mean * (1 - factor) + _TRUNCATE)


def _saturation(crop: np.ndarray, factor: float) -> np.ndarray:
    return cv2.transform(crop, factor * np.eye(3) + (1 - factor) * _GRAY)


def _hue(crop: np.ndarray, shift: float) -> np.ndarray:
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)  # whole rows at once: three times as quick as the strided hue channel
    turn = np.zeros(rows.shape[1], np.uint8)
    turn[::3] = int(shift * 255) & 255
    np.add(rows, turn, out=rows)  # wraps round the circle
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


JITTER = (_brightness, _contrast, _saturation, _hue)


def _stack_views(samples: list[list[np.ndarray]]) -> Tensor:
    """B lists of V crops -> [V * B, h, w, C], view-major."""
    views, batch = len(samples[0]), len(samples)
    out = np.empty((views, batch, *samples[0][0].shape), samples[0][0].dtype)
    for index, crops in enumerate(samples):
        for view, crop in enumerate(crops):
            out[view, index] = crop
    return torch.from_numpy(out).flatten(0, 1)


def _stack_images(images: list[np.ndarray]) -> dict[str, Tensor]:
    """Images of like size, padded to one: {"images.K": [n, H, W, C], "rows.K": int64 [n], their numbers in the batch}."""
    buckets: dict[tuple[int, int], list[int]] = {}
    for row, image in enumerate(images):
        buckets.setdefault(tuple(-(-side // _BUCKET) for side in image.shape[:2]), []).append(row)
    payload = {}
    for number, rows in enumerate(buckets.values()):
        height, width = (max(images[row].shape[axis] for row in rows) for axis in (0, 1))
        padded = np.zeros((len(rows), height, width, images[0].shape[2]), images[0].dtype)
        for place, row in enumerate(rows):
            padded[place, : images[row].shape[0], : images[row].shape[1]] = images[row]
        payload[f"images.{number}"], payload[f"rows.{number}"] = torch.from_numpy(padded), torch.tensor(rows)
    return payload
