"""The `crops` section: what is cut from an image and how it is changed; and its stages, where that differs over the run."""

import itertools
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from ssl_locat.config.section import AtLeast0, Positive, Section, Share

KeptShare = Annotated[float, Field(gt=0, le=1)]

# The defaults are those of DINO (arXiv:2104.14294, section 3.2, and the options of its main_dino.py).


class CropSettings(Section):
    """What stages may differ in."""

    global_size: int = Field(default=224, gt=0, description="pixels")
    local_size: int = Field(default=96, gt=0, description="pixels")
    num_local: int = Field(default=8, ge=0)
    low_frequencies_of: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = Field(
        default=None,
        description="[pixels of a global crop, of a local one]: crops are cut at these sizes and brought to global_size and local_size by keeping the "
        "lowest frequencies of their spectrum (EfficientTrain++, arXiv:2405.08768)",
    )
    keep_patches: KeptShare | tuple[KeptShare, KeptShare] = Field(
        default=1.0,
        description="share of the global crops' patches that the student gets, the teacher sees all; [first, last]: goes straight from one to the other "
        "over the stage (the run, without stages), by samples seen",
    )
    keep_shape: Literal["random", "block"] = Field(
        default="random", description="which: single patches anywhere, or neighbours; drawn anew for each crop"
    )
    global_scale: tuple[float, float] = Field(default=(0.4, 1.0), description="fraction of the image's area")
    local_scale: tuple[float, float] = Field(default=(0.05, 0.4), description="fraction of the image's area")
    flip_prob: float = Field(default=0.5, ge=0, le=1, description="horizontal flip")
    # hue turns the colour circle by up to this share of it, either way: half is all of it
    jitter: tuple[AtLeast0, AtLeast0, AtLeast0, Annotated[float, Field(ge=0, le=0.5)]] = Field(
        default=(0.4, 0.4, 0.2, 0.1), description="brightness, contrast, saturation, hue"
    )
    jitter_prob: float = Field(default=0.8, ge=0, le=1)
    gray_prob: float = Field(default=0.2, ge=0, le=1)
    blur_prob: tuple[Share, Share, Share] = Field(
        default=(1.0, 0.1, 0.5), description="global crop 1, global crop 2, local crops"
    )
    blur_sigma: tuple[Positive, Positive] = Field(default=(0.1, 2.0), description="pixels of the crop")
    solarize_prob: tuple[Share, Share, Share] = Field(
        default=(0.0, 0.2, 0.0), description="global crop 1, global crop 2, local crops"
    )
    vertical_flip_prob: float = Field(default=0.0, ge=0, le=1, description="for images that have no up, such as aerial ones")
    turn_prob: float = Field(default=0.0, ge=0, le=1, description="a turn by 90, 180 or 270 degrees, for images that have no up")
    band_jitter: tuple[AtLeast0, AtLeast0] = Field(
        default=(0.2, 0.05),
        description="each channel by itself: factor 1 +- the first, then +- the second added (channels in 0..1)",
    )
    band_jitter_prob: float = Field(default=0.0, ge=0, le=1)
    band_drop_prob: float = Field(
        default=0.0, ge=0, lt=1, description="of each channel, to be replaced by its mean; never of all"
    )
    stretch: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=0.02, description="percentile stretch: largest share of a crop's values cut at either end, each channel by itself"
    )
    stretch_prob: float = Field(default=0.0, ge=0, le=1)
    noise_sigma: tuple[AtLeast0, AtLeast0] = Field(
        default=(0.0, 0.05), description="of Gaussian noise, least and greatest (channels in 0..1)"
    )
    noise_prob: float = Field(default=0.0, ge=0, le=1)
    hed_jitter: float = Field(
        default=0.05, ge=0, description="haematoxylin, eosin and DAB each: factor 1 +- this, then +- this added; RGB of histology"
    )
    hed_prob: float = Field(default=0.0, ge=0, le=1)

    @field_validator("keep_patches", mode="before")
    @classmethod
    def _a_share(cls, value: Any) -> Any:
        given = value if isinstance(value, list | tuple) else [value]
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) and 0 < one <= 1 for one in given)
        if not numbers or len(given) != (2 if given is value else 1):
            raise ValueError(f"is {value}; expected a share above 0 and up to 1, or [first, last] of such")
        return value

    @property
    def keeps(self) -> tuple[float, float]:
        """The share of patches that the student gets at the beginning and at the end."""
        return self.keep_patches if isinstance(self.keep_patches, tuple) else (self.keep_patches, self.keep_patches)

    @field_validator("global_scale", "local_scale")
    @classmethod
    def _a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"is {list(value)}; expected [smallest, largest] with 0 < smallest <= largest <= 1")
        return value


