"""A run folder as people ask about it: how far it came, how it ended, what it cost, what to do now. Reads plain files only, no torch.

The report, `doctor RUN` and the model card stand on this. Unlike folder.py it takes a run as it finds it, half-written or of
another version, since a broken run is what people want explained.
"""

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_locat.config.yaml_files import load_yaml
from ssl_locat.errors import ConfigError, UserError
from ssl_locat.runs.best import SERVES, Best, better_than_last, measure_of, noise_of, probes_of, read_best
from ssl_locat.runs.log import duration, read_jsonl

# kind of the last telling event -> what became of the run
ENDINGS = {
    "finish": "finished",
    "preempt": "preempted",
    "requeue": "preempted",
    "diverged": "diverged",
    "outage": "starved",
    "fault": "failed",
}
QUIET_SECONDS = 600  # no new line for so long, and no word of an ending: nobody is writing any more


@dataclass(frozen=True)
class Run:
    """What the files of one run folder say. `probes`: protocol -> one record per probe, {"step", score: value}."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    probes: dict[str, list[dict[str, Any]]]
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def last(self) -> dict[str, Any]:
        return self.metrics[-1] if self.metrics else {"step": 0, "samples_seen": 0}

    @property
    def total_steps(self) -> int | None:
        """As configured, or from the start event: epochs are turned into steps only once the data is counted."""
        totals = [event["total_steps"] for event in self.events if event.get("total_steps")]
        return totals[-1] if totals else (self.config.get("optim") or {}).get("total_steps")

    @property
    def status(self) -> str:
        """finished, preempted, diverged, starved, failed, running, or stopped (ended without a word: killed, out of memory, power)."""
        if self.summary:
            return "finished"
        # the last telling event counts: what came before the last start was of an earlier attempt
        for event in reversed(self.events):
            if event["kind"] in ENDINGS:
                return ENDINGS[event["kind"]]
            if event["kind"] in ("start", "resume"):
                break
        return "running" if time.time() - self._newest_line() < QUIET_SECONDS else "stopped"

    @property
    def seconds(self) -> float:
        """Time that was worked: gaps between a stop and its resume do not count."""
        if "seconds" in self.summary:
            return float(self.summary["seconds"])
        times = [record["time"] for record in self.metrics if "time" in record]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        # a step of minutes is work, too: so long a gap is measured by the usual one
        usual = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
        return float(sum(gap for gap in gaps if gap < max(QUIET_SECONDS, 20 * usual)))

    @property
    def restarts(self) -> int:
        return sum(event["kind"] == "resume" for event in self.events)

    def _newest_line(self) -> float:
        files = [self.path / name for name in ("metrics.jsonl", "events.jsonl")]
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def is_run(path: str | Path) -> bool:
    return (Path(path) / "config.yaml").is_file()


def find_runs(folder: str | Path, deepest: int = 3) -> list[Path]:
    """Run folders below a folder, in the order of their names; what lies inside a run is part of it. Links are not followed."""
    found: list[Path] = []
    for child in sorted(Path(folder).iterdir()):
        if child.is_symlink() or not child.is_dir() or child.name.startswith("."):
            continue
        # a config.yaml alone may be an export, or a recipe in a folder of its own
        if is_run(child) and any((child / name).exists() for name in ("events.jsonl", "metrics.jsonl", "summary.json")):
            found.append(child)
        elif deepest > 1:
            found += find_runs(child, deepest - 1)
    return found


def check_run(path: str | Path) -> None:
    """UserError if it is no run folder."""
    path = Path(path)
    if not is_run(path):
        there = "has no config.yaml" if path.is_dir() else "is no folder"
        raise UserError(f"{path} {there}; expected a run folder, as `ssl-locat pretrain` makes it (its `run_dir`).")


def open_run(path: str | Path, every_line: bool = True) -> Run:
    """Read a run folder. Raises UserError if it is none. `every_line=False`: of the metrics only the first and the last line."""
    path = Path(path)
    check_run(path)
    metrics = path / "metrics.jsonl"
    return Run(
        path=path,
        config=load_yaml(str(path / "config.yaml")).data,
        environment=_json(path / "environment.json"),
        metrics=read_jsonl(metrics) if every_line else _first_and_last(metrics),
        events=read_jsonl(path / "events.jsonl"),
        quarantine=read_jsonl(path / "quarantine.jsonl"),
        probes={file.stem: read_jsonl(file) for file in sorted((path / "probes").glob("*.jsonl"))},
        summary=_json(path / "summary.json"),
    )


def _first_and_last(path: Path, enough: int = 65536) -> list[dict[str, Any]]:
    """Of a .jsonl file of any length: its first whole line and its last."""
    try:
        with open(path, "rb") as file:
            first = file.readline(enough)
            # 64 KiB hold a line of metrics many times over, and cost the same at any length of the file
            file.seek(max(0, path.stat().st_size - enough))
            tail = file.read()
    except FileNotFoundError:
        return []
    found = []
    for line in (first, tail.rpartition(b"\n")[0].rpartition(b"\n")[2]):  # what a kill cut off has no line end
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record and record not in found:
            found.append(record)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (FileNotFoundError, ValueError):  # not written yet, or cut off by a full disk
        return {}


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def explain(run: Run) -> tuple[list[str], list[str]]:
    """What became of the run, and what to do: sentences for people."""
    fact, advice = ending(run)
    look = {
        "finished": f"Look at it: ssl-locat report {run.path}",
        "running": f"Follow it: ssl-locat report {run.path} --watch",
    }
    facts, advices = [fact], [advice or look[run.status]]
    knn = run.summary.get("knn") or {}
    if knn.get("trained") is not None:
        others = {"before training": knn.get("init"), "raw pixels": knn.get("raw_pixels")}
        compared = ", ".join(f"{label} {value:.1f}" for label, value in others.items() if value is not None)
        facts.append(f"k-NN top-1 {knn['trained']:.1f}" + (f" ({compared})." if compared else "."))
    found = findings(run)
    facts += [fact for fact, _ in found]
    advices += [advice for _, advice in found]
    return [fact for fact in dict.fromkeys(facts) if fact], [sentence for sentence in dict.fromkeys(advices) if sentence]


def ending(run: Run) -> tuple[str, str]:
    """How far it came and how it ended, and what to do about that: '' where nothing went wrong."""
    share = f" of {run.total_steps}" if run.total_steps else ""
    at = f"{run.last['step']}{share} steps, {run.last['samples_seen']:,} images, in {duration(run.seconds)}"
    again = "Start the same command again: it resumes from the newest whole checkpoint."
    words = {
        "finished": (f"Finished: {at}.", ""),
        "running": (f"Running, or stopped within the last minutes: {at}.", ""),
        "preempted": (f"Preempted, and saved before it stopped: {at}.", again),
        "diverged": (f"Diverged: {at}.", "The last events name the step, the samples and what people change."),
        "starved": (f"The data store did not answer: {at}.", f"{again} `ssl-locat doctor CONFIG` tries the store."),
        "failed": (f"Failed: {at}.", "The fault is among the last events and in the job's log."),
        "stopped": (f"Ended without a word (killed, out of memory, or power): {at}.", again),
    }
    return words[run.status]


def findings(run: Run) -> list[tuple[str, str]]:
    """What is worth knowing beside the numbers, each with what to do about it ('' for nothing)."""
    found = []
    for event in run.events:
        if event["kind"] in ("branch", "change"):
            begin = f"Branched from {event['parent']}" if "parent" in event else "Settings were changed on purpose"
            found.append((f"{begin} at step {event['step']}: {'; '.join(event['changes']) or 'with the same settings'}.", ""))
    if stopped := run.summary.get("stopped"):
        found.append((f"Ended before its last step by stop_when: {stopped}.", ""))
    if verdict := run.summary.get("guard"):
        found.append((verdict["sentence"], ""))
    found += _better_backbones(run)
    knn = run.summary.get("knn") or {}
    if knn.get("trained") is not None and knn.get("init") is not None and knn["trained"] <= knn["init"]:
        found.append(
            ("", "k-NN did not rise over the untrained network: train longer, or start from a recipe for data of this size.")
        )
    # of the end: the first steps wait for workers and caches in every run
    waits = [record["data_wait"] for record in run.metrics[-200:] if isinstance(record.get("data_wait"), int | float)]
    if waits and sum(waits) / len(waits) > 0.2:
        fact = f"The model waited for data {100 * sum(waits) / len(waits):.0f} % of the time."
        found.append(
            (fact, "Against waiting: more data.workers, images stored smaller (`ssl-locat shards pack`), a local data.cache.")
        )
    if run.quarantine:
        shards = any(str(entry.get("shard", "")).endswith(".tar") for entry in run.quarantine)
        all_of_them = "; `ssl-locat shards check` finds them all" if shards else ""
        found.append(
            (
                f"{len(run.quarantine)} corrupt image{'s' * (len(run.quarantine) > 1)} were replaced by others.",
                f"They are listed in {run.path / 'quarantine.jsonl'}{all_of_them}.",
            )
        )
    # those of the end explain how it ended; a run of weeks may have hundreds
    for event in run.events[-50:]:
        if event["kind"] in ("warning", "diverged", "outage", "fault"):
            found.append((str(event.get("message", "")), str(event.get("advice", ""))))
    return list(dict.fromkeys(found))


def _better_backbones(run: Run) -> list[tuple[str, str]]:
    """Whether an earlier checkpoint serves better than the last one, by what the run's probes measured: (fact, what to do or '')."""
    probes = probes_of(run.config)
    named = (run.config.get("checkpoint") or {}).get("keep_best") or {}
    found = []
    for choice, serves in SERVES.items():
        try:
            measure = measure_of(choice, probes, named.get(choice))
        except ConfigError:  # nothing measures it
            continue
        records = run.probes.get(measure.probe, [])
        pair = better_than_last(records, measure)
        # while it trains, the last step is no end to judge by
        if pair and run.status != "running":
            found.append(_compared(run, choice, serves, noise_of(measure, records[-1]), *pair))
    return found


