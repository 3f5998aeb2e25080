"""What a process and those below it use of the machine, against work of a known size."""

import subprocess
import sys
import time

import pytest
import torch

from ssl_locat.measure import usage


@pytest.mark.skipif(not usage.family(), reason="no /proc here")
def test_work_of_a_child_process_counts():
    looked = usage.Usage(torch.device("cpu"))
    work = "import time\nx = bytearray(300_000_000)\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep(60)"
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert child.pid in usage.family()
        seen = looked.since_last()
        child.kill()
    seconds = time.monotonic() - began
    assert 0.4 < seen["cpu_cores"] * seconds < 5
    assert seen["host_memory_gb"] > 0.3
    assert "gpu_busy" not in seen


def test_a_gpu_that_tells_nothing_is_not_asked_again():
    if not torch.cuda.is_available():
        assert usage.gpu_busy(torch.device("cuda")) is None