class CropStage(CropSettings):
    """A part of the run with crops of its own; what it does not name is as beside `stages`."""

    until: float = Field(
        gt=0, le=1, description="share of the run, by samples seen, at which the stage ends; the last one's is 1.0"
    )
    batch_size: int | None = Field(
        default=None, gt=0, description="images per optimiser step in this stage; default: optim.global_batch_size"
    )

    @model_serializer(mode="wrap")
    def _what_was_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # a resolved config says again what differs, not every default: else `crops` would no longer stand for the rest
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}

    @property
    def given(self) -> dict[str, Any]:
        """What it names."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    @property
    def differences(self) -> dict[str, Any]:
        """The settings of crops that it names."""
        return {name: value for name, value in self.given.items() if name in CropSettings.model_fields}


class Stage(NamedTuple):
    """One stage with all its settings. until: share of the run by samples seen; batch_size: None for optim.global_batch_size."""

    until: float
    crops: "Crops"
    batch_size: int | None


class Crops(CropSettings):
    """Of a run with stages, once it is read: the last stage's, at whose sizes the network is made."""

    anchor_size: int | None = Field(
        default=None,
        gt=0,
        description="pixels: the global crops again, cut from the image at this size, for an objective's anchor that sees finer (anchor_scale)",
    )
    mode: Literal["auto", "cpu", "device-photometric", "device"] = Field(
        default="auto", description="what the CPU does and what the device does"
    )
    # ImageNet's, which released weights expect; `ssl-locat init` measures others
    mean: tuple[float, ...] = Field(default=(0.485, 0.456, 0.406), description="of the channels in 0..1, one for each")
    std: tuple[Positive, ...] = Field(default=(0.229, 0.224, 0.225), description="likewise")
    stages: list[CropStage] = Field(
        default=[],
        description="parts of the run with other crops, one after the other: each has `until`, the share of the run by samples seen, and may have "
        "`batch_size` and any key of crops but anchor_size, mode, mean and std, which else are as beside the list; or give the list as `crops` itself "
        "(docs/cheaper.md)",
    )

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> "Crops":
        if not self.stages:
            return self
        untils = [stage.until for stage in self.stages]
        for number, (before, after) in enumerate(itertools.pairwise(untils), start=2):
            if after <= before:
                raise ValueError(
                    f"stage {number} ends at until {after:g}, stage {number - 1} at {before:g}: each stage ends later than the one before it. "
                    "`until` is a share of the whole run, not the stage's own length"
                )
        if untils[-1] != 1:
            raise ValueError(f"the last stage ends at until {untils[-1]:g}: nothing says how the run goes on. Set it to 1.0")
        # The last stage is what the network is made for, so `crops` itself comes to say its settings; the earlier stages then name what they had
        # from beside it. Read again, the resolved config gives the same stages.
        *earlier, last = self.stages
        common = {name: getattr(self, name) for name in last.differences}
        stages = [CropStage(**{**common, **stage.given}) for stage in earlier]
        alone = {name: value for name, value in last.given.items() if name not in last.differences}
        # the section is frozen for its readers; here it is still being made
        self.__dict__.update({**last.differences, "stages": [*stages, CropStage(**alone)]})
        return self

    @model_validator(mode="after")
    def _each_stage_fits(self) -> "Crops":
        for number, (_, crops, _) in enumerate(self.resolved(), start=1):
            if wrong := crops.problem():
                raise ValueError(f"stage {number}: {wrong}" if self.stages else wrong)
        return self

    def problem(self) -> str | None:
        """What does not go together, in words; None if all does."""
        if self.anchor_size is not None and self.anchor_size <= self.global_size:
            return (
                f"anchor_size is {self.anchor_size}, global_size {self.global_size}: an anchor that sees no finer than the student sees its "
                "global crops; leave anchor_size out"
            )
        sizes = (self.global_size, *((self.local_size,) if self.num_local else ()))
        if self.low_frequencies_of and any(cut < size for cut, size in zip(self.low_frequencies_of, sizes, strict=False)):
            return (
                f"low_frequencies_of is {list(self.low_frequencies_of)}, smaller than the crops made of it, {' and '.join(map(str, sizes))} pixels: "
                "frequencies are left out, none are added"
            )
        if len(self.mean) != len(self.std):
            return f"mean has {len(self.mean)} numbers and std {len(self.std)}; give one of each for every channel"
        if len(self.mean) != 3 and (self.gray_prob or self.jitter[2] or self.jitter[3]):
            return (
                f"grey, saturation and hue are made of RGB, the images have {len(self.mean)} channels: set gray_prob: 0.0 and the last two "
                f"of jitter to 0, as in [{self.jitter[0]}, {self.jitter[1]}, 0.0, 0.0]"
            )
        if len(self.mean) != 3 and self.hed_prob:
            return f"hed_prob is {self.hed_prob}: stains are taken apart in RGB, the images have {len(self.mean)} channels"
        return None

    def resolved(self) -> list[Stage]:
        """The stages with all their settings; of crops without stages one, the whole run."""
        alone = self.model_copy(update={"stages": []})
        found = [Stage(stage.until, alone.model_copy(update=stage.differences), stage.batch_size) for stage in self.stages]
        return found or [Stage(1.0, self, None)]

    def options(self) -> dict[str, Any]:
        """As MultiCrop takes them."""
        return self.model_dump(exclude={"stages", "keep_patches", "keep_shape"})
