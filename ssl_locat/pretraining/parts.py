"""The parts of a pretraining run, made from its config: data and length, rates, model and losses, how they are distributed, the summed loss."""

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_locat import objectives
from ssl_locat.config.schema import OBJECTIVES, Config, Data
from ssl_locat.data.images.bands import reading
from ssl_locat.data.images.crops import MultiCrop, Sample
from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.left_out import without_left_out
from ssl_locat.data.shards.metadata import check_fields, fields_of, read_all
from ssl_locat.data.shards.selections import Chosen, choose_by_key
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.data.stores.cache import CachedStore
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.plan import micro_batch_size
from ssl_locat.errors import ConfigError
from ssl_locat.evaluation.probe_options import check_probes
from ssl_locat.models.backbone import create_backbone, init_weights, restore_grid
from ssl_locat.models.families.front import LocAtModel
from ssl_locat.models.gaug import GAug
from ssl_locat.models.moving import backbone_blocks
from ssl_locat.models.packing import cannot_pack
from ssl_locat.models.tokens import forward_tokens, input_grid
from ssl_locat.objectives import Progress
from ssl_locat.objectives.masking import Keep
from ssl_locat.objectives.metadata import check_names
from ssl_locat.optim.schedules import LEARNING_RATES, cosine, decayed, straight, warmed_up
from ssl_locat.pretraining.given import freeze, load_anchors, sharing
from ssl_locat.pretraining.probes import check_probe_data
from ssl_locat.pretraining.stages import crop_sizes, stage_at, stages_of, steps_left
from ssl_locat.pretraining.start_heads import load_heads
from ssl_locat.pretraining.student_teacher import Network, StudentTeacher
from ssl_locat.runs import distributed
from ssl_locat.runs.distributed import is_main, world_size
from ssl_locat.runs.marker import read_marker
from ssl_locat.seeds import mix64

log = logging.getLogger(__name__)

WSD_DECAY = 0.2  # of the run, where `decay_epochs` is not given: as LocAtViT's cooldown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Length(NamedTuple):
    """How long the run is. Progress is counted in samples, so that these follow a changed batch size."""

    epoch_samples: int
    steps_per_epoch: int
    total_steps: int
    total_samples: int  # what schedules go by: steps of another batch size may lie behind a run that changed its own


class Since(NamedTuple):
    """Where schedules that do not span the whole run begin: a place in the stream, and the rates there. Kept in checkpoints."""

    samples_seen: int
    lr: float
    weight_decay: float
    momentum: float


class Rates(NamedTuple):
    lr: float
    weight_decay: float
    momentum: float


