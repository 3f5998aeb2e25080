"""Processes that train together: set-up, and the few collectives the project uses. stop.py holds their agreement on when to stop.

Every call is a no-op on one process, so that code written with them runs on a laptop unchanged. A process knows its place from
RANK, WORLD_SIZE and LOCAL_RANK (torchrun sets them; cluster/launch.py sets them inside a Slurm job). They meet at MASTER_ADDR:MASTER_PORT,
or through a file on a shared disk named by SSL_LOCAT_RENDEZVOUS: rank 0 lets the kernel choose a free port and writes it there,
so that a requeued job never meets the port of its former self or of a neighbour.
"""

import json
import logging
import os
import re
import socket
import time
import traceback
import uuid
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ssl_locat.errors import EXPECTED, ConfigError, RankLost
from ssl_locat.text.shown import printable, redact, to_json

log = logging.getLogger(__name__)

# Longer than a store's outage budget (5 min), during which one rank may wait for data while the others wait for it.
TIMEOUT = timedelta(minutes=10)

COMMON_FAILURE_SECONDS = 15  # ranks that fail alike do so at the same collective, or in checks of the same few files
ROLL_CALL_SECONDS = 5  # ranks notice a lost one within a second of each other: each has a vote under way at every step
COMMUNICATION = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|monitoredBarrier|timed? ?out", re.IGNORECASE)

# torch before 2.15 casts all of a unit or nothing, and norms and positions must stay float32: it gathers everything so
GATHERS_CAST = "param_dtype_override_fn" in MixedPrecisionPolicy.__dataclass_fields__

_roll: "Roll | None" = None
_alone = False
_cpu_group: Any = None  # gloo: agreements and small objects, whatever the tensors' backend is


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def alone() -> Iterator[None]:
    """What one rank does by itself while the others wait for its finding: losses that gather over all ranks would wait for theirs."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def rank_and_host() -> str:
    """'rank 3 on n2': opens every log line that is about a fault."""
    return f"rank {rank()} on {socket.gethostname()}"


def setup(device: str = "auto", timeout: timedelta = TIMEOUT) -> torch.device:
    """Joins the other processes (if there are any) and returns this one's device: `cuda:LOCAL_RANK` or `cpu`.

    Collectives on CUDA tensors go through NCCL, on CPU tensors through gloo. A rank that does not answer within `timeout`
    raises in the others, with a message, instead of leaving them to wait for ever.
    """
    global _cpu_group, _roll
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but PyTorch finds no GPU here: `ssl-locat doctor` says why; device=auto takes the CPU then."
        )
    chosen = torch.device(device, local_rank() % torch.cuda.device_count()) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size() == 1 or dist.is_initialized():
        return chosen
    rendezvous = os.environ.get("SSL_LOCAT_RENDEZVOUS")
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ and not rendezvous]:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but the environment lacks {', '.join(missing)}: start the command with torchrun, or by `--on`; "
            "or unset WORLD_SIZE to run alone."
        )
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a failed collective ends the process
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    options: dict[str, Any] = {"device_id": chosen} if chosen.type == "cuda" else {}
    if rendezvous:
        options["store"] = _store_through_file(Path(rendezvous), timeout)
    else:
        options["store"], _, _ = next(dist.rendezvous("env://", timeout=timeout))
        options["store"].set_timeout(timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
            # torchrun restarts ranks against the same store: what the former ones left must not be read
            options["store"] = dist.PrefixStore(_attempt(options["store"], timeout), options["store"])
    # apart from the process group's keys: the roll is called when the group is broken
    own = dist.PrefixStore("ssl_locat", options["store"])
    options["store"] = dist.PrefixStore("processes", options["store"])
    dist.init_process_group(backend, rank=rank(), world_size=world_size(), timeout=timeout, **options)
    _cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    own.set(f"host {rank()}", socket.gethostname())
    barrier()
    _roll = Roll(own, [own.get(f"host {number}").decode() for number in range(world_size())])
    if rendezvous and is_main():
        Path(rendezvous).unlink(missing_ok=True)
    return chosen


def _store_through_file(path: Path, timeout: timedelta) -> dist.Store:
    """The key-value store where processes meet; rank 0 serves it on a port of the kernel's choice and writes host and port to `path`."""
    if is_main():
        store = dist.TCPStore("0.0.0.0", 0, world_size(), is_master=True, timeout=timeout, wait_for_workers=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"hosts": _own_addresses(), "port": store.port}))
        partial.replace(path)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{rank_and_host()}: rank 0 did not write {path} within {timeout}; it failed, or the disk is not shared"
            )
        os.scandir(path.parent).close() if path.parent.exists() else None  # makes NFS look again
        time.sleep(0.1)
    found = json.loads(path.read_text())
    for host in found["hosts"]:
        try:
            socket.getaddrinfo(host, found["port"])
            store = dist.TCPStore(host, found["port"], world_size(), is_master=False, timeout=timedelta(seconds=60))
            store.set_timeout(timeout)
            return store
        except (socket.gaierror, dist.DistNetworkError) as error:
            log.warning("%s: no rank 0 at %s:%s (%s)", rank_and_host(), host, found["port"], error)
    raise RuntimeError(f"{rank_and_host()}: cannot reach rank 0 at any of {found['hosts']}, port {found['port']}")


