"""`ssl-locat doctor [CONFIG|RUN] [--on PROFILE]`: looks, measures, and says what to do.

Without a target: this machine. With a config: the machine, the data, the run that it would be, and advice in order of worth.
With a run folder: what became of that run.
"""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from ssl_locat.config.schema import Config, load
from ssl_locat.doctor.early import check_config
from ssl_locat.errors import UserError
from ssl_locat.measure.machine import Load, band
from ssl_locat.runs.history import explain, is_run, open_run
from ssl_locat.runs.log import console, duration, progress

if TYPE_CHECKING:  # these import torch
    from collections.abc import Sequence

    from ssl_locat.data.shards.kinds import Dataset
    from ssl_locat.measure.images import DataSample
    from ssl_locat.measure.step import StepTimes
    from ssl_locat.pretraining.parts import Length


class Advice(NamedTuple):
    """`worth`: how much of the run's time or chance of success it concerns, to sort by."""

    worth: float
    text: str


def doctor(target: str | None = None, overrides: list[str] | None = None, on: str | None = None) -> int:
    """Print the sections that apply; 0 if nothing stands in the way, 2 if the run would fail as it is.

    Raises UserError for a config or data that cannot be used at all, with the same message as `pretrain`.
    """
    if target and is_run(target):
        if overrides or on:
            raise UserError(f"{target} is a run folder, which doctor explains as it is; overrides and --on belong to a config.")
        _section("Run", *_run_lines(target))
        return 0
    config = load(target, overrides or []) if target else None
    if config:
        check_config(config, on)
    # before anything is measured: afterwards the load would be our own
    load_before = Load.now()
    _section("Environment", environment_lines())
    if config is None:
        _section("Advice", ["Next: ssl-locat doctor CONFIG, or ssl-locat init FOLDER_OF_IMAGES."])
        return 0
    return _examine(config, on, load_before)


def _section(title: str, *groups: list[str]) -> None:
    out = console()
    out.print(f"\n[bold]{title}[/bold]")
    for group in groups:
        for line in group:
            out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


# --- a run ----------------------------------------------------------------------------------------------------------------


def _run_lines(path: str) -> tuple[list[str], list[str]]:
    run = open_run(path)
    facts, advice = explain(run)
    # what happens all the time says nothing about how it ended
    routine = {"save", "probe"}
    last = [event for event in run.events if event["kind"] not in routine][-5:]
    shown = [f"{event['time'][:19].replace('T', ' ')}  {event['kind']}  step {event.get('step', '?')}" for event in last]
    return [*facts, *(["Last events:", *(f"  {line}" for line in shown)] if shown else [])], ["What to do:", *advice]


# --- the machine ----------------------------------------------------------------------------------------------------------


def environment_lines() -> list[str]:
    """Versions, devices, and which optional parts work or why not."""
    import torch

    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {version('timm')}, {_count(os.cpu_count(), 'core')}"
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            lines.append(f"GPU {index}: {found.name}, {found.total_memory / 1e9:.0f} GB, compute {found.major}.{found.minor}")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no driver or no visible device"
        lines.append(f"No GPU ({why}): the CPU serves, for small models")
    return [*lines, *_attention_lines(), *_optional_lines(), f"Free on this disk: {shutil.disk_usage('.').free / 1e9:.0f} GB"]


def _attention_lines() -> list[str]:
    """Each attention backend is tried on this device, in the precisions that training uses."""
    import torch

    from ssl_locat.models.attention import BACKENDS, Gaussian, gaussian_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    works, refused = [], []
    for backend in BACKENDS:
        # [1 image, 2 heads, a class token and 4 x 4 patches, 32 channels]: enough for a kernel to start or refuse
        q = torch.randn(1, 2, 17, 32, device=device)
        # [1, 2, 16] each: variances and height of every patch's Gaussian
        ax, ay, alpha = torch.rand(3, 1, 2, 16, device=device)
        coefficients = Gaussian(ax, ay, alpha)
        try:
            gaussian_attention(q, q, q, coefficients, (4, 4), 1, backend=backend)
            works.append(backend)
        except (UserError, RuntimeError, ImportError) as error:
            refused.append(f"  {backend} does not: {str(error).splitlines()[0][:160]}")
    return [f"Attention on {device}: {', '.join(works)} work", *refused]