def check(config: Config, ranks: int = 1, may_write: bool = True) -> tuple[list[Dataset], list[float], Length]:
    """Everything that can be found wrong without building a model; returns the data sets, their weights, and how long the run is.

    may_write: make the image set of `data.make` if it is not there. Without it, what stands in for that set has only its length.

    Raises:
        UserError: with what is wrong and how to mend it.
    """
    micro_batch_size(config.optim.global_batch_size, ranks, config.optim.accumulate_steps)
    for number, stage in enumerate(config.crops.stages, start=1):
        if stage.batch_size:
            what = f"batch_size of stage {number} of crops"
            micro_batch_size(stage.batch_size, ranks, config.optim.accumulate_steps, what)
    if config.optim.name == "muon" and config.parallel == "fsdp" and ranks > 1:
        raise ConfigError(
            "optim.name is muon and parallel fsdp: Muon orthogonalises whole matrices, of which each rank holds a part. Take parallel=ddp, or "
            "optim.name=adamw."
        )
    if config.compile == "cuda-graphs" and config.parallel == "fsdp" and ranks > 1:
        raise ConfigError(
            "compile is cuda-graphs with parallel: fsdp: graphs want weights that stay where they are, and FSDP gathers them anew each time. "
            "Take compile: true, or parallel: ddp."
        )
    rising = next((stage.crops.keeps for stage in config.crops.resolved() if stage.crops.keeps[0] != stage.crops.keeps[1]), None)
    if config.compile and rising:
        raise ConfigError(
            f"compile is {str(config.compile).lower()}, and crops.keep_patches goes from {rising[0]:g} to {rising[1]:g}: each number of patches would be "
            "compiled anew. Give a few stages of crops with one share each, or compile: false."
        )
    check_backbone(config)
    for option in config.objectives:
        if option.name == "metadata":  # before a job waits in a queue for it
            check_names([*option.options.get("nuisance", ()), *option.options.get("informative", ())], config.metadata_sizes)
    check_probes(config)
    # two commands on a fresh machine: rank 0 makes the images, the others wait
    made = config.data.make
    to_come = made if made is not None and not may_write and not Path(made.folder).is_dir() else None
    if made and not to_come:
        if is_main():
            make_textures(made.folder, **made.model_dump(exclude={"folder"}))
        distributed.barrier()
    budget, cache = 60 * config.data.retry_minutes, config.data.cache
    store = CachedStore(cache.folder, int(cache.max_gb * 1e9), budget_seconds=budget) if cache else Store(budget_seconds=budget)
    fields = fields_of(config.data.model_dump(mode="json")["metadata"])
    datasets: list[Any] = [range(to_come.num_train)] if to_come else []
    weights = [1.0]
    if not to_come:
        opened, weights = open_mix(
            config.data.model_dump()["train"], store=store, split="train", in_groups=True, metadata=bool(fields)
        )
        datasets = [without_left_out(dataset) for dataset in opened]
        if config.data.held_out:
            datasets = [without_held_out(datasets, config.data.held_out)]
        if is_main():
            check_fields(fields, datasets)
    if config.data.epoch_samples is None and len(datasets) > 1:
        raise ConfigError(
            "data.train mixes several data sets: say how many samples count as an epoch, such as data.epoch_samples=1281167."
        )
    if not to_come:  # probes of a made set read it, too
        check_probe_data(config)
    return datasets, weights, run_length(config, datasets)


def without_held_out(datasets: list[Dataset], count: int) -> Chosen:
    """The samples that are trained on: all but those that the guard judges by, which are chosen by their keys as it chooses them."""
    if len(datasets) > 1:
        raise ConfigError(
            "data.held_out keeps images of one set from training, data.train mixes several: give data.validation instead."
        )
    (dataset,) = datasets
    if count > len(dataset) // 2:
        raise ConfigError(
            f"data.held_out is {count}, of the {len(dataset):,} images of data.train: more than half. Give at most {len(dataset) // 2}, or data.validation."
        )
    return Chosen(dataset, np.setdiff1d(np.arange(len(dataset)), choose_by_key(dataset, count)))


