"""`ssl-locat bench rehearsal`: a recipe's whole life at ImageNet's size, with a very small network, stage by stage.

Shards of the full count (1,281,167 + 50,000 samples; small JPEGs, a few thousand distinct ones under their own keys) are packed from tars, as
ILSVRC's come, and go through the recipe's own YAML: its workers, batch, probes and checkpoints. Small are the network, crops and images, the
number of steps at each place, and linear (one epoch); the rest is what users will meet. Each stage is a command or a process of its own, in
files and over HTTP with 50 ms to the first byte. Its row is kept in FOLDER/rehearsal.json as soon as it is done: the same command resumes
where it stopped.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ssl_locat.benchmarks.rehearsal_source import TEST, TRAIN, write_source
from ssl_locat.benchmarks.stream import _in_child, _web_server
from ssl_locat.config.schema import Config, load
from ssl_locat.data.images.crops import MultiCrop
from ssl_locat.errors import UserError
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import console

RECIPE = "dino_locatvit_s16"
RANKS = (1, 8, 64)
_DELAY = 0.05  # seconds to the first byte over HTTP
_POSITION = 0.9  # of an epoch, where a checkpoint is written and resumed from
_STREAMED = 16_384  # samples that one rank reads to count what reading costs; a third of the data at most
_SMALL = (
    "backbone={name: locatvit_tiny, patch_size: 8, img_size: 32, embed_dim: 24, depth: 1, num_heads: 2, drop_path_rate: 0.1}",
    "objective.num_prototypes=256 objective.hidden_dim=32 objective.bottleneck_dim=16",
    "crops.global_size=32 crops.local_size=16 crops.num_local=2 precision=fp32 device=cpu log.tensorboard=false",
)  # network, crops and image size: all that may be small


def rehearse(
    folder: Path,
    recipe: str = RECIPE,
    scale: float = 1.0,
    gpu_images_per_second: float | None = None,
) -> dict:
    """Run, or finish, the rehearsal under `folder`; prints each stage and returns {"settings", "rows"}, as rehearsal.json holds them.

    Args:
        scale: share of the samples, classes and shards that is made; 1 is ImageNet's.
        gpu_images_per_second: what one GPU trains; only then hours on GPUs are told.

    Raises UserError if the folder holds a rehearsal of other settings; RuntimeError if a command fails.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"recipe": recipe, "scale": scale}
    kept = folder / "rehearsal.json"
    state: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"settings": settings, "rows": {}}
    if state["settings"] != settings:
        raise UserError(
            f"{folder} holds a rehearsal with {state['settings']}, not {settings}: give another folder, or remove it."
        )
    for name, stage in Rehearsal(folder, recipe, scale).stages():
        if name not in state["rows"]:
            began = time.perf_counter()
            row = stage()
            state["rows"][name] = {"seconds": round(time.perf_counter() - began, 2), **row}
            # after each stage: one may take an hour, and the same command resumes behind it
            write_atomically(kept, json.dumps(state, indent=1))
        console().print(f"{name:32} {_in_words(state['rows'][name])}", markup=False, highlight=False, soft_wrap=True)
    for line in scaled(state["rows"], gpu_images_per_second):
        console().print(line, markup=False, highlight=False, soft_wrap=True)
    return state


