"""Which checkpoint of a run is the best, by which measure, and when no better one is to be expected.

All of it are functions of what the probes measured (RUN/probes/*.jsonl): nothing else is remembered, so that a run which was killed and
resumed decides as one that was not. What was decided stands in RUN/checkpoints/best.json, for people and for `export --step best-dense`:

    {"dense": {"measure": "unlabelled.dse", "step": 4000, "value": 0.512}, "global": {...}}

The measure of `dense` and `global` is the labelled probe's where there is one; without labels dense is DSE (with lambda 1), and there is
no global one unless it is named: RankMe and its kin follow class tokens, and mislead as soon as patches degrade (arXiv:2510.17299).
Imports no torch.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ssl_locat.config.schema import Config
from ssl_locat.errors import CheckpointError, ConfigError, UserError, did_you_mean
from ssl_locat.intervals.figures import share_noise
from ssl_locat.runs.durable import write_atomically
from ssl_locat.text.shown import to_json

FILE = "best.json"
CHOICES = ("dense", "global")
SERVES = {"dense": "segmentation", "global": "classification"}

# protocol -> its measure of each choice; the first probe of the config that is among these serves
LABELLED = {
    "dense": {"hummingbird": "miou", "segmentation": "miou"},
    "global": {"linear": "top1", "linear_sweep": "top1", "knn": "top1", "held_out": "score"},
}
LABEL_FREE = {"dense": {"unlabelled": "dse"}, "global": {}}

# metric -> which values are good; k-NN's names continue with _k20. What is not here (counts of images, settings) says nothing about a backbone
BETTER = dict.fromkeys(
    (
        "top1",
        "top5",
        "miou",
        "miou_hungarian",
        "mean_accuracy",
        "pixel_accuracy",
        "score",
        "knn",
        "linear",
        "dse",
        "dse_inter",
        "dse_dim",
        "rankme",
        "lidar",
    ),
    "higher",
)
BETTER |= dict.fromkeys(("dse_intra_1", "dse_intra_8", "uniformity", "alignment", "norm_outliers"), "lower")
BETTER |= {"alpha_req": "near 1"}
NOISE = {"dse": 0.04}  # of k-means seeds: smaller differences mean nothing (docs/label-free.md)
SHARES = ("top1", "top5")  # per cent of test images that are classified rightly: the noise follows from their number


def better(metric: str) -> str | None:
    """Which values of a metric are good: "higher", "lower", "near 1"; None where nobody knows."""
    return BETTER.get(_stem(metric))


def goodness(metric: str, value: float) -> float:
    """Higher is better, whatever the metric."""
    rule = BETTER[_stem(metric)]
    return value if rule == "higher" else -value if rule == "lower" else -abs(value - 1)


class Measure(NamedTuple):
    """A metric of one of a run's probes."""

    probe: str
    metric: str

    def __str__(self) -> str:
        return f"{self.probe}.{self.metric}"

    def named_in(self, record: Mapping[str, Any]) -> str:
        """Its name in a line of probes/PROBE.jsonl, '' if it is not there. `top1` stands for the first top1_k... of k-NN."""
        return self.metric if self.metric in record else next((key for key in record if key.startswith(f"{self.metric}_k")), "")

    def value(self, record: Mapping[str, Any]) -> float | None:
        """Of one line of probes/PROBE.jsonl; None where it is no number."""
        found = record.get(self.named_in(record))
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None

    def goodness(self, value: float) -> float:
        """Higher is better, whatever the metric."""
        return goodness(self.metric, value)


class Best(NamedTuple):
    """One decision: the value of `measure` at `step`."""

    measure: str
    step: int
    value: float

    def of(self) -> Measure:
        """What was compared."""
        return Measure(*self.measure.split(".", 1))


