"""How busy this machine is, and times said as honestly as a few measured steps allow."""

import os
from typing import NamedTuple

BUSY = 0.6  # load a core, above which other work is taken for granted
BAND = (0.8, 1.25)  # a few steps tell the time of a run no better than this, on an idle machine


class Load(NamedTuple):
    """Processes that want to run (mean of the last minute), and cores."""

    processes: float
    cores: int

    @classmethod
    def now(cls) -> "Load":
        return cls(os.getloadavg()[0], os.cpu_count() or 1)

    @property
    def busy(self) -> bool:
        return self.processes > BUSY * self.cores

    @property
    def slowdown(self) -> float:
        """How much slower than alone a process is that asks for all cores, at most."""
        return 1 + self.processes / self.cores if self.busy else 1.0

    def words(self) -> str:
        """'; it is busy now, load 9', or '' on an idle machine."""
        return f"; it is busy now, load {self.processes:.0f} on {self.cores} core{'s' * (self.cores > 1)}" if self.busy else ""


def band(seconds: float, load: Load) -> str:
    """'40 to 60 min': from what an idle machine would take to what was measured, both with room for error. load: while it was measured."""
    low, high = seconds * BAND[0] / load.slowdown, seconds * BAND[1]
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if high >= 1.5 * size:
            return _range(low / size, high / size, unit)
    return _range(max(low, 1), max(high, 1), "s")


def _range(low: float, high: float, unit: str) -> str:
    """Two digits; of one value alone where both are the same."""
    shown = [f"{float(f'{value:.2g}'):.0f}" if value >= 5 else f"{value:.1f}".removesuffix(".0") for value in (low, high)]
    return f"{shown[0]} to {shown[1]} {unit}" if shown[0] != shown[1] else f"{shown[0]} {unit}"