def _attempt(store: dist.Store, timeout: timedelta) -> str:
    """A name for this start of the job, the same on all ranks, that no earlier one had.

    torchrun's agent serves one store for all its restarts: what a former start left there (gloo's addresses, among others) would be taken for
    this one's. Its counts do not tell them apart, since each node counts its own failures. So each rank says that it is here, under a name that
    it has just made up; rank 0 lists these names until all ranks have found their own, and then says so.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"here {rank()}", own)
    names: list[str] = []
    while time.monotonic() < deadline:
        keys = [f"here {number}" for number in range(world_size())]
        if is_main() and store.check(keys) and names != (found := [store.get(key).decode() for key in keys]):
            names = found
            store.set("attempt", " ".join([uuid.uuid4().hex, *names]))
        if store.check(["attempt"]):
            attempt, *listed = store.get("attempt").decode().split()
            if listed[rank() :][:1] == [own]:
                store.set(f"{attempt} {rank()}", "yes")
            if is_main() and listed == names and store.check([f"{attempt} {number}" for number in range(world_size())]):
                store.set(f"{attempt} complete", "yes")
            if store.check([f"{attempt} complete"]) and listed[rank() :][:1] == [own]:
                return attempt
        time.sleep(0.05)
    raise RuntimeError(f"{rank_and_host()}: the {world_size()} processes of this job did not all start within {timeout}")


def _own_addresses() -> list[str]:
    """Names and addresses under which other nodes may reach this one, the likeliest first."""
    addresses = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks the kernel which interface leads outside
            addresses.append(probe.getsockname()[0])
        except OSError:
            pass  # no route outside: the host name alone
    return addresses


def shutdown() -> None:
    """Leaves the process group; the last call of a program that called `setup()`."""
    global _cpu_group, _roll
    if dist.is_initialized():
        dist.destroy_process_group()
    _cpu_group = _roll = None


class Roll(NamedTuple):
    """Who takes part, and the store where each says that it still lives once something went wrong."""

    store: dist.Store
    hosts: list[str]

    def missing(self, seconds: float, what: str = "alive") -> list[int]:
        """The ranks that do not answer within `seconds`, asked by one that failed: those that live fail, too, and ask the same."""
        others = [number for number in range(len(self.hosts)) if number != rank()]
        try:
            self.store.set(f"{what} {rank()}", "yes")
            until = time.monotonic() + seconds
            while others and time.monotonic() < until:
                others = [number for number in others if not self.store.check([f"{what} {number}"])]
                time.sleep(0.1)
        except RuntimeError:  # the store is gone, and with it rank 0 (or torchrun's first agent), which serves it
            return [0] if rank() else others
        return others


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """What gloo or NCCL say where another process is gone (addresses, a closed connection) becomes RankLost, which names rank and host."""
    try:
        yield
    except RuntimeError as error:
        if _roll is None or isinstance(error, EXPECTED) or not COMMUNICATION.search(str(error)):
            raise
        log.info(
            "%s: %s", rank_and_host(), str(error).partition("\n")[0]
        )  # whose words tell an engineer more than the message below
        missing = _roll.missing(ROLL_CALL_SECONDS)
        names = [f"rank {number} on {_roll.hosts[number]}" for number in missing]
        what = (
            f"{', '.join(names[:8])}{' and others' if len(names) > 8 else ''}"
            if names
            else "another rank, which has answered since,"
        )
        raise RankLost(
            f"{rank_and_host()} ends, because it lost {what}: it failed, was killed (out of memory?), or its node or network is gone. Its own "
            f"log says more, if it could. Start the same command again: it resumes from what was saved."
        ) from error


def failed_alike(what: str) -> bool:
    """Whether every rank reports this failure (a name that is used once) within COMMON_FAILURE_SECONDS.

    Called by a rank whose work failed. If it alone did, the others wait for it in a collective that will never come: no message reaches
    them there, so that the process has to end.
    """
    return world_size() == 1 or _roll is None or not _roll.missing(COMMON_FAILURE_SECONDS, f"failed: {what},")


def cpu_group() -> Any:
    """The group for agreements and small objects, whatever device the ranks train on; None on one process."""
    return _cpu_group


def barrier() -> None:
    """Waits for all ranks; names those that do not come."""
    if world_size() > 1:
        dist.monitored_barrier(group=_cpu_group)


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_on_cpu_(tensor: Tensor) -> Tensor:
    """Sum of a CPU tensor over ranks, in place, whatever device they train on."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=_cpu_group)
    return tensor


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place. Floating point only."""
    return all_reduce_sum_(tensor).div_(world_size())


def all_gather_cat(tensor: Tensor) -> Tensor:
    """[b, ...] on each rank -> [W*b, ...] in rank order. All ranks give the same shape; no gradient flows."""
    if world_size() == 1:
        return tensor
    # gloo and NCCL write into contiguous memory of equal size
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _SumOverRanks(torch.autograd.Function):
    """What all ranks' losses say about the sum comes back to each summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum_(gradient.clone())


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks of x, with its gradient: of a loss that each rank computes from the sum, DDP's mean over ranks is the gradient of one."""
    total: Tensor = _SumOverRanks.apply(x)
    return total


