"""How cost grows: with resolution, batch and local crops in one process, and with the number of ranks in whole pretrainings."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from ssl_locat.benchmarks.networks import forward_backward, make_model, our_stepper, tiny_pair
from ssl_locat.benchmarks.timing import device, make_rows, precisions, side_by_side, time_rows
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.runs.log import read_jsonl

SIZES = (224, 384, 512, 768, 1024)
RUN_STEPS, RUN_WARMUP = 24, 8


def cases(repeats: int) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    yield "resolutions", resolution_rows
    yield "batches", partial(batch_rows, repeats)
    yield "local crops", partial(crop_rows, repeats)
    yield "ranks", rank_rows


def resolution_rows() -> list[dict]:
    """Forward + backward of the vanilla model and of LocAt's, up to 4096 patches."""
    on_gpu = device().type == "cuda"
    name, pair = (
        ("ViT-S", ("vit_small_patch16_224", "locatvit_small"))
        if on_gpu
        else ("ViT-Ti", ("vit_tiny_patch16_224", "locatvit_tiny"))
    )
    # the lowest precision that this device is fast in
    precision, dtype = list(precisions().items())[-1]
    result = []
    for size in SIZES:
        models = {variant: make_model(model, size) for variant, model in zip(("vanilla", "LocAt"), pair, strict=True)}
        images = torch.randn(8 if on_gpu else 1, 3, size, size, device=device())
        calls = {variant: partial(forward_backward, model, images, dtype) for variant, model in models.items()}
        result += time_rows("step", f"{name} {size} px {precision}", side_by_side(calls, 3, warmup=1), "vanilla")
    return result


def small_step(batch: int, num_local: int) -> Callable[[], torch.Tensor]:
    model, objective = tiny_pair(4096)
    globals_ = torch.randn(2 * batch, 3, 32, 32, device=device())
    locals_ = torch.randn(num_local * batch, 3, 16, 16, device=device()) if num_local else None
    step = our_stepper(model, objective)
    return lambda: step(globals_, locals_)


def batch_rows(repeats: int) -> list[dict]:
    """Images a second of the DINO step, by batch."""
    batches = (64, 256, 1024) if device().type == "cuda" else (8, 32, 128)
    timings = side_by_side({f"batch {batch}": small_step(batch, 4) for batch in batches}, repeats, warmup=1)
    speeds = {f"batch {batch}": batch / timings[f"batch {batch}"].seconds for batch in batches}
    spreads = {name: timing.spread for name, timing in timings.items()}
    case = "DINO, ViT 2.7 M, 2x32 + 4x16 px"
    return make_rows("step", case, "throughput", "images/s", speeds, f"batch {batches[0]}", spreads)


def crop_rows(repeats: int) -> list[dict]:
    """Time of the DINO step, by the number of local crops."""
    batch = 256 if device().type == "cuda" else 16
    steps = {f"{count} local crops": small_step(batch, count) for count in (0, 4, 8)}
    timings = side_by_side(steps, repeats, warmup=1)
    return time_rows("step", f"DINO, ViT 2.7 M, 2x32 + n x 16 px, batch {batch}", timings, "0 local crops")


def rank_rows() -> list[dict]:
    """Images a second of a whole pretraining (reading, decoding, crops and all) under torchrun, one core or GPU for each rank."""
    on_gpu = device().type == "cuda"
    most = (
        torch.cuda.device_count()
        if on_gpu
        else len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    # more ranks than cores would measure the scheduler
    counts = [count for count in (1, 2, 4, 8) if count <= most]
    with tempfile.TemporaryDirectory() as folder:
        make_textures(Path(folder, "set"), num_train=512, num_test=1, image_size=48, progress=False)
        speeds = {f"{count} ranks": run_speed(Path(folder), count, 512 if on_gpu else 64) for count in counts}
    case = f"whole pretraining, ViT 0.4 M, 2x48 + 2x24 px, {512 if on_gpu else 64} images a step over all ranks"
    return make_rows("step", case, "throughput", "images/s", speeds, "1 ranks")


def run_speed(folder: Path, ranks: int, batch: int) -> float:
    """Median over the last steps of a run of the quickstart's network, wall-clock."""
    run = folder / f"ranks_{ranks}"
    options = [f"run_dir={run}", f"data.train={folder}/set/textures-train-*.tar", "data.make=null", "probes={}", "export=false"]
    options += [
        "optim.epochs=null",
        f"optim.total_steps={RUN_STEPS}",
        f"optim.global_batch_size={batch}",
        "log.tensorboard=false",
    ]
    # a run of its own, as users start it: processes, loaders and collectives included
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, "-m", *launcher, "ssl_locat", "pretrain", "quickstart", *options, "--quiet"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    records = read_jsonl(run / "metrics.jsonl")
    # the first steps wait for workers, caches and the allocator
    return statistics.median(record["images_per_second"] for record in records if record["step"] > RUN_WARMUP)
