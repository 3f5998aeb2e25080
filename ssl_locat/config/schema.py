"""The schema of a pretraining run: frozen sections, every key with its type, default and unit.

`load(name, overrides)` reads a YAML (yaml_files.py), checks it against the schema and returns a `Config`; nothing here imports
torch, so that a wrong key costs a second. The resolved config, written into the run folder, alone rebuilds the run.
"""

import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ssl_locat.config.crops_section import Crops as Crops
from ssl_locat.config.data_section import Data as Data
from ssl_locat.config.mistakes import drop_other_kinds, explain
from ssl_locat.config.section import AtLeast0, Share
from ssl_locat.config.section import Options as Options
from ssl_locat.config.section import Section as Section
from ssl_locat.config.signatures import check_options
from ssl_locat.config.yaml_files import LoadedYaml, dump_yaml, load_yaml
from ssl_locat.errors import ConfigError, did_you_mean

# name in YAML -> where the class lives; an objective of your own is given as 'package.module:Class'
OBJECTIVES = {
    "dino": "ssl_locat.objectives.dino:DINO",
    "ibot": "ssl_locat.objectives.ibot:IBOT",
    "koleo": "ssl_locat.objectives.koleo:KoLeo",
    "coding_rate": "ssl_locat.objectives.coding_rate:CodingRate",
    "patch_cosine": "ssl_locat.objectives.coding_rate:PatchCosine",
    "gram": "ssl_locat.objectives.gram:Gram",
    "distill": "ssl_locat.objectives.distill:Distill",
    "metadata": "ssl_locat.objectives.metadata:Metadata",
}

# two ways to say one thing: a file or a command line that gives the one takes the place of a base that gives the other
EITHER = (("optim", "epochs"), ("optim", "total_steps"))

T = TypeVar("T", bound=BaseModel)


class Lora(Section):
    """Low-rank adapters (arXiv:2106.09685) by Hugging Face's peft; the extra `lora`. Exports and everything that loads a run get merged weights."""

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=16, gt=0, description="an adapter adds alpha / rank times the product of its two factors")
    targets: list[str] = Field(
        default=["qkv", "proj", "fc1", "fc2"],
        min_length=1,
        description="linear layers within the blocks: qkv also means separate projections, fc1 both inputs of a gated MLP",
    )


class Backbone(Options):
    """A timm model or one of ours, by name; further keys are its constructor's arguments (patch_size, depth, img_size, ...)."""

    name: str
    drop_path_rate: float = Field(default=0.1, ge=0, lt=1, description="stochastic depth of the student; the teacher has none")
    init: str | None = Field(default=None, description="start from these weights: PATH, timm:NAME or hf-hub:NAME")
    init_heads: bool = Field(default=False, description="the heads too, with their prototypes, where `init` holds them")
    frozen_epochs: float = Field(default=0, ge=0, description="epochs in which only the heads train; for `init`")
    frozen_steps: int = Field(
        default=0, ge=0, description="the same in optimiser steps, for small data; the longer of the two counts"
    )
    trainable: Literal["full", "last", "lora"] = Field(
        default="full",
        description="what moves of `init`: all of it, its last blocks and what lies behind them, or adapters on its linear layers; what `init` did not "
        "bring, such as GAug attached newly, moves always",
    )
    last_blocks: int = Field(default=4, gt=0, description="for `last`: how many")
    lora: Lora = Lora()
    also_trainable: list[Literal["norms", "gaug", "layer_scale", "positions", "class_token", "patch_embed", "mask_token"]] = (
        Field(default=[], description="free to move besides, in all blocks, under `last` and `lora`; class_token: and registers")
    )
    pack_crops: bool | Literal["auto"] = Field(
        default="auto",
        description="global and local crops through the student in one pass; `auto`: where this machine measures it faster",
    )


class Objective(Options):
    """A loss, by name; further keys are its constructor's arguments."""

    name: str = Field(description="which loss: one of the shipped ones, or 'package.module:Class' of your own")
    weight: Annotated[float, Field(gt=0)] | tuple[AtLeast0, AtLeast0] = Field(
        default=1.0, description="in the sum; [first, last]: goes straight from one to the other over the run, by samples seen"
    )
    weight_until: float = Field(default=1.0, gt=0, le=1, description="share of the run by which a weight arrives at its last")

    @field_validator("weight", mode="before")
    @classmethod
    def _some_weight(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, list | tuple) and not any(value)):
            raise ValueError(f"is {value}; expected a number above 0, or [first, last] that are not both 0")
        return value

    def weight_at(self, share: float) -> float:
        """At this share of the run, 0 to 1."""
        if not isinstance(self.weight, tuple):
            return self.weight
        first, last = self.weight
        return first + (last - first) * min(share / self.weight_until, 1.0)


