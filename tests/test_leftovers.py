"""What a test starts is gone when the tests are: also what lost its parent, and also after a failure, a time limit or a TERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
STRAY = """
import os, subprocess, sys, time
# a grandchild in a session of its own, deaf to TERM, whose parent is gone: what a killed launcher leaves
code = "import signal, time, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1], 'w').write('x'); time.sleep(600)"
launch = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}, *sys.argv[1:]], start_new_session=True)"

def stray(path):
    subprocess.run([sys.executable, "-c", launch, str(path)], check=True)
    while not os.path.exists(path):
        time.sleep(0.05)

def strays(path):
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and str(path).encode() in command(pid)]

def command(pid):
    try:
        return open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return b""
"""
CASES = {
    "passes": "def test_it():\n    stray(PATH)\n",
    "fails": "def test_it():\n    stray(PATH)\n    assert False\ndef test_next():\n    assert not strays(PATH)\n",
    "times_out": "import pytest\n@pytest.mark.timeout(5)\ndef test_it():\n    stray(PATH)\n    time.sleep(600)\n",
    "terminated": "def test_it():\n    stray(PATH)\n    open(str(PATH) + '.ready', 'w').close()\n    time.sleep(600)\n",
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_no_process_outlives_the_session(case, tmp_path):
    marker = tmp_path / f"stray-{case}"
    (tmp_path / "conftest.py").write_text("from leftovers import *  # noqa: F403\n")
    (tmp_path / "test_stray.py").write_text(f"{STRAY}\nPATH = {str(marker)!r}\n{CASES[case]}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    with (tmp_path / "log").open("w") as log:  # not a pipe: a stray that held it would hold us
        pytest_run = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(TESTS)})
        try:
            if case == "terminated":
                end = time.monotonic() + 60
                while not Path(f"{marker}.ready").exists() and time.monotonic() < end:
                    time.sleep(0.05)
                pytest_run.send_signal(signal.SIGTERM)
            status = pytest_run.wait(90)
        finally:
            pytest_run.kill()
    text = (tmp_path / "log").read_text()
    assert marker.exists() and status == {"passes": 0, "terminated": 2}.get(case, 1), text
    if case == "fails":
        assert "1 failed, 1 passed" in text
    left = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and str(marker).encode() in command_line(entry)]
    assert not left, text


def command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""
