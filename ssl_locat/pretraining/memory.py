"""How much memory a pretraining step needs on each GPU, by counting: works on models that are too large to build here.

    memory_of(load("dinov2_locatvit_l16"), ranks=8).total / 1e9     # GB; what `ssl-locat doctor` and `ssl-locat bench memory` show

Counted on the meta device, where tensors have shapes and no memory.
"""

from typing import NamedTuple

import torch
from torch import nn

from ssl_locat import objectives
from ssl_locat.config.crops_section import Stage
from ssl_locat.config.schema import Config
from ssl_locat.models.backbone import create_backbone, split_options
from ssl_locat.models.moving import backbone_blocks, first_moving_block
from ssl_locat.pretraining.given import freeze, sharing
from ssl_locat.pretraining.parts import cast_by_autocast, make_backbone
from ssl_locat.pretraining.student_teacher import StudentTeacher
from ssl_locat.runs.distributed import GATHERS_CAST

# Bytes that one transformer block keeps for its backward pass, per token and unit of width, with fused attention (counted by
# saved_tensors_hooks; a test counts again). fp32: 16 values: the inputs of both norms and of the four linear layers, q, k, v and
# GELU's input. 16 bit: the same, but for the norms' inputs, which stay fp32, in two bytes.
KEPT = {"fp32": 64, "bf16": 36, "fp16": 36}
# fp32 copies of the student's and teacher's scores, [views, B, K] and [hidden patches, K], that head, softmax and loss keep at their peak
SCORES = 3
SIMILARITIES = 4  # fp32 copies of a Gram matrix [N, N]: student's, anchor's, their difference and its gradient
BATCHES = 2  # of crops: the one that trains and, on a GPU, the next