def measure_of(choice: str, probes: Mapping[str, Any], named: str | None = None, key: str = "checkpoint.keep_best") -> Measure:
    """What stands for `choice` (dense, global, or PROBE.METRIC) in a run with these probes (name -> options).

    named: PROBE.METRIC that the user wants in its place. Raises ConfigError, about the config's `key`, where nothing can stand for it.
    """
    if choice not in CHOICES:
        named = choice
    if named:
        return _named(named, probes, key)
    # with labels before without: what people want of a backbone is what labels measure
    for table in (LABELLED[choice], LABEL_FREE[choice]):
        for name, options in probes.items():
            if (protocol := _protocol(name, options)) in table:
                return Measure(name, table[protocol])
    if choice == "dense":
        raise ConfigError(
            f"{key}: dense needs a probe that measures dense features. Without labels: probes.unlabelled={{}}; with masks: "
            "probes.hummingbird or probes.segmentation."
        )
    raise ConfigError(
        f"{key}: global needs labels (probes.knn or probes.linear), or the name of a measure, such as {key}="
        + ("{global: unlabelled.lidar}" if key.endswith("keep_best") else "unlabelled.lidar")
        + ": no measure without labels is trusted by itself, RankMe misleads."
    )


def _named(name: str, probes: Mapping[str, Any], key: str) -> Measure:
    probe, _, metric = name.partition(".")
    if probe not in probes:
        there = ", ".join(probes) or "none"
        raise ConfigError(
            f"{key}: {name!r} is no measure of a probe of this run (PROBE.METRIC; probes: {there}).{did_you_mean(probe, probes)}"
        )
    if _stem(metric) not in BETTER:
        raise ConfigError(
            f"{key}: {name!r}: no metric {metric!r} can be compared.{did_you_mean(metric, BETTER)} Known: {', '.join(BETTER)}."
        )
    return Measure(probe, metric)


def check_choices(config: Config) -> None:
    """ConfigError for a `keep_best` or `stop_when` that nothing would measure."""
    kept_measures(config)
    stop_measure(config)
    asked = "checkpoint.keep_best" if config.checkpoint.keep_best else "stop_when" if config.stop_when else None
    if asked and not (config.probes.every_epochs or config.probes.every_steps):
        raise ConfigError(
            f"{asked} compares what probes measure on the way, but they run at the start and the end alone: give probes.every_epochs "
            "(or probes.every_steps)."
        )


def kept_measures(config: Config) -> dict[str, Measure]:
    """choice -> its measure, for each choice of `checkpoint.keep_best`; what the guard will judge is kept as the global one."""
    probes = config.probes.options
    found: dict[str, Measure] = {
        choice: measure_of(choice, probes, named) for choice, named in config.checkpoint.keep_best.items()
    }
    if guards := guard_measure(config):
        if found.get("global", guards) != guards:
            raise ConfigError(
                f"checkpoint.keep_best: global is {found['global']}, but the guard chooses by {guards}: leave global out, or set guard=null."
            )
        found["global"] = guards
    return found


def guard_measure(config: Config) -> Measure | None:
    """What the guard chooses a checkpoint by; None without a guard, or where no labels are there to judge by."""
    if not config.guard:
        return None
    probes = config.probes.options
    return next((Measure(name, "score") for name in probes if _protocol(name, probes[name]) == "held_out"), None)


def stop_measure(config: Config) -> Measure | None:
    """Of `stop_when`; None where the run continues to its last step in any case."""
    return measure_of(config.stop_when.measure, config.probes.options, key="stop_when.measure") if config.stop_when else None


def best_of(records: Iterable[Mapping[str, Any]], measure: Measure, steps: Collection[int] | None = None) -> Best | None:
    """The best of a probe's records, the earlier one of two alike; None if none counts.

    The untrained network (step 0) is none: it has no checkpoint, and label-free measures flatter it.

    Args:
        steps: those that may be chosen; None: all.
    """
    values = ((record["step"], measure.value(record)) for record in records)
    found = [(step, value) for step, value in values if value is not None and step > 0 and (steps is None or step in steps)]
    if not found:
        return None
    # of two alike the earlier one: noise must not make a run keep its later checkpoints only
    step, value = max(found, key=lambda pair: (measure.goodness(pair[1]), -pair[0]))
    return Best(str(measure), step, value)


