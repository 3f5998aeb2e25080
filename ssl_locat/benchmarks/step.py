"""The training step: LocAt beside the vanilla model, our DINO step beside one written as the publication describes it, and every
objective beside DINO alone."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssl_locat.benchmarks import cheaper, crops, label_free, moves, objectives, scaling, slow_step
from ssl_locat.benchmarks.networks import PAIRS, PROGRESS, autocast, forward_backward, make_model, our_stepper, tiny_pair
from ssl_locat.benchmarks.timing import device, make_rows, peak_bytes, precisions, side_by_side, time_rows
from ssl_locat.data.images.crops import MultiCrop
from ssl_locat.models.attention import forced_backend
from ssl_locat.models.packing import allow_packing, packed_tokens
from ssl_locat.models.tokens import forward_tokens
from ssl_locat.objectives.dino import DINO
from ssl_locat.optim.optim import build_optimizer, clip_gradients
from ssl_locat.pretraining.student_teacher import StudentTeacher

# what published code calls, whatever `tokens.unfused_if_short` takes for ours
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
# dense bfloat16 peaks without sparsity, from the vendor's data sheets, FLOP/s
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    on_gpu, repeats = device().type == "cuda", 5 if quick else 11
    for precision in precisions():
        # large batches fill a GPU, and hide what launching costs on a CPU; a GPU's models are also compiled
        for batch in (64, 256) if on_gpu else (2,) if quick else (2, 8):
            case = f"ViT-S 224 px {precision}, batch {batch}"
            yield case, partial(model_rows, case, "ViT-S", 224, batch, repeats, precision, compiled=on_gpu and not quick)
    for name in ("vanilla", "LocAt"):
        case = f"packing, {name} ViT-S, 2x224 + 8x96 px"
        yield case, partial(packing_rows, case, name, 2 if quick else repeats)
    yield "DINO", partial(dino_rows, repeats, compiled=not quick)
    if not on_gpu:
        yield "whole job", partial(job_rows, repeats)
    yield "objectives", partial(objectives.rows, 2 if quick else repeats)
    yield "stages and kept patches", partial(cheaper.rows, 2 if quick else repeats)
    yield "what moves", partial(moves.rows, 2 if quick else repeats, quick)
    if quick:
        return
    yield "label-free measures", partial(label_free.rows, 3)
    for precision in precisions():
        case = f"ViT-S 512 px {precision}"
        yield case, partial(model_rows, case, "ViT-S", 512, 16 if on_gpu else 1, 5, precision, compiled=on_gpu)
    if on_gpu:
        for batch in (64, 256):
            case = f"ViT-B 224 px bf16, batch {batch}"
            yield case, partial(model_rows, case, "ViT-B", 224, batch, repeats, "bf16", compiled=True)
    yield "parts", partial(part_rows, repeats)
    yield from scaling.cases(repeats)
    for name in PAIRS:
        for size in (224, 512):
            yield f"memory, {name} {size} px", partial(memory_rows, name, size)


def model_rows(case: str, name: str, size: int, batch: int, repeats: int, precision: str, compiled: bool) -> list[dict]:
    """Forward + backward of the vanilla model, of LocAt's, and of LocAt's with the bias computed by the published formula; on demand both
    models compiled, and compiled into CUDA graphs, which take the launching out of the comparison."""
    models = dict(zip(("vanilla", "LocAt"), (make_model(model, size) for model in PAIRS[name]), strict=True))
    images = torch.randn(batch, 3, size, size, device=device())
    dtype = precisions()[precision]

    def by_formula() -> None:
        with forced_backend("reference"):
            forward_backward(models["LocAt"], images, dtype)

    networks: dict[str, Any] = dict(models)
    for way, mode in {"compiled": None, "CUDA graphs": "reduce-overhead"}.items() if compiled else ():
        networks |= {f"{variant}, {way}": torch.compile(copy.deepcopy(model), mode=mode) for variant, model in models.items()}
    variants: dict[str, Callable[[], object]] = {
        **{name: partial(forward_backward, network, images, dtype) for name, network in networks.items()},
        "LocAt, published formula": by_formula,
    }
    timings = side_by_side(variants, repeats, warmup=3 if compiled else 1)  # a graph is captured in the second call
    result = time_rows("step", case, timings, "vanilla")
    if device().type == "cuda" and precision == "bf16":
        result += utilisation_rows(case, models["vanilla"], images, timings)
    return result


def packing_rows(case: str, name: str, repeats: int) -> list[dict]:
    """Forward + backward of a student's crops: a pass for each size beside one for both (backbone.pack_crops)."""
    images = 32 if device().type == "cuda" else 1
    precision, dtype = list(precisions().items())[-1]
    name = PAIRS["ViT-S"][name == "LocAt"]
    torch.manual_seed(0)
    model = allow_packing(timm.create_model(name, num_classes=0, img_size=224, dynamic_img_size=True).to(device()))
    crops = [torch.randn(views * images, 3, side, side, device=device()) for views, side in ((2, 224), (8, 96))]

    def both(packed: bool) -> None:
        with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
            tokens = packed_tokens(model, crops) if packed else [forward_tokens(model, one) for one in crops]
            loss: Any = sum(one.patches.float().square().mean() for one in tokens)
        loss.backward()
        model.zero_grad(set_to_none=True)

    variants = {"a pass for each size": partial(both, False), "packed": partial(both, True)}
    case = f"{case}, {images} images {precision}"
    result = time_rows("step", case, side_by_side(variants, repeats), "a pass for each size")
    memory = {variant: peak_bytes(call) / 2**20 for variant, call in variants.items()}
    return result + make_rows("step", case, "peak memory", "MiB", memory, "a pass for each size")


