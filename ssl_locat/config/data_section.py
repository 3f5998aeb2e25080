"""The `data` section: where the images lie, what they hold, how they are read."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ssl_locat.config.section import Positive, Section


class WeightedShards(Section):
    shards: str | list[str] = Field(description="brace or glob pattern, list of shards, or a folder")
    weight: float = Field(default=1.0, gt=0, description="share of the samples, relative to the other entries")
    filters: list[str] = Field(
        default=[],
        description="webdataset filters of your own, 'package.module:name', that make one sample of each (docs/webdataset.md)",
    )

    @field_validator("filters")
    @classmethod
    def _dotted_names(cls, value: list[str]) -> list[str]:
        if wrong := next((name for name in value if not re.fullmatch(r"\w+(\.\w+)*:\w+", name)), None):
            raise ValueError(f"holds {wrong!r}; expected 'package.module:name' of a filter")
        return value


class RasterWindows(Section):
    """Windows of large TIFFs and slides (data/shards/raster.py)."""

    raster: str | list[str] = Field(description="brace or glob pattern of TIFFs, list of them, or a folder; any fsspec URL")
    size: int = Field(gt=0, description="side of a window, pixels of its level")
    stride: int | None = Field(default=None, gt=0, description="pixels from one window to the next; default: `size`")
    level: int = Field(default=0, ge=0, description="of a pyramid; 0 is the largest")
    min_tissue: float = Field(default=0, ge=0, le=1, description="share of a window that must be stained tissue (8-bit RGB)")
    min_data: float = Field(default=0, ge=0, le=1, description="share of a window that must hold data")
    no_data: float | None = Field(
        default=None, description="value that `min_data` counts as none, as NaN always is; default: what the file itself names"
    )
    weight: float = Field(default=1.0, gt=0, description="as of the other entries")
    filters: list[str] = Field(default=[], description="as of the other entries")


DataSpec = str | list[str] | RasterWindows | list[WeightedShards | RasterWindows]


class Cache(Section):
    folder: str = Field(description="folder on a local disk, shared by the ranks of a node")
    max_gb: float = Field(default=50, gt=0, description="size limit, GB; least recently used pages go first")


class Textures(Section):
    """A small image set that is made on first use (data/textures.py)."""

    folder: str = Field(description="where the shards are written")
    num_train: int = Field(default=4000, gt=0)
    num_test: int = Field(default=1000, gt=0)
    image_size: int = Field(default=48, ge=16, description="pixels")
    seed: int = 0


class Channels(Section):
    """Images of any number type and bands: which of them, and on which scale. `ssl-locat init` measures and writes it."""

    type: Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64", "dicom"] | None = Field(
        default=None, description="number type that every file must hold; a file of another is corrupt"
    )
    low: float | list[float] = Field(default=0.0, description="stored value that becomes 0, for all channels or one for each")
    high: float | list[float] = Field(default=1.0, description="stored value that becomes 1, likewise; nothing is clipped")
    pick: list[Annotated[int, Field(ge=0)] | str] | None = Field(
        default=None,
        description="the file's bands, in this order: by place from 0, or by name where the file has names; default: all",
    )
    bands: int | None = Field(
        default=None,
        gt=0,
        description="how many bands every file must have; one of another number is corrupt; default: as many as channels, or any "
        "number where `pick` chooses",
    )
    names: list[str] | None = Field(default=None, description="what the channels are called, in exports and reports")
    no_data: float | None = Field(
        default=None, description="stored value that means none, as NaN always does; default: what the file itself names"
    )
    max_no_data: float = Field(
        default=1.0, gt=0, le=1, description="share of no data above which an image is corrupt; one without any data always is"
    )
    bands_first: bool = Field(default=False, description="arrays are [bands, height, width], not [height, width, bands]")
    window: Literal["file"] | tuple[float, Positive] | None = Field(
        default=None, description="of DICOM: `file`, the first that each file holds, or [centre, width]; values are then 0..1"
    )
    show: tuple[int, int, int] | None = Field(default=None, description="channels that pictures show as red, green and blue")

    @model_validator(mode="after")
    def _a_scale(self) -> "Channels":
        low, high = (value if isinstance(value, list) else [value] for value in (self.low, self.high))
        wide = max(len(low), len(high))
        if {len(low), len(high)} - {1, wide} or not all(
            a < b for a, b in zip(low * (wide // len(low)), high * (wide // len(high)), strict=True)
        ):
            raise ValueError(
                f"low is {self.low} and high {self.high}; expected numbers with low < high, one of each or one for each channel"
            )
        if self.window and (low, high) != ([0.0], [1.0]):
            raise ValueError("gives a window and low or high; a window's values are 0..1 already")
        return self

    def lengths(self) -> dict[str, int]:
        """key -> how many channels it speaks of."""
        given = {"pick": self.pick, "names": self.names, "low": self.low, "high": self.high}
        return {name: len(value) for name, value in given.items() if isinstance(value, list)}


class Metadata(Section):
    """One thing that members of a sample say beside its image, such as its camera (data/shards/metadata.py); the objective `metadata` reads it."""

    member: str = Field(
        description="extension of the member: json, camera.txt, ...; the other columns of Parquet are one member json"
    )
    key: str | None = Field(
        default=None, description="within a JSON member, dots between levels; default: the member is the value"
    )
    values: list[str] = Field(min_length=2, description="the values that are told apart, as text or numbers; others are unknown")
    otherwise: Literal["ignore", "corrupt"] = Field(
        default="ignore",
        description="where a sample lacks it or holds another value: this one loss leaves it out, or the sample is quarantined",
    )

    @field_validator("values", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        texts = [as_text(item) for item in value] if isinstance(value, list) else value
        if not isinstance(texts, list) or None in texts or len(set(texts)) < len(texts):
            raise ValueError(f"is {value}; expected at least two texts or numbers, each once")
        return texts

    @field_validator("member")
    @classmethod
    def _an_extension(cls, value: str) -> str:
        return value.lower().lstrip(".")

    @model_validator(mode="after")
    def _json_has_a_key(self) -> "Metadata":
        if self.key is None and self.member.rpartition(".")[2] == "json":
            raise ValueError("the member is JSON: give the key of the value in it, such as key: camera")
        return self


def as_text(value: Any) -> str | None:
    """A plain value as YAML and JSON both write it; None for null, lists and mappings."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)
    return value.strip() if isinstance(value, str) else None