def reason_to_stop(records: list[dict[str, Any]], measure: Measure, patience: int) -> str | None:
    """In words, why a run whose probe measured this has no more to gain: `patience` records in a row that brought nothing better."""
    best = best_of(records, measure)
    since = sum(record["step"] > best.step for record in records) if best else 0
    if best is None or since < patience:
        return None
    last = next((value for record in reversed(records) if (value := measure.value(record)) is not None), best.value)
    return (
        f"{measure} was best at step {best.step} ({best.value:.4g}) and not better in the {since} probes since (last: {last:.4g}); "
        f"stop_when.patience is {patience}"
    )


def read_best(run: str | Path) -> dict[str, Best]:
    """What best.json of a run says; {} without one."""
    try:
        found = json.loads(Path(run, "checkpoints", FILE).read_text(encoding="utf-8"))
        best = {choice: Best(str(entry["measure"]), int(entry["step"]), float(entry["value"])) for choice, entry in found.items()}
        return {choice: entry for choice, entry in best.items() if choice in CHOICES and "." in entry.measure}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # none, or half of one
        return {}


def write_best(run: Path, best: Mapping[str, Best]) -> None:
    """best.json, whole or not at all; without anything to say, none."""
    path = run / "checkpoints" / FILE
    if best:
        write_atomically(path, to_json({choice: entry._asdict() for choice, entry in best.items()}, indent=1))
    else:
        path.unlink(missing_ok=True)


def parse_step(text: str) -> int | str:
    """What --step says: a number, `last`, `best-dense` or `best-global`."""
    known = ("last", *(f"best-{choice}" for choice in CHOICES))
    if text in known:
        return text
    if text.isdecimal():
        return int(text)
    raise UserError(
        f"step is {text!r}; expected the number of a step, {', '.join(known[:-1])} or {known[-1]}.{did_you_mean(text, known)}"
    )


def best_step(run: Path, choice: str) -> int:
    """The step that a run kept as its best by `choice`. CheckpointError if it kept none."""
    found = read_best(run)
    if choice not in found:
        there = (
            f"it has best-{', best-'.join(found)}"
            if found
            else "a run keeps some with checkpoint.keep_best=[dense, global] and probes"
        )
        raise CheckpointError(f"{run} has no best-{choice} ({there}). Take --step last, or the number of a step.")
    return found[choice].step


def better_than_last(records: list[dict[str, Any]], measure: Measure) -> tuple[Best, Best] | None:
    """(best, last) of a probe's records; None where there are not two to compare."""
    best = best_of(records, measure)
    # of the last record alone: its value, in the same form
    last = best_of(records[-1:], measure)
    return (best, last) if best and last and len(records) > 1 else None


def noise_of(measure: Measure, record: Mapping[str, Any]) -> float:
    """Differences up to which two values of a measure are alike; 0 where it is not known.

    Of a share of n test images it is half of the share's 95 % interval, the larger the fewer they are."""
    stem, value, images = _stem(measure.metric), measure.value(record), record.get("test_images")
    if stem in SHARES and value is not None and images:
        return share_noise(value, images)
    return NOISE.get(stem, 0.0)


def probes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """name -> options of the probes that a run's config, as plain values, has on."""
    found = config.get("probes") or {}
    return {
        name: options for name, options in found.items() if options is not None and name not in ("every_epochs", "every_steps")
    }


def _protocol(name: str, options: Any) -> str:
    """The protocol of a probe: its own option, or its name."""
    return str((options or {}).get("protocol", name)) if isinstance(options, Mapping) or options is None else name


def _stem(metric: str) -> str:
    """`top1` of `top1_k20`, else the metric itself."""
    head, separator, rest = metric.partition("_k")
    return head if separator and rest[:1].isdecimal() else metric
