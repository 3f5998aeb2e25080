"""Protocols that watch a run: at a period, on the teacher's backbone, without touching its random state or its data."""

import logging
import time
from pathlib import Path

from torch import nn

from ssl_locat.config.schema import Config
from ssl_locat.errors import UserError
from ssl_locat.evaluation.online import open_splits, probe
from ssl_locat.evaluation.probe_options import own_data, resolve
from ssl_locat.evaluation.protocols.knn import raw_pixel_knn
from ssl_locat.runs.distributed import is_main
from ssl_locat.runs.folder import write_atomically
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
    """Protocols at a period, on the teacher's backbone; results in RUN/probes/NAME.jsonl, one line per step."""

    def __init__(self, config: Config, backbone: nn.Module, steps_per_epoch: int, total_steps: int, events: EventLog):
        self.config, self.backbone, self.events = config, backbone, events
        options = config.probes
        period = options.every_steps or (options.every_epochs and max(1, round(options.every_epochs * steps_per_epoch)))
        self.period, self.total_steps = period or total_steps, total_steps
        self.folder = Path(config.run_dir) / "probes"
        self.data = own_data(config)
        self.results: dict[str, list[dict]] = {}

    def due(self, step: int) -> bool:
        return step % self.period == 0 or step == self.total_steps

    def forget_after(self, step: int) -> None:
        """After a resume: what lies ahead of the checkpoint will be measured again."""
        for name in self.config.probes.options:
            kept = [record for record in read_jsonl(self.folder / f"{name}.jsonl") if record["step"] <= step]
            self.results[name] = kept

    def run(self, step: int) -> None:
        for name, options in self.config.probes.options.items():
            began = time.monotonic()
            scores = probe(self.backbone, name, options or {}, self.data)
            self.results[name].append({"step": step, **scores})
            if is_main():
                self.folder.mkdir(exist_ok=True)
                lines = "".join(to_json(record) + "\n" for record in self.results[name])
                write_atomically(self.folder / f"{name}.jsonl", lines)
            self.events.add("probe", step=step, name=name, seconds=round(time.monotonic() - began, 2), **scores)
            log.info("step %d  %s: %s", step, name, "  ".join(f"{key} {value:.2f}" for key, value in scores.items()))

    def knn(self) -> dict[str, float]:
        """k-NN top-1 in percent, to two digits behind the point, of raw pixels (where there are test images), of the random initialisation and of the trained backbone; {} without a k-NN probe."""
        if not self.results.get("knn"):
            return {}
        first, last = self.results["knn"][0], self.results["knn"][-1]
        key = next(name for name in first if name.startswith("top1"))
        own = (self.config.probes.options["knn"] or {}).get("data") or {}  # the probe's splits, over the run's
        data, scores = {**self.data, **own}, {"init": round(first[key], 2), "trained": round(last[key], 2)}
        if not data["test"]:  # judged by cross-validation (folds)
            return scores
        k = int(key.removeprefix("top1_k").partition("_t")[0])
        raw = raw_pixel_knn(data=data, k=k, channels=len(self.config.crops.mean))
        return {"raw_pixels": round(raw[f"top1_k{k}"], 2), **scores}
