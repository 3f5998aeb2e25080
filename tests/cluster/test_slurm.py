"""Pretraining on a real Slurm (launch/dev_slurm): whatever happens to a job, it ends as if nothing had happened.

`make test-slurm` runs the five cases that matter most, `make test-slurm-full` the whole matrix.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import leftovers
import pytest
import yaml

from ssl_locat.cluster import jobs

ROOT = Path(__file__).resolve().parents[2]
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
        self.started: list[str] = []  # job numbers

    def slurm(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def node(self, action: str, name: str) -> None:
        environment = {**os.environ, leftovers.KEEP: "1"}  # the cluster may be the user's: a node stays up after the tests
        subprocess.run([ROOT / "launch/dev_slurm", action, name], check=True, capture_output=True, env=environment)

    def batch(self, *words: str) -> str:
        """A job that only takes nodes; its number."""
        self.started.append(self.slurm("sbatch", "--parsable", "-o", "/dev/null", *words).strip())
        return self.started[-1]

    def cancel_all(self) -> None:
        """Ends what the tests started, and nothing else."""
        if self.started:
            subprocess.run(["scancel", *self.started], check=False, capture_output=True)
            self.started.clear()

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
        return Run(self, self.folder / "runs" / name, self.queue("pretrain", f"{name}.yaml", "--on", f"{name}-on.yaml"))

    def queue(self, *words: str) -> str:
        """`ssl-locat WORDS`; the job's number."""
        done = self.ssl_locat(*words)
        assert done.returncode == 0, done.stderr
        self.started.append(re.search(r"queued +(\d+)", done.stderr)[1])
        return self.started[-1]


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

    def now(self) -> str:
        """What `jobs list` says of it."""
        return re.search(rf"^{self.job} +([A-Z]+)", self.cluster.jobs("list", self.job), re.MULTILINE)[1]

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
    from ssl_locat.data.shards.textures import make_textures

    folder = tmp_path_factory.mktemp("slurm")
    make_textures(folder / "textures", num_train=256, num_test=32, image_size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        yield Cluster(folder)


@pytest.fixture(autouse=True)
def _nothing_goes_on(cluster):
    """A job of a failed test must not keep the nodes from the next one."""
    yield
    cluster.cancel_all()


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
    return cluster.batch("-p", "prio", "-N3", "-c8", "--ntasks-per-node=1", "--wrap", "srun sleep 3")


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


def test_without_scontrol_in_the_container_the_jobs_script_asks_for_the_requeue(cluster, unbroken):
    """And `--resume never` holds for the first start only."""
    contained = cluster.folder / "contained.sh"
    contained.write_text(f'#!/bin/bash\nexport PATH=/nowhere\nexec {sys.executable} "$@"\n')
    contained.chmod(0o755)
    (cluster.folder / "contained.yaml").write_text(yaml.safe_dump({**CONFIG, "run_dir": "runs/contained"}))
    (cluster.folder / "contained-on.yaml").write_text(yaml.safe_dump({**PROFILE, "python": str(contained)}))
    job = cluster.queue("pretrain", "contained.yaml", "--on", "contained-on.yaml", "--resume", "never")
    run = Run(cluster, cluster.folder / "runs/contained", job)
    run.wait_for_step(25)
    cluster.slurm("scancel", "--signal=USR2", run.job)
    run.wait(lambda: run.resumed_at(), "resumed")
    run.wait_for_end()
    assert run.losses() == unbroken.losses() and run.restarts() == 1 and run.resumed_at()[0] >= 25
    said = "\n".join(path.read_text() for path in (run.folder / "slurm").glob(f"{job}_*_log.err"))
    assert "there is no scontrol here" in said and "Traceback" not in said


MODEL = "timm:locatvit_tiny?img_size=32&patch_size=8&embed_dim=48&num_heads=3&depth=2"
SETS = {"train": "textures/textures-train-*.tar", "test": "textures/textures-test-*.tar"}
TABLE = {
    "title": "Preempted",
    "results": "preempted-table",
    "data": {"textures": SETS},
    "columns": {
        "k-NN": {"protocol": "knn", "data": "textures", "metric": "top1_k5", "options": {"k": [5]}},
        "linear": {
            **{"protocol": "linear", "data": "textures", "metric": "top1"},
            "options": {"epochs": 150, "batch_size": 32, "lr": 0.1, "workers": 1},
        },
    },
    "rows": {"ours": {"model": MODEL}},
}


@pytest.mark.parametrize("what", ["evaluate", "table"])
def test_a_preempted_evaluation_saves_requeues_and_resumes(cluster, what):
    """What trains for days as a protocol, by itself or as a cell of a table, never begins again."""
    (cluster.folder / "scavenge-on.yaml").write_text(yaml.safe_dump({**PROFILE, "nodes": 1, "slurm_partition": "scavenge"}))
    if what == "table":
        (cluster.folder / "preempted-table.yaml").write_text(yaml.safe_dump(TABLE))
        words, saved = ["table", "preempted-table.yaml"], cluster.folder / "preempted-table" / "cells"
    else:
        options = [f"{key}={value}" for key, value in TABLE["columns"]["linear"]["options"].items()]
        data = [f"data.{name}={shards}" for name, shards in SETS.items()]
        words, saved = ["evaluate", "linear", MODEL, *options, *data, "--json"], cluster.folder / "state/ssl_locat/progress"
    run = Run(cluster, cluster.folder, cluster.queue(*words, "--on", "scavenge-on.yaml"))
    run.wait(lambda: list(saved.glob("linear-*.safetensors")), "the first epoch")
    cluster.batch("-p", "prio", "-N4", "-c8", "--ntasks-per-node=1", "--wrap", "srun sleep 3")
    run.wait_for_end()
    (log,) = cluster.folder.rglob(f"{run.job}_0_log.err")
    resumed = re.findall(r"resumes at step (\d+)", log.read_text())
    assert len(resumed) == 1 and 8 <= int(resumed[0]) < 8 * 150
    assert (
        "Stopped by SIGUSR2 in linear, step" in log.read_text()
    )  # saved at the warning, not killed at the end of the grace time
    assert not list(saved.glob("linear-*.safetensors"))
    if what == "table":
        assert len(list(saved.glob("*.json"))) == 2


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
    assert "/slurm/snapshot-" in "\n".join(shown)  # the code that ran is the copy made when it was queued


# --- the rest of the matrix -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def slurm_conf(cluster: Cluster, old: str, new: str):
    """The cluster with a line of its slurm.conf changed."""
    conf = Path(os.environ["SLURM_CONF"])
    text = conf.read_text()
    assert old in text
    conf.write_text(text.replace(old, new))
    cluster.slurm("scontrol", "reconfigure")
    try:
        yield
    finally:
        conf.write_text(text)
        cluster.slurm("scontrol", "reconfigure")


@pytest.mark.slow
def test_preempted_without_the_user_signal(cluster, unbroken):
    with slurm_conf(cluster, "SlurmctldParameters=preempt_send_user_signal\n", ""):
        run = cluster.submit("preempted-silently", {"slurm_partition": "scavenge"})
        run.wait_for_step(25)
        preempt(cluster)
        run.wait_for_end()
    assert run.losses() == unbroken.losses()
    assert run.restarts() == 1 and run.resumed_at()[0] >= 25  # TERM comes at once, KILL after the grace time


CREEPING = """
import os, time
from ssl_locat.objectives.dino import DINO

class Creeping(DINO):
    \"\"\"The same numbers; from step 25 on so slow, until it is requeued, that the time limit comes first.\"\"\"

    def __init__(self):
        super().__init__(num_prototypes=64, hidden_dim=32, bottleneck_dim=16, frozen_last_layer_epochs=0)

    def forward(self, student, teacher, progress):
        if progress.step >= 25 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(1.6)
        return super().forward(student, teacher, progress)
"""


@pytest.mark.slow
def test_time_limit(cluster, unbroken, tmp_path):
    (tmp_path / "creeping.py").write_text(CREEPING)
    cluster.environment["PYTHONPATH"] = str(tmp_path)
    try:  # Slurm warns at 60 to 90 s before the limit, so 90 to 120 s after the start
        run = cluster.submit("limited", {"timeout_min": 3, "slurm_signal_delay_s": 60}, objective={"name": "creeping:Creeping"})
    finally:
        del cluster.environment["PYTHONPATH"]
    run.wait(lambda: run.resumed_at(), "resumed", seconds=600)
    run.wait_for_end()
    assert run.losses() == unbroken.losses() and run.restarts() >= 1
    signals = [event["signal"] for event in run.records("events.jsonl") if event["kind"] == "preempt"]
    assert signals and set(signals) == {"SIGUSR2"}  # the warning, not the KILL at the limit


@pytest.mark.slow
def test_cancelled_job_saves_and_stays_cancelled_and_the_same_command_resumes(cluster, unbroken):
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
def test_resumes_on_fewer_and_other_nodes(cluster, unbroken):
    run = cluster.submit("shrunk")
    run.wait_for_step(25)
    first = cluster.slurm("squeue", "-h", "-j", run.job, "-o", "%N").strip()
    # the operator gives it one node instead of two, and none of those it had; Slurm then starts both tasks there
    cluster.slurm("scontrol", "requeuehold", run.job)
    run.wait(lambda: run.state() == "PENDING", "requeued")
    cluster.slurm("scontrol", "update", f"JobId={run.job}", "NumTasks=1", "NumCPUs=8", "NumNodes=1-1", f"ExcNodeList={first}")
    cluster.slurm("scontrol", "release", run.job)
    run.wait(lambda: run.resumed_at(), "resumed")
    second = cluster.slurm("squeue", "-h", "-j", run.job, "-o", "%N").strip()
    hosts = cluster.slurm("scontrol", "show", "hostnames", first).split()
    assert len(hosts) == 2 and second and "[" not in second and second not in hosts
    run.wait_for_step(50)
    cluster.jobs("stop", run.job)
    run.wait_for_end("FAILED")  # Slurm's word for exit code 4
    # the user goes on with half as many processes
    run = cluster.submit("shrunk", {"nodes": 1})
    run.wait_for_end()
    sizes = [event["world_size"] for event in run.records("events.jsonl") if event["kind"] in ("start", "resume")]
    assert sizes == [2, 2, 1] and run.restarts() == 2
    before = run.resumed_at()[1]
    assert before >= 50 and run.losses()[:before] == unbroken.losses()[:before]
    assert all(
        math.isfinite(loss) for loss in run.losses()
    )  # now stochastic depth draws for one rank: other numbers, same samples


@pytest.mark.slow
def test_sweep_is_an_array_of_runs(cluster):
    run = cluster.submit(
        "sweep", {"nodes": 1}, sweep={"seed": [0, 1], "optim.lr": [1e-3]}, optim={**CONFIG["optim"], "total_steps": 10}
    )
    names = [f"{run.job}_{index}" for index in (0, 1)]
    run.wait(lambda: len(list(run.folder.glob("*seed=*/summary.json"))) == 2, "both runs")
    run.wait(lambda: cluster.jobs("list", *names).count("COMPLETED") == 2, "completed")
    found = [line.split()[0] + line[-7:] for line in cluster.jobs("list", *names).splitlines()[1:]]
    assert found == [f"{names[0]},seed=0", f"{names[1]},seed=1"]


@pytest.mark.slow
def test_job_that_waits_is_not_touched_by_later_edits_and_can_be_stopped(cluster, unbroken):
    blocker = cluster.batch("-N3", "-c8", "--exclusive", "--wrap", "sleep 600")
    run, other = cluster.submit("waiting"), cluster.submit("unwanted")
    run.wait(lambda: "Resources" in cluster.slurm("squeue", "-h", "-j", run.job, "-o", "%r"), "waiting for nodes")
    assert run.now() == "PENDING" and other.now() == "PENDING"
    assert "taken out of the queue" in cluster.jobs("stop", other.job)
    other.wait_for_end("CANCELLED")
    (cluster.folder / "waiting.yaml").write_text("not: [a config\n")  # what the user does next with the file
    cluster.slurm("scancel", blocker)
    run.wait_for_end()
    assert run.losses() == unbroken.losses() and run.restarts() == 0


@pytest.mark.slow
def test_stop_that_comes_while_python_starts_is_kept(cluster):
    run = cluster.submit("early")
    run.wait(lambda: run.state() == "RUNNING", "started")
    time.sleep(1)  # the shell has begun; Python imports for seconds more
    assert not run.records() and "asked to save and stop" in cluster.jobs("stop", run.job)
    run.wait_for_end("FAILED")  # Slurm's word for exit code 4
    assert run.now() == "STOPPED" and run.step() < STEPS
    assert [event["signal"] for event in run.records("events.jsonl") if event["kind"] == "preempt"] == ["SIGUSR2"]


@pytest.mark.slow
def test_evaluate_and_table_run_as_jobs(cluster, unbroken):
    profile = cluster.folder / "evaluate.yaml"
    profile.write_text(yaml.safe_dump(PROFILE))
    data = {part: f"textures/textures-{part}-*.tar" for part in ("train", "test")}
    words = ["evaluate", "knn", "runs/unbroken", *(f"data.{part}={value}" for part, value in data.items()), "k=[5]", "workers=1"]
    here = json.loads(cluster.ssl_locat(*words, "--json").stdout)
    shown = cluster.ssl_locat(*words, "--on", "evaluate.yaml", "--dry-run").stdout
    assert "#SBATCH --nodes=2\n" in shown and "#SBATCH --job-name=ssl-locat-evaluate\n" in shown
    assert not (cluster.folder / "jobs").exists()

    table = {
        "title": "T",
        "results": "runs/table",
        "data": {"textures": data},
        "columns": {"k-NN": {"protocol": "knn", "data": "textures", "metric": "top1_k5", "options": {"k": [5], "workers": 1}}},
        "rows": {
            "ours": {"model": "runs/unbroken"},
            "random": {"model": "timm:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"},
        },
    }
    (cluster.folder / "small.yaml").write_text(yaml.safe_dump(table))
    evaluated = Run(cluster, cluster.folder, cluster.queue(*words, "--json", "--on", "evaluate.yaml"))
    tabled = Run(cluster, cluster.folder, cluster.queue("table", "small.yaml", "--on", "evaluate.yaml"))
    (cluster.folder / "small.yaml").unlink()  # the job has its own
    for run in (evaluated, tabled):
        run.wait(lambda run=run: run.state() not in ("PENDING", "RUNNING", "COMPLETING"), "the end")
        assert run.now() == "COMPLETED", cluster.jobs("logs", run.job)
    output = next((cluster.folder / "jobs").glob(f"evaluate-*/{evaluated.job}_0_log.out")).read_text()
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert found["metrics"] == pytest.approx(here["metrics"], abs=0.1)  # two processes, in percent
    lines = (cluster.folder / "runs/table/table.md").read_text()
    score = float(re.search(r"ours \| ([\d.]+)", lines)[1])
    assert score == pytest.approx(here["metrics"]["top1_k5"], abs=0.1) and "random" in lines


@pytest.mark.slow
def test_states_when_slurm_has_forgotten_the_jobs(cluster):
    """Run without accounting, and by the second half of `make test-slurm-full` with it: the words are the same."""
    short = {"optim": {**CONFIG["optim"], "total_steps": 10}}
    done = cluster.submit("finished", {"nodes": 1}, **short)
    failed = cluster.submit("misspelt", {"nodes": 1}, backbone={"name": "vit_tiny_patch16_225"}, **short)
    long = cluster.submit("stopped", {"nodes": 1})
    unwanted = cluster.submit("unwanted-too", {"nodes": 1, "slurm_additional_parameters": {"hold": True}})
    cluster.jobs("stop", unwanted.job)
    long.wait_for_step(5)
    cluster.jobs("stop", long.job)
    done.wait_for_end()
    for run in (failed, long):
        run.wait_for_end("FAILED")
    expected = {done.job: "COMPLETED", failed.job: "FAILED", long.job: "STOPPED", unwanted.job: "CANCELLED"}
    runs = (done, failed, long, unwanted)
    assert {run.job: run.now() for run in runs} == expected
    with slurm_conf(cluster, "MinJobAge=600\n", "MinJobAge=2\n"):
        for run in runs:
            known = ["scontrol", "show", "job", run.job]
            run.wait(lambda known=known: subprocess.run(known, capture_output=True).returncode != 0, "forgotten")
        assert {run.job: run.now() for run in runs} == expected
        accounts = subprocess.run(["sacct", "-X", "-n", "-P", "-o", "JobID,State"], capture_output=True, text=True)
        if accounts.returncode == 0:  # with accounts: what the job wrote of itself is not needed
            for path in cluster.folder.glob(f"runs/*/slurm/{done.job}.json"):
                path.unlink()
            assert f"{done.job}|COMPLETED" in accounts.stdout and done.now() == "COMPLETED"