class Data(Section):
    train: DataSpec = Field(
        description="unlabelled images: shards (tar, Parquet, zip; brace or glob, any fsspec URL), a folder, {raster, size, ...}, or a list of {shards, weight}"
    )
    test: DataSpec | None = Field(default=None, description="labelled images that online probes are measured on")
    validation: DataSpec | None = Field(
        default=None,
        description="labelled images that the probe held_out judges by, so that data.test stays unseen until the end",
    )
    held_out: int | None = Field(
        default=None,
        gt=0,
        description="how many images of train, chosen by their keys, are not trained on: held_out judges by their labels",
    )
    num_classes: int | None = Field(default=None, gt=0, description="classes of train and test, where probes need labels")
    make: Textures | None = Field(default=None, description="make this image set before the run, if it is not there")
    image_key: str | None = Field(
        default=None, description="member of a sample that holds the image; default: the first of jpg, jpeg, png, webp, ..."
    )
    label_key: str | None = Field(default=None, description="member that holds the label; default: cls, or the class folder")
    metadata: dict[str, Metadata] | None = Field(
        default=None, description="name -> what members say beside the image, for the objective `metadata` (docs/metadata.md)"
    )
    channels: Channels | None = Field(
        default=None,
        description="of images that are not 8 bits of grey or RGB; default: every image becomes 8 bits, of in_chans channels",
    )
    workers: int = Field(default=2, ge=0, description="processes per rank that decode; one more reads for them")
    read_memory_gb: float = Field(
        default=1.0,
        gt=0,
        description="raw samples that a rank holds in memory at most, GiB; a new run's shuffling is as wide as it allows",
    )
    max_bad: float = Field(default=0.001, ge=0, le=1, description="share of damaged samples above which the run stops")
    max_pixels: int = Field(
        default=100_000_000,
        gt=0,
        description="an image with more pixels, or that takes more than 6 bytes for each of so many to decode, is refused",
    )
    epoch_samples: int | None = Field(
        default=None, gt=0, description="samples that count as one epoch; default: all; a mix must give it"
    )
    retry_minutes: float = Field(
        default=5, gt=0, description="how long an unreachable store is tried before the run stops, resumable"
    )
    cache: Cache | None = None