def _optional_lines() -> list[str]:
    """Stores, trackers and exports that need an extra."""
    parts = {
        "s3fs": "s3",
        "gcsfs": "gcs",
        "aiohttp": "http",
        "wandb": "wandb",
        "mlflow": "mlflow",
        "onnxruntime": "onnx",
        "pyarrow": "parquet",
    }
    there = [extra for module, extra in parts.items() if importlib.util.find_spec(module)]
    missing = [extra for extra in parts.values() if extra not in there]
    lines = [f"Extras installed: {', '.join(there) or 'none'}"]
    if missing:
        lines.append(f"  not installed: {', '.join(missing)} (pip install 'ssl_locat[{','.join(missing)}]' for what you need)")
    try:
        lines.append(f"JPEG: simplejpeg {version('simplejpeg')}")
    except PackageNotFoundError:
        lines.append("JPEG: simplejpeg is missing, Pillow serves several times slower")
    lines.append(
        "Slurm: found" if shutil.which("sbatch") else "Slurm: no sbatch here; --on slurm will not work from this machine"
    )
    return lines


# --- a config -------------------------------------------------------------------------------------------------------------


def _examine(config: Config, on: str | None, load_before: Load) -> int:
    from ssl_locat.measure.images import sample_data
    from ssl_locat.measure.step import step_device
    from ssl_locat.pretraining.parts import check
    from ssl_locat.pretraining.precision_choice import decide_precision, with_precision
    from ssl_locat.pretraining.step_times import decide_crops, step_times

    # here or by torchrun: what one process does is measured, and a profile says how many there will be
    ranks = 1
    if on not in (None, "local"):
        from ssl_locat.cluster.launch import load_profile

        ranks = load_profile(on).ranks
    with progress("opening the data"):
        datasets, weights, length = check(config, ranks)
    # of the last stage, whose steps are measured
    micro_batch = (config.crops.resolved()[-1].batch_size or config.optim.global_batch_size) // (
        ranks * config.optim.accumulate_steps
    )
    crops = []
    if config.precision == "auto":
        with progress("measuring precisions"):
            precision, why = decide_precision(config, step_device(config.device), micro_batch)
        config, crops = with_precision(config, precision), [f"precision auto: {precision} ({why})"]
    if config.crops.mode == "auto":
        with progress("measuring crops"):
            config, why = decide_crops(config, datasets, step_device(config.device), micro_batch)
        crops.append(f"crops.mode auto: {config.crops.mode} ({why})")
    with progress("reading a sample"):
        sample = sample_data(datasets, config, step_device(config.device))
    advice = _data_advice(config, sample, datasets)
    reading, more = _reading(config, datasets, weights, ranks)
    advice += more
    _section("Data", _data_lines(config, datasets, sample), reading)
    if sample.payload is None:
        _section("Advice", ["None of the images looked at could be read: is data.train the right folder, or pattern of shards?"])
        return 2
    with progress("measuring a few steps"):
        times = step_times(config, sample.payload, micro_batch)
    lines, more = _run_section(config, length, ranks, micro_batch, sample, times, load_before)
    told, costly = _probe_lines(config, length, datasets)
    _section("Run", lines, told, crops)
    advice = sorted([*advice, *more, *costly], key=lambda item: -item.worth)
    _section("Advice", [f"{number}. {item.text}" for number, item in enumerate(advice, 1)] or ["Nothing: start it."])
    return 2 if any(item.worth >= STOPPER for item in advice) else 0


SCORES_SHARE = 0.4  # of a step's memory, from which scores of prototypes are worth a word
STOPPER = 100.0  # worth of an advice without which the run fails


def _data_lines(config: Config, datasets: "Sequence[Dataset]", sample: "DataSample") -> list[str]:
    lines = []
    for dataset in datasets:
        size = dataset.mean_bytes * len(dataset)
        kind = "shards" if dataset.by_range else "folder"
        where = "remote" if dataset.remote else "local"
        lines.append(f"{dataset.name}: {_count(len(dataset), 'image')}, {size / 1e9:.2f} GB, {kind}, {where}")
    formats = ", ".join(
        f"{100 * count / sum(sample.formats.values()):.0f} % {name}" for name, count in sample.formats.most_common()
    )
    if sample.sizes:
        heights, widths = zip(*sample.sizes, strict=True)
        lines.append(f"Formats: {formats}; {min(widths)}..{max(widths)} x {min(heights)}..{max(heights)} px (width x height)")
    share = len(sample.damaged) / sample.looked_at
    lines.append(
        f"Unreadable: {len(sample.damaged)} of {sample.looked_at} looked at ({100 * share:.1f} %; data.max_bad allows {100 * config.data.max_bad:g} %)"
    )
    return [*lines, *(f"  {line}" for line in sample.damaged[:5])]


