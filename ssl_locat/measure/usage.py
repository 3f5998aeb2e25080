"""What a process of training and its readers use of the machine: processors, memory, the GPU. A few small files of /proc, read now and then."""

import os
import time
from contextlib import suppress
from pathlib import Path

import torch

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Usage:
    """Of this process with all that it started, since the last look. Without /proc (macOS) it has nothing to say but of the GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.looks_at_gpu = device.type == "cuda" and gpu_busy(device) is not None
        self.began, self.cpu_seconds = time.monotonic(), _cpu_seconds(family())

    def since_last(self) -> dict[str, float]:
        """cpu_cores: cores kept busy; host_memory_gb: resident now, GB (what processes share counts for each); gpu_busy: 0 to 1, where
        the driver tells it."""
        found, members = {}, family()
        if members:
            now, seconds = time.monotonic(), _cpu_seconds(members)
            # a reader that has ended takes its seconds along
            found["cpu_cores"] = max(0.0, seconds - self.cpu_seconds) / max(now - self.began, 1e-3)
            found["host_memory_gb"] = sum(map(_resident, members)) / 1e9
            self.began, self.cpu_seconds = now, seconds
        if self.looks_at_gpu:
            found["gpu_busy"] = gpu_busy(self.device) or 0.0
        return found


def gpu_busy(device: torch.device) -> float | None:
    """Share of the last moments (NVML: up to a second) in which a kernel ran; None where it cannot be told (no nvidia-ml-py, MIG)."""
    with suppress(ImportError, RuntimeError, AttributeError):
        return torch.cuda.utilization(device) / 100
    return None


def family() -> list[int]:
    """This process and all below it; [] without Linux's /proc."""
    found, waiting = [], [os.getpid()]
    while waiting:
        pid = waiting.pop()
        with suppress(OSError):  # it ended meanwhile
            threads = list(Path(f"/proc/{pid}/task").iterdir())
            found.append(pid)
            for thread in threads:
                with suppress(OSError):
                    waiting.extend(map(int, (thread / "children").read_text().split()))
    return found


def _cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes, their ended children included."""
    total = 0
    for pid in pids:
        with suppress(OSError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return total / _TICKS


def _resident(pid: int) -> int:
    """Bytes."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0