class Rehearsal:
    """The stages of one recipe on one folder."""

    def __init__(self, folder: Path, recipe: str, scale: float):
        self.folder, self.recipe, self.scale = folder, recipe, scale
        # at the smallest scale, still some batches and some images of each class
        self.train, self.test = max(4096, round(TRAIN * scale)), max(500, round(TEST * scale))
        self.classes = max(10, round(1000 * scale))
        self._servers = ExitStack()

    def stages(self) -> Iterator[tuple[str, Callable[[], dict]]]:
        """(name, what runs it and returns what it found)"""
        yield "source tars", self.source
        yield "pack", self.pack
        yield "index", self.index
        # the web server starts with the first stage over HTTP, and ends with the last
        with self._servers:
            for place in ("local", "http"):
                for ranks in RANKS:
                    yield f"stream, {ranks} ranks, {place}", partial(self.stream, place, ranks)
                yield f"checkpoint at 90 %, {place}", partial(self.checkpoint, place)
                yield f"resume to the end, {place}", partial(self.resume, place)
                yield f"knn, {place}", partial(self.evaluate, place, "knn", "k=[20]")
                yield f"linear, {place}", partial(self.evaluate, place, "linear", "epochs=1")
            yield "export", self.export
            yield "table", self.table
            yield "doctor", self.doctor

    # stages -----------------------------------------------------------------------------------------------------------------

    def source(self) -> dict:
        written = write_source(self.folder / "source", self.train, self.test, self.classes)
        return {"samples": self.train + self.test, "megabytes": written / 1e6}

    def pack(self) -> dict:
        """As many shards as packing ImageNet at 1000 images each gives."""
        source, rows = self.folder / "source", []
        for name, tar, count in (("train", "ILSVRC2012_img_train.tar", self.train), ("val", "ILSVRC2012_img_val.tar", self.test)):
            # 1000 samples: packing counts 1024 bytes of header and padding for each file, a tar of small files has 768 on average
            megabytes = (source / tar).stat().st_size / count * 1000 / 1e6 + 0.256
            labels = [f"labels={source / 'val.csv'}"] if name == "val" else []
            rows.append(
                self._command("shards", "pack", source / tar, self.folder / name, f"max_shard_mb={megabytes:.3f}", *labels)
            )
        shards = len(list((self.folder / "train").glob("*.tar")))
        return _together(rows) | {"samples": self.train + self.test, "shards": shards}

    def index(self) -> dict:
        return _together([self._command("shards", "index", f"{self.folder / name}/shard-*.tar") for name in ("train", "val")])

    def stream(self, place: str, ranks: int) -> dict:
        """One rank of so many, with the recipe's workers and batch: opens the data, then reads, decodes and cuts."""
        config = self.config(place)
        with self.counted(place) as served:
            return _in_child(lambda: _stream(config, ranks)) | served()

    def checkpoint(self, place: str) -> dict:
        """At 90 % of an epoch, written by the run itself: its position is all that says where the data continues."""
        config = self.config(place)
        return _in_child(lambda: _write_checkpoint(config))

    def resume(self, place: str) -> dict:
        """The next steps, and all that ends a run: the probe, the last checkpoint, summary, export."""
        with self.counted(place) as served:
            row = self._command("pretrain", self.recipe, *self.overrides(place))
            folder = Path(self.config(place).run_dir)
            # exit code 0 is not enough: the run must have left what the next stages open
            for name in ("summary.json", "export/model.safetensors"):
                if not (folder / name).exists():
                    raise RuntimeError(f"{folder} has no {name}")
            return row | served()

    def evaluate(self, place: str, protocol: str, *options: str) -> dict:
        with self.counted(place) as served:
            row = self._command("evaluate", protocol, self.config(place).run_dir, *options, *self.data(place))
            used = self.train + self.test
            return row | {"images_per_second": used / row["seconds_of_command"], "used": used} | served()

    def export(self) -> dict:
        return self._command("export", self.config("local").run_dir, self.folder / "exported")

    def table(self) -> dict:
        """Its cells are k-NN and linear on the whole bank, so that one of them serves here."""
        data = {
            "train": f"{self.folder}/train/shard-*.tar",
            "test": f"{self.folder}/val/shard-*.tar",
            "num_classes": self.classes,
        }
        text = {
            "title": "Rehearsal",
            "results": str(self.folder / "table"),
            "data": {"all": data},
            "columns": {"k-NN": {"protocol": "knn", "data": "all", "metric": "top1_k20", "options": {"k": [20], "workers": 2}}},
            "rows": {"rehearsed": {"model": self.config("local").run_dir}},
        }
        (self.folder / "table.yaml").write_text(json.dumps(text))  # which is YAML, too
        return self._command("table", self.folder / "table.yaml")

    def doctor(self) -> dict:
        return self._command("doctor", self.recipe, *self.overrides("local"))

    # what they share --------------------------------------------------------------------------------------------------------

    def url(self, place: str) -> tuple[str, Callable[[], tuple[int, int]] | None]:
        if place == "local":
            return str(self.folder), None
        if not hasattr(self, "_web"):
            address, requests, served = self._servers.enter_context(_web_server(self.folder, _DELAY))
            self._web = address, lambda: (requests.value, served.value)
        return self._web

    def data(self, place: str) -> list[str]:
        """Shards by their numbers: a web server need not list."""
        root, _ = self.url(place)

        def shards(name: str) -> str:
            count = len(list((self.folder / name).glob("shard-*.tar")))
            return f"{root}/{name}/shard-{{000000..{count - 1:06d}}}.tar"

        return [f"data.train={shards('train')}", f"data.test={shards('val')}"]

    def overrides(self, place: str) -> list[str]:
        small = [part for line in _SMALL[1:] for part in line.split(" ")]
        batch = load(self.recipe, []).optim.global_batch_size
        # the checkpoint is written two steps before the end: one to resume with, one to end on
        steps = math.ceil(_POSITION * self.train / batch) + 2
        # no milestone: it would stay for ever in a folder of runs
        length = ["optim.epochs=null", f"optim.total_steps={steps}", f"checkpoint.milestone_every_steps={10 * steps}"]
        run = [f"run_dir={self.folder / f'run-{place}'}", f"data.num_classes={self.classes}"]
        return [_SMALL[0], *small, *length, *run, *self.data(place)]

    def config(self, place: str) -> Config:
        return load(self.recipe, self.overrides(place))

    @contextmanager
    def counted(self, place: str) -> Iterator[Callable[[], dict]]:
        """`served()` -> requests and megabytes that the web server answered since."""
        _, counts = self.url(place)
        before = counts() if counts else (0, 0)

        def served() -> dict:
            if counts is None:
                return {}
            requests, size = (now - then for now, then in zip(counts(), before, strict=True))
            return {"http_requests": requests, "http_megabytes": size / 1e6}

        yield served

    def _command(self, *words) -> dict:
        """A command, in a process of its own: its seconds, CPU-seconds and peak memory. Its output is kept beside the results."""
        log = self.folder / "commands.log"
        environment = os.environ | {"XDG_CACHE_HOME": str(self.folder / "cache"), "NO_COLOR": "1"}
        began = time.perf_counter()
        with log.open("ab") as output:
            output.write(f"\n$ ssl-locat {' '.join(map(str, words))}\n".encode())
            output.flush()
            child = subprocess.Popen(
                [sys.executable, "-m", "ssl_locat", *map(str, words)],
                stdout=output,
                stderr=output,
                env=environment,
                cwd=self.folder,
            )
            # wait4 gives the usage of this child and its own, RUSAGE_CHILDREN that of all children so far
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            tail = log.read_text(errors="replace").splitlines()[-15:]
            raise RuntimeError(f"ssl-locat {words[0]} ended with {child.returncode}; {log}:\n" + "\n".join(tail))
        return {
            "seconds_of_command": time.perf_counter() - began,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_megabytes": used.ru_maxrss / 1024,  # of the process that took most
        }


