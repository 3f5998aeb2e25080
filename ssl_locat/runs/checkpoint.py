"""Checkpoints: all or nothing, in the background, loadable at any world size and any sharding.

    run/checkpoints/step_00001234/shard-*.safetensors    tensors: modules by their names, `optimizer.<parameter>.<state>`
    run/checkpoints/step_00001234/checkpoint.json        written last: the list of files and sizes, and what else resuming needs

torch.distributed.checkpoint writes the tensors in its safetensors storage, each rank its own part; JSON holds the rest, so that
nothing is ever unpickled. A checkpoint is written to a hidden folder beside, flushed to disk and renamed: a kill or a full disk at
any moment leaves the former one as it was. Random state is not stored: what draws numbers in training seeds itself from (seed, step).
"""

import json
import logging
import os
import shutil
import struct
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.nn.parallel import DistributedDataParallel

from ssl_locat.errors import CheckpointError
from ssl_locat.runs import distributed
from ssl_locat.shown import to_json

log = logging.getLogger(__name__)

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process, as we mean it

FORMAT = 1
MARKER = "checkpoint.json"


class Checkpointer:
    """Saves and loads the state of one run. All ranks call every method, in the same order.

    Args:
        run_dir: the run's folder, on a disk that all ranks share.
        keep_last: how many of the newest checkpoints stay.
        milestone_every: checkpoints whose step is a multiple of this stay for ever.
        asynchronous: `save` returns once the tensors are copied to host memory; a thread writes them.
    """

    def __init__(self, run_dir: str | Path, keep_last: int = 3, milestone_every: int | None = None, asynchronous: bool = True):
        self.folder = Path(run_dir) / "checkpoints"
        self.keep_last, self.milestone_every, self.asynchronous = keep_last, milestone_every, asynchronous
        self.last_step: int | None = None  # newest step of this run's own line: loaded or saved by this object
        self.failures = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())  # caches pinned buffers
        # a group of its own: the writing thread's collectives must not mix with the training loop's
        self._group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT) if distributed.world_size() > 1 else None

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

        A periodic save that fails (full disk) is logged, counted in `.failures`, and the former checkpoint stays; training
        goes on. With `block` it returns when all is on disk on all ranks, and raises CheckpointError where that failed.
        """
        self.wait()
        if step == self.last_step and self.failures == 0:
            return  # saved a moment ago, by its period; now asked for again by a stop
        tensors = _tensors(modules, optimizer)
        scalars = [name for name, tensor in tensors.items() if tensor.ndim == 0]
        tensors = _at_least_1d(tensors)
        if self._stager.state_dict_cache and self._stager.state_dict_cache.keys() != tensors.keys():
            self._stager.state_dict_cache = None  # AdamW has no state of frozen parameters, and then it has
        tensors = self._stager.stage(tensors)
        content = {"format": FORMAT, "step": step, "meta": meta, "scaler": scaler_state, "scalars": scalars}
        content["groups"] = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        self._pending = self._writer.submit(self._write, step, tensors, content)
        if block or not self.asynchronous:
            self.wait(raise_errors=block)

    def wait(self, raise_errors: bool = False) -> None:
        """Until the save in the background, if there is one, is on disk (or failed)."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        step, seconds, error = pending.result()
        if error is None:
            self.last_step, self.failures = step, 0
            return log.info("saved step %d in %.1f s", step, seconds)
        self.failures += 1
        newest = self.newest()
        message = (
            f"{distributed.rank_and_host()}: step {step} could not be saved: {error}. The newest good checkpoint is {newest}."
        )
        if raise_errors:
            raise CheckpointError(message + " Make room (or mend the disk) and start the same command again.")
        log.error(message)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, found by looking at the folders themselves; the same on all ranks."""
        found = None
        if distributed.is_main():
            for path in reversed(_step_folders(self.folder)):
                if wrong := problem(path):
                    log.warning("%s is passed over: %s", path, wrong)
                else:
                    found = str(path)
                    break
        found = distributed.broadcast_object(found)
        return Path(found) if found else None

    def unusable(self) -> list[str]:
        """'step_00000100: what is wrong with it' for each checkpoint that is not whole; the same on all ranks."""
        found = [f"{path.name}: {wrong}" for path in _step_folders(self.folder) if (wrong := problem(path))]
        return distributed.broadcast_object(found)

    def load(self, path: str | Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict:
        """Fills modules and optimizer in place, bit by bit as they were saved, and returns {"step", "meta", "scaler"}.

        Raises CheckpointError, before anything is changed, if the checkpoint is damaged or its names or shapes are another model's.
        """
        path = Path(path)
        content = read_marker(path)
        reader = HuggingFaceStorageReader(str(path))
        saved = reader.read_metadata().state_dict_metadata
        targets = _at_least_1d(_tensors(modules))
        _compare(path, {name: tuple(info.size) for name, info in saved.items()}, targets)
        state = _empty_optimizer_state(modules, optimizer, saved)
        flat = {f"optimizer.{name}.{key}": value for (name, _), values in state.items() for key, value in values.items()}
        dcp.load(targets | _at_least_1d(flat), storage_reader=reader, no_dist=True)
        for (_, parameter), values in state.items():
            optimizer.state[parameter] = values
        for group, values in zip(optimizer.param_groups, content["groups"], strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        self.last_step = content["step"]
        return {key: content[key] for key in ("step", "meta", "scaler")}

    # ---- the writing thread

    def _write(self, step: int, tensors: dict[str, Tensor], content: dict) -> tuple[int, float, str | None]:
        """-> (step, seconds, what went wrong on this or another rank)."""
        start, error = time.monotonic(), None
        partial = self.folder / f".step_{step:08d}.partial"
        try:
            if distributed.is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(".step_*.partial"):
                    shutil.rmtree(leftover)
                partial.mkdir()
            # torch plans the save collectively before it writes, so no rank writes ahead of the lines above
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            if distributed.is_main():
                self._commit(step, partial, content)
        except (OSError, RuntimeError, ValueError, dcp.CheckpointException) as caught:
            error = _reason(caught)
            shutil.rmtree(partial, ignore_errors=True)
        if self._group is not None:
            failed = torch.tensor([error is not None], dtype=torch.uint8)
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
            error = error or ("it failed on another rank" if failed.item() else None)
        return step, time.monotonic() - start, error

    def _commit(self, step: int, partial: Path, content: dict) -> None:
        """Rank 0, once all ranks wrote their files: the marker, the rename, then (only then) older ones go."""
        files = {file.name: file.stat().st_size for file in sorted(partial.glob("*.safetensors"))}
        _write_and_flush(partial / MARKER, to_json(content | {"saved": time.time(), "files": files}))
        _flush_folder(partial)
        for path in _step_folders(self.folder):
            # resumed from an older checkpoint, or started afresh in a used folder: what lies ahead belongs to another history
            if _step_of(path) >= step or self.last_step is None:
                path.rename(_unused_name(self.folder / f"superseded_{path.name}"))
        partial.rename(self.folder / f"step_{step:08d}")
        _flush_folder(self.folder)
        self.last_step = step
        for path in _step_folders(self.folder)[: -self.keep_last]:
            if not self.milestone_every or _step_of(path) % self.milestone_every:
                shutil.rmtree(path)


def problem(path: str | Path) -> str | None:
    """What is wrong with the checkpoint folder `path`; None if it is whole. Reads headers only, so it takes milliseconds."""
    path = Path(path)
    try:
        content = json.loads((path / MARKER).read_text())
        if content["format"] != FORMAT:
            return f"its format is {content['format']}, this version reads {FORMAT}"
        if lacking := [name for name in ("step", "meta", "scaler", "scalars", "groups") if name not in content]:
            return f"{MARKER} lacks {', '.join(lacking)}"
        for name, size in content["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if _data_end(path / name) != size:
                return f"{name}: its header does not match its size"
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_marker(path: Path) -> dict:
    """The JSON part of a checkpoint: {"step", "meta", "scaler", "scalars", "groups", "saved", "files"}; CheckpointError if it is not whole."""
    wrong = problem(path)
    if wrong:
        raise CheckpointError(f"{path} is not a whole checkpoint: {wrong}. Expected a folder step_NNNNNNNN with {MARKER} in it.")
    return json.loads((path / MARKER).read_text())


def read_weights(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """CPU tensors whose names begin with `prefix` ("teacher.backbone."), which is cut off; needs no process group.

    Whatever sharding they were saved with, they come whole. CheckpointError if there are none.
    """
    path = Path(path)
    scalars = read_marker(path)["scalars"]
    reader = HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(info.size, dtype=info.properties.dtype) for name, info in saved.items() if name.startswith(prefix)
    }
    if not wanted:
        starts = sorted({".".join(name.split(".")[:2]) + "." for name in saved})
        raise CheckpointError(f"{path} has no weights under {prefix!r}; it has {', '.join(starts)}")
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor.reshape(()) if name in scalars else tensor for name, tensor in wanted.items()}


# ---- names and tensors


def plain_name(module: nn.Module, name: str) -> str:
    """`name` as in the bare module: without the levels that DDP, torch.compile and checkpoint wrappers put in."""
    parts, current = [], module
    for part in name.split("."):
        wrapper = (isinstance(current, DistributedDataParallel) and part == "module") or part in (
            "_orig_mod",
            "_checkpoint_wrapped_module",
        )
        parts += [] if wrapper else [part]
        current = getattr(current, part, None) if current is not None else None
    return ".".join(parts)


def _tensors(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """All state by name; tensors share memory with the modules'."""
    found = {}
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            found[f"{prefix}.{plain_name(module, name)}"] = tensor
    if optimizer is not None:
        for name, parameter in _parameters(modules, optimizer).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
    return found


