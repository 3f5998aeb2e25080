"""Checkpoints: all or nothing, in the background, loadable at any world size and any sharding.

    run/checkpoints/step_00001234/shard-*.safetensors    tensors: modules by their names, `optimizer.<parameter>.<state>`
    run/checkpoints/step_00001234/checkpoint.json        written last: files, sizes and hashes, and what else resuming needs (marker.py)

torch.distributed.checkpoint writes the tensors in its safetensors storage, each rank its own part; JSON holds the rest, so that
nothing is ever unpickled. A checkpoint is written to a hidden folder beside, synced to disk together with the run's other files, and
renamed: a kill, a full disk or a power cut at any moment leaves the former one as it was, and no checkpoint is ahead of the metrics.
Each rank hashes its own file while it writes it; at a resume the ranks share the files to hash out among them.
Random state is not stored: what draws numbers in training seeds itself from (seed, step).
"""

import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from ssl_locat.errors import DISK_ERRORS, CheckpointError, Outage, disk_error_message
from ssl_locat.runs import distributed
from ssl_locat.runs.durable import flush, flush_folder, make_folder, write_and_flush
from ssl_locat.runs.marker import (
    FORMAT,
    MARKER,
    damage,
    hashes,
    problem,
    read_marker,
    require_intact,
    step_folders,
    step_of,
    write_seal,
)
from ssl_locat.runs.tensors import at_least_1d, compare, empty_optimizer_state, is_finite, state_tensors

log = logging.getLogger(__name__)

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process, as we mean it

RETRY_SECONDS = 60  # from a save that failed to the next try
UNSAVED_SECONDS = 600  # of saves that fail, after which a run ends
SAVE_AGAIN, SAVE_OR_END = 1, 2  # what a rank may wish for

# what a run writes beside its checkpoints: on disk before a checkpoint that is later than it
# (config.yaml, environment.json and probes/ are synced where they are written)
COMMITTED = ("metrics.jsonl", "events.jsonl", "quarantine.jsonl", ".")


