"""What a run does with networks that are given: what moves of `backbone.init`, what of it student and teacher share, frozen anchors."""

from collections.abc import Iterable

from torch import nn

from ssl_locat.config.schema import Config
from ssl_locat.errors import ConfigError
from ssl_locat.models.backbone import load_backbone, load_start
from ssl_locat.models.moving import choose_moving
from ssl_locat.runs.distributed import world_size


def freeze(backbone: nn.Module, config: Config, new: Iterable[str] = ()) -> None:
    """What the config says that moves; new: names of parameters that `init` did not bring."""
    own = config.backbone
    options = {**own.lora.model_dump(), "last_blocks": own.last_blocks, "also": own.also_trainable, "new": frozenset(new)}
    choose_moving(backbone, own.trainable, **options)


def sharing(config: Config) -> dict[str, bool]:
    """Options of StudentTeacher that follow from what moves; FSDP cuts each network into parts of its own."""
    own = config.backbone
    return {
        "share_frozen": own.trainable != "full" and not (config.parallel == "fsdp" and world_size() > 1),
        "mask_token_moves": own.trainable != "last" or "mask_token" in own.also_trainable,
    }


def load_anchors(losses: nn.ModuleDict, config: Config) -> dict[str, nn.Module]:
    """Frozen networks from outside, by the name of the objective; each MODEL is loaded once. `start` is that of backbone.init."""
    loaded: dict[str, nn.Module] = {}
    named = {name: str(getattr(objective, "anchor", None) or "teacher") for name, objective in losses.items()}
    wanted = {name: anchor for name, anchor in named.items() if anchor != "teacher"}
    for name, anchor in wanted.items():
        if anchor not in loaded:
            loaded[anchor] = load_start(str(config.backbone.init)) if anchor == "start" else load_backbone(anchor)
        channels = len(loaded[anchor].pretrained_cfg["mean"])
        if channels != len(config.crops.mean):
            raise ConfigError(
                f"{name}: its anchor {anchor} takes images of {channels} channels, the crops have {len(config.crops.mean)}. Take "
                "anchor: teacher, a copy of this run's own network as it begins."
            )
    return {name: loaded[anchor] for name, anchor in wanted.items()}
