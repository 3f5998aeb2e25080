"""The stages of a run: which crops and which batch size a step has. All of it follows from the samples seen when the step begins, so that a
resumed run, and one on another number of ranks, changes over at the same sample.

    stages = stages_of(config, total_samples)
    stage = stage_at(stages, samples_seen)                       # of the step that comes next
    stretches(stages, samples_seen, total_samples)               # what is left: each stage's first sample and its steps
"""

from collections.abc import Callable
from typing import NamedTuple

from ssl_locat.config.crops_section import Crops
from ssl_locat.config.schema import Config
from ssl_locat.objectives.masking import Keep


class RunStage(NamedTuple):
    """A stage in samples. A step belongs to the stage in which it begins: the last step of one may reach over its end."""

    number: int  # from 0
    ends: int  # samples seen
    crops: Crops
    batch: int  # images per optimiser step, over all ranks


class Stretch(NamedTuple):
    """The steps of one stage, as a run does them that begins at some sample."""

    stage: RunStage
    first: int  # samples seen when its first step begins
    steps: int

    @property
    def samples(self) -> int:
        return self.steps * self.stage.batch


def stages_of(config: Config, total_samples: int) -> list[RunStage]:
    """Of a run of so many samples; one for a config without stages."""
    found = []
    for number, (until, crops, batch) in enumerate(config.crops.resolved()):
        found.append(RunStage(number, round(until * total_samples), crops, batch or config.optim.global_batch_size))
    return found


def stage_at(stages: list[RunStage], samples_seen: int) -> RunStage:
    """Of the step that begins there; behind the end of the run the last one."""
    return next((stage for stage in stages if samples_seen < stage.ends), stages[-1])


def stretches(stages: list[RunStage], samples_seen: int, total_samples: int) -> list[Stretch]:
    """What is left of the run from `samples_seen` on, stage by stage; a stage that no step begins in is left out."""
    found = []
    while samples_seen < total_samples:
        stage = stage_at(stages, samples_seen)
        ends = total_samples if stage is stages[-1] else stage.ends
        stretch = Stretch(stage, samples_seen, -(-(ends - samples_seen) // stage.batch))
        found.append(stretch)
        samples_seen += stretch.samples
    return found


def keep_at(stages: list[RunStage], samples_seen: int) -> Keep | None:
    """What the student gets of the global crops' patches in the step that begins there; None: all."""
    stage = stage_at(stages, samples_seen)
    begins = stages[stage.number - 1].ends if stage.number else 0
    first, last = stage.crops.keeps
    done = min(1.0, max(0.0, (samples_seen - begins) / max(1, stage.ends - begins)))
    return _keep(stage.crops, first + (last - first) * done)


def keep_on_average(crops: Crops) -> Keep | None:
    """For what stands for the steps of a whole stage."""
    return _keep(crops, sum(crops.keeps) / 2)


def _keep(crops: Crops, share: float) -> Keep | None:
    return Keep(share, crops.keep_shape) if share < 1 else None


def steps_left(stages: list[RunStage], samples_seen: int, total_samples: int) -> int:
    return sum(stretch.steps for stretch in stretches(stages, samples_seen, total_samples))


def crop_sizes(config: Config) -> list[tuple[str, int, str, float]]:
    """(key, pixels, in which stage, smallest share of patches kept) of all crops that a run will cut, the last stage's first."""
    found = []
    for number, (_, crops, _) in reversed(list(enumerate(config.crops.resolved(), start=1))):
        where = f" in stage {number}" if config.crops.stages else ""
        found.append(("global_size", crops.global_size, where, min(crops.keeps)))
        if crops.num_local:
            found.append(("local_size", crops.local_size, where, 1.0))
    return found


class Told(NamedTuple):
    """A stage as people are told of it. `step`: its first; FLOP of an image."""

    number: int
    step: int
    until: float
    samples: int
    steps: int
    batch: int
    global_size: int
    local_size: int
    num_local: int
    flop: float
    keeps: list[float]  # first and last share of the global crops' patches that the student gets
    whole: float  # FLOP of an image of the last stage's crops, of which the student gets all patches

    def words(self) -> str:
        local = f" + {self.num_local} x {self.local_size}" if self.num_local else ""
        first, last = (f"{100 * share:.3g}" for share in self.keeps)
        kept = f", of which the student gets {first if first == last else f'{first} to {last}'} % of the large ones' patches"
        return (
            f"stage {self.number + 1}, to {100 * self.until:g} % of the run: {self.samples:,} images in {self.steps:,} steps of {self.batch}, from step "
            f"{self.step:,}; crops 2 x {self.global_size}{local} px{kept if min(self.keeps) < 1 else ''}; {self.flop / 1e9:.3g} GFLOP an image"
        )


def changes(config: Config) -> bool:
    """Whether a run is cheaper than its last stage's crops throughout."""
    return bool(config.crops.stages) or min(config.crops.keeps) < 1


def told(config: Config, total_samples: int, flop: list[float], whole: float) -> list[Told]:
    """The stages of a whole run, from its beginning. flop: of an image in each, and in the last with all patches (operations.py)."""
    found, step = [], 0
    for stage, _, steps in stretches(stages_of(config, total_samples), 0, total_samples):
        crops, until = stage.crops, config.crops.resolved()[stage.number].until
        sizes = crops.global_size, crops.local_size, crops.num_local
        counts = steps * stage.batch, steps, stage.batch
        found.append(Told(stage.number, step, until, *counts, *sizes, flop[stage.number], list(crops.keeps), whole))
        step += steps
    return found


def in_words(stages: list[Told]) -> list[str]:
    """A line for each stage, and what they save."""
    done, whole = sum(stage.samples * stage.flop for stage in stages), sum(stage.samples * stage.whole for stage in stages)
    return [
        *(stage.words() for stage in stages),
        f"in all {done / 1e15:.3g} PFLOP, {done / whole:.2g} of what the last stage's whole crops would cost throughout",
    ]


def work(stages: list[RunStage], step: int, samples_seen: int, total_samples: int, flop: list[float]) -> Callable[[int], float]:
    """What a run that stands at `step` has done when it stands at a later one, in FLOP: the ETA goes by it."""
    left = stretches(stages, samples_seen, total_samples)

    def until(later: int) -> float:
        done, missing = 0.0, later - step
        for stage, _, steps in left:
            done += min(missing, steps) * stage.batch * flop[stage.number]
            missing -= min(missing, steps)
        return done

    return until
