"""Protocols that watch a run: at a period, on the teacher's backbone, without touching its random state or its data."""

import json
import logging
import time
from pathlib import Path

from torch import nn

from ssl_locat.config.schema import Config
from ssl_locat.errors import UserError
from ssl_locat.evaluation.online import open_splits, probe
from ssl_locat.evaluation.probe_options import own_data, resolve
from ssl_locat.evaluation.protocols.knn import raw_pixel_knn
from ssl_locat.pretraining.probe_costs import MOST, limits, period
from ssl_locat.runs.distributed import barrier, broadcast_object, is_main
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import EventLog, read_jsonl
from ssl_locat.text.shown import to_json

log = logging.getLogger(__name__)


def check_probe_data(config: Config) -> None:
    """UserError for a probe whose data or labels are not there: at the start, also of a run that it is added to later, not at its turn."""
    for name, options in config.probes.options.items():
        protocol, arguments = resolve(name, options or {}, own_data(config))
        try:
            open_splits(protocol, arguments["data"])
        except UserError as error:
            raise type(error)(f"probes.{name}: {error}") from None


class Probes:
    """Protocols at a period, on the teacher's backbone; results in RUN/probes/NAME.jsonl, one line per step.

    They read subsets fixed by key (probe_costs.py), and with them the baseline of raw pixels, once: RUN/probes/raw_pixels.json.
    """

    def __init__(self, config: Config, backbone: nn.Module, steps_per_epoch: int, total_steps: int, events: EventLog):
        self.config, self.backbone, self.events = config, backbone, events
        self.period, self.total_steps = period(config, steps_per_epoch, total_steps), total_steps
        self.folder = Path(config.run_dir) / "probes"
        automatic = limits(config, steps_per_epoch, total_steps)
        # the run's own sets, cut to subsets; what a probe names itself is laid over them later (resolve)
        self.data = {name: own_data(config) | automatic[name] for name in config.probes.options}
        self.results: dict[str, list[dict]] = {name: [] for name in self.data}

    def due(self, step: int) -> bool:
        return step % self.period == 0 or step == self.total_steps

    def owed(self, step: int) -> bool:
        """Whether a run that begins at this step has to measure it first: at its start, and where it was stopped before its probe."""
        return self.due(step) and step < self.total_steps and self.missing(step)

    def missing(self, step: int) -> bool:
        """Whether a probe has no result at this step."""
        return any(not self._measured(name, step) for name in self.results)

    def _measured(self, name: str, step: int) -> bool:
        return any(record["step"] == step for record in self.results[name])

    def forget_after(self, step: int) -> None:
        """After a resume: what lies ahead of the checkpoint will be measured again. Rank 0 read the files for all."""
        for name in self.results:
            kept = (
                [record for record in read_jsonl(self.folder / f"{name}.jsonl") if record["step"] <= step] if is_main() else None
            )
            # the same on all ranks: they decide together whether a probe is still missing
            self.results[name] = broadcast_object(kept)

    def run(self, step: int, backbone: nn.Module | None = None) -> None:
        """Measure what is missing at this step: a kill may have come between two probes. backbone: in the teacher's place."""
        for name, options in self.config.probes.options.items():
            if self._measured(name, step):
                continue
            began = time.monotonic()
            scores = probe(backbone or self.backbone, name, self._with_files(name, step, options or {}), self.data[name])
            self.results[name].append({"step": step, **scores})
            if is_main():
                self.folder.mkdir(exist_ok=True)
                # written whole: after a resume the file may hold steps beyond the checkpoint
                lines = "".join(to_json(record) + "\n" for record in self.results[name])
                write_atomically(self.folder / f"{name}.jsonl", lines)
            self.events.add("probe", step=step, name=name, seconds=round(time.monotonic() - began, 2), **scores)
            log.info("step %d  %s: %s", step, name, "  ".join(f"{key} {value:.2f}" for key, value in scores.items()))
        self._raw_pixels()

    def _with_files(self, name: str, step: int, options: dict) -> dict:
        """The options with a file for what a probe knows besides: k-NN's classes, of which the newest are kept, and what each held-out image
        added, of every step (guard.py)."""
        if options.get("protocol", name) == "held_out":
            return {"tallies": str(tallies_of(self.folder.parent, name, step)), **options}
        if options.get("protocol", name) != "knn" or options.get("folds"):
            return options
        return {"per_class": str(self.folder / f"{name}_classes.json"), **options}

    def _raw_pixels(self) -> None:
        """What learned features must beat, on the same images as the k-NN probe: measured with the first of them, and kept."""
        path, section = self.folder / "raw_pixels.json", self._knn_data()
        if not section or not section["test"] or broadcast_object(path.exists()):
            return
        first = self.results["knn"][0]
        key = _top1(first)
        # top1_k20 and top1_k20_t0.07: the first k that the probe measures
        k = int(key.removeprefix("top1_k").partition("_t")[0])
        raw = raw_pixel_knn(data=section, k=k, channels=len(self.config.crops.mean), bands=self.config.channels, most_images=MOST)
        if is_main():
            write_atomically(path, to_json({**raw, "top1": raw[f"top1_k{k}"]}))
        barrier()

    def _knn_data(self) -> dict | None:
        """The data section of the k-NN probe; None without one."""
        if not self.results.get("knn"):
            return None
        own = (self.config.probes.options["knn"] or {}).get("data") or {}  # the probe's splits, over the run's
        return {key: value for key, value in {**self.data["knn"], **own}.items() if key != "judged"}

    def knn(self) -> dict[str, float]:
        """k-NN top-1 in percent, to two digits behind the point, of raw pixels (where there are test images), of the random initialisation and of the trained backbone; {} without a k-NN probe."""
        if not self.results.get("knn"):
            return {}
        first, last = self.results["knn"][0], self.results["knn"][-1]
        scores, path = (
            {"init": round(first[_top1(first)], 2), "trained": round(last[_top1(last)], 2)},
            self.folder / "raw_pixels.json",
        )
        raw = broadcast_object(json.loads(path.read_text())["top1"] if is_main() and path.exists() else None)
        return (
            scores if raw is None else {"raw_pixels": round(raw, 2), **scores}
        )  # none where k-NN is evaluated by cross-validation (folds)


def tallies_of(run: str | Path, name: str, step: int) -> Path:
    """Where a probe of held-out images keeps what each of them added."""
    return Path(run) / "probes" / name / f"step_{step:08d}.npz"


def _top1(record: dict) -> str:
    return next(name for name in record if name.startswith("top1"))


def counted(run: str | Path) -> tuple[int, int] | None:
    """(training images in the bank, test images) of a run's k-NN probe; None where nothing tells."""
    records = read_jsonl(Path(run) / "probes" / "knn.jsonl")
    last = records[-1] if records else {}
    return (int(last["train_images"]), int(last["test_images"])) if {"train_images", "test_images"} <= set(last) else None