# The defaults of optimiser and teacher are those of DINO (arXiv:2104.14294, section 3.2, and the options of its main_dino.py).
class Optim(Section):
    """AdamW or Muon. Progress is counted in samples; epochs and steps are derived."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: orthogonal updates for the matrices of blocks and heads, AdamW for the rest; not with parallel: fsdp",
    )
    epochs: float | None = Field(default=None, gt=0, description="length of the run; or give total_steps")
    total_steps: int | None = Field(default=None, gt=0, description="length of the run in optimiser steps; or give epochs")
    global_batch_size: int = Field(gt=0, description="images per optimiser step, over all ranks and accumulation steps")
    accumulate_steps: int = Field(default=1, gt=0, description="micro-batches per optimiser step")
    # the linear scaling rule (Goyal et al., arXiv:1706.02677): lr * global_batch_size / 256
    lr: float = Field(default=5e-4, gt=0, description="at a global batch of 256; scaled linearly")
    min_lr: float = Field(default=1e-6, ge=0, description="at the end of a cosine; not scaled")
    warmup_epochs: float = Field(default=10, ge=0)
    warmup_start_lr: float = Field(default=0, ge=0, description="at the first step of the warm-up; not scaled")
    weight_decay: tuple[AtLeast0, AtLeast0] = Field(
        default=(0.04, 0.4), description="start and end of the schedule; none on biases and norms"
    )
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="factor on the lr from each block to the one before it; below 1 early blocks move less",
    )
    patch_embed_lr: float = Field(default=1.0, ge=0, description="factor on the lr of the patch embedding, besides")
    schedule: Literal["cosine", "wsd", "constant_cooldown", "restart", "decay"] = Field(
        default="cosine",
        description="of lr, weight decay and teacher momentum: a cosine over the whole run; wsd (warm-up, stable, decay): constant but for the last "
        "decay_epochs, in which the lr goes straight to 0 and the others to their ends; constant_cooldown: cosines, but the lr is constant, then "
        "linear to min_lr over the last fifth; for a run that branches off a checkpoint, restart: cosines with warm-up over what is left; decay: "
        "wsd's decay over what is left",
    )
    decay_epochs: float | None = Field(
        default=None,
        ge=0,
        description="length of wsd's decay; 0: none, for a long run whose decays are branches; default: a fifth of the run",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip_grad: float = Field(default=3.0, ge=0, description="largest gradient norm; 0: no clipping")
    # a norm over all tensors, which other projects clip by, is larger than that of any one: 3.0 then cuts far more often
    clip: Literal["per_parameter", "global"] = Field(default="per_parameter", description="DINO clips each tensor by itself")

    @model_validator(mode="after")
    def _one_length(self) -> "Optim":
        if (self.epochs is None) == (self.total_steps is None):
            raise ValueError("give exactly one of epochs and total_steps: the length of the run")
        if self.global_batch_size % self.accumulate_steps:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by accumulate_steps {self.accumulate_steps}; "
                f"the nearest that are: {', '.join(map(str, near_multiples(self.global_batch_size, self.accumulate_steps)))}"
            )
        return self


class Teacher(Section):
    # 1.0 at the end: the exported teacher no longer moves with the noise of single batches
    momentum: tuple[Share, Share] = Field(default=(0.996, 1.0), description="start and end of the schedule")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="of its forward pass; default: the student's"
    )


class Checkpoint(Section):
    every_steps: int = Field(default=1000, gt=0)
    keep_last: int = Field(default=3, gt=0)
    milestone_every_steps: int | None = Field(default=None, gt=0, description="these are never deleted")
    keep_best: dict[Literal["dense", "global"], str | None] = Field(
        default={},
        description="beside the last, the best by what probes measure: [dense, global], or a mapping to the measure that counts, such as "
        "{global: unlabelled.lidar}; null: the labelled probe's, else DSE for dense",
    )
    # the copy to memory is what the step waits for; files are written by a thread (runs/checkpoint.py)
    asynchronous: bool = Field(default=True, description="write while training continues")

    @field_validator("keep_best", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        return dict.fromkeys(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value


class StopWhen(Section):
    """A rule that ends a run which has no more to gain; exit code 0."""

    measure: str = Field(description="dense or global, as of checkpoint.keep_best; or PROBE.METRIC, such as unlabelled.lidar")
    patience: int = Field(gt=0, description="probes in a row that bring no better value, and then it ends")


class Guard(Section):
    """At its end the run hands back the weights that it started from (`backbone.init`), unless a checkpoint is better by more than the noise."""

    otherwise: Literal["start", "refuse"] = Field(
        default="start", description="where none is better: export the start, or nothing and end with exit code 2"
    )
    unverified: Literal["start", "trained"] = Field(
        default="start",
        description="what is exported where no labels can tell: the start, or the trained backbone, which is not called better",
    )
    margin: float = Field(
        default=0.0, ge=0, description="points that are no difference to speak of: the interval must lie beyond"
    )


class Log(Section):
    every_steps: int = Field(default=10, gt=0, description="how often numbers are fetched from the device and written")
    tensorboard: bool = Field(default=True, description="write event files to RUN/tensorboard")
    trackers: list[Literal["wandb", "mlflow"]] = Field(default=[], description="offline unless their own variables say otherwise")


class Probes(Options):
    """Protocols that run during training on the teacher; each further key is a protocol and its options, or null: off."""

    every_epochs: float | None = Field(default=None, gt=0)
    every_steps: int | None = Field(default=None, gt=0)

    @property
    def options(self) -> dict[str, Any]:
        """The probes that run: one set to null is off, so that `probes.knn=null` takes away what a base or a recipe has."""
        return {name: options for name, options in super().options.items() if options is not None}


class Config(Section):
    """One pretraining run."""

    run_dir: str = Field(description="folder of the run: config, metrics, checkpoints; the same folder again resumes")
    seed: int = Field(default=0, ge=0, description="of weights, sample order, crops and stochastic depth")
    data: Data
    backbone: Backbone
    objective: Objective | list[Objective] = Field(description="a loss, or several that are summed with their weights")
    crops: Crops = Crops()
    optim: Optim
    teacher: Teacher = Teacher()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="of the networks; losses and weights stay fp32. auto: what some steps at the first start measure to be faster, fp32 or the 16-bit type "
        "that the machine multiplies (GPUs: bf16, on Volta and Turing fp16; CPUs: bf16 where they have it); the run keeps it",
    )
    tf32: bool = Field(
        default=False,
        description="products of fp32 matrices on NVIDIA GPUs (Ampere and later) with 10 bits of mantissa instead of 23: faster",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one")
    compile: bool | Literal["cuda-graphs"] = Field(
        default=False, description="torch.compile student and teacher; cuda-graphs: and launch each pass as one graph"
    )
    parallel: Literal["ddp", "fsdp"] = Field(default="ddp", description="how several processes share the model")
    activation_checkpointing: bool = Field(
        default=False, description="recompute blocks in the backward pass: less memory, more time"
    )
    checkpoint: Checkpoint = Checkpoint()
    probes: Probes = Probes()
    log: Log = Log()
    stop_on: list[Literal["uniform", "collapse"]] = Field(
        default=[], description="kinds of collapse that end the run instead of a warning"
    )
    stop_when: StopWhen | None = Field(
        default=None, description="end the run early, finished, when a measure has not risen for long"
    )
    guard: Guard | None = Field(
        default=None, description="never end worse than `backbone.init`, judged by the probe held_out; `adapt` sets it"
    )
    export: bool = Field(default=False, description="export the teacher to RUN/export when the run ends")
    sweep: dict[str, list[Any]] = Field(default={}, description="key -> values: on a cluster, one job for each combination")

    @field_validator("run_dir")
    @classmethod
    def _home(cls, value: str) -> str:
        return os.path.expanduser(value)  # no shell sees what stands in a YAML

    @field_validator("crops", mode="before")
    @classmethod
    def _stages_alone(cls, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError("is an empty list; expected stages, each with `until`, or the settings of crops")
        return {"stages": value} if isinstance(value, list) else value

    @field_validator("objective")
    @classmethod
    def _names_differ(cls, value: Objective | list[Objective]) -> Objective | list[Objective]:
        names = [objective.name for objective in value] if isinstance(value, list) else [value.name]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"lists {', '.join(names) or 'nothing'}; expected at least one objective, each once")
        return value

    @model_validator(mode="after")
    def _channels_agree(self) -> "Config":
        channels = self.backbone.options.get("in_chans", 3)
        if channels != len(self.crops.mean):
            raise ValueError(
                f"backbone.in_chans is {channels}, but crops.mean has {len(self.crops.mean)} numbers: give crops.mean and crops.std one for "
                "each channel (`ssl-locat init` measures them)"
            )
        for key, count in (self.data.channels.lengths() if self.data.channels else {}).items():
            if count != channels:
                raise ValueError(f"data.channels.{key} lists {count} channels, but backbone.in_chans is {channels}")
        if (show := self.data.channels and self.data.channels.show) and not all(0 <= place < channels for place in show):
            raise ValueError(f"data.channels.show is {list(show)}; the channels are numbered 0 to {channels - 1}")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Config":
        parts = self.optim.accumulate_steps
        for number, stage in enumerate(self.crops.stages, start=1):
            if stage.batch_size and stage.batch_size % parts:
                raise ValueError(
                    f"crops.stages: batch_size of stage {number} is {stage.batch_size}, not divisible by optim.accumulate_steps {parts}; the nearest "
                    f"that are: {', '.join(map(str, near_multiples(stage.batch_size, parts)))}"
                )
        return self

    @model_validator(mode="after")
    def _guard_has_a_start(self) -> "Config":
        if self.guard and not self.backbone.init:
            raise ValueError("guard compares with the weights that the run started from: give backbone.init, or take guard out")
        return self

    @property
    def channels(self) -> dict[str, Any] | None:
        """`data.channels` as plain values, for the layers below; None where images are 8 bits."""
        return self.data.channels.model_dump(mode="json") if self.data.channels else None

    @property
    def metadata_sizes(self) -> dict[str, int]:
        """Number of values of each field of data.metadata, in its order."""
        return {name: len(field.values) for name, field in (self.data.metadata or {}).items()}

    @property
    def objectives(self) -> list[Objective]:
        return self.objective if isinstance(self.objective, list) else [self.objective]

    def to_yaml(self) -> str:
        """The resolved config as YAML that `load` reads back to an equal one."""
        return dump_yaml(self.model_dump(mode="json"))


def near_multiples(value: int, of: int) -> list[int]:
    """The positive multiples of `of` just below and above `value`."""
    below = value // of * of
    return [multiple for multiple in (below, below + of) if multiple > 0]


def load(name: str, overrides: Iterable[str] = ()) -> Config:
    """The config that a shipped name or a path means, with `key.sub=value` overrides.

    Raises:
        ConfigError: with file, line, full key, the value, what was expected and the nearest valid key.
    """
    loaded = load_yaml(name, "configs/pretrain", overrides, either=EITHER)
    # options last: a wrong section is the likelier mistake, and objectives of the user are looked up for them
    config = parse(Config, loaded)
    for index, objective in enumerate(config.objectives):
        key = ("objective", index) if isinstance(config.objective, list) else ("objective",)
        target = objective_target(objective.name, loaded.place((*key, "name")))
        check_options(target, objective.options, loaded, key)
    return config


def check_allow(config: Config, allow: Iterable[str]) -> None:
    """ConfigError for a key of `--allow` that this config has not; a section stands for all below it."""
    known: list[str] = []
    sections = [("", config.model_dump(mode="json"))]
    for prefix, values in sections:  # grows as it is read
        for name, value in values.items():
            known.append(f"{prefix}{name}")
            if isinstance(value, dict):
                sections.append((f"{prefix}{name}.", value))
    for key in allow:
        if key not in known and key.split(".")[0] not in ("backbone", "objective"):  # their options may be what is new
            raise ConfigError(f"--allow {key}: there is no such setting.{did_you_mean(key, known)}")


def objective_target(name: str, place: str) -> str:
    """'package.module:Class' of an objective."""
    if ":" in name:
        return name
    if name not in OBJECTIVES:
        raise ConfigError(
            f"{place}: objective.name is {name!r}; known: {', '.join(OBJECTIVES)}.{did_you_mean(name, OBJECTIVES)} "
            "An objective of your own is given as 'package.module:Class'."
        )
    return OBJECTIVES[name]


def parse(schema: type[T], loaded: LoadedYaml) -> T:
    """Check a YAML against a schema."""
    try:
        return schema.model_validate(loaded.data)
    except ValidationError as error:
        # each member of a union complains, mostly in the same words: said once, in the order of the file
        lines = dict.fromkeys(
            explain(schema, item, loaded, foreign=schema is Config) for item in drop_other_kinds(error.errors(), loaded.data)
        )
        raise ConfigError("\n".join(lines)) from None
