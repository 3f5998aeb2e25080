"""What runs on every task of a job: takes its place among the processes, runs the command, and deals with how it ended.

Seen on a real Slurm, and why this is as it is:
- A preempted job that exits by itself within the grace time is not requeued: it has FAILED. So after saving, rank 0 asks for a
  requeue itself, and everybody waits to be ended by Slurm.
- `scontrol requeue` brings a cancelled job back to life. So it is only asked for while Slurm says RUNNING: after `scancel` and
  after an operator's requeue the state is COMPLETING already.
- A signal that comes before there is a handler kills the process, and with it the requeue. So Python is started with signals blocked
  (cluster/launch.py), and the handlers that remember them come first here.
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from ssl_locat.cli import app
from ssl_locat.cluster.jobs import write_status
from ssl_locat.errors import EXPECTED, Outage, Preempted, disk_error_message
from ssl_locat.runs import distributed, log, stop

logger = logging.getLogger(__name__)

SAVING = ("pretrain", "evaluate", "table")  # commands that save at a stop signal, and resume
SECONDS_TO_BE_ENDED = 120  # after a requeue Slurm sends TERM at once and KILL after KillWait (30 s by default)


def run(arguments: list[str], folder: str, cwd: str, max_requeues: int) -> None:
    """`ssl-locat ARGUMENTS` as one task of a submitit job; `folder` is where the job's logs are, on a disk that all nodes share."""
    import submitit

    place = submitit.JobEnvironment()
    job, restart = place.job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0))
    faults = Path(folder, f"{job}_faults")
    os.environ.update(
        RANK=str(place.global_rank),
        WORLD_SIZE=str(place.num_tasks),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.num_tasks // place.num_nodes),
        SSL_LOCAT_RENDEZVOUS=str(Path(folder, f"{job}_rendezvous_{restart}.json")),
    )
    os.chdir(cwd)
    log.setup()
    if arguments[0] in SAVING:
        stop.remember_signals()
    else:  # begins again when requeued: nothing to save, and Slurm requeues only what did not exit by itself
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        stop.deliver_signals()
    if distributed.is_main():
        shutil.rmtree(faults, ignore_errors=True)
        Path(folder, f"{job}_0_result.pkl").unlink(missing_ok=True)  # of an attempt whose node was lost
        write_status(folder, job, state="RUNNING", restart=restart, host=socket.gethostname(), tasks=place.num_tasks)
    code = 1
    try:
        code = app(arguments, standalone_mode=False) or 0
    except EXPECTED as error:
        logger.log(logging.INFO if isinstance(error, Preempted) else logging.ERROR, "%s: %s", distributed.rank_and_host(), error)
        code = error.exit_code
        if not isinstance(error, Preempted):
            distributed.fault(error, faults)
        if isinstance(error, Preempted | Outage) and "SLURM_JOB_ID" in os.environ:
            requeue_and_wait(folder, job, restart, max_requeues)
    except (OSError, SafetensorError) as error:
        message = disk_error_message(error)
        print(
            f"{distributed.rank_and_host()}: {message}" if message else distributed.fault(error, faults),
            file=sys.stderr,
            flush=True,
        )
        code = Outage.exit_code if message else 1
    except BaseException as error:
        print(distributed.fault(error, faults), file=sys.stderr, flush=True)
    if distributed.is_main():
        with suppress(OSError):  # a full disk: the exit code says the same
            write_status(folder, job, state={0: "COMPLETED", 4: "STOPPED"}.get(code, "FAILED"), restart=restart, exit_code=code)
    if code:
        # without this a thread of a dead collective can keep the process, and with it the whole step, alive
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    distributed.shutdown()


def slurm_state(job: str) -> str:
    """Slurm's own word for it, such as RUNNING; '' if it does not answer or know."""
    if shutil.which("scontrol") is None:
        return ""
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False).stdout
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    return fields.get("JobState", "")


def requeue_and_wait(folder: str, job: str, restart: int, max_requeues: int) -> None:
    """Rank 0 asks Slurm to start the job again, unless the stop was asked for by `ssl-locat jobs stop`, or Slurm is ending or
    requeuing the job already. Returns if not (the others are then ended with rank 0); else waits to be ended by Slurm."""
    if distributed.is_main():
        reachable = shutil.which("scontrol") is not None
        if Path(folder, f"{job}.stop").exists() or (reachable and slurm_state(os.environ["SLURM_JOB_ID"]) != "RUNNING"):
            return
        if restart >= max_requeues:
            return logger.error("%s: not requeued: it was %d times already (max_requeues)", distributed.rank_and_host(), restart)
        if not reachable:  # the job's script runs outside a container, and asks there (cluster/launch.py)
            with suppress(OSError):
                Path(folder, f"{os.environ['SLURM_JOB_ID']}.requeue").touch()
            return logger.warning(
                "%s: saved, but there is no scontrol here, on this node or in this container: the job's script asks Slurm for the requeue as soon "
                "as this ends. If the job does not come back, run `ssl-locat jobs requeue %s` on a login node.",
                distributed.rank_and_host(),
                job,
            )
        with suppress(OSError):  # a full disk
            write_status(folder, job, state="REQUEUED", restart=restart)
        logger.info("requeue: saved, asking Slurm to start this job again")
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(SECONDS_TO_BE_ENDED)
