"""How much memory a pretraining step needs on each GPU, by counting: works on models that are too large to build here.

with torch.device("meta"):
    model = StudentTeacher(create_backbone("vit_giant_patch14_224"), losses)
estimate_memory(model, losses, images=16, global_size=224, local_size=98, num_local=8, precision="bf16", parallel="fsdp", world_size=8)
"""

from typing import NamedTuple

from torch import nn

# Bytes that one transformer block keeps for its backward pass, per token and unit of width, with fused attention (counted by
# saved_tensors_hooks; a test counts again). fp32: 16 values: the inputs of both norms and of the four linear layers, q, k, v and
# GELU's input. 16 bit: the same, but for the norms' inputs, which stay fp32, in two bytes.
KEPT = {"fp32": 64, "bf16": 36, "fp16": 36}
# fp32 copies of the student's and teacher's scores, [views, B, K] and [hidden patches, K], that head, softmax and loss keep at their peak
SCORES = 3


class Memory(NamedTuple):
    """Bytes on each GPU."""

    weights: float  # student and teacher, fp32; under 16 bit also the student's copies in that type
    gradients: float  # with DDP a second time, in its buckets
    optimizer: float  # AdamW: two moments
    gathered: float  # FSDP: the whole of what computes just now (and of what comes next)
    activations: float
    scores: float

    @property
    def total(self) -> float:
        return sum(self)


def estimate_memory(
    model: nn.Module,
    objectives: nn.ModuleDict,
    *,
    images: int,
    global_size: int,
    local_size: int,
    num_local: int,
    precision: str = "bf16",
    parallel: str = "ddp",
    world_size: int = 1,
    activation_checkpointing: bool = False,
) -> Memory:
    """Memory of one step; what the allocator loses to fragments (some 5 to 10 %) and the CUDA context (about 1 GB) come on top.

    Args:
        model: a StudentTeacher with a ViT (`.blocks` of one width), on any device; objectives: those it was made for.
        images: per GPU and micro-batch.
        global_size, local_size: of the crops, pixels; two global crops.
    """
    backbone = model.student.backbone
    blocks, width = list(backbone.blocks), backbone.embed_dim
    student, teacher = _count(model.student), _count(model.teacher)
    parts = world_size if parallel == "fsdp" else 1
    low = 2 if precision != "fp32" else 0
    # FSDP holds the block that computes and the next one, gathered; and the heads, where prototypes weigh most
    largest = max([_count(block) for block in blocks] + [_count(head) for head in model.student.heads.values()])
    gathered = 2 * 4 * largest if parts > 1 else 0

    rows, columns = backbone.patch_embed.patch_size
    prefix = getattr(backbone, "num_prefix_tokens", 1)
    tokens = images * (
        2 * (prefix + (global_size // rows) * (global_size // columns))
        + num_local * (prefix + (local_size // rows) * (local_size // columns))
    )
    per_block = tokens * width * KEPT[precision]
    kept = tokens * width * 4 * len(blocks) + per_block if activation_checkpointing else per_block * len(blocks)
    patches = (global_size // rows) * (global_size // columns)
    scores = 0.0  # values: rows of all networks and views, times prototypes
    for objective in objectives.values():
        prototypes = getattr(objective, "num_prototypes", 0)  # KoLeo and the like have none
        hidden = getattr(
            objective, "hidden_share", None
        )  # iBOT scores the hidden patches of the two global crops, by both networks
        scores += prototypes * images * (2 + 2 + num_local if hidden is None else 2 * 2 * patches * hidden)
    return Memory(
        weights=4 * (student + teacher) / parts + low * (largest * 2 if parts > 1 else student),
        gradients=4 * student * (1 if parts > 1 or world_size == 1 else 2) / parts,
        optimizer=8 * student / parts,
        gathered=gathered,
        activations=kept,
        scores=SCORES * 4 * scores,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
