"""Pretraining on a real Slurm (launch/dev_slurm): whatever happens to a job, it ends as if nothing had happened.

`make test-slurm` runs the five cases that matter most, `make test-slurm-full` the whole matrix.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ssl_locat import jobs

ROOT = Path(__file__).resolve().parent.parent
STEPS = 120
ANSWER = subprocess.run(["scontrol", "ping"], capture_output=True, text=True) if shutil.which("scontrol") else None
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not (ANSWER and "UP" in ANSWER.stdout), reason="no Slurm answers `scontrol ping`: run `make test-slurm`"),
    pytest.mark.timeout(900),
]

CONFIG = {
    "data": {"train": "textures/textures-train-*.tar", "workers": 1},
    "backbone": {
        **{"name": "locatvit_tiny", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        "drop_path_rate": 0.1,  # its random numbers, too, must be the same again
    },
    "objective": {"name": "dino", "num_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16, "frozen_last_layer_epochs": 0},
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "optim": {"total_steps": STEPS, "global_batch_size": 16, "warmup_epochs": 0},
    "checkpoint": {"every_steps": 20},
    "log": {"every_steps": 1, "tensorboard": False},
    "device": "cpu",
}
PROFILE = {
    **{"base": "slurm", "nodes": 2, "gpus_per_node": None, "mem_gb": 2, "cpus_per_task": 8, "timeout_min": 20},
    "slurm_signal_delay_s": 30,
}


class Cluster:
    """A place to submit from (not the checkout), with one data set, and what the tests do to jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def slurm(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def node(self, action: str, name: str) -> None:
        subprocess.run([ROOT / "launch/dev_slurm", action, name], check=True, capture_output=True)

    def ssl_locat(self, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ssl_locat.cli", *words]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def jobs(self, action: str, *names: str) -> str:
        """What `ssl-locat jobs` prints; called, not started: on a busy machine Python takes longer to start than a run to end."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            jobs.ACTIONS[action](list(names))
        return printed.getvalue()

    def submit(self, name: str, profile: dict | None = None, **changes) -> "Run":
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({**CONFIG, **changes, "run_dir": f"runs/{name}"}))
        (self.folder / f"{name}-on.yaml").write_text(yaml.safe_dump({**PROFILE, **(profile or {})}))
        done = self.ssl_locat("pretrain", f"{name}.yaml", "--on", f"{name}-on.yaml")
        assert done.returncode == 0, done.stderr
        return Run(self, self.folder / "runs" / name, re.search(r"queued +(\d+)", done.stderr)[1])


class Run:
    """A run folder and its job."""

    def __init__(self, cluster: Cluster, folder: Path, job: str):
        self.cluster, self.folder, self.job = cluster, folder, job

    def records(self, file: str = "metrics.jsonl") -> list[dict]:
        path = self.folder / file
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def step(self) -> int:
        return max((record["step"] for record in self.records()), default=0)

    def state(self) -> str:
        fields = self.cluster.slurm("scontrol", "show", "job", "-o", self.job).split()
        return next(field.removeprefix("JobState=") for field in fields if field.startswith("JobState="))

    def wait(self, condition, what: str, seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                f"{what}: not within {seconds} s; state {self.state()}, step {self.step()}\n{self.logs()}"
            )
            time.sleep(0.3)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step, f"step {step}")

    def wait_for_end(self, state: str = "COMPLETED") -> None:
        self.wait(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), "the end")
        assert self.state() == state, self.logs()

    def logs(self) -> str:
        files = sorted((self.folder / "slurm").glob(f"{self.job}_*_log.err"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    def losses(self) -> list[float]:
        """By step; each step once, and the samples add up."""
        records = self.records()
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        assert [record["samples_seen"] for record in records] == [16 * step for step in range(1, STEPS + 1)]
        return [record["loss"] for record in records]

    def restarts(self) -> int:
        return json.loads((self.folder / "summary.json").read_text())["restarts"]

    def resumed_at(self) -> list[int]:
        return [event["step"] for event in self.records("events.jsonl") if event["kind"] == "resume"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    from ssl_locat.data.textures import make_textures

    folder = tmp_path_factory.mktemp("slurm")
    make_textures(folder / "textures", num_train=256, num_test=32, image_size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        yield Cluster(folder)
    subprocess.run(["scancel", "--me"], check=False)


@pytest.fixture(scope="session")
def unbroken(cluster):
    """The run that nothing happens to: two nodes, one task each."""
    run = cluster.submit("unbroken")
    run.wait_for_end()
    return run


def test_two_node_run(unbroken):
    assert len(unbroken.losses()) == STEPS and unbroken.restarts() == 0
    nodes = {re.search(r"hostname=(\w+)", path.read_text())[1] for path in (unbroken.folder / "slurm").glob("*_log.out")}
    assert len(nodes) == 2
    listed = unbroken.cluster.ssl_locat("jobs", "list").stdout
    assert re.search(rf"^{unbroken.job} +COMPLETED +0 .*runs/unbroken$", listed, re.MULTILINE)


def preempt(cluster: Cluster) -> str:
    """Takes three of the four nodes for a few seconds; its job id."""
    return cluster.slurm(
        *("sbatch", "--parsable", "-p", "prio", "-N3", "-c8", "--ntasks-per-node=1", "-o", "/dev/null", "--wrap", "srun sleep 3")
    ).strip()


def test_preempted_and_resumed(cluster, unbroken):
    run = cluster.submit("preempted", {"slurm_partition": "scavenge"})
    run.wait_for_step(25)
    preempt(cluster)
    run.wait_for_end()
    assert run.losses() == unbroken.losses()
    assert run.restarts() == 1 and run.resumed_at()[0] >= 25  # from where it was told to stop, not from step 20


def test_operators_requeue(cluster, unbroken):
    run = cluster.submit("requeued")
    run.wait_for_step(25)
    cluster.slurm("scontrol", "requeue", run.job)
    run.wait_for_end()
    assert run.losses() == unbroken.losses()
    assert run.restarts() == 1 and run.resumed_at()[0] >= 25


def test_node_killed(cluster, unbroken):
    run = cluster.submit("bereft")
    run.wait_for_step(25)
    nodes = cluster.slurm("squeue", "-h", "-j", run.job, "-o", "%N").strip()
    lost = cluster.slurm("scontrol", "show", "hostnames", nodes).split()[1]
    cluster.node("kill-node", lost)
    try:
        run.wait_for_end()
    finally:
        cluster.node("start-node", lost)
    assert run.losses() == unbroken.losses()
    assert run.restarts() == 1 and run.resumed_at()[0] >= 20  # nobody told it: from the last periodic checkpoint


CRASHING = """
import os
from ssl_locat.objectives.dino import DINO

class Crashing(DINO):
    def __init__(self):
        super().__init__(num_prototypes=64, hidden_dim=32, bottleneck_dim=16)

    def forward(self, student, teacher, progress):
        if progress.step == 3 and os.environ["RANK"] == "1":
            raise ArithmeticError("the sky fell")
        return super().forward(student, teacher, progress)
"""


def test_crash_of_one_rank_ends_the_job_and_is_what_one_sees_first(cluster, tmp_path):
    (tmp_path / "crashing.py").write_text(CRASHING)
    cluster.environment["PYTHONPATH"] = str(tmp_path)
    try:
        run = cluster.submit("crashed", objective={"name": "crashing:Crashing"})
    finally:
        del cluster.environment["PYTHONPATH"]
    run.wait_for_step(2)
    began = time.monotonic()
    run.wait_for_end("FAILED")
    assert time.monotonic() - began < 30
    shown = cluster.jobs("logs", run.job).splitlines()
    assert shown[0].startswith(f"--- job {run.job}: FAILED")
    assert re.match(r"--- what failed first: rank 1 on n\d", shown[1]) and shown[2].startswith("Traceback")
    assert "ArithmeticError: the sky fell" in "\n".join(shown)


# --- the rest of the matrix -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_preempted_without_the_user_signal(cluster, unbroken):
    conf = Path(os.environ["SLURM_CONF"])
    text = conf.read_text()
    conf.write_text(text.replace("SlurmctldParameters=preempt_send_user_signal\n", ""))
    cluster.slurm("scontrol", "reconfigure")
    try:
        run = cluster.submit("preempted-silently", {"slurm_partition": "scavenge"})
        run.wait_for_step(25)
        preempt(cluster)
        run.wait_for_end()
    finally:
        conf.write_text(text)
        cluster.slurm("scontrol", "reconfigure")
    assert run.losses() == unbroken.losses()
    assert run.restarts() == 1 and run.resumed_at()[0] >= 25  # TERM comes at once, KILL after the grace time


@pytest.mark.slow
def test_time_limit(cluster, unbroken):
    run = cluster.submit("limited", {"timeout_min": 2, "slurm_signal_delay_s": 60}, log={"every_steps": 1, "tensorboard": False})
    run.wait_for_step(10)
    cluster.slurm("scancel", "--signal=USR2", run.job)  # what Slurm sends at the limit, minutes earlier
    run.wait_for_end()
    assert run.losses() == unbroken.losses() and run.restarts() >= 1


@pytest.mark.slow
def test_cancelled_job_saves_and_stays_cancelled_and_the_same_command_goes_on(cluster, unbroken):
    run = cluster.submit("cancelled")
    run.wait_for_step(25)
    cluster.slurm("scancel", run.job)
    run.wait_for_end("CANCELLED")
    time.sleep(8)  # longer than a requeue waits
    assert run.state() == "CANCELLED"
    again = cluster.submit("cancelled")
    again.wait_for_end()
    assert again.losses() == unbroken.losses() and again.resumed_at()[0] >= 25


@pytest.mark.slow
def test_stopped_and_requeued_by_hand(cluster, unbroken):
    run = cluster.submit("by-hand")
    run.wait_for_step(15)
    assert "asked to save and requeue" in cluster.jobs("requeue", run.job)
    run.wait(lambda: run.resumed_at(), "resumed")
    run.wait_for_step(40)
    assert "asked to save and stop" in cluster.jobs("stop", str(run.folder))
    run.wait_for_end("FAILED")  # Slurm's word for exit code 4
    assert re.search(rf"^{run.job} +STOPPED", cluster.jobs("list"), re.MULTILINE)
    cluster.jobs("requeue", run.job)
    run.wait(lambda: run.state() != "FAILED", "requeued")
    run.wait_for_end()
    assert run.losses() == unbroken.losses() and run.restarts() == 2


@pytest.mark.slow
def test_goes_on_with_fewer_and_other_nodes(cluster, unbroken):
    run = cluster.submit("shrunk", {"slurm_additional_parameters": {"nodes": "1-2"}})
    run.wait_for_step(25)
    used = cluster.slurm(
        "scontrol", "show", "hostnames", cluster.slurm("squeue", "-h", "-j", run.job, "-o", "%N").strip()
    ).split()
    spare = next(name for name in ("n1", "n2", "n3", "n4") if name not in used)
    others = ",".join({"n1", "n2", "n3", "n4"} - {spare})
    cluster.slurm("scontrol", "update", f"NodeName={others}", "State=drain", "Reason=test")
    try:
        cluster.slurm("scontrol", "requeue", run.job)
        run.wait_for_end()
    finally:
        cluster.slurm("scontrol", "update", f"NodeName={others}", "State=resume")
    sizes = [event["world_size"] for event in run.records("events.jsonl") if event["kind"] in ("start", "resume")]
    assert sizes == [2, 1]
    before = run.resumed_at()[0]
    assert run.losses()[:before] == unbroken.losses()[:before]  # then stochastic depth draws per rank, so other numbers
    assert all(loss == loss for loss in run.losses())


@pytest.mark.slow
def test_sweep_is_an_array_of_runs(cluster):
    run = cluster.submit(
        "sweep", {"nodes": 1}, sweep={"seed": [0, 1], "optim.lr": [1e-3]}, optim={**CONFIG["optim"], "total_steps": 10}
    )
    names = [f"{run.job}_{index}" for index in (0, 1)]
    run.wait(lambda: len(list(run.folder.glob("seed=*/summary.json"))) == 2, "both runs")
    listed = cluster.jobs("list", *names)
    assert re.search(r"seed=0,lr=0.001", listed) and re.search(r"seed=1,lr=0.001", listed)


@pytest.mark.slow
def test_job_that_waits_can_be_listed_and_stopped(cluster):
    run = cluster.submit("waiting", {"slurm_additional_parameters": {"hold": True}})
    assert re.search(rf"^{run.job} +PENDING", cluster.jobs("list"), re.MULTILINE)
    assert "taken out of the queue" in cluster.jobs("stop", run.job)
    run.wait_for_end("CANCELLED")