class SyncBatchNorm(nn.BatchNorm1d):
    """BatchNorm of [B, C, ...] over all ranks' batches, which are of one size, on any device (torch's own serves GPUs alone)."""

    def _check_input_dim(self, _input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        normalised: Tensor = self._over_ranks(x)
        return normalised

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives; torch gives the decorator no types
    def _over_ranks(self, x: Tensor) -> Tensor:
        others = [dim for dim in range(x.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        # values per channel over all ranks
        count = world_size() * x.numel() // x.shape[1]
        # two sums, one after the other: E[x^2] - E[x]^2 in one would lose digits
        mean = sum_over_ranks(x.float().sum(others)) / count
        centred = x.float() - mean.view(shape)
        var = sum_over_ranks(centred.square().sum(others)) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
            assert self.momentum is not None  # only affine layers with running statistics are made
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            # unbiased, as torch keeps it; the normalisation itself takes the biased one
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def broadcast_object(value: Any = None) -> Any:
    """Rank 0's `value` (anything JSON can hold) on every rank."""
    if world_size() == 1:
        return value
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if is_main() else torch.empty(0)
    # its length first, as receivers need memory of that size; JSON, as nothing is unpickled
    length = torch.tensor([payload.numel()])
    dist.broadcast(length, src=0, group=_cpu_group)
    if not is_main():
        payload = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(payload, src=0, group=_cpu_group)
    return json.loads(payload.numpy().tobytes())


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Keep only each block's input for the backward pass and compute the rest again there: less memory, about a third more time.

    In place, names of parameters unchanged. After the teacher was copied (a copy would call the original's blocks), before `shard`.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(
    network: nn.Module,
    units: Iterable[nn.Module],
    device: torch.device,
    precision: torch.dtype = torch.float32,
    cast: Collection[nn.Parameter] = (),
) -> None:
    """FSDP2 (`fully_shard`), in place: parameters, gradients and what an optimizer built afterwards keeps lie in world_size parts.

    Each of `units` (blocks, heads) is gathered for the time it computes; what they leave, for as long as `network` does. The network
    must be used through its `__call__`: that is where the gathering happens.

    Args:
        precision: in which the parameters `cast` are gathered; the parts stay as they are, and gradients are summed over ranks in float32.
            For those that autocast would cast to it before each use: half the bytes travel, and the same is computed.
    """
    # a view that a loss changed in place would lose the hook that gathers for the backward pass; ours change nothing in place
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = gathering(precision, cast)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    # torch would keep the root gathered for the backward pass; the teacher has none, and its update wants the parts
    fully_shard(network, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def gathering(precision: torch.dtype, cast: Collection[nn.Parameter]) -> MixedPrecisionPolicy:
    """Sums of gradients in float32; parameters as they are, but for `cast`."""
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if precision == torch.float32 or not GATHERS_CAST:
        return exact
    chosen = {id(parameter) for parameter in cast}
    return MixedPrecisionPolicy(
        param_dtype=precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # what flows from block to block stays float32, as under autocast; so do masks, which are numbers
        param_dtype_override_fn=lambda parameter: None if id(parameter) in chosen else parameter.dtype,
    )


@contextmanager
def gradient_sync(student: nn.Module, now: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: whether gradients are summed over ranks `now`, or with a later one's."""
    if isinstance(student, FSDPModule):
        student.set_requires_gradient_sync(now)
    with student.no_sync() if isinstance(student, DistributedDataParallel) and not now else nullcontext():
        yield


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module) -> nn.Module:
    """`target`, an unsharded twin, with the weights of `source`, sharded or not. Called by all ranks; then each may use it alone."""
    for whole, part in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        whole.copy_(part.full_tensor() if isinstance(part, DTensor) else part)
    return target


def fault(error: BaseException, folder: str | Path | None = None) -> str:
    """The text to show for an error that ends this rank: rank and host first, then the trace.

    With `folder` it is also kept there as `fault-rank<R>.json`, so that the first of many ranks' errors can be told from those
    that followed ("connection closed by peer").
    """
    trace = "".join(traceback.format_exception(error))
    text = printable(redact(f"{rank_and_host()}: {type(error).__name__}: {error}\n{trace}"))
    if folder is not None:
        record = {"time": time.time(), "rank": rank(), "host": socket.gethostname(), "error": f"{type(error).__name__}: {error}"}
        with suppress(OSError):  # a full disk
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"fault-rank{rank()}.json").write_text(to_json(record | {"trace": trace}))
    return text