class Checkpointer:
    """Saves and loads the state of one run. All ranks call every method, in the same order.

    Args:
        run_dir: the run's folder, on a disk that all ranks share.
        keep_last: how many of the newest checkpoints stay.
        milestone_every: checkpoints whose step is a multiple of this stay for ever.
        asynchronous: `save` returns once the tensors are copied to host memory; a thread writes them.
    """

    def __init__(self, run_dir: str | Path, keep_last: int = 3, milestone_every: int | None = None, asynchronous: bool = True):
        self.run_dir, self.folder = Path(run_dir), Path(run_dir) / "checkpoints"
        self.keep_last, self.milestone_every, self.asynchronous = keep_last, milestone_every, asynchronous
        self.kept: frozenset[int] = frozenset()  # steps that stay for another reason: the best ones
        self.last_step: int | None = None  # newest step of this run's own line: loaded or saved by this object
        self.failures = 0  # saves in a row that failed
        self.failing_since: float | None = None  # time.monotonic() of the first of them
        self._next_try = 0.0
        self._made = False
        self._synced: dict[str, tuple] = {}  # what of COMMITTED is on disk, by inode, size and time
        # one thread: saves come to disk in the order of their steps
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())  # caches pinned buffers
        # a group of its own: the writing thread's collectives must not mix with the training loop's
        # Any: torch's annotation includes a sentinel of processes outside the group, of which there are none
        self._group: Any = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT) if distributed.world_size() > 1 else None

    def save(
        self,
        step: int,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        meta: dict,
        scaler_state: dict | None = None,
        block: bool = False,
    ) -> None:
        """Saves `modules` (names become prefixes), the optimizer's state and `meta` (anything JSON can hold) as `step`.

        A periodic save that fails (full disk) is logged at once, counted in `.failures`, and the former checkpoint stays; training
        continues, and the loop asks again soon. With `block` it returns when all is on disk on all ranks, and raises Outage where that failed.
        """
        self.wait()
        if distributed.is_main() and not self._made:
            make_folder(self.folder)
            self._made = True
        if step == self.last_step and self.failures == 0:
            return  # saved a moment ago, by its period; now asked for again by a stop
        tensors = state_tensors(modules, optimizer)
        scalars = [name for name, tensor in tensors.items() if tensor.ndim == 0]
        tensors = at_least_1d(tensors)
        if self._stager.state_dict_cache and self._stager.state_dict_cache.keys() != tensors.keys():
            self._stager.state_dict_cache = None  # AdamW has no state of frozen parameters, and then it has
        # the copy is what the step waits for; from here on training may change the tensors
        tensors = self._stager.stage(tensors)
        content = {"format": FORMAT, "step": step, "meta": meta, "scaler": scaler_state, "scalars": scalars}
        content["groups"] = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        self._pending = self._writer.submit(self._write, step, tensors, content)
        if block or not self.asynchronous:
            self.wait(raise_errors=block)

    def wish(self) -> int:
        """SAVE_AGAIN a minute after a save failed, and each minute from then on; SAVE_OR_END once nothing could be saved for ten minutes: a
        run whose work is lost is not worth its power. Waits for nothing. For one rank to ask, and for all to agree on (`StopFlag`)."""
        if self._pending is not None and self._pending.done():
            self.wait()
        now = time.monotonic()
        if not self.failures or self.failing_since is None or now < self._next_try:
            return 0
        self._next_try = now + RETRY_SECONDS
        return SAVE_OR_END if now - self.failing_since >= UNSAVED_SECONDS else SAVE_AGAIN

    def wait(self, raise_errors: bool = False) -> None:
        """Until the save in the background, if there is one, is on disk (or failed)."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        step, seconds, error = pending.result()
        if error is None:
            self.last_step, self.failures, self.failing_since = step, 0, None
            return log.info("saved step %d in %.1f s", step, seconds)
        self.failures += 1
        if self.failing_since is None:
            self.failing_since = time.monotonic()
            self._next_try = self.failing_since + RETRY_SECONDS
        if raise_errors:
            raise Outage(f"{self._words(step, error)} Make room (or mend the disk) and start the same command again.")

    def _words(self, step: int, error: str) -> str:
        whole = next((path for path in reversed(step_folders(self.folder)) if not problem(path)), None)
        return f"{distributed.rank_and_host()}: step {step} could not be saved: {error}. The newest good checkpoint is {whole}."

    def newest(self) -> Path | None:
        """The newest intact checkpoint, found by reading the folders themselves; the same on all ranks. Those passed over are named."""
        found = [str(path) for path in reversed(step_folders(self.folder))] if distributed.is_main() else None
        for path in map(Path, distributed.broadcast_object(found)):
            if not (wrong := self.verify(path)):
                return path
            if distributed.is_main():
                log.warning("%s is passed over: %s", path, wrong)
        return None

    def verify(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, each byte of it read by one of the ranks; the same answer on all of them."""
        wrong: str | None = distributed.broadcast_object(problem(path) if distributed.is_main() else None)
        if wrong:
            return wrong
        expected = distributed.broadcast_object(hashes(path) if distributed.is_main() else None)
        names = sorted(expected)
        # each file is hashed by one rank: reading a large checkpoint takes as long as its disk gives, not ranks times that
        own = names[distributed.rank() :: distributed.world_size()]
        votes = torch.tensor([name in own and damage(path, expected, [name]) is not None for name in names], dtype=torch.int64)
        bad = distributed.sum_on_cpu_(votes).tolist()
        first = next((name for name, times in zip(names, bad, strict=True) if times), None)
        return (
            first and f"{first} does not hold the bytes that were written (its SHA-256 is another): it was damaged or exchanged"
        )

    def unusable(self) -> list[str]:
        """'step_00000100: what is wrong with it' for each checkpoint that is not intact; the same on all ranks."""
        found = [str(path) for path in step_folders(self.folder)] if distributed.is_main() else None
        return [
            f"{path.name}: {wrong}" for path in map(Path, distributed.broadcast_object(found)) if (wrong := self.verify(path))
        ]

    def set_aside(self, path: Path) -> None:
        """What lies ahead of the checkpoint `path` is of another history than a run that resumes from it; it keeps its files under
        another name. A checkpoint of the same step that is another one goes, too."""
        if distributed.is_main():
            step, own = read_marker(path)["step"], path.resolve().parent == self.folder.resolve()
            for later in step_folders(self.folder):
                if step_of(later) >= step + own:
                    later.rename(_unused_name(self.folder / f"superseded_{later.name}"))
            flush_folder(self.folder)
        distributed.barrier()

    def load(
        self,
        path: str | Path,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        may_differ: tuple[str, ...] | None = None,
    ) -> dict:
        """Fills modules and optimizer in place, bit by bit as they were saved, and returns {"step", "meta", "scaler"}.

        Args:
            may_differ: where settings were changed on purpose (None: they were not): beginnings of names, such as "student.heads.gram.", that
                may be missing on either side; missing here they stay as built. The optimizer keeps its own rates, betas and groups then.

        Raises CheckpointError, before anything is changed, if the checkpoint is damaged or its names, shapes or types are another model's.
        """
        path = Path(path)
        if wrong := self.verify(path):
            raise CheckpointError(f"{path} is no intact checkpoint: {wrong}. Take another one of this run.")
        content = read_marker(path)
        if not hashes(path) and distributed.is_main():
            log.info("%s was written by version 0.1, without hashes: its contents cannot be checked", path)
        with _explained(path):
            reader = HuggingFaceStorageReader(str(path))
            saved = reader.read_metadata().state_dict_metadata
        targets = at_least_1d(state_tensors(modules))
        if may_differ is not None:
            targets = {name: tensor for name, tensor in targets.items() if name in saved or not name.startswith(may_differ)}
            known = targets.keys()
            saved = {name: info for name, info in saved.items() if name in known or not name.startswith(may_differ)}
        compare(path, saved, targets)
        if may_differ is None and len(content["groups"]) != len(optimizer.param_groups):
            raise CheckpointError(
                f"{path} has {len(content['groups'])} parameter groups, the optimiser here has {len(optimizer.param_groups)}."
            )
        state = empty_optimizer_state(modules, optimizer, saved)
        flat = {f"optimizer.{name}.{key}": value for (name, _), values in state.items() for key, value in values.items()}
        with _explained(path):
            # no_dist: each rank reads what its own shards need, whatever sharding was saved
            dcp.load(targets | at_least_1d(flat), storage_reader=reader, no_dist=True)
        for (_, parameter), values in state.items():
            optimizer.state[parameter] = values
        for group, values in zip(optimizer.param_groups, content["groups"], strict=True) if may_differ is None else ():
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        if not_finite := [name for name, tensor in (targets | flat).items() if not is_finite(tensor)]:
            log.warning(
                "%s: %d tensors hold NaN or infinity, %s first: training from it cannot succeed. Resume from an earlier checkpoint "
                "(--resume PATH), with a lower lr.",
                path,
                len(not_finite),
                not_finite[0],
            )
        self.last_step = content["step"]
        return {key: content[key] for key in ("step", "meta", "scaler")}

    # ---- the writing thread

    def _write(self, step: int, tensors: dict[str, Tensor], content: dict) -> tuple[int, float, str | None]:
        """-> (step, seconds, what went wrong on this or another rank).

        In three parts, after each of which the ranks agree: one that continued alone would wait for the others until the time-out."""
        start = time.monotonic()
        partial, files = self.folder / f".step_{step:08d}.partial", _HashedFiles()

        def store() -> None:
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            writer.fs = files
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            # this rank's own files; the writer syncs, too, but torch 2.11's before it has emptied Python's buffer
            for name in files.sha256:
                flush(partial / name)

        error = self._attempt(lambda: self._begin(partial) if distributed.is_main() else None)
        error = error or self._attempt(store)
        if error is None:
            found = self._gather(files.sha256)
            error = self._attempt(lambda: self._commit(step, partial, content, found) if distributed.is_main() else None)
        if error and distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            log.error("%s Training continues; it is tried again soon.", self._words(step, error))  # at once, not at the next save
        return step, time.monotonic() - start, error

    def _attempt(self, part: Callable[[], object]) -> str | None:
        """Run a part of the save; what went wrong with it, on this or another rank."""
        error = None
        try:
            part()
        except (OSError, RuntimeError, ValueError, SafetensorError, dcp.CheckpointException) as caught:
            error = _reason(caught)
        if self._group is not None:
            failed = torch.tensor([error is not None], dtype=torch.uint8)
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
            error = error or ("it failed on another rank" if failed.item() else None)
        return error

    def _gather(self, own: dict[str, str]) -> dict[str, str]:
        """The hashes of all ranks' files; each rank wrote at most one."""
        if self._group is None:
            return own
        # 512 bytes hold a file name and its 64 digits; gathered tensors must be of one size
        packed = torch.frombuffer(bytearray(json.dumps(own).encode().ljust(512)), dtype=torch.uint8)
        parts = [torch.empty_like(packed) for _ in range(distributed.world_size())]
        dist.all_gather(parts, packed, group=self._group)
        return {name: value for part in parts for name, value in json.loads(part.numpy().tobytes()).items()}

    def _begin(self, partial: Path) -> None:
        self.folder.mkdir(exist_ok=True)  # without parents: a run folder that was moved away must not appear again
        # of a save that was killed
        for leftover in self.folder.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir()

    def _commit(self, step: int, partial: Path, content: dict, sha256: dict[str, str]) -> None:
        """Rank 0, once all ranks wrote their files: the run's own files, the marker, the rename; then (only then) older ones go."""
        for name in COMMITTED:
            path = self.run_dir / name
            with suppress(FileNotFoundError):
                stat = path.stat()
                state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if self._synced.get(name) != state:  # a sync costs milliseconds, and a busy disk's hundreds
                    flush_folder(path) if path.is_dir() else flush(path)
                    self._synced[name] = state
        files = {file.name: file.stat().st_size for file in sorted(partial.glob("*.safetensors"))}
        content = content | {"saved": time.time(), "files": files, "sha256": {name: sha256[name] for name in files}}
        write_and_flush(partial / MARKER, write_seal(content))
        flush_folder(partial)
        for path in step_folders(self.folder):
            # resumed from an older checkpoint, or started afresh in a used folder: what lies ahead belongs to another history
            if step_of(path) >= step or self.last_step is None:
                path.rename(_unused_name(self.folder / f"superseded_{path.name}"))
        partial.rename(self.folder / f"step_{step:08d}")
        flush_folder(self.folder)
        self.last_step = step
        self._rotate()

    def keep(self, steps: Iterable[int]) -> None:
        """From here on the checkpoints of these steps stay, however old; those kept before go, unless they stay for another reason."""
        if (steps := frozenset(steps)) == self.kept:
            return
        self.wait()  # the thread that writes reads them, too
        self.kept = steps
        if distributed.is_main():
            self._rotate()

    def whole_steps(self) -> set[int]:
        """Steps whose checkpoints are whole by names, sizes and headers. For rank 0."""
        return {step_of(path) for path in step_folders(self.folder) if not problem(path)}

    def _rotate(self) -> None:
        """Rank 0: the older checkpoints go, but for milestones and those that are kept."""
        for path in step_folders(self.folder)[: -self.keep_last]:
            milestone = self.milestone_every and step_of(path) % self.milestone_every == 0
            if not milestone and step_of(path) not in self.kept:
                # renamed first: cut off half-way, it is a leftover, no damaged one
                shutil.rmtree(path.rename(self.folder / f".{path.name}.partial"))


