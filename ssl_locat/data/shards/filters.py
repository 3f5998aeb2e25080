"""A user's own webdataset filters on samples, between the shard and the decoder: `filters: [my_package.module:name]` of an entry of data.train.

A filter is what webdataset's pipelines are made of (`webdataset.map(f)`, `rename(image="jpg")`, `decode("rgb8")`), a generator function that takes
samples and yields samples, a plain function of one sample, or a list of these. It is given one sample at a time, and must give back one: so the
order of the stream, its resume and its batches stay what they are. What it draws at random comes from the sample's own seed.

Nothing is imported before the first sample: loading a config, a run folder or an export runs no code of a user's.
"""

import importlib
import inspect
import io
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.errors import ConfigError, CorruptSample, UserError
from ssl_locat.seeds import mix64
from ssl_locat.text.shown import shown

Stage = Callable[[Iterator[dict]], Iterable[Any]]

# webdataset's, by the names of their functions and classes: they need more samples than one, or leave some out
_OF_MANY = {
    *("_shuffle", "detshuffle", "_batched", "_unbatched", "_unlisted", "_rsample", "_select", "islice"),
    *("_to_tuple", "_map_tuple", "_extract_keys", "_associate", "Cached", "LMDBCached"),
}
# members that `decode` would unpickle, which runs whatever their author wrote; .gz is looked through
_EXECUTED = re.compile(r"(^|\.)(pyd|pkl|pickle|pth|pt)(\.gz)*$", re.IGNORECASE)
_STREAM = 0x66696C74  # of random numbers, apart from those of the crops


class Filters:
    """The filters of one data set, by their dotted names; pickled as such, imported where the first sample is."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._stages: list[tuple[str, Stage]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "_stages": None}

    @property
    def stages(self) -> list[tuple[str, Stage]]:
        """(name, stage) of each. ConfigError for what cannot be imported or is no filter of single samples."""
        if self._stages is None:
            self._stages = [(name, stage) for name in self.names for stage in _load(name)]
        return self._stages

    def __call__(self, raw: RawSample, seed: int) -> RawSample:
        """The sample as the filters make it, its values as bytes again. CorruptSample for what a filter raises: it may be the sample's fault, and
        data.max_bad ends the run if it is the filter's. UserError for a filter that gives none, several, or something else."""
        members = {name: data for name, data in raw.members.items() if not _EXECUTED.search(name)}
        sample: dict[str, Any] = {"__key__": raw.key, "__url__": raw.shard, **members}
        stages = self.stages
        with _seeded(mix64(seed, _STREAM)):
            for name, stage in stages:
                sample = _one(name, stage, sample, raw)
        key = sample.get("__key__")
        found = {name: _bytes(name, value) for name, value in sample.items() if not name.startswith("__") and value is not None}
        return RawSample(found, key if isinstance(key, str) else raw.key, raw.shard)


def with_filters(found: RawSample | Damage, filters: Filters | None) -> RawSample | Damage:
    """A sample that knows what is to be done to it."""
    return found._replace(filters=filters) if filters is not None and isinstance(found, RawSample) else found


def filtered(raw: RawSample, seed: int) -> RawSample:
    """The sample after its data set's filters, if it has any. seed: the sample's own."""
    return raw if raw.filters is None else raw.filters(raw, seed)


def _load(name: str) -> list[Stage]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"data.train's filter {name!r} cannot be imported: {error}. Expected 'package.module:name' of something installed, or on PYTHONPATH."
        ) from None
    except AttributeError:
        raise ConfigError(f"data.train's filter {name!r}: {module} holds no {attribute!r}.") from None
    return [_stage(name, part) for part in (found if isinstance(found, list | tuple) else [found])]


def _stage(name: str, part: Any) -> Stage:
    """Anything that a filter may be, as a function of an iterator of samples."""
    kind = getattr(getattr(part, "f", None), "__name__", type(part).__name__)
    if kind in _OF_MANY:
        raise ConfigError(
            f"data.train's filter {name!r} is webdataset's {kind.strip('_')}, which keeps samples back, joins or drops them: a filter here makes one "
            "sample of each, so that order and resume stay exact. The stream shuffles and batches by itself."
        )
    if type(part).__name__ == "RestCurried":
        raise ConfigError(
            f"data.train's filter {name!r} lacks its arguments: write a module with, say, stage = webdataset.map(function), and name that."
        )
    if hasattr(part, "run") and not inspect.isfunction(part):  # webdataset's PipelineStage
        run: Stage = part.run
        return run
    if inspect.isfunction(part) and not inspect.isgeneratorfunction(part):
        return lambda samples: map(part, samples)
    if not callable(part):
        raise ConfigError(
            f"data.train's filter {name!r} is {shown(repr(part)[:80])}; expected a webdataset filter or a function of one sample"
        )
    stage: Stage = part
    return stage


def _one(name: str, stage: Stage, sample: dict[str, Any], raw: RawSample) -> dict[str, Any]:
    try:
        found = list(islice(stage(iter([sample])), 2))
    except (CorruptSample, UserError):
        raise
    except Exception as error:
        raise CorruptSample(f"filter {name}: {type(error).__name__}: {error}") from None
    if len(found) != 1:
        raise UserError(
            f"data.train's filter {name!r} made {'no sample' if not found else 'more than one sample'} of {shown(raw.key)} in {shown(raw.shard)}. It must "
            "make one of each, so that order and resume stay exact: raise an exception for a sample that cannot be used, and choose "
            "samples by what is packed."
        )
    if not isinstance(found[0], dict):
        raise UserError(
            f"data.train's filter {name!r} made {shown(repr(type(found[0]).__name__))} of {shown(raw.key)}; expected a sample: a dict of "
            "'__key__' and one value for each extension"
        )
    return found[0]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All generators that a filter may draw from begin at `seed`, and go on afterwards as if nothing had been: without workers they are the
    trainer's own."""
    torch = sys.modules.get("torch")  # what has not been imported yet has drawn nothing
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state() if torch else None
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if torch:
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        if torch:
            torch.set_rng_state(tensors)


def _bytes(name: str, value: Any) -> bytes:
    """A member as it would lie in a shard: pixels without loss, numbers and texts as text."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    if hasattr(value, "getbands"):  # a Pillow image: greys of 16 and 32 bits keep them
        value = np.array(value.convert("RGB") if value.mode in ("P", "RGBA", "CMYK", "LA", "YCbCr") else value)
    elif hasattr(value, "detach"):  # a tensor, [C, H, W] as webdataset's `torchrgb` makes it
        value = value.detach().cpu().numpy()
        value = value.transpose(1, 2, 0) if value.ndim == 3 else value
    if isinstance(value, np.ndarray) and value.ndim in (2, 3):
        return _array_bytes(name, value)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError):
        raise CorruptSample(
            f"member {name!r} is {type(value).__name__} after the filters; expected bytes, text, a number, an image or plain JSON"
        ) from None


def _array_bytes(name: str, pixels: np.ndarray) -> bytes:
    if pixels.dtype.kind == "f":  # webdataset's `rgb` is 0..1
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise CorruptSample(
                f"member {name!r} is a float image from {pixels.min():g} to {pixels.max():g}; expected 0..1, or uint8"
            )
        pixels = np.rint(pixels * 255).astype(np.uint8)
    buffer = io.BytesIO()
    if (
        pixels.ndim == 2 and pixels.dtype.kind in "ui" and pixels.dtype.itemsize <= 2
    ):  # a grey image or a mask: both are read as PNG
        from PIL import Image

        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    else:
        np.save(buffer, np.ascontiguousarray(pixels), allow_pickle=False)
    return buffer.getvalue()