def utilisation_rows(case: str, vanilla: nn.Module, images: torch.Tensor, timings: dict) -> list[dict]:
    """Model FLOP utilisation: the vanilla model's operations, forward + backward, over time and the device's dense peak."""
    from torch.utils.flop_counter import FlopCounterMode

    device_name = torch.cuda.get_device_name()
    peak = next((peak for name, peak in PEAKS.items() if name in device_name), None)
    if peak is None:
        return []
    # of matrix products, convolutions and attention; a multiply-accumulate counts as two
    with FlopCounterMode(display=False) as counter:
        forward_backward(vanilla, images, torch.float32)
    shares = {name: 100 * counter.get_total_flops() / timing.seconds / peak for name, timing in timings.items()}
    return make_rows("step", f"{case}, of {peak / 1e12:.0f} TFLOP/s", "MFU", "%", shares, "vanilla")


def memory_rows(name: str, size: int) -> list[dict]:
    """Peak bytes that one more image costs in a forward + backward, with and without activation checkpointing.

    Gradients are there before, as otherwise they hide what few images need."""
    precision, dtype = list(precisions().items())[-1]
    few = 1 if size > 224 else 2
    result = []
    for checkpointing in (False, True):
        values = {}
        for variant, model_name in zip(("vanilla", "LocAt"), PAIRS[name], strict=True):
            model = make_model(model_name, size)
            model.set_grad_checkpointing(checkpointing)
            images = torch.randn(2 * few, 3, size, size, device=device())
            forward_backward(model, images[:1], dtype, keep_gradients=True)
            peaks = [peak_bytes(partial(forward_backward, model, x, dtype, True)) for x in (images[:few], images)]
            # the difference of two batches: weights, gradients and workspaces drop out
            values[variant] = (peaks[1] - peaks[0]) / few / 2**20
        case = f"{name} {size} px {precision}" + ", checkpointing" * checkpointing
        result += make_rows("step", case, "memory per image", "MiB", values, "vanilla")
    return result


def dino_rows(repeats: int, compiled: bool) -> list[dict]:
    """Whole steps, 2 x 32 + 4 x 16 px, from the same weights, ours and as published, in fp32 and where there are instructions for it in bf16; the first
    losses must agree. Compiling takes a minute or so."""
    batch = 512 if device().type == "cuda" else 32
    globals_, locals_ = (torch.randn(n * batch, 3, s, s, device=device()) for n, s in ((2, 32), (4, 16)))
    steppers: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}
    for name, dtype in precisions().items():
        suffix = "" if name == "fp32" else f", {name}"
        steppers |= {
            f"as published{suffix}": slow_stepper(*tiny_pair(4096), dtype),
            f"ours{suffix}": our_stepper(*tiny_pair(4096), dtype),
        }
    modes = {"compiled": None} | ({"CUDA graphs": "reduce-overhead"} if device().type == "cuda" else {})
    for name, mode in modes.items() if compiled else ():
        model, objective = tiny_pair(4096)
        for network in (model.student, model.teacher):
            network.compile(mode=mode)
        steppers[f"ours, {name}"] = our_stepper(model, objective)
    steps = {name: partial(step, globals_, locals_) for name, step in steppers.items()}
    # the first step is also the check: a step that is quick because it computes something else is no gain
    losses = {name: float(step()) for name, step in steps.items()}
    # bf16 keeps 8 bits of each score, of which a loss is a mean
    tolerances = {name: 1e-2 if "bf16" in name else 1e-4 for name in losses}
    if any(abs(loss - losses["as published"]) > tolerances[name] * losses["as published"] for name, loss in losses.items()):
        raise RuntimeError(f"the DINO steps disagree, so their times mean nothing: {losses}")
    timings = side_by_side(steps, repeats, warmup=1)
    case = f"DINO, ViT 2.7 M, 2x32 + 4x16 px, batch {batch}"
    result = time_rows("step", case, timings, "as published")
    speeds = {name: batch / timing.seconds for name, timing in timings.items()}
    unit = "images/s" if device().type == "cuda" else "images/s/core"
    result += make_rows("step", case, "throughput", unit, speeds, "as published")
    # operators are not seen in compiled code
    memory = {name: peak_bytes(step) / 2**20 for name, step in steps.items() if "compiled" not in name and "graphs" not in name}
    return result + make_rows("step", case, "peak memory", "MiB", memory, "as published")


