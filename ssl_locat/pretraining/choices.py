"""What a run decides by its probes: which checkpoints are kept as the best ones, and whether it has no more to gain.

Decided anew after each probe, and at a resume, from the probes' records alone (runs/best.py); rank 0 decides.
"""

import logging

from ssl_locat.config.schema import Config
from ssl_locat.errors import ConfigError
from ssl_locat.runs.best import best_of, kept_measures, read_best, reason_to_stop, stop_measure, write_best
from ssl_locat.runs.checkpoint import Checkpointer
from ssl_locat.runs.distributed import broadcast_object, is_main
from ssl_locat.runs.log import EventLog

log = logging.getLogger(__name__)


class Choices:
    """Of one run. `enough`: in words, why it ends before its last step; '' while it continues."""

    def __init__(self, config: Config, checkpointer: Checkpointer, events: EventLog):
        self.checkpointer, self.events = checkpointer, events
        self.measures = kept_measures(config)
        self.stop, self.patience = stop_measure(config), config.stop_when.patience if config.stop_when else 0
        self.enough = ""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to decide: then each probe after the first step has a checkpoint of its step."""
        return bool(self.measures or self.stop)

    def require_measured(self, results: dict[str, list[dict]]) -> None:
        """ConfigError where a probe ran and did not measure what is compared, which shows at the first one."""
        for measure in {*self.measures.values(), *([self.stop] if self.stop else [])}:
            last = results[measure.probe][-1]
            if not measure.named_in(last):
                has = ", ".join(name for name in last if name != "step")
                raise ConfigError(f"{measure}: this probe measures no {measure.metric}; it has {has}.")

    def decide(self, results: dict[str, list[dict]]) -> None:
        """results: probe -> its records so far, up to the step of the newest checkpoint. All ranks call it."""
        if is_main():
            self._keep(results)
        if self.stop:
            records = results[self.stop.probe]
            # ranks may read a shared disk at different times: one of them decides for all
            self.enough = broadcast_object(reason_to_stop(records, self.stop, self.patience) or "")

    def _keep(self, results: dict[str, list[dict]]) -> None:
        self.checkpointer.wait()  # the step that was just measured is on disk, or its save failed
        whole, before = self.checkpointer.whole_steps(), read_best(self.checkpointer.run_dir)
        chosen = {choice: best_of(results[measure.probe], measure, whole) for choice, measure in self.measures.items()}
        best = {choice: entry for choice, entry in chosen.items() if entry}
        if best != before:
            write_best(self.checkpointer.run_dir, best)  # first: what is named there is kept, what is not named may go
        for choice, entry in best.items():
            if entry != before.get(choice):
                self.events.add("best", choice=choice, **entry._asdict())
                log.info("step %d is the best %s one so far: %s %.4g", entry.step, choice, entry.measure, entry.value)
        self.checkpointer.keep(entry.step for entry in best.values())
