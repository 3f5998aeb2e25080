"""What a step costs where all of a backbone moves, its last four blocks, or adapters: time and peak memory measured, large ones by count.

ssl-locat bench step; ssl-locat bench memory
"""

import importlib.util
from functools import partial
from typing import Any

from torch import nn

from ssl_locat.benchmarks.objectives import Step
from ssl_locat.benchmarks.timing import device, make_rows, peak_bytes, side_by_side, time_rows
from ssl_locat.config.schema import load
from ssl_locat.models.backbone import create_backbone
from ssl_locat.models.moving import choose_moving
from ssl_locat.objectives.dino import DINO
from ssl_locat.objectives.gram import Gram
from ssl_locat.pretraining.memory import memory_of

PROTOTYPES = 4096
MOVES: dict[str, dict[str, Any]] = {
    "full": {"trainable": "full"},
    "last 4": {"trainable": "last", "last_blocks": 4},
    "lora 16": {"trainable": "lora", "rank": 16},
}


def shown() -> dict[str, dict[str, Any]]:
    """Those that can be made here: adapters need peft."""
    return {name: how for name, how in MOVES.items() if how["trainable"] != "lora" or importlib.util.find_spec("peft")}


def rows(repeats: int, quick: bool = False) -> list[dict]:
    """DINO and a Gram anchor on a ViT-S/14 without LocAt, 2 x 98 + 4 x 42 px: time and peak of a step, its weights apart."""
    batch = 64 if device().type == "cuda" else 2 if quick else 8
    steps, weights = {}, {}
    for name, how in shown().items():
        smaller = {"embed_dim": 96, "depth": 6, "num_heads": 3} if quick else {}
        backbone = create_backbone("vit_small_patch14_dinov2", img_size=98, **smaller)
        choose_moving(backbone, **how)
        losses: dict[str, nn.Module] = {"dino": DINO(num_prototypes=PROTOTYPES), "gram": Gram()}
        steps[name] = Step(losses, batch, backbone, sizes=(98, 42), share_frozen=True)
        weights[name] = 4 * sum(parameter.numel() for parameter in steps[name].model.parameters()) / 2**20
    case = f"what moves, {'a small ViT' if quick else 'ViT-S/14'}, DINO + Gram, 2x98 + 4x42 px, batch {batch}, fp32"
    result = time_rows("step", case, side_by_side(steps, repeats, warmup=1), "full")
    memory = {name: peak_bytes(partial(_steps, step)) / 2**20 for name, step in steps.items()}
    result += make_rows("step", case, "peak memory beside weights", "MiB", memory, "full")
    return result + make_rows("step", case, "weights of student, teacher and anchor", "MiB", weights, "full")


def _steps(step: Step) -> None:
    step.optimizer.state.clear()  # its moments count: made by the first step, kept for the second
    step()
    step()


def memory_rows(names: list[str]) -> list[dict]:
    """32 images of 2 x 224 + 8 x 98 px on one GPU, bf16, DINO with 65536 prototypes; counted."""
    result = []
    for name in names:
        counted = {}
        for title, how in shown().items():
            moves = [f"backbone.{key}={how[key]}" for key in ("trainable", "last_blocks") if key in how]
            backbone = [f"backbone.name={name}_patch14_dinov2", "backbone.patch_size=14"]
            options = ["crops.local_size=98", "precision=bf16", "optim.global_batch_size=32", "optim.accumulate_steps=1"]
            counted[title] = memory_of(load("dino_vit_s16", [*backbone, *moves, *options])).total / 1e9
        result += make_rows("memory", f"what moves, {name}, 32 images, by count", "memory", "GB", counted, "full")
    return result