def slow_stepper(
    model: StudentTeacher, objective: DINO, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same, as published."""
    parameters = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.04, foreach=False, fused=False)

    def step(globals_: torch.Tensor, locals_: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast(dtype):
            targets = model.teacher(globals_, None, 2)["dino"]
        with autocast(dtype), sdpa_kernel(FUSED):
            scores = model.student(globals_, locals_, 2)["dino"]
        loss = slow_step.pairwise_loss(scores, targets, objective.center, 0.1, 0.04)
        # as published code does each step, for its log: on a GPU the host waits here
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        slow_step.clip_each(parameters, 3.0)
        optimizer.step()
        objective.center.mul_(0.9).add_(0.1 * targets.mean((0, 1)))
        slow_step.update_each(model.teacher, model.student, 0.996)
        return loss.detach()

    return step


def job_rows(repeats: int) -> list[dict]:
    """Images per second and core of the whole job: small JPEGs, crops and step, by the published code's ways and by ours."""
    batch, jpegs = 32, crops.make_jpegs(32, 48, 48)
    augmentation, multi_crop = crops.dino_augmentation(32, 16, 4), MultiCrop(32, 16, 4, mode="cpu")

    def as_published(step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        views = crops.dino_batch(jpegs, augmentation)
        step(torch.cat(views[:2]), torch.cat(views[2:]))

    def as_ours(step: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> None:
        step(*crops.our_batch(jpegs, multi_crop)[:2])

    variants: dict[str, Callable[[], object]] = {}
    for name, dtype in precisions().items():
        suffix = "" if name == "fp32" else f", {name}"
        variants |= {
            f"as published{suffix}": partial(as_published, slow_stepper(*tiny_pair(4096), dtype)),
            f"ours{suffix}": partial(as_ours, our_stepper(*tiny_pair(4096), dtype)),
        }
    timings = side_by_side(variants, repeats, warmup=1)
    speeds = {name: batch / timing.seconds for name, timing in timings.items()}
    spreads = {name: timing.spread for name, timing in timings.items()}
    case = "whole job: 48 x 48 JPEGs, crops, DINO step, ViT 2.7 M, 2x32 + 4x16 px, batch 32"
    return make_rows("step", case, "throughput", "images/s/core", speeds, "as published", spreads)


def part_rows(repeats: int) -> list[dict]:
    """What surrounds the network, on ViT-Ti with 65536 prototypes: loss, clipping, optimiser, teacher update."""
    batch, prototypes = 8, 65536
    model, objective = tiny_pair(prototypes)
    model = StudentTeacher(timm.create_model("vit_tiny_patch16_224", num_classes=0), nn.ModuleDict({"dino": objective})).to(
        device()
    )
    parameters = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    fused = build_optimizer(model.student, (0.9, 0.999))
    # lr 0: the same work, and weights that stay as they are over the repeats
    single = torch.optim.AdamW(parameters, lr=0.0, foreach=False, fused=False)
    student = torch.randn(10, batch, prototypes, device=device(), requires_grad=True)
    teacher = torch.randn(2, batch, prototypes, device=device())

    def our_loss():
        objective(student, teacher, PROGRESS)[0].backward()
        # the loop clears it once a step; here it would grow over the repeats
        objective.seen.clear()

    parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "loss, 2 + 8 views": (
            lambda: slow_step.pairwise_loss(student, teacher, objective.center, 0.1, 0.04).backward(),
            our_loss,
        ),
        "clipping": (lambda: slow_step.clip_each(parameters, 3.0), lambda: clip_gradients(parameters, 3.0)),
        "AdamW": (single.step, fused.step),
        "teacher update": (
            lambda: slow_step.update_each(model.teacher, model.student, 0.996),
            lambda: model.update_teacher(0.996),
        ),
    }
    result = []
    for name, (published, ours) in parts.items():
        variants = {"as published": published, "ours": ours}
        result += time_rows("step", name, side_by_side(variants, repeats), "as published")
        if name.startswith("loss"):
            memory = {variant: peak_bytes(call) / 2**20 for variant, call in variants.items()}
            result += make_rows("step", name, "peak memory", "MiB", memory, "as published")
    return result
