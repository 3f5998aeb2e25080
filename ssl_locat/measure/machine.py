"""How busy this machine is, and times said as honestly as a few measured steps allow."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ssl_locat.runs.folder import cpu_name

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


def cpu_features() -> set[str]:
    """Instruction sets as Linux names them (avx2, avx512_bf16, amx_bf16; bf16 on ARM); empty elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, values = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(values.split())
    return set()


def cpu_words() -> str:
    """'AMD EPYC (AVX-512, bf16), 2 cores': what ratios of times depend on."""
    features, names = (
        cpu_features(),
        {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX", "bf16": "bf16"},
    )
    found = [words for flag, words in names.items() if flag in features]
    if "AVX-512" in found:
        found.remove("AVX2")
    return cpu_name() + (f" ({', '.join(found)})" if found else "") + f", {os.cpu_count()} cores"


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