class _HashedFiles(FileSystem):
    """The storage writer's files. `sha256`: of what was given to be written, by name, whatever the disk made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashed = _Hashed(stream)
            yield hashed
        self.sha256[Path(path).name] = hashed.sha256.hexdigest()


class _Hashed:
    """A stream that hashes what goes through it; the rest is the stream's own."""

    def __init__(self, stream: Any):
        self.stream, self.sha256 = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return int(self.stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def read_weights(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """CPU tensors whose names begin with `prefix` ("teacher.backbone."), which is cut off; needs no process group.

    Whatever sharding they were saved with, they come whole. CheckpointError if there are none, or if the checkpoint is damaged.
    """
    path = Path(path)
    require_intact(path)
    scalars = read_marker(path)["scalars"]
    with _explained(path):
        reader = HuggingFaceStorageReader(str(path))
        saved = reader.read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(info.size, dtype=info.properties.dtype)
        for name, info in saved.items()
        if name.startswith(prefix) and isinstance(info, TensorStorageMetadata)
    }
    if not wanted:
        starts = sorted({".".join(name.split(".")[:2]) + "." for name in saved})
        raise CheckpointError(f"{path} has no weights under {prefix!r}; it has {', '.join(starts)}")
    with _explained(path):
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor.reshape(()) if name in scalars else tensor for name, tensor in wanted.items()}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever torch and safetensors raise at a header that is malformed in a way of its own becomes one message."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # torch's is no Exception
        if isinstance(error, OSError) and disk_error_message(error):
            raise
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}. Take another checkpoint of this run.") from error


# ---- files


def _unused_name(path: Path) -> Path:
    return next(p for p in (path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 10_000))) if not p.exists())


def _reason(error: BaseException) -> str:
    """One line; torch wraps what happened on each rank in a CheckpointException."""
    causes = getattr(error, "failures", None) or {0: error}
    found = (cause[0] if isinstance(cause, tuple) else cause for cause in causes.values())
    return "; ".join(sorted({_in_words(cause) for cause in found}))


def _in_words(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    words = DISK_ERRORS.get(number, "").partition(".")[0] if number else ""
    return f"{words} ({error})" if words else f"{type(error).__name__}: {error}"