def _together(rows: list[dict]) -> dict:
    """One row of several commands, one after the other: their sums, and the highest peak."""
    return {name: (max if name == "peak_megabytes" else sum)(row[name] for row in rows) for name in rows[0]}


def _stream(config: Config, ranks: int) -> dict:
    import torch

    from ssl_locat.data.stream.plan import choose_plan
    from ssl_locat.data.stream.stream import TrainStream
    from ssl_locat.pretraining.parts import Prepare, check

    torch.set_num_threads(1)
    began = time.perf_counter()
    datasets, weights, _ = check(config, ranks)
    opened = time.perf_counter() - began
    batch, memory = config.optim.global_batch_size, round(config.data.read_memory_gb * 2**30)
    plan = choose_plan(datasets, weights, config.seed, batch, memory)
    crops = MultiCrop(**config.crops.options() | {"mode": "cpu"})
    size: dict[str, Any] = {
        "global_batch_size": batch,
        "world_size": ranks,
        "workers": config.data.workers,
        "memory_bytes": memory,
        "prefetch": 1,
    }
    micro_batch = batch // ranks
    batches = max(2, min(_STREAMED, len(datasets[0]) // 3) // micro_batch)
    with TrainStream(datasets, plan, Prepare(crops, config.data), crops.collate, start_samples=0, **size) as stream:
        iterator = iter(stream)
        next(iterator)
        first = time.perf_counter() - began
        used = micro_batch + sum(len(found.keys) for found in islice(iterator, batches - 1))
        seconds, counts = time.perf_counter() - began - opened, stream.counts
    usage = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    workers = range(17)
    return {
        "open_seconds": opened,
        "first_batch_seconds": first,
        "images_per_second": used / seconds,
        "used": used,
        "fetched_over_used": (counts.used + counts.dropped) / counts.used,  # what waits for its use is counted apart
        "read_ahead": counts.fetched - used,
        "requests": counts.requests,
        "megabytes": counts.bytes / 1e6,
        "raw_peak_megabytes": counts.peak / 1e6,
        "readers_per_lane": max(plan.readers_per_lane(micro_batch, ranks, number) for number in workers),
        "cpu_seconds_per_1000_images": 1000 * sum(u.ru_utime + u.ru_stime for u in usage) / used,
        "peak_megabytes": max(u.ru_maxrss for u in usage) / 1024,
    }


def _write_checkpoint(config: Config) -> dict:
    from ssl_locat.pretraining.setup import set_up

    began = time.perf_counter()
    run = set_up(config)
    ready = time.perf_counter() - began
    run.open_data()
    run.step = run.length.total_steps - 2
    run.samples_seen = run.step * config.optim.global_batch_size
    began = time.perf_counter()
    run.save(block=True)
    run.checkpointer.close() if hasattr(run.checkpointer, "close") else None
    run.close()
    return {"set_up_seconds": ready, "save_seconds": time.perf_counter() - began, "samples_seen": run.samples_seen}


def scaled(rows: dict[str, dict], gpu_images_per_second: float | None) -> list[str]:
    """What one epoch reads and asks of CPUs at 1, 8 and 64 ranks, by the counts above: reads and bytes of each rank, all ranks' CPU-seconds."""
    lines = []
    for ranks in RANKS:
        row = rows.get(f"stream, {ranks} ranks, local")
        if not row:
            continue
        # counts of a part of an epoch, scaled to ImageNet's number of images
        samples = TRAIN / ranks
        fetched = (row["used"] + row["read_ahead"]) / row["fetched_over_used"]
        requests, size = row["requests"] / fetched * samples, row["megabytes"] / fetched * samples
        line = f"{ranks:2} ranks: a rank reads {samples:,.0f} samples of an epoch in {requests:,.0f} requests, {size:,.0f} MB; holds at most "
        line += f"{row['raw_peak_megabytes']:.0f} MB of raw samples; all ranks {row['cpu_seconds_per_1000_images'] * TRAIN / 1000:,.0f} CPU-s"
        if gpu_images_per_second:
            line += f"; {TRAIN / (ranks * gpu_images_per_second) / 60:.1f} min on GPUs of {gpu_images_per_second:g} images/s"
        lines.append(line)
    return lines


def _in_words(row: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in row.items() if isinstance(value, int | float))
