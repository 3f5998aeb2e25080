"""Jobs that were sent to a cluster from here: `ssl-locat jobs list | logs | stop | requeue`.

A job's state comes from whoever knows it, in this order: squeue, scontrol (Slurm forgets a job minutes after its end), sacct (many
clusters keep no accounts), and what the job last wrote about itself (worker/task.py).
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from ssl_locat.errors import UserError
from ssl_locat.text.shown import to_json

log = logging.getLogger(__name__)

SHOWN = 30  # of the newest jobs
TAIL = 40  # lines of a log


def record_file() -> Path:
    """What was queued from this account, one JSON object per line."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "ssl_locat" / "jobs.jsonl"


def add(job: str, folder: str, run: str, command: list[str]) -> None:
    """Remember a queued job. folder: its logs; run: the run it works on."""
    path = record_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"job": job, "folder": folder, "run": str(Path(run).absolute()), "command": command, "submitted": time.time()}
    with path.open("a") as stream:
        stream.write(to_json(record) + "\n")


def records() -> list[dict[str, Any]]:
    path = record_file()
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def after_queueing(queued: list[str], folder: Path) -> None:
    """What to know once a job is queued."""
    first = queued[0]
    several = f" ... {queued[-1]}" if len(queued) > 1 else ""
    print(
        f"queued   {first}{several}\n"
        f"logs     {folder}/{first}_0_log.err (and .out; one pair per process)\n"
        f"follow   tail -F {shlex.quote(str(folder))}/{first}_0_log.err     or: ssl-locat jobs logs {first}\n"
        f"state    ssl-locat jobs list\n"
        f"stop     ssl-locat jobs stop {first}         it saves first; the same command resumes later\n"
        f"requeue  ssl-locat jobs requeue {first}      it saves, and resumes when Slurm finds nodes",
        file=sys.stderr,
    )


# --- states -----------------------------------------------------------------------------------------------------------------


def _run_slurm(*words: str) -> str | None:
    """stdout of a Slurm command; None if there is no such command or it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def queue() -> dict[str, str] | None:
    """Job -> state, of what is in the queue now; each element of an array by itself, as <array>_<index>. None: Slurm does not answer."""
    # -r: elements of an array one by one; --me: of this user, whatever others have queued
    answer = _run_slurm("squeue", "-r", "-h", "--me", "-o", "%i|%T")
    return None if answer is None else dict(line.strip().split("|", 1) for line in answer.splitlines() if "|" in line)


def state(record: dict[str, Any], queued: dict[str, str] | None) -> str:
    """One word, or a few where the job's own account says more than Slurm's. queued: what `queue()` said."""
    job, own = record["job"], job_status(record)
    if queued is not None and job in queued:
        return queued[job]
    known = _from_scontrol(job) or _from_sacct(job)
    if own.get("state") == "STOPPED" and known in ("", "FAILED", "CANCELLED", "COMPLETED"):
        return "STOPPED"  # saved, and left with exit code 4, which Slurm takes for a failure
    if known:
        return known
    if queued is None and own.get("state") not in ("COMPLETED", "FAILED", "STOPPED", "CANCELLED"):
        return "UNKNOWN (Slurm does not answer)"
    if own.get("state") in ("RUNNING", "REQUEUED"):
        return f"LOST (last heard of {time.strftime('%Y-%m-%d %H:%M', time.localtime(own['time']))})"
    return str(own.get("state", "UNKNOWN"))


def write_status(folder: str, job: str, **fields: Any) -> None:
    """What this job last said of itself: the word that counts where Slurm has forgotten the job and keeps no accounts."""
    path = Path(folder, f"{job}.json")
    partial = path.with_suffix(".partial")
    partial.write_text(to_json({"time": time.time(), **fields}))
    partial.replace(path)


def job_status(record: dict[str, Any]) -> dict[str, Any]:
    """What the job last wrote about itself; {} before it ran."""
    path = Path(record["folder"], f"{record['job']}.json")
    status: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return status


def _from_scontrol(job: str) -> str:
    fields = dict(word.split("=", 1) for word in (_run_slurm("scontrol", "show", "job", "-o", job) or "").split() if "=" in word)
    return fields.get("JobState", "")


def _from_sacct(job: str) -> str:
    # -X: the job itself, without its steps
    lines = (_run_slurm("sacct", "-X", "-n", "-P", "-o", "State", "-j", job) or "").split("\n")
    return lines[0].split(" ")[0].strip()  # 'CANCELLED by 0'


def find(name: str) -> dict[str, Any]:
    """The newest record that a job id or a run folder means."""
    path = str(Path(name).absolute())
    record: dict[str, Any]
    # a run may have been queued many times: its newest job counts
    for record in reversed(records()):
        if name == record["job"] or path in (record["run"], record["folder"]):
            return record
    known = ", ".join(record["job"] for record in records()[-5:]) or "none"
    raise UserError(f"{name}: no job of that number or run folder was queued from this account. The last ones: {known}.")


# --- actions ------------------------------------------------------------------------------------------------------------------


def list_jobs(names: list[str]) -> None:
    """The newest jobs (or those named), one line each."""
    chosen = [find(name) for name in names] or records()[-SHOWN:]
    queued = queue()
    if not chosen:
        return print("No jobs were queued from this account.")
    print(f"{'JOB':<12} {'STATE':<12} {'RESTARTS':>8}  {'QUEUED':<16}  RUN")
    for record in chosen:
        queued_at = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["submitted"]))
        restarts = job_status(record).get("restart", 0)
        print(f"{record['job']:<12} {state(record, queued):<12} {restarts:>8}  {queued_at}  {record['run']}")


def show_logs(names: list[str]) -> None:
    """Where the logs are, what failed first if something did, then the end of rank 0's log."""
    for record in [find(name) for name in names] or records()[-1:]:
        folder, job = Path(record["folder"]), record["job"]
        print(f"--- job {job}: {state(record, queue())}; logs {folder}/{job}_*_log.*")
        first = first_fault(folder, job)
        if first:
            print(f"--- what failed first: rank {first['rank']} on {first['host']}\n{first['trace'].rstrip()}")
        for kind in ("out", "err"):
            path = folder / f"{job}_0_log.{kind}"
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()
                print(f"--- {path.name}, last {min(TAIL, len(lines))} of {len(lines)} lines", *lines[-TAIL:], sep="\n")


