"""Losses, one file each. config.OBJECTIVES is their table; `Views` is what they are given, `Progress` where the run stands.

An objective is an nn.Module (its buffers, such as a centre, are saved with the run) with

    needs: Needs                                    what it wants beyond class tokens
    make_head(embed_dim) -> nn.Module               called for student and for teacher; head(Views) -> whatever forward compares. embed_dim is the
                                                    class token's width; make_head(..., patch_dim) is told the patches', too
    forward(student, teacher, progress) -> (loss [], metrics)      outputs of the two heads, for one micro-batch
    finish_step() -> {name: value []}               once per optimiser step, after all micro-batches: centres and the like; more to log
    frozen(head, progress) -> iterable of parameters               of the student's head that must not move at this point

so that the training loop knows no loss by name. Imported by pretraining and benchmarks. Begin with dino.py. One that wants more than student and teacher says so by

    min_images: int                                 fewest images in a micro-batch over all ranks: for losses that compare images
    make_masks(seeds, views, grid) -> bool [views * B, N]          with needs.masks: which patches the student does not see
    shares_head_of: str | None                      name of the objective whose head its own head is given by `share(head)`, and whose
                                                    options it takes by `follow(objective)`
    needs.metadata                                  forward's `teacher` is then what data.metadata says of the images, int64 [B, M], -1 where nothing; and
                                                    make_head(embed_dim, metadata={name: number of values}) is told its columns
    anchor, anchor_scale, anchor_every_steps        a frozen third network (student_teacher.Anchor): MODEL, "start" for that of backbone.init, or
                                                    "teacher" for copies of the run's own; forward's `teacher` is then the anchor's Views, and make_head is
                                                    called with the width of its tokens too: make_head(embed_dim, anchor_dim)
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ssl_locat.config.schema import OBJECTIVES, Objective, objective_target
from ssl_locat.errors import ConfigError
from ssl_locat.objectives.masking import Masks


class Views(NamedTuple):
    """What one network made of a micro-batch; the first T views are the global crops."""

    cls: Tensor  # [V, B, D]  class token after the final norm and PRR; student: V = T + local crops, teacher: V = T
    patches: Tensor | None = None  # [T, B, N, D]  patch tokens of the global crops after the final norm, where asked for
    refined_patches: Tensor | None = None  # [T, B, N, D]  the same after PRR, where asked for
    masks: Tensor | None = None  # [T, B, N] bool, True = hidden from the student
    masked: Tensor | None = None  # [M] int64, where masks is True, counted through T*B*N


def required(tokens: Tensor | None) -> Tensor:
    """Tokens that an objective's `needs` asked for, which are therefore there."""
    assert tokens is not None, "an objective reads what its `needs` does not name"
    return tokens


class Needs(NamedTuple):
    """What an objective wants computed beyond class tokens."""

    patches: bool = False
    refined_patches: bool = False
    masks: bool = False
    metadata: bool = False


class Progress(NamedTuple):
    """Where the run stands; everything that is scheduled is a function of this."""

    step: int  # optimiser steps done
    epoch: float  # steps over steps per epoch; an epoch is as many whole batches as its samples fill, as in DINO
    total_epochs: float
    decayed: float = 0.0  # 0 to 1: how much of the decay (optim.schedule wsd, decay) lies behind; 0 where there is none


def build(objectives: list[Objective]) -> nn.ModuleDict:
    """name -> objective, in the order of the config."""
    built = nn.ModuleDict({option.name: _build_one(option.name, option.options) for option in objectives})
    for objective in built.values():
        owner = getattr(objective, "shares_head_of", None)
        if owner and owner in built:  # one that is missing is refused where heads are made
            objective.follow(built[owner])
    return built


def _build_one(name: str, options: dict[str, Any]) -> nn.Module:
    from importlib import import_module

    module, _, attribute = objective_target(name, "config").partition(":")
    return getattr(import_module(module), attribute)(**options)


def check_batch(losses: nn.ModuleDict, images: int) -> None:
    """Refuse objectives that compare images with each other when there are too few.

    images: of a micro-batch, over all ranks: what they see together; accumulated micro-batches stay apart.
    """
    for name, objective in losses.items():
        wanted = getattr(objective, "min_images", 1)
        if images < wanted:
            raise ConfigError(
                f"{name} compares the images of a micro-batch, of which there are {images} (global_batch_size / accumulate_steps), with each "
                f"other; expected at least {wanted}. Enlarge the batch, lower optim.accumulate_steps (activation_checkpointing=true saves "
                "memory), use `targets: centering`, which works at any size, or set min_images lower to try it."
            )


__all__ = ["OBJECTIVES", "Masks", "Needs", "Progress", "Views", "build", "check_batch", "required"]