def _parameters(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by name; those without state yet (frozen so far) included."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {
        f"{prefix}.{plain_name(module, name)}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if id(parameter) in owned
    }


def _empty_optimizer_state(modules: dict, optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """{(name, parameter): {key: tensor to fill}} for what the checkpoint holds; sharded as the parameter is."""
    state: dict = {}
    for name, parameter in _parameters(modules, optimizer).items():
        for key in [full.removeprefix(f"optimizer.{name}.") for full in saved if full.startswith(f"optimizer.{name}.")]:
            if "." in key:
                continue  # a longer parameter name that begins alike
            info = saved[f"optimizer.{name}.{key}"]
            if info.size == parameter.shape and parameter.ndim > 0 and key != "step":
                value = torch.empty_like(parameter, dtype=info.properties.dtype, requires_grad=False)
            else:  # a count of steps: on the parameter's device if the optimizer is fused, else on the CPU
                group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
                on_device = group.get("fused") or group.get("capturable")
                value = torch.empty((), dtype=info.properties.dtype, device=parameter.device if on_device else "cpu")
            state.setdefault((name, parameter), {})[key] = value
    return state


def _compare(path: Path, saved: dict[str, tuple], targets: dict[str, Tensor]) -> None:
    """CheckpointError if the checkpoint's model is not the one in memory."""
    saved = {name: shape for name, shape in saved.items() if not name.startswith("optimizer.")}
    missing, extra = sorted(targets.keys() - saved.keys()), sorted(saved.keys() - targets.keys())
    shapes = [f"{n}: {saved[n]} saved, {tuple(t.shape)} here" for n, t in targets.items() if n in saved and saved[n] != t.shape]
    for what, names in (("lacks", missing), ("has besides", extra), ("differs in shape", shapes)):
        if names:
            listed = "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(
                f"{path} belongs to another model: it {what} {listed}. Resume with the config.yaml in its run folder, "
                "or start afresh in another run_dir."
            )


def _at_least_1d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views with the same memory; safetensors storage wants at least one dimension."""
    return {name: tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach() for name, tensor in tensors.items()}


# ---- files


def _step_folders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdigit()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _unused_name(path: Path) -> Path:
    return next(p for p in (path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 10_000))) if not p.exists())


def _data_end(file: Path) -> int:
    """Size that a safetensors file should have by its own header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(min(length, 100_000_000)))
    return 8 + length + max((info["data_offsets"][1] for name, info in header.items() if name != "__metadata__"), default=0)


def _write_and_flush(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """One line; torch wraps what happened on each rank in a CheckpointException."""
    causes = getattr(error, "failures", None) or {0: error}
    return "; ".join(sorted({f"{type(c).__name__}: {c}" for c in (v[0] if isinstance(v, tuple) else v for v in causes.values())}))