def _reading(config: Config, datasets: "Sequence[Dataset]", weights: list[float], ranks: int) -> tuple[list[str], list[Advice]]:
    """How often samples would be fetched, and what lies in memory meanwhile: counted from the plan of a new run, local data or remote."""
    from ssl_locat.data.stream.plan import choose_plan

    batch, workers, limit = config.optim.global_batch_size, config.data.workers, config.data.read_memory_gb
    plan = choose_plan(datasets, weights, config.seed, batch, round(limit * 2**30))
    # in the units of the plan: 1.0 means that nobody reads what another rank reads, too
    readers = plan.readers_per_lane(batch // (ranks * config.optim.accumulate_steps), ranks, workers)
    windows = readers * plan.lanes * plan.window * max(dataset.mean_bytes for dataset in datasets) / ranks / 2**30
    by = f"a reader for {_count(workers, 'decoding worker')}" if workers else "the trainer itself (data.workers is 0)"
    lines = [
        f"Read by {_count(ranks, 'rank')}, each with {by}: every sample fetched {readers:.2f} times a pass, in ranges of {plan.chunk} samples",
        f"Raw samples in memory: at most {max(windows, limit):.2f} GiB a rank (data.read_memory_gb={limit:g}), {windows:.2f} of it for shuffling",
    ]
    advice = []
    if readers > 1.05:  # where the stream warns, too
        text = f"{_count(ranks, 'rank')} with optim.accumulate_steps={config.optim.accumulate_steps} share runs of {plan.unit} samples, so that each "
        text += f"sample is fetched {readers:.1f} times: give each rank and accumulated step a multiple of {plan.unit} samples of the batch"
        advice.append(Advice(10 * readers, f"{text} (64 ranks at most where the batch is a multiple of 64)."))
    if windows > limit:
        text = f"The windows that samples are shuffled in take {windows:.1f} GiB a rank, more than data.read_memory_gb={limit:g}"
        advice.append(
            Advice(10, f"{text}: more ranks, smaller files (`ssl-locat shards pack` with resize), or that much memory.")
        )
    return lines, advice


def _data_advice(config: Config, sample: "DataSample", datasets: "Sequence[Dataset]") -> list[Advice]:
    advice = []
    share = len(sample.damaged) / sample.looked_at
    if share > config.data.max_bad:
        text = f"{100 * share:.1f} % of the samples are unreadable, more than data.max_bad: the run would stop with exit code 3. "
        how = (
            "Mend or repack them (`ssl-locat shards check`)"
            if any(data.by_range for data in datasets)
            else "Replace or remove them"
        )
        advice.append(Advice(STOPPER + share, f"{text}{how}, or raise data.max_bad."))
    total = sum(map(len, datasets))
    for objective in config.objectives:
        # 65536: DINO's own default
        prototypes = objective.options.get("num_prototypes", 65536)
        few = max(64, 2 ** max(0, (total // 8).bit_length() - 1))  # fewer than 64 tell too little, however small the set
        if objective.name == "dino" and prototypes > max(total, few):
            text = f"{prototypes} prototypes for {total} images: most would never be used. Try objective.num_prototypes={few}."
            advice.append(Advice(20, text))
    if config.optim.global_batch_size < 64:
        advice.append(
            Advice(
                10,
                f"A global batch of {config.optim.global_batch_size} makes a noisy centre; 256 or more, with optim.accumulate_steps, is usual.",
            )
        )
    return advice


def _probe_lines(config: Config, length: "Length", datasets: "Sequence[Dataset]") -> tuple[list[str], list[Advice]]:
    """What the probes will read, and whether that is more than they are worth."""
    from ssl_locat.evaluation.probe_options import own_data
    from ssl_locat.evaluation.shared.samples import open_split
    from ssl_locat.pretraining.probe_costs import SHARE, costs, shares

    if not config.probes.options:
        return [], []
    data = own_data(config)
    sizes = {"train": sum(map(len, datasets)), "test": len(open_split(data, "test")) if data["test"] else 0}
    if validation := data["judged"]["test"] if config.data.validation else None:
        sizes["validation"] = len(open_split({**data, "test": validation}, "test"))
    found = costs(config, length.steps_per_epoch, length.total_steps, sizes)
    decoded, forwards = shares(config, found, length.total_samples)
    each = "; ".join(f"{cost.name} {cost.times} times {_count(cost.images, 'image')}" for cost in found)
    lines = [
        f"Probes: {each}. That is {100 * decoded:.1f} % of the images that training decodes, {100 * forwards:.1f} % of its forward passes"
    ]
    if max(decoded, forwards) <= SHARE:
        return lines, []
    text = "Probes cost more than 5 % of the training: raise probes.every_epochs, or lower data.train_images and data.test_images of a probe."
    return lines, [Advice(5, text)]


def _run_section(
    config: Config, length: "Length", ranks: int, micro_batch: int, sample: "DataSample", times: "StepTimes", load_before: Load
) -> tuple[list[str], list[Advice]]:
    import torch

    from ssl_locat.pretraining.memory import memory_of
    from ssl_locat.pretraining.operations import operations_of_stages
    from ssl_locat.pretraining.stages import changes, in_words, told
    from ssl_locat.pretraining.step_times import seconds_of_run, shares_cores, usable_workers

    advice = []
    workers = usable_workers(config, ranks)
    loader = sample.read_seconds + sample.decode_seconds + sample.crop_seconds
    # seconds an image: workers share the one, the device does the other
    feed, model = loader / workers, times.transfer + times.step
    alone = shares_cores(config, times)
    flop = operations_of_stages(config) if changes(config) else None
    seconds = seconds_of_run(config, sample, times, ranks, length, flop.stages if flop else [1.0])
    speed = length.total_samples / seconds
    parts = {
        "reading": sample.read_seconds / workers,
        "decode": sample.decode_seconds / workers,
        "crops": sample.crop_seconds / workers,
        "host to device": times.transfer,
        "attention": times.attention,
        "head": times.head,
        "the rest of the backbone": max(0.0, times.step - times.attention - times.head),
    }
    # parts that wait for each other add up; parts side by side hide behind the slower side
    candidates = (
        parts
        if alone
        else {name: value for name, value in parts.items() if (name in ("reading", "decode", "crops")) == (feed > model)}
    )
    bottleneck = max(candidates, key=candidates.__getitem__)
    counted = memory_of(config, ranks)
    memory = counted.total / 1e9
    lines = [
        f"{length.total_steps:,} steps{', at the end' if config.crops.stages else ''} of {micro_batch * ranks * config.optim.accumulate_steps} images = {_count(ranks, 'rank')} x {config.optim.accumulate_steps} accumulated x {micro_batch}; "
        f"{length.steps_per_epoch:,} steps an epoch",
        *(in_words(told(config, length.total_samples, *flop)) if flop else []),
        f"{config.backbone.name}: {times.backbone_params / 1e6:.2f} M parameters, heads {times.head_params / 1e6:.2f} M; {config.precision} on {times.device}",
        f"Memory per rank: about {memory:.2g} GB by count ({counted.words()})",
        f"Measured on this machine: model {1 / model:.0f} images/s per rank, loader {workers / loader:.0f} images/s with {_count(workers, 'worker')}",
        f"Expected: {speed:.0f} images/s, {band(seconds, load_before)} in all, without probes{load_before.words()}",
        f"First bottleneck: {bottleneck}. Milliseconds an image: "
        + ", ".join(f"{name} {1000 * value:.2f}" for name, value in parts.items()),
    ]
    at_once = any(o.name in ("dino", "ibot") and not o.options.get("prototype_block") for o in config.objectives)
    if at_once and counted.scores > max(SCORES_SHARE * counted.total, 1e9):
        text = f"{counted.scores / 1e9:.2g} of {memory:.2g} GB are scores of prototypes"
        advice.append(Advice(7, f"{text}: objective.prototype_block=8192 makes them a block at a time, for the same losses."))
    if times.device.type == "cuda":
        available = torch.cuda.get_device_properties(times.device).total_memory / 1e9
        # counted, so with room to spare for fragments and what else the device holds
        if memory > 0.9 * available:
            factor = 2 ** (memory / (0.85 * available)).__ceil__().bit_length()
            text = f"About {memory:.0f} GB of {available:.0f} GB: too much. optim.accumulate_steps={config.optim.accumulate_steps * factor}"
            advice.append(Advice(STOPPER, f"{text}, or precision=bf16, or activation_checkpointing=true."))
        if config.precision == "fp32":
            advice.append(
                Advice(15, "precision=bf16: on this GPU about twice as fast, with the same results in all published recipes.")
            )
    if feed > model and not alone:
        more = min((os.cpu_count() or 1) // ranks, round(config.data.workers * feed / model + 0.5))
        if more > config.data.workers:
            advice.append(Advice(12 * feed / model, f"The loader is slower than the model: data.workers={more}."))
    large = [min(size) for size in sample.sizes if min(size) > 2.5 * config.crops.global_size]
    if len(large) > len(sample.sizes) / 2 and bottleneck in ("reading", "decode"):
        text = f"Images are far larger than the crops ({sorted(large)[len(large) // 2]} px for {config.crops.global_size} px): store them smaller"
        advice.append(Advice(8, f"{text}, `ssl-locat shards pack` with resize=."))
    if times.device.type == "cpu" and seconds > 86400:  # a day
        advice.append(
            Advice(30, f"{duration(seconds)} on this CPU: a GPU, a smaller model (locatvit_tiny, fewer blocks) or fewer epochs.")
        )
    return lines, advice


def _count(number: int | None, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
