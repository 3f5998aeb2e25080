"""Memory of a pretraining step: by count for the shipped recipes and for ViTs of four sizes, and the count beside a measured peak.

ssl-locat bench memory
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ssl_locat.benchmarks import moves
from ssl_locat.benchmarks.timing import device, make_rows, peak_bytes
from ssl_locat.config.schema import Config, load
from ssl_locat.config.yaml_files import names
from ssl_locat.objectives import Progress
from ssl_locat.optim.optim import build_optimizer
from ssl_locat.pretraining.memory import memory_of, without_memory
from ssl_locat.pretraining.parts import autocasts, build_model, total_loss

RANKS = 8
SIZES = {"ViT-S/16": "vit_small", "ViT-B/16": "vit_base", "ViT-L/16": "vit_large", "ViT-g/14": "vit_giant"}
# form -> what a config says, and on how many GPUs
FORMS = {
    "DDP": (["parallel=ddp"], 8),
    "DDP, recomputing": (["parallel=ddp", "activation_checkpointing=true"], 8),
    "FSDP on 8, recomputing": (["parallel=fsdp", "activation_checkpointing=true"], 8),
    "FSDP on 64, recomputing": (["parallel=fsdp", "activation_checkpointing=true"], 64),
}
MOVED = ["vit_small", "vit_base", "vit_large"]
# recipes made so small that a laptop runs a step, with enough images that what grows with them is most of it
SMALL = [
    "backbone.embed_dim=96",
    "backbone.depth=4",
    "backbone.num_heads=3",
    "optim.global_batch_size=16",
    "optim.accumulate_steps=1",
]
SMALL += ["crops.global_size=96", "crops.local_size=48"]
HEAD = "num_prototypes: 1024, hidden_dim: 256, bottleneck_dim: 64"
MEASURED = {
    "dino_locatvit_s16": [f"objective={{name: dino, {HEAD}}}"],
    "dinov2_locatvit_s16": [
        f"objective=[{{name: dino, {HEAD}}}, {{name: ibot, {HEAD}}}, {{name: koleo, weight: 0.1, min_images: 16}}]"
    ],
}


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    yield "recipes", partial(recipe_rows, names("configs/pretrain")[:2] if quick else names("configs/pretrain"))
    yield "what moves", partial(moves.memory_rows, MOVED[:1] if quick else MOVED)
    yield "sizes", partial(size_rows, dict(list(SIZES.items())[:1]) if quick else SIZES)
    for recipe in list(MEASURED)[:1] if quick else MEASURED:
        for precision in ("fp32", "bf16"):
            yield f"{recipe} made small, {precision}", partial(measured_rows, recipe, precision)


def recipe_rows(recipes: list[str]) -> list[dict]:
    """Each recipe as it is, on as many GPUs as share its batch: one, or a node of eight."""
    counted = {}
    for recipe in recipes:
        config = load(recipe)
        networks = without_memory(config)
        for ranks in (1, RANKS):
            if config.optim.global_batch_size % (ranks * config.optim.accumulate_steps) == 0:
                counted[f"{recipe} on {ranks}"] = memory_of(config, ranks, networks).total / 1e9
    return make_rows("memory", "recipes, by count", "memory", "GB", counted, next(iter(counted)))


def size_rows(sizes: dict[str, str]) -> list[dict]:
    """DINO of 2 x 224 + 8 x 96 px (98 where patches have 14), 65536 prototypes, bf16, 32 images a GPU."""
    rows = []
    for title, name in sizes.items():
        patch = int(title[-2:])
        size = ["crops.local_size=98"] if patch == 14 else []
        counted, networks = {}, None
        for form, (options, ranks) in FORMS.items():
            backbone = [f"backbone.name={name}_patch{patch}_224", f"backbone.patch_size={patch}"]
            config = load("dino_vit_s16", [*backbone, *size, *options, "precision=bf16", f"optim.global_batch_size={32 * ranks}"])
            networks = networks or without_memory(config)  # the same in each form
            counted[form] = memory_of(config, ranks, networks).total / 1e9
        rows += make_rows("memory", f"{title}, 32 images a GPU, by count", "memory", "GB", counted, "DDP")
    return rows


def measured_rows(recipe: str, precision: str) -> list[dict]:
    """The peak of a second step (the optimiser's moments are there then) beside the count."""
    config = load(recipe, [*SMALL, *MEASURED[recipe], f"precision={precision}"])
    found = {"counted": memory_of(config).total / 1e9, "measured": measured(config) / 1e9}
    return make_rows("memory", f"{recipe} made small, {precision}, {device().type}", "memory", "GB", found, "measured")


def measured(config: Config) -> int:
    """Bytes at the peak of a step on this device: weights, and what the allocator or the operators say (timing.peak_bytes)."""
    here = device()
    model, losses = build_model(config, here)
    optimizer = build_optimizer(model.student, config.optim.betas)
    teacher_autocast, student_autocast = autocasts(config, here)
    images, crops = config.optim.global_batch_size, config.crops

    def step() -> None:
        # in here, so that they count
        images_, local = (
            torch.randn(views * images, 3, side, side, device=here)
            for views, side in ((2, crops.global_size), (crops.num_local, crops.local_size))
        )
        masks = model.make_masks(losses, list(range(images)), images_)
        with teacher_autocast:
            targets, _ = model.targets(images_, 2, masks)
        with student_autocast:
            views = model.student(images_, local, 2, masks)
        loss, _ = total_loss(losses, config, views, targets, Progress(0, 0.0, 1.0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for objective in losses.values():
            objective.finish_step()

    def two_steps() -> None:  # as the moments that the first makes live on
        step()
        step()

    return peak_bytes(two_steps) + sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))