def _compared(run: Run, choice: str, serves: str, noise: float, best: Best, last: Best) -> tuple[str, str]:
    at, measure = _epoch(run, best.step), best.measure
    values = f"{measure} {best.value:.4g} against {last.value:.4g} at the last step"
    if best.step == last.step:
        return f"The last step is the best backbone for {serves} (by {measure}).", ""
    if abs(best.value - last.value) <= noise:
        return f"For {serves} {at} and the last step are alike ({values}: differences up to {noise:.2g} are noise).", ""
    fact = f"{at[0].upper()}{at[1:]} is the better backbone for {serves} ({values})."
    there = (run.path / "checkpoints" / f"step_{best.step:08d}").is_dir()
    kept = read_best(run.path).get(choice)
    step = f"best-{choice}" if kept and kept.step == best.step else str(best.step)
    if there:
        return fact, f"Take it: ssl-locat export {run.path} OUT --step {step}"
    if parents := [event["parent"] for event in run.events if event["kind"] == "branch" and event["step"] == best.step]:
        return fact, f"It is what this run branched from: {parents[-1]}"
    return fact, f"Its checkpoint is gone; a run keeps such ones with checkpoint.keep_best=[{choice}]."


def _epoch(run: Run, step: int) -> str:
    """'epoch 40 (step 5,000)', or the step alone where nothing tells how long an epoch was."""
    lengths = [event["steps_per_epoch"] for event in run.events if event.get("steps_per_epoch")]
    epochs = (run.config.get("optim") or {}).get("epochs")
    length = lengths[-1] if lengths else run.total_steps / epochs if epochs and run.total_steps else None
    return f"epoch {step / length:.3g} (step {step:,})" if length else f"step {step:,}"