def first_fault(folder: Path, job: str) -> dict[str, Any] | None:
    """The earliest of the ranks' errors in the last attempt: the others follow from it."""
    faults = [json.loads(path.read_text()) for path in Path(folder, f"{job}_faults").glob("fault-rank*.json")]
    return min(faults, key=lambda fault: fault["time"], default=None)


def stop(names: list[str]) -> None:
    """Save, then end; not requeued. A job that waits, or has nothing to save, is cancelled."""
    for record in _named(names, "stop"):
        job, now = record["job"], _queued(record["job"])
        if now == "RUNNING" and _saves(record):
            # the file first: at the signal the job looks for it, and asks for no requeue if it is there
            Path(record["folder"], f"{job}.stop").touch()
            _run_or_fail("scancel", "--signal=USR2", job)
            print(f"{job}: asked to save and stop")
        elif now:
            _run_or_fail("scancel", job)
            if now == "PENDING":  # it cannot say so itself
                own = job_status(record)
                write_status(record["folder"], job, **{**own, "state": "STOPPED" if own else "CANCELLED"})
            print(f"{job}: {now}, {'taken out of the queue' if now == 'PENDING' else 'cancelled'}")
        else:
            print(f"{job}: {state(record, {})}, nothing to stop")


def requeue(names: list[str]) -> None:
    """Save and start again when there is room; a job that ended, if Slurm still knows it, starts again."""
    for record in _named(names, "requeue"):
        job, now = record["job"], _queued(record["job"])
        Path(record["folder"], f"{job}.stop").unlink(missing_ok=True)
        if now == "RUNNING" and _saves(record):
            _run_or_fail("scancel", "--signal=USR2", job)  # it asks Slurm for the requeue itself, once it is saved
            print(f"{job}: asked to save and requeue")
        elif now == "PENDING":
            print(f"{job}: waits in the queue already")
        elif now or _from_scontrol(job):
            _run_or_fail("scontrol", "requeue", job)
            print(f"{job}: requeued")
        else:
            command = shlex.join(record["command"])
            raise UserError(f"Slurm has forgotten job {job}. Queue it anew with --on; it resumes where it stopped: {command}")


def _saves(record: dict[str, Any]) -> bool:
    """Whether the job's command saves at a signal and resumes (worker/task.py)."""
    return any(word in record["command"] for word in ("pretrain", "evaluate", "table"))


def _queued(job: str) -> str:
    """The job's state in the queue; '' if it is not there."""
    queued = queue()
    if queued is None:
        raise UserError("Slurm does not answer (squeue failed). Look with `scontrol ping`, and try again when it is back.")
    return queued.get(job, "")


def _named(names: list[str], action: str) -> list[dict[str, Any]]:
    if not names:
        raise UserError(f"ssl-locat jobs {action} needs a job number or a run folder; `ssl-locat jobs list` shows them.")
    return [find(name) for name in names]


def _run_or_fail(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{shlex.join(words)}: {done.stderr.strip() or 'failed'}")


ACTIONS = {"list": list_jobs, "logs": show_logs, "stop": stop, "requeue": requeue}


# --- processes of this machine --------------------------------------------------------------------------------------------------


def follow_local(job: Any, folder: Path) -> int:
    """Shows rank 0's log of a submitit local job until it ends; returns its exit code."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        os.kill(int(job.job_id), signal.SIGTERM)  # the controller passes it on to the processes, which save and stop

    former = signal.signal(signal.SIGTERM, pass_on)
    # Ctrl-C reaches the processes by itself, as they belong to the same terminal
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs = {folder / f"{job.job_id}_0_log.{kind}": 0 for kind in ("out", "err")}
    try:
        while True:
            ended = job.done()
            for path, seen in logs.items():
                text = path.read_bytes()[seen:] if path.exists() else b""
                sys.stderr.write(text.decode(errors="replace"))
                logs[path] = seen + len(text)
            sys.stderr.flush()
            if ended:
                break
            time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, former)
        signal.signal(signal.SIGINT, interrupted)
    fault = first_fault(folder, job.job_id)
    if fault:
        print(f"--- what failed first: rank {fault['rank']} on {fault['host']}\n{fault['trace'].rstrip()}", file=sys.stderr)
    path = folder / f"{job.job_id}.json"
    own = json.loads(path.read_text()) if path.exists() else {}
    return int(own.get("exit_code", 0 if own.get("state") == "COMPLETED" else 1))