def run_length(config: Config, datasets: list[Dataset]) -> Length:
    """How long a run of this config on these data is."""
    batch = config.optim.global_batch_size
    epoch_samples = config.data.epoch_samples or len(datasets[0])
    images = sum(map(len, datasets))
    if batch > images and is_main():
        log.warning(
            "optim.global_batch_size is %d, but data.train holds %d images: every batch holds some of them twice. Give at most %d.",
            batch,
            images,
            max(1, images // 2),
        )
    steps_per_epoch = max(1, epoch_samples // batch)
    if config.optim.epochs and config.optim.epochs * steps_per_epoch < 0.5:
        raise ConfigError(
            f"optim.epochs is {config.optim.epochs:g}: of {epoch_samples:,} images ({steps_per_epoch:,} steps of {batch} an epoch) that is not one "
            f"step. Give at least {1 / steps_per_epoch:.2g}, or optim.total_steps."
        )
    total_steps = config.optim.total_steps or max(1, round((config.optim.epochs or 0) * steps_per_epoch))
    total_samples = total_steps * batch
    # as many images with stages of another batch size: then in another number of steps
    steps = steps_left(stages_of(config, total_samples), 0, total_samples)
    length = Length(epoch_samples, steps_per_epoch, steps, total_samples)
    if (decay := decay_steps(config, length)) > total_samples / batch:  # all three in steps of optim.global_batch_size
        raise ConfigError(
            f"optim.decay_epochs is {config.optim.decay_epochs:g}, {decay:g} steps: longer than the run, which has {total_steps:,}. Give at most "
            f"{total_steps / steps_per_epoch:g}."
        )
    return length


def rates(config: Config, length: Length, samples_seen: int, since: Since | None = None) -> Rates:
    """Learning rate, weight decay and teacher momentum of the step that begins here, functions of the samples seen.

    In a stage with k times the batch: k times the lr (the linear rule again), and the momentum to the power of k, so that the teacher looks back over as
    many images as before (arXiv:2307.13813, EMA scaling rule)."""
    factor = stage_at(stages_of(config, length.total_samples), samples_seen).batch / config.optim.global_batch_size
    found = scheduled(config, length, samples_seen, since)
    return found if factor == 1 else Rates(factor * found.lr, found.weight_decay, found.momentum**factor)


def scheduled(config: Config, length: Length, samples_seen: int, since: Since | None = None) -> Rates:
    """The rates for steps of optim.global_batch_size.

    `cosine`: DINO's schedules over the whole run; `constant_cooldown`: so, but for the lr (optim/schedules.py). `restart`: the same ones,
    warm-up included, from `since` to the end. `wsd` (warm-up-stable-decay, arXiv:2404.06395): warm-up of the lr, then all three stay at
    their first values, and over the last `decay_epochs` go straight to their ends, the lr to 0 (arXiv:2502.15938); nothing before the decay
    depends on the length of the run. `decay`: the same decay from `since` to the end, from whatever values the run had there. The step
    after the last would have the ends.
    """
    optim, batch = config.optim, config.optim.global_batch_size
    begin = since.samples_seen if since and optim.schedule in ("restart", "decay") else 0
    # steps of today's batch, fractions where it was another one before
    iteration, total = (samples_seen - begin) / batch, (length.total_samples - begin) / batch
    warmup = optim.warmup_epochs * length.steps_per_epoch
    if optim.schedule in ("wsd", "decay"):
        before = since if optim.schedule == "decay" else None
        lr, weight_decay, momentum = (
            before[1:]
            if before
            else (
                warmed_up(iteration, warmup, optim.warmup_start_lr, optim.lr * batch / 256),
                optim.weight_decay[0],
                config.teacher.momentum[0],
            )
        )
        done = decay_done(config, length, samples_seen, since)
        return Rates(
            straight(done, lr, 0.0),
            straight(done, weight_decay, optim.weight_decay[1]),
            straight(done, momentum, config.teacher.momentum[1]),
        )
    return Rates(
        LEARNING_RATES.get(optim.schedule, cosine)(
            iteration, total, optim.lr * batch / 256, optim.min_lr, warmup, optim.warmup_start_lr
        ),
        cosine(iteration, total, *optim.weight_decay),
        cosine(iteration, total, *config.teacher.momentum),
    )


def decay_done(config: Config, length: Length, samples_seen: int, since: Since | None = None) -> float:
    """0 to 1: how much of the decay of `wsd` or `decay` lies behind; 0 with the other schedules, which have none."""
    batch, total = config.optim.global_batch_size, length.total_samples
    return decayed(samples_seen / batch, total / batch, decay_steps(config, length, since))


def decay_steps(config: Config, length: Length, since: Since | None = None) -> float:
    """How many steps at the run's end are its decay; 0 with the schedules that have none."""
    optim, batch = config.optim, config.optim.global_batch_size
    if optim.schedule == "decay" and since:
        return (length.total_samples - since.samples_seen) / batch
    if optim.schedule != "wsd":
        return 0.0
    if optim.decay_epochs is None:
        return WSD_DECAY * length.total_samples / batch
    return optim.decay_epochs * length.steps_per_epoch


def make_backbone(config: Config) -> nn.Module:
    options = {"img_size": config.crops.global_size, **config.backbone.options}
    return create_backbone(config.backbone.name, drop_path_rate=config.backbone.drop_path_rate, **options)


def check_backbone(config: Config) -> None:
    """UserError if the backbone cannot be made, or does not take crops of these sizes; allocates nothing."""
    moves = config.backbone.trainable
    if moves != "full" and not config.backbone.init:
        raise ConfigError(
            f"backbone.trainable is {moves}, but backbone.init is not given: random weights would stay as they were drawn. Give backbone.init, or "
            "take trainable: full."
        )
    for option in config.objectives:
        if option.options.get("anchor") == "start" and not config.backbone.init:
            raise ConfigError(
                f"{option.name}: its anchor is the start, but backbone.init is not given. Give it, or anchor: teacher, a copy of this run's own "
                "network."
            )
    # shapes without memory: a ViT-g is checked on a login node
    with torch.device("meta"):
        backbone = make_backbone(config)
        freeze(backbone, config)
        if config.backbone.pack_crops is True and (reason := why_not_packed(config, backbone)):
            raise ConfigError(f"backbone.pack_crops is true, but {reason}. Set it to auto or false.")
        for name, size, where, share in crop_sizes(config):
            try:
                backbone.patch_embed(torch.empty(1, len(config.crops.mean), size, size))
                if name == "global_size" and share < 1:
                    check_kept(backbone, torch.empty(1, len(config.crops.mean), size, size), share)
            except (AssertionError, RuntimeError) as error:
                raise ConfigError(
                    f"crops.{name} is {size} pixels{where}, which {config.backbone.name} does not take: {error} Sides are multiples of the patch size."
                ) from None


def check_kept(backbone: nn.Module, crop: torch.Tensor, share: float) -> None:
    """UserError for a backbone that cannot leave patches out."""
    grid = input_grid(backbone, crop)
    forward_tokens(backbone, crop, kept=torch.zeros(1, Keep(share).count(grid.rows * grid.cols), dtype=torch.int64))


def why_not_packed(config: Config, backbone: nn.Module) -> str | None:
    """A reason why the crops of this config cannot go through the student in one pass; None if they can."""
    if not config.crops.num_local:
        return "there are no local crops: a batch is one pass already"
    if config.compile:
        return "compiled networks are not packed: they take a pass for each size"
    reason = cannot_pack(backbone)
    return reason and f"{config.backbone.name} {reason}"


def build_model(config: Config, device: torch.device, checkpoint: Path | None = None) -> tuple[StudentTeacher, nn.ModuleDict]:
    """Student and teacher, and the objectives, on the device; a pure function of config and seed.

    checkpoint: the one whose weights will be loaded next; `backbone.init` need not be there any more then."""
    # stream 0 of the seed: weights; 1 are the masks
    torch.manual_seed(mix64(config.seed, 0))
    backbone = make_backbone(config)
    backbone.pretrained_cfg = {
        **(getattr(backbone, "pretrained_cfg", None) or {}),
        "mean": config.crops.mean,
        "std": config.crops.std,
        "channels": config.channels,
    }
    # what the start's weights did not bring; a checkpoint remembers it
    backbone.new_parameters = []
    if checkpoint:
        restore_grid(backbone, checkpoint)
        backbone.new_parameters = read_marker(checkpoint)["meta"].get("new_parameters", [])
    elif config.backbone.init:
        backbone.new_parameters = init_weights(backbone, config.backbone.init)
    freeze(backbone, config, backbone.new_parameters)
    losses = objectives.build(config.objectives)
    batches = [stage.batch_size or config.optim.global_batch_size for stage in config.crops.resolved()]
    objectives.check_batch(losses, min(batches) // config.optim.accumulate_steps)
    model = StudentTeacher(
        backbone,
        losses,
        load_anchors(losses, config),
        pack_crops=config.backbone.pack_crops is True,
        **sharing(config),
        metadata=config.metadata_sizes,
    ).to(device)
    if config.backbone.init_heads and config.backbone.init and not checkpoint:
        load_heads(model, config.backbone.init)
    check_anchor_crops(model, config)
    if config.optim.accumulate_steps > 1 and any(isinstance(part, nn.BatchNorm1d) for part in model.student.heads.modules()):
        raise ConfigError("batch_norm in a head sees one micro-batch at a time: with it, optim.accumulate_steps must be 1.")
    return model, losses.to(device)


def check_anchor_crops(model: StudentTeacher, config: Config) -> None:
    """ConfigError where an anchor sees larger crops than any that are cut: enlarged ones would show it nothing finer."""
    sides = [stage.crops.global_size for stage in config.crops.resolved()]
    anchors = [*model.anchors.items(), *model.snapshots.items()]
    for side, (name, anchor) in itertools.product(sides, anchors):
        cut = config.crops.anchor_size or side
        grid = input_grid(model.student.backbone, torch.empty(0, len(config.crops.mean), side, side, device="meta"))
        if (wanted := max(anchor.size(grid))) > cut:
            raise ConfigError(
                f"{name}: with anchor_scale {anchor.scale:g} its anchor sees crops of {wanted} pixels, but the largest that are cut have {cut}. "
                f"Set crops.anchor_size={wanted}: they are cut from the images at that size then."
            )


def saved_modules(model: StudentTeacher, losses: nn.ModuleDict) -> dict[str, nn.Module]:
    """What a checkpoint holds, by the prefix of its names in there."""
    return {"student": model.student, "teacher": model.teacher, "objective": losses, "snapshot": model.snapshots}


def mask_seeds(config: Config, positions: Iterable[int]) -> list[int]:
    """One per image, of its place in the stream: any resume and any number of ranks hides the same patches."""
    return [mix64(config.seed, 1, int(position)) for position in positions]


def distribute(model: StudentTeacher, config: Config, device: torch.device) -> nn.Module:
    """The student as the loop calls it: compiled, recomputing its blocks, its gradients averaged over ranks, as the config says."""
    blocks = {network: backbone_blocks(network.backbone) for network in (model.student, model.teacher)}
    if config.activation_checkpointing:
        # the student alone: the teacher keeps nothing for a backward pass
        distributed.checkpoint_activations(blocks[model.student])
    sharded = config.parallel == "fsdp" and world_size() > 1
    if config.compile:
        compile_in_place(blocks, config.compile == "cuda-graphs", whole=not sharded)
    if world_size() == 1:
        return model.student
    if sharded:
        precisions = (config.precision, config.teacher.precision or config.precision)
        for (network, parts), precision in zip(blocks.items(), precisions, strict=True):
            # KoLeo's and Gram's heads have no parameters to gather
            heads = [head for head in network.heads.values() if any(True for _ in head.parameters())]
            distributed.shard(network, [*parts, *heads], device, DTYPES[precision], cast_by_autocast(network))
        return model.student
    # looking for unused parameters walks the whole graph once a step
    ids = [device.index] if device.type == "cuda" else None
    # ours leave no parameter without a gradient; of someone else's model or loss nobody knows
    own_model = isinstance(model.student.backbone, LocAtModel) or type(model.student.backbone) is VisionTransformer
    ours = (
        own_model
        and getattr(model.student.backbone, "attn_pool", None) is None
        and all(objective.name in OBJECTIVES for objective in config.objectives)
    )
    return DistributedDataParallel(model.student, device_ids=ids, find_unused_parameters=not ours)


def compile_in_place(blocks: dict[Network, list[nn.Module]], cuda_graphs: bool, whole: bool) -> None:
    """torch.compile the networks, or each of their blocks. In place: a wrapper would put `_orig_mod.` before each name of a checkpoint."""
    mode = "reduce-overhead" if cuda_graphs else None
    for network, parts in blocks.items():
        if whole:
            network.compile(mode=mode)  # dynamic sizes are found out: the number of hidden patches changes
            continue
        for block in parts:
            # its forward alone: FSDP's hooks, which gather the block, stay outside and need no compiler
            block.forward = torch.compile(block.forward, mode=mode)


def cast_by_autocast(network: nn.Module) -> list[nn.Parameter]:
    """Most of a network: linear layers and convolutions. Norms, positions, GAug and the normalisation of prototypes compute in float32."""
    exact = {id(parameter) for module in network.modules() if isinstance(module, GAug) for parameter in module.parameters()}
    layers = (module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False) if id(parameter) not in exact]


class Prepare:
    """From a raw sample to its crops; runs in the loader's workers."""

    def __init__(self, crops: MultiCrop, data: Data):
        # a class and no closure: workers that are not forked get it pickled
        self.crops, self.image_key = crops, data.image_key
        self.options: dict[str, Any] = {
            "channels": reading(data.channels.model_dump(mode="json") if data.channels else None, crops.mean),
            "max_pixels": data.max_pixels,
        }
        self.fields = fields_of(data.model_dump(mode="json")["metadata"])

    def __call__(self, sample: RawSample, seed: int) -> Sample:
        metadata = read_all(self.fields, sample.members)  # first: a sample that is refused for it need not be decoded
        cut = self.crops.cut(decode_image(find_image(sample.members, self.image_key), **self.options), seed)
        return cut._replace(metadata=metadata) if metadata else cut


def autocasts(config: Config, device: torch.device) -> tuple[torch.autocast, torch.autocast]:
    """What the teacher's forward pass runs under, and the student's."""
    teacher, student = (
        torch.autocast(device.type, DTYPES[name], enabled=name != "fp32")
        for name in (config.teacher.precision or config.precision, config.precision)
    )
    return teacher, student


def total_loss(
    losses: nn.ModuleDict, config: Config, views: dict, targets: dict, at: Progress
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the objectives; their metrics, under their own names where there are several."""
    total: Any = 0.0
    metrics: dict[str, Tensor] = {}
    for option in config.objectives:
        loss, seen = losses[option.name](views[option.name], targets[option.name], at)
        # metrics show a loss as it is, without its weight
        total = total + option.weight_at(at.epoch / at.total_epochs) * loss
        if len(losses) > 1:
            seen = {option.name: loss.detach(), **{f"{option.name}_{name}": value for name, value in seen.items()}}
        metrics.update(seen)
    return total, metrics


def describe(config: Config, model: StudentTeacher, length: Length, datasets: list[Dataset], device: torch.device) -> str:
    """One paragraph at the start: what runs, on what, how long."""
    backbone = sum(parameter.numel() for parameter in model.student.backbone.parameters())
    heads = sum(parameter.numel() for parameter in model.student.heads.parameters())
    batches, scaled = {stage.batch for stage in stages_of(config, 1)}, config.optim.lr * config.optim.global_batch_size / 256
    batch = " to ".join(map(str, sorted({min(batches), max(batches)})))
    moving = sum(parameter.numel() for parameter in model.student.backbone.parameters() if parameter.requires_grad)
    share = "" if config.backbone.trainable == "full" else f", of which {moving / 1e6:.2f} M move ({config.backbone.trainable})"
    return (
        f"{config.backbone.name} ({backbone / 1e6:.2f} M parameters{share}, heads {heads / 1e6:.2f} M) on {device} x {world_size()}, {config.precision}; "
        f"{sum(map(len, datasets)):,} images; {length.total_steps:,} steps of {batch} ({length.steps_per_epoch:,} an epoch), "
        f"lr {scaled:.3g}" + (f"; {len(config.crops.stages)} stages of crops" if config.crops.stages else "")
    )
