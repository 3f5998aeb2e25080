"""The plan: stream position n -> (dataset, sample), a pure function with no tables, so that the whole state of a run is one integer.

The stream is endless. Positions are dealt to `lanes` in runs of `unit`; each lane owns 1/lanes of every pass over every dataset and walks
it window by window. A window is a shuffled handful of `chunk`s of neighbouring samples (one range read each); where the chunks lie is
permuted over the whole dataset, anew in each pass. Who computes a position (rank, worker, batch size) does not enter anywhere.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.errors import CheckpointError, ConfigError
from ssl_locat.seeds import mix64, mix64_array

VERSION = 1  # of the order; a change to any formula below breaks every running job and must raise it

# one stream of random numbers for each purpose
_QUOTA, _WINDOW, _CHUNK, _ROTATION, _AUGMENT = range(1, 6)


class Slot(NamedTuple):
    """Where a position lies: entry `offset` of window `window` of `lane` in pass `epoch` over `dataset`."""

    dataset: int
    epoch: int
    lane: int
    window: int
    offset: int


@dataclass(frozen=True)
class Plan:
    """All that the order depends on. Frozen at the start of a run and kept in its checkpoints."""

    seed: int
    sizes: tuple[int, ...]  # samples per dataset
    manifests: tuple[str, ...]  # hash of each dataset's index
    quotas: tuple[int, ...]  # slots of each dataset in a block of sum(quotas)
    lanes: int
    unit: int
    window: int  # samples; a multiple of chunk
    chunk: int  # samples
    version: int = field(default=VERSION)
    # chunk of each dataset whose samples lie on a grid on which alone they are read (row groups), 0 of another; (): 0 of all
    grids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise CheckpointError(
                f"the data plan has version {self.version}, this release reads version {VERSION}: the sample order would change. "
                "Continue with the release that wrote the checkpoint, or start a new run from its weights."
            )
        assert 1 <= self.lanes <= min(self.sizes) and self.window % self.chunk == 0 and len(self.sizes) == len(self.quotas)
        assert len(self.grids) in (0, len(self.sizes))

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Realised share of each dataset."""
        return tuple(quota / sum(self.quotas) for quota in self.quotas)

    def slot(self, position: int) -> Slot:
        run, within = divmod(position, self.unit)
        turn, lane = divmod(run, self.lanes)
        dataset, index = self._mix(lane, turn * self.unit + within)
        low, high = self._lane_part(dataset, lane)
        epoch, index = divmod(index, high - low)
        length = self.window_of(dataset)
        window = (low + index) // length
        return Slot(dataset, epoch, lane, window, low + index - max(low, window * length))

    def slots(self, positions: range) -> list[Slot]:
        """`slot` of each position, several times as fast for one dataset: what a batch needs at once."""
        if len(self.sizes) > 1 or positions.stop >= 1 << 62:
            return [self.slot(position) for position in positions]
        run, within = np.divmod(np.arange(positions.start, positions.stop), self.unit)
        turn, lane = np.divmod(run, self.lanes)
        low, high = np.array([self._lane_part(0, lane) for lane in range(self.lanes)]).T[:, lane]
        epoch, index = np.divmod(turn * self.unit + within, high - low)
        length = self.window_of(0)
        window = (low + index) // length
        offset = low + index - np.maximum(low, window * length)
        return [Slot(0, *rest) for rest in zip(*(a.tolist() for a in (epoch, lane, window, offset)), strict=True)]

    def window_samples(self, dataset: int, epoch: int, lane: int, window: int) -> np.ndarray:
        """int64 [<= window]: the samples of one window in the order in which its lane meets them."""
        low, high = self._lane_part(dataset, lane)
        chunk, length = self.chunk_of(dataset), self.window_of(dataset)
        places = np.arange(max(low, window * length), min(high, (window + 1) * length))
        keys = mix64_array(mix64(self.seed, _WINDOW, dataset, epoch, lane, window), places)
        places = places[np.argsort(keys, kind="stable")]
        size = self.sizes[dataset]
        chunks, within = np.divmod(places, chunk)
        first = int(chunks.min())
        moved = [self._permute_chunk(number, dataset, epoch) for number in range(first, int(chunks.max()) + 1)]
        places = np.array(moved, dtype=np.int64)[chunks - first] * chunk + within
        # turning the whole circle by a random step gives a sample new chunk mates in every pass; on a grid, chunks would then begin in the
        # middle of what is read as one
        step = 0 if self._grid(dataset) else mix64(self.seed, _ROTATION, dataset, epoch)
        samples: np.ndarray = (places + step % size) % size
        return samples

    def locate(self, position: int) -> tuple[int, int, int]:
        """(dataset, sample, pass) at a position. For tests and tools: readers ask for whole windows."""
        slot = self.slot(position)
        return slot.dataset, int(self.window_samples(*slot[:4])[slot.offset]), slot.epoch

    def following(self, slot: Slot) -> tuple[int, int, int, int]:
        """(dataset, epoch, lane, window) of the window that this lane reads after the slot's, from the same dataset."""
        low, high = self._lane_part(slot.dataset, slot.lane)
        length = self.window_of(slot.dataset)
        if (slot.window + 1) * length < high:
            return slot.dataset, slot.epoch, slot.lane, slot.window + 1
        return slot.dataset, slot.epoch + 1, slot.lane, low // length

    def chunk_of(self, dataset: int) -> int:
        """Neighbouring samples that are read together."""
        return self._grid(dataset) or self.chunk

    def window_of(self, dataset: int) -> int:
        """Samples that are shuffled together: whole chunks."""
        grid = self._grid(dataset)
        return grid * max(1, self.window // grid) if grid else self.window

    def _grid(self, dataset: int) -> int:
        return self.grids[dataset] if self.grids else 0

    def augment_seed(self, position: int) -> int:
        """Seed of a position's crops."""
        return mix64(self.seed, _AUGMENT, position)

    def augment_seeds(self, positions: range) -> list[int]:
        seeds: list[int] = mix64_array(mix64(self.seed, _AUGMENT), np.arange(positions.start, positions.stop)).tolist()
        return seeds

    def readers_per_lane(self, micro_batch: int, world_size: int, workers: int) -> float:
        """In how many processes, on average, a lane is read: 1.0 is best, 2.0 doubles the traffic.

        A rank has one reader, whatever the number of its workers; it is here because that is what users ask about.
        """
        runs = np.arange(min(self.lanes * 64, 1 << 18)) * self.unit
        # a run that does not lie within one rank's slice has its first and its last position with different readers
        ranks = [(runs + within) // micro_batch % world_size for within in range(self.unit)]
        lane = runs // self.unit % self.lanes
        return len(np.unique(np.concatenate([lane << 32 | rank for rank in ranks]))) / len(np.unique(lane))

    def to_dict(self) -> dict:
        """What a checkpoint keeps: plain JSON."""
        found = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if not self.grids:  # as releases before this field wrote it, and read it
            del found["grids"]
        return found

    @staticmethod
    def from_dict(saved: dict) -> "Plan":
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
        return Plan(**values)

    # lanes, mixing and permutation ------------------------------------------------------------------------------------------

    def _lane_part(self, dataset: int, lane: int) -> tuple[int, int]:
        size = self.sizes[dataset]
        return lane * size // self.lanes, (lane + 1) * size // self.lanes

    def _mix(self, lane: int, turn: int) -> tuple[int, int]:
        """(dataset, how many of its samples the lane has met before) for the lane's `turn`-th sample."""
        if len(self.sizes) == 1:
            return 0, turn
        block, slot = divmod(turn, sum(self.quotas))
        datasets, ranks = _block_order(self.seed, self.quotas, lane, block)
        dataset = int(datasets[slot])
        return dataset, block * self.quotas[dataset] + int(ranks[slot])

    def _permute_chunk(self, chunk: int, dataset: int, epoch: int) -> int:
        """Feistel network on the full chunks, walking on until it lands inside; the short last chunk stays where it is."""
        count = self.sizes[dataset] // self.chunk_of(dataset)
        if chunk >= count:
            return chunk
        # the network permutes 2^(2 * half) numbers, fewer than 4 * count: a few rounds of walking at most
        half = max(1, ((count - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        key = mix64(self.seed, _CHUNK, dataset, epoch)
        while True:
            left, right = chunk >> half, chunk & mask
            for turn in range(4):
                left, right = right, left ^ (mix64(key, turn, right) & mask)
            chunk = left << half | right
            if chunk < count:
                return chunk


@lru_cache(maxsize=4096)
def _block_order(seed: int, quotas: tuple[int, ...], lane: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Which dataset each slot of a block shows, and which of that dataset's slots in the block it is."""
    total = sum(quotas)
    order = np.argsort(mix64_array(mix64(seed, _QUOTA, lane, block), np.arange(total)), kind="stable")
    datasets = np.repeat(np.arange(len(quotas)), quotas)[order]
    ranks = np.empty(total, dtype=np.int64)
    for dataset, quota in enumerate(quotas):
        ranks[datasets == dataset] = np.arange(quota)
    return datasets, ranks


# choosing the parameters, once per run ---------------------------------------------------------------------------------------

_CHUNK_BYTES = 3 << 20  # of one range read: 2..5 MB reach a store's bandwidth at 50 ms to the first byte
MEMORY_BYTES = 1 << 30  # of raw samples that a rank holds at most
_POOL_SHARE = (
    0.85  # of that memory, what the windows of all lanes may fill; the rest, and what is used up of them, is for reading ahead
)
_RETURN = (
    1024  # positions after which a lane comes again, at least: neighbours in a chunk keep that distance, or share a run of `unit`
)
_LANE = 8  # samples of a lane, at least, on average
_FEWEST_GROUPS = 64  # row groups of a set whose order is chosen by row groups
_RANKS = 64  # up to which a lane belongs to one rank, if the batch is a multiple of it


def choose_plan(
    datasets: Sequence[Dataset], weights: Sequence[float], seed: int, global_batch_size: int, memory_bytes: int = MEMORY_BYTES
) -> Plan:
    """Parameters for a new run; a resumed run takes `resume_plan`.

    World size, accumulation and workers do not enter: the same config gives the same order however many processes run it. So a single
    rank must be able to hold the windows of all lanes in its memory.

    Args:
        weights: share of each dataset; need not sum to one.
        memory_bytes: raw samples that one rank may hold.
    """
    sizes = tuple(len(dataset) for dataset in datasets)
    mean_bytes = max(dataset.mean_bytes for dataset in datasets)
    best = min(_CHUNK_BYTES / mean_bytes, max(sizes) / 64) if all(dataset.by_range for dataset in datasets) else 8
    # a row group of Parquet is read whole or not at all: chunks as long as that, as far as memory and shuffling allow
    best = max(best, *(min(getattr(dataset, "rows_per_read", 0), max(sizes) / 64) for dataset in datasets), 0)
    grids = tuple(dataset.together if dataset.together > 1 else 0 for dataset in datasets)
    most = max(1, min(sizes) // _LANE)  # lanes
    # every lane comes once in so many global batches, whole ones: then a rank's slices of them always hold the same lanes
    rounds = max(1, min(8, -(-_RETURN // global_batch_size)))
    chosen = None
    units = _units(global_batch_size, most)
    # short runs of one lane (small units) shuffle best, but make many lanes that must share the memory: stop at readable chunks
    for unit, batches in [*((unit, rounds) for unit in units), (units[0], max(1, rounds // 2))]:
        per_batch = global_batch_size // unit
        lanes = min(batches, max(1, most // per_batch)) * per_batch
        pool = memory_bytes * _POOL_SHARE / mean_bytes / lanes  # samples of one lane
        chunk = _power_of_two(min(best, pool / 2), low=1, high=512)
        window = chunk * max(1, min(4, int(pool / chunk)))
        chosen = Plan(seed, sizes, tuple(d.manifest_hash for d in datasets), choose_quotas(weights), lanes, unit, window, chunk)
        read = min(chunk, min(sizes) / lanes)  # samples of a typical range; a lane of a small dataset has no whole chunk
        readable = 2 * read >= min(best, 128) or read * mean_bytes > _CHUNK_BYTES / 8  # 32 at once still fill 2 Gbit/s at 50 ms
        if readable and pool >= 1:
            break
    assert chosen
    return _on_grids(chosen, grids, datasets, global_batch_size, rounds, memory_bytes) if any(grids) else chosen


def _on_grids(
    plan: Plan, grids: tuple[int, ...], datasets: Sequence[Dataset], global_batch_size: int, rounds: int, memory_bytes: int
) -> Plan:
    """The plan with chunks on the grids of what is read together: of the most lanes whose windows of whole row groups fit into the memory; of
    parts of them (each read so many times) where none do; as it is for a set of so few row groups that shuffling them would mix little."""
    sizes = plan.sizes
    grids = tuple(grid if sizes[place] >= _FEWEST_GROUPS * grid else 0 for place, grid in enumerate(grids))
    if not any(grids):
        return plan
    # of a lane, of all datasets at once: each has a window of its own
    pairs = list(zip(grids, datasets, strict=True))
    other_bytes = sum(plan.window * dataset.mean_bytes for grid, dataset in pairs if not grid)
    group_bytes = sum(grid * dataset.mean_bytes for grid, dataset in pairs)
    room = memory_bytes * _POOL_SHARE
    # a lane ends within a row group, which is then read twice: few lanes beside the number of groups
    most = min(sizes[place] // (4 * grid) for place, grid in enumerate(grids) if grid)
    units = _units(global_batch_size, max(1, min(sizes) // _LANE))
    choices = {global_batch_size // unit * turns: unit for unit in reversed(units) for turns in range(1, rounds + 1)}
    few = [lanes for lanes in choices if lanes <= min(most, min(sizes) // _LANE)] or [min(choices)]
    lanes = next((lanes for lanes in sorted(few, reverse=True) if lanes * (group_bytes + other_bytes) <= room), min(few))
    parts = max(1, -(-lanes * group_bytes // max(1, room - lanes * other_bytes)) if room > lanes * other_bytes else max(grids))
    # a part must divide its row group evenly, or it would reach into the next one
    grids = tuple(grid // _divisor(grid, int(parts)) if grid else 0 for grid in grids)
    chunk, window = plan.chunk, plan.window
    if all(grids):
        chunk = max(grids)
        window = chunk * max(1, min(4, int(room * parts / lanes / group_bytes)))
    return replace(plan, lanes=lanes, unit=choices[lanes], window=window, chunk=chunk, grids=grids)


def _divisor(number: int, least: int) -> int:
    """The smallest divisor of a number from `least` on; the number itself at most."""
    return next((parts for parts in range(least, number) if number % parts == 0), max(1, number))


def _units(global_batch_size: int, most: int) -> list[int]:
    """Lengths of runs to choose from, in order, none of which makes more than `most` lanes of a batch.

    They divide the slices of all numbers of ranks up to 64 that share the batch evenly; for sets of some hundred images there may be none
    of these: then the shortest that serves fewer ranks.
    """
    slices = [global_batch_size // ranks for ranks in range(1, _RANKS + 1) if global_batch_size % ranks == 0]
    common = gcd(*slices)
    first = next(unit for unit in (4, 3, 2, 1) if common % unit == 0)
    units = sorted({first, common, *(unit for unit in (8, 16, 32) if common % unit == 0)})
    units = [unit for unit in units if unit >= first and global_batch_size // unit <= most]
    return units or [
        next(
            unit
            for unit in range(1, global_batch_size + 1)
            if global_batch_size % unit == 0 and global_batch_size // unit <= most
        )
    ]


def micro_batch_size(
    global_batch_size: int, world_size: int, accumulate_steps: int, what: str = "optim.global_batch_size"
) -> int:
    """Samples per rank, forward pass and step. Raises ConfigError with the nearest sizes that divide evenly."""
    parts = world_size * accumulate_steps
    if global_batch_size % parts or global_batch_size < parts:
        below, above = global_batch_size // parts * parts, (global_batch_size // parts + 1) * parts
        raise ConfigError(
            f"{what} is {global_batch_size}: it must be a multiple of {world_size} ranks x {accumulate_steps} accumulated "
            f"steps = {parts}. Nearest: {f'{below} or ' if below else ''}{above}."
        )
    return global_batch_size // parts


def choose_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Integers in the proportion of `weights`, to a thousandth, none zero: (0.7, 0.29, 0.01) -> (70, 29, 1)."""
    if not all(weight > 0 for weight in weights):
        raise ConfigError(f"data.train has weights {list(weights)}: each must be above 0. Leave out what should not be read.")
    # thousandths, rounded down; what is then missing goes to those that lost most
    exact = np.array(weights, dtype=np.float64) / sum(weights) * 1000
    quotas = np.maximum(1, np.floor(exact)).astype(int)
    for dataset in np.argsort(quotas - exact, kind="stable")[: max(0, 1000 - quotas.sum())]:
        quotas[dataset] += 1
    divisor = gcd(*quotas.tolist())
    return tuple(int(quota) // divisor for quota in quotas)


def resume_plan(saved: dict, datasets: Sequence[Dataset], weights: Sequence[float], seed: int) -> Plan:
    """The plan of a checkpoint, for today's datasets. Raises CheckpointError if they, the weights or the seed are not the same."""
    plan = Plan.from_dict(saved)
    manifests = tuple(dataset.manifest_hash for dataset in datasets)
    names = [dataset.name for dataset in datasets]
    if plan.seed != seed:
        _refuse(f"seed was {plan.seed}, now it is {seed}")
    if len(plan.sizes) != len(datasets):
        _refuse(f"data.train had {len(plan.sizes)} datasets, now it has {len(datasets)}")
    for name, before, size, now, count in zip(names, plan.manifests, plan.sizes, manifests, map(len, datasets), strict=True):
        if before != now:
            _refuse(
                f"{name} has {count} samples with manifest {now}; the run was started on {size} samples with manifest {before}"
            )
    if plan.quotas != choose_quotas(weights):
        _refuse(f"the weights of data.train were in proportion {plan.quotas}, now they are {choose_quotas(weights)}")
    return plan


def _refuse(what: str) -> None:
    raise CheckpointError(
        f"cannot continue this run: {what}. A resumed run must see the same data in the same order. Put the data or the setting back, "
        "or start a new run (another run_dir) from this one's weights."
    )


def _power_of_two(value: float, low: int, high: int) -> int:
    """The largest power of two up to `value`, within low..high."""
    power = low
    while power * 2 <= min(value, high):
        power *= 2
    return power