class Memory(NamedTuple):
    """Bytes on each GPU."""

    weights: float  # student, teacher and frozen anchors, fp32; under 16 bit also the student's copies in that type
    gradients: float  # with DDP a second time, in its buckets
    optimizer: float  # AdamW: two moments
    gathered: float  # FSDP: the whole of what computes just now (and of what comes next), and the gradients of one block
    activations: float
    scores: float  # of prototypes, and Gram matrices
    crops: float

    @property
    def total(self) -> float:
        return sum(self)

    def words(self) -> str:
        """Its parts in GB, the largest first."""
        parts = sorted(self._asdict().items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {size / 1e9:.2g}" for name, size in parts if size >= 0.005 * self.total)


def without_memory(config: Config) -> tuple[StudentTeacher, nn.ModuleDict]:
    """The networks of a config, and its objectives, as shapes alone; built in a second or two."""
    with torch.device("meta"):
        losses = objectives.build(config.objectives)
        backbone = make_backbone(config)
        backbone.pretrained_cfg = {"mean": config.crops.mean, "std": config.crops.std}
        # which of LocAt's parameters `init` brings is not looked up here: all are taken to be new, which is most memory
        freeze(backbone, config, [name for name, _ in backbone.named_parameters() if ".gaug." in name or name.startswith("prr.")])
        return StudentTeacher(
            backbone, losses, _anchors(losses, config), **sharing(config), metadata=config.metadata_sizes
        ), losses


def memory_of(config: Config, ranks: int = 1, networks: tuple[StudentTeacher, nn.ModuleDict] | None = None) -> Memory:
    """Memory of one step of this config on each of `ranks` processes, in the stage that takes most. networks: `without_memory` of it, where it is made
    already."""
    networks = networks or without_memory(config)
    return max(
        (_memory_of_stage(config, ranks, stage, *networks) for stage in config.crops.resolved()), key=lambda found: found.total
    )


def _memory_of_stage(config: Config, ranks: int, stage: Stage, model: StudentTeacher, losses: nn.ModuleDict) -> Memory:
    crops = stage.crops
    return estimate_memory(
        model,
        losses,
        images=(stage.batch_size or config.optim.global_batch_size) // (ranks * config.optim.accumulate_steps),
        global_size=crops.global_size,
        local_size=crops.local_size,
        num_local=crops.num_local,
        anchor_size=crops.anchor_size,
        keep_patches=max(crops.keeps),
        precision="fp32" if config.precision == "auto" else config.precision,  # the most that it can be
        parallel=config.parallel,
        world_size=ranks,
        activation_checkpointing=config.activation_checkpointing,
    )


def _anchors(losses: nn.ModuleDict, config: Config) -> dict[str, nn.Module]:
    """Networks of the sizes of frozen anchors from outside; one that is not named by timm is taken to be as large as the student."""
    found = {}
    for name, objective in losses.items():
        anchor = getattr(objective, "anchor", None)
        if anchor in (None, "teacher"):
            continue
        anchor = str(config.backbone.init) if anchor == "start" else anchor
        model, options = split_options(anchor.removeprefix("timm:"))
        options = {key: value for key, value in options.items() if key != "pretrained"}
        found[name] = create_backbone(model, **options) if anchor.startswith("timm:") else make_backbone(config)
        found[name].pretrained_cfg = {"mean": config.crops.mean, "std": config.crops.std}
    return found


def estimate_memory(
    model: StudentTeacher,
    objectives: nn.ModuleDict,
    *,
    images: int,
    global_size: int,
    local_size: int,
    num_local: int,
    anchor_size: int | None = None,
    keep_patches: float = 1.0,
    precision: str = "bf16",
    parallel: str = "ddp",
    world_size: int = 1,
    activation_checkpointing: bool = False,
) -> Memory:
    """Memory of one step; what the allocator loses to fragments (some 5 to 10 %) and the CUDA context (about 1 GB) come on top.

    Args:
        model: on any device; objectives: those it was made for.
        images: per GPU and micro-batch.
        global_size, local_size, anchor_size: of the crops, pixels; two global crops, and two more for a finer anchor.
        keep_patches: share of the global crops' patches that the student gets.
    """
    backbone = model.student.backbone
    # the teacher's alone: what is frozen it has in common with the student, where nothing is cut into parts
    student, teacher = _count(model.student), _count_besides(model.teacher, model.student)
    moving = sum(parameter.numel() for parameter in model.student.parameters() if parameter.requires_grad)
    parts = world_size if parallel == "fsdp" else 1
    low = 2 if precision != "fp32" else 0
    # copies that autocast makes of the student's weights, and keeps until the loss; FSDP gathers them in that type instead, where torch can
    cast = {id(parameter) for parameter in cast_by_autocast(model.student)} if low else set()
    copies, gathered = low * _count(model.student, cast), 0
    if parts > 1:
        saved = 4 - low if GATHERS_CAST else 0  # bytes of each parameter of `cast` that is gathered
        units = [*backbone_blocks(backbone), *model.student.heads.values()]
        # the one that computes, the next, and the first one's gradients
        gathered = max((2 * 4 + 4) * _count(unit) - 2 * saved * _count(unit, cast) for unit in units)
        copies = 0 if GATHERS_CAST else low * 2 * max(_count(unit, cast) for unit in units)
    if parts > 1:
        teacher = _count(model.teacher)
    # frozen networks are whole on every rank; so is the copy of a sharded teacher that probes evaluate
    whole = _count(model.anchors) + _count_besides(model.snapshots, model.student)
    whole += _count(model.teacher.backbone) if parts > 1 else 0
    kept = images * sum(
        views * _kept_by_blocks(backbone, side, precision, activation_checkpointing, share)
        for views, side, share in ((2, global_size, keep_patches), (num_local, local_size, 1.0))
        if views
    )
    patches = round(keep_patches * _patches(backbone, global_size))
    scores = sum(_scores(objective, images, num_local, patches) for objective in objectives.values())
    channels = len(backbone.pretrained_cfg["mean"])
    pixels = 2 * global_size**2 + num_local * local_size**2 + 2 * (anchor_size or 0) ** 2
    return Memory(
        weights=4 * (student + teacher) / parts + 4 * whole + copies,
        gradients=4 * moving * (1 if parts > 1 or world_size == 1 else 2) / parts,
        optimizer=8 * moving / parts,
        gathered=gathered,
        activations=kept,
        scores=4 * scores,
        crops=BATCHES * 4 * images * channels * pixels,
    )


def _kept_by_blocks(backbone: nn.Module, side: int, precision: str, recompute: bool, share: float) -> float:
    """Bytes that all blocks keep of one crop: Swin's stages have a quarter of the tokens each time, twice as wide."""
    prefix, first = getattr(backbone, "num_prefix_tokens", 0), share * _patches(backbone, side)
    blocks = backbone_blocks(backbone)
    widths = [backbone.embed_dim if hasattr(backbone, "blocks") else block.dim for block in blocks]
    values = [(first * (widths[0] / width) ** 2 + prefix) * width for width in widths]
    values = values[first_moving_block(backbone) :] or [0.0]  # below it nothing is kept for a backward pass
    if recompute:  # the inputs of all, fp32, and the inside of the one that is recomputed
        return 4 * sum(values) + KEPT[precision] * max(values)
    return KEPT[precision] * sum(values)


def _scores(objective: nn.Module, images: int, num_local: int, patches: int) -> float:
    """Numbers in the largest tensors of a loss: rows of all networks and views, times prototypes; pairs of patches."""
    if hasattr(objective, "level"):  # Gram matrices of two global crops
        tokens, count = (patches, 2 * images) if objective.level == "image" else (2 * images * patches, 1)
        return SIMILARITIES * count * tokens**2
    # iBOT scores the hidden patches of the two global crops, by both networks; KoLeo and the like score nothing
    hidden = getattr(objective, "hidden_share", None)
    rows = images * (2 + 2 + num_local if hidden is None else 2 * 2 * patches * hidden)
    prototypes = getattr(objective, "num_prototypes", 0)
    options = getattr(objective, "head_options", {})
    if block := options.get("prototype_block"):
        # block by block (objectives/blocks.py); what remains of all are normalised prototypes of both networks, and the student's gradient
        return SCORES * rows * min(block, prototypes) + 3 * prototypes * options["bottleneck_dim"]
    return SCORES * rows * prototypes


def _patches(backbone: nn.Module, side: int) -> int:
    """Of a square crop, in the first layer."""
    height, width = backbone.patch_embed.patch_size
    return (side // height) * (side // width)


def _count_besides(module: nn.Module, other: nn.Module) -> int:
    """Parameters of a module that are not `other`'s, too."""
    return _count(module) - _count(module, {id(parameter) for parameter in other.parameters()})


def _count(module: nn.Module, among: set[int] | None = None) -> int:
    """Parameters of a module; of those with these ids alone, where given."""
    return sum(parameter.numel() for parameter in module.parameters() if among is None or id(parameter) in among)
