"""Where a command runs: `--on PROFILE` reads launch/PROFILE.yaml and hands the command to torchrun, to processes of this machine,
or to Slurm (submitit).

A profile has `launcher: local | torchrun | slurm`; all other keys are that launcher's own, by their own names: submitit's and Slurm's,
or torchrun's. `--on slurm,nodes=4,slurm_partition=gpu` changes some. Before anything is queued the config is checked and its data
opened; code and resolved config are copied into the run folder, so that later edits do not touch a job that waits.
"""

import itertools
import json
import logging
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from ssl_locat.cluster import jobs as registry
from ssl_locat.config.schema import Config, load
from ssl_locat.config.yaml_files import dump_yaml, load_yaml, shipped
from ssl_locat.errors import ConfigError, UserError, did_you_mean
from ssl_locat.runs.durable import write_atomically
from ssl_locat.text.shown import carries_credentials

log = logging.getLogger(__name__)

# submitit's shared names -> Slurm's; `slurm_X` means X
SHARED_NAMES = {"name": "job_name", "timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks_per_node"}
OURS: dict[str, Any] = {  # keys that are neither submitit's nor Slurm's, with their defaults
    "environment": {},  # variables of the job
    "python": None,  # the interpreter on the nodes; default: this one
    "max_requeues": 1000,  # a job that is stopped more often than this stays stopped
}
# Signals that come while Python still imports are kept until there is a handler (worker/task.py): they would kill it, and a killed job is not
# requeued. The shell ignores them for the instant until a first Python blocks them; blocked they stay over exec, and are delivered later.
BLOCK_SIGNALS = "import os, signal as s, sys; s.pthread_sigmask(s.SIG_BLOCK, [s.SIGTERM, s.SIGUSR1, s.SIGUSR2]); os.execvp(sys.argv[1], sys.argv[1:])"
DEFER_SIGNALS = f'trap \'\' TERM USR1 USR2; exec "$0" -c {shlex.quote(BLOCK_SIGNALS)} "$0" "$@"'


@dataclass
class Profile:
    """A launch profile: who launches, its options by its own names, and ours."""

    name: str
    launcher: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None
    max_requeues: int = 1000

    @property
    def ranks(self) -> int:
        """Processes in all."""
        if self.launcher == "torchrun":
            return int(self.options.get("nnodes", 1)) * _torchrun_processes(self.options)
        options = slurm_names(self.options)
        return int(options.get("nodes", 1)) * max(1, int(options.get("ntasks_per_node", 1)))


def load_profile(on: str) -> Profile:
    """`NAME_OR_PATH[,key=value ...]` -> Profile.

    Raises:
        ConfigError: an unknown launcher or field, with the list of those known.
    """
    name, *overrides = on.split(",")
    loaded = load_yaml(name, "launch", overrides)
    data = dict(loaded.data)
    launcher = data.pop("launcher", None)
    if launcher not in FIELDS:
        raise ConfigError(f"{loaded.place(('launcher',))}: launcher is {launcher!r}; expected one of {', '.join(FIELDS)}.")
    ours = {key: data.pop(key, default) for key, default in OURS.items()}
    known = FIELDS[launcher]()
    for key in data:
        if key not in known:
            raise ConfigError(
                f"{loaded.place((key,))}: {launcher} has no field {key!r}.{did_you_mean(key, known)} "
                f"Known: {', '.join(sorted({*known, *OURS}))}."
            )
    if (
        launcher == "slurm"
        and data.get("gpus_per_node")
        and not {"tasks_per_node", "ntasks_per_node", "slurm_ntasks_per_node"} & set(data)
    ):
        data["tasks_per_node"] = data["gpus_per_node"]  # one process per GPU: their number is said in one place
    for key in ours["environment"]:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(key)):
            raise ConfigError(
                f"{loaded.place(('environment', key))}: environment has {key!r}, which is no name of a variable; expected letters, digits and _."
            )
    ours["environment"] = {key: str(value) for key, value in ours["environment"].items()}
    return Profile(name, launcher, {key: value for key, value in data.items() if value is not None}, **ours)


def _slurm_fields() -> list[str]:
    own = sorted(submitit.SlurmExecutor._valid_parameters())
    # asked of the installed submitit: the list of Slurm's options that it knows grows
    return [*SHARED_NAMES, *own, *(f"slurm_{name}" for name in own)]


def _local_fields() -> list[str]:
    return ["tasks_per_node", "gpus_per_node"]


def _torchrun_fields() -> list[str]:
    from torch.distributed.run import get_args_parser

    actions = [action for action in get_args_parser()._actions if action.option_strings]
    return sorted(action.dest for action in actions if action.dest not in ("help", "module", "no_python", "run_path"))


FIELDS = {"local": _local_fields, "torchrun": _torchrun_fields, "slurm": _slurm_fields}


def slurm_names(options: dict[str, Any]) -> dict[str, Any]:
    """Options by the names that submitit's SlurmExecutor takes."""
    renamed = {}
    for key, value in options.items():
        key = SHARED_NAMES.get(key.removeprefix("slurm_"), key.removeprefix("slurm_"))
        # Slurm takes a bare number for megabytes; submitit's mem_gb is in GB
        renamed[key] = f"{value}GB" if key == "mem" and isinstance(value, int | float) else value
    return renamed


def _torchrun_processes(options: dict[str, Any]) -> int:
    asked = options.get("nproc_per_node", 1)
    if isinstance(asked, int):
        return asked
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return found or (1 if asked in ("auto", "gpu") else os.cpu_count() or 1)


# --- what the command line calls ----------------------------------------------------------------------------------------


def submit_pretrain(config: Config, on: str, resume: str = "auto", allow: Sequence[str] = (), dry_run: bool = False) -> None:
    """Start a pretraining, or one for each combination of its `sweep`, where the profile says.

    Raises:
        UserError: whatever is wrong with config, data or profile, before anything is queued.
    """
    from ssl_locat.pretraining.origin import check_resume
    from ssl_locat.pretraining.parts import check

    profile = load_profile(on)
    runs = expand_sweep(config)
    for run in runs:
        check(run, profile.ranks)
        check_resume(run, resume, allow)
    if profile.launcher == "torchrun" and len(runs) > 1:
        raise UserError("torchrun starts one run; a sweep needs --on slurm (or local, one after the other).")
    snapshot = _snapshot(Path(config.run_dir).absolute() / "slurm", dry_run)
    commands = []
    for index, run in enumerate(runs):
        own_config = snapshot / (f"config-{index}.yaml" if len(runs) > 1 else "config.yaml")
        if not dry_run:
            write_atomically(own_config, run.to_yaml(), private=carries_credentials(run.model_dump(mode="json")))
        allowed = ["--allow", ",".join(allow)] if allow else []
        commands.append(["pretrain", str(own_config), "--resume", resume, *allowed])
    _start(commands, profile, snapshot, [run.run_dir for run in runs], dry_run)


def submit_evaluate(
    protocol: str, model: str, overrides: list[str], on: str, as_json: bool = False, dry_run: bool = False
) -> None:
    """Evaluate a backbone where the profile says; the same checks as for a pretraining come first."""
    from ssl_locat.evaluation.evaluate import check

    profile = load_profile(on)
    own, resolved = check(protocol, model, overrides, model_may_come=waits_for_a_job(profile))
    _submit_evaluation("evaluate", protocol, resolved, [model, *own, *(["--json"] if as_json else [])], profile, dry_run)


def submit_table(name: str, arguments: list[str], on: str, dry_run: bool = False) -> None:
    """Fill a table where the profile says; requeued, it resumes after the cells that are finished."""
    from ssl_locat.tables.table import check

    profile = load_profile(on)
    _submit_evaluation("table", name, check(name, arguments, model_may_come=waits_for_a_job(profile)), [], profile, dry_run)


def _submit_evaluation(
    command: str, name: str, resolved: dict[str, Any], arguments: list[str], profile: Profile, dry_run: bool
) -> None:
    """`resolved`: the YAML with all that it was given on the command line, kept beside the code under its own name."""
    folder = Path("jobs", f"{command}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    snapshot = _snapshot(folder, dry_run)
    own = snapshot / f"{Path(name).stem}.yaml"
    if not dry_run:
        write_atomically(own, dump_yaml(resolved), private=carries_credentials(resolved))
    _start([[command, str(own), *arguments]], profile, snapshot, [str(folder)], dry_run)


def waits_for_a_job(profile: Profile) -> bool:
    """A run folder that does not exist yet may be what the job waits for."""
    return profile.launcher == "slurm" and bool(slurm_names(profile.options).get("dependency"))


def expand_sweep(config: Config) -> list[Config]:
    """One config per combination of the sweep's values, each with a run folder of its own inside the sweep's."""
    if not config.sweep:
        return [config]
    runs = []
    for values in itertools.product(*config.sweep.values()):
        chosen = dict(zip(config.sweep, values, strict=True))
        # lr=0.001,epochs=100: the folder tells its combination; no slash may deepen it
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items()).replace("/", "-").replace(" ", "")
        plain = config.model_copy(update={"sweep": {}, "run_dir": str(Path(config.run_dir) / name)})
        runs.append(_changed(plain, chosen))
    return runs


def _changed(config: Config, values: dict[str, Any]) -> Config:
    """The config with some keys changed, checked as if it had been read from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sweep.yaml")
        path.write_text(config.to_yaml(), encoding="utf-8")
        # JSON is YAML: lists and text with spaces arrive as they are
        return load(str(path), [f"{key}={json.dumps(value)}" for key, value in values.items()])


def _snapshot(folder: Path, dry_run: bool) -> Path:
    """A copy of the code beside the job's logs; jobs import it from there."""
    stem = f"snapshot-{time.strftime('%Y%m%d-%H%M%S')}"
    target = folder / stem
    if not dry_run:
        for number in itertools.count(2):  # several may be sent off within a second
            try:
                target.mkdir(parents=True)
                break
            except FileExistsError:
                target = folder / f"{stem}-{number}"
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(Path(__file__).parents[1], target / "ssl_locat", ignore=ignore)
        for name in ("configs", "launch", "eval"):
            if not (target / "ssl_locat" / "shipped" / name).is_dir():  # a checkout: they lie beside the package
                shutil.copytree(shipped(name), target / name, ignore=ignore)
    return target


# --- launchers ------------------------------------------------------------------------------------------------------------


def _start(commands: list[list[str]], profile: Profile, snapshot: Path, runs: list[str], dry_run: bool) -> None:
    starter = {"slurm": _start_slurm, "local": _start_local, "torchrun": _start_torchrun}[profile.launcher]
    starter(commands, profile, snapshot, runs, dry_run)


class _Worker:
    """What a task of a job runs, named and not imported: it stands above `cli`, and so above this room. submitit pickles what it queues;
    the node that unpickles this gets the function itself."""

    def __call__(self, *arguments: Any) -> None:
        raise TypeError("runs only as what it is unpickled to, on a node")

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return pkgutil.resolve_name, ("ssl_locat.worker.task:run",)


class _SlurmExecutor(submitit.SlurmExecutor):
    """Also where there is no Slurm: a dry run only prints the script."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _start_slurm(commands: list[list[str]], profile: Profile, snapshot: Path, runs: list[str], dry_run: bool) -> None:
    folder = snapshot.parent
    if shutil.which("sbatch") is None and not dry_run:
        raise UserError(
            "There is no Slurm here (no sbatch on the PATH). Run this on the cluster's login node, choose --on local, "
            "or try it on a real Slurm on this machine: launch/dev_slurm up."
        )
    executor = _SlurmExecutor(folder, python=_python_with_signals_deferred(profile))
    try:
        executor.update_parameters(**slurm_parameters(profile, commands[0][0], snapshot))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"profile {profile.name}: {error}") from None
    if dry_run:
        if len(commands) > 1:
            executor.parameters["map_count"] = len(commands)
        print(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))
        return
    # a job that submits a job must not pass on its own place; submitit's clean_env would take SLURM_CONF as well
    inside = submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
    conf = os.environ.get("SLURM_CONF")
    try:
        with inside:
            if conf:
                os.environ["SLURM_CONF"] = conf
            with executor.batch() if len(commands) > 1 else nullcontext():
                queued: list[Any] = [
                    executor.submit(_Worker(), command, str(folder), os.getcwd(), profile.max_requeues) for command in commands
                ]
    except FailedJobError as error:
        raise UserError(f"Slurm refused the job: {error}") from None
    for job, command, run in zip(queued, commands, runs, strict=True):
        registry.add(job.job_id, str(folder), run, ["ssl-locat", *command])
    registry.after_queueing([job.job_id for job in queued], folder)


def slurm_parameters(profile: Profile, program: str, snapshot: Path) -> dict[str, Any]:
    """What SlurmExecutor is given: the profile's options, and what a job of ours cannot do without."""
    options = slurm_names(profile.options)
    options.setdefault("job_name", f"ssl-locat-{program}")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job_variables(profile, snapshot).items()]
    options["setup"] = [*options.get("setup", []), *exports]
    # the script runs on the node itself, where a container that lacks Slurm's commands cannot ask for a requeue (worker/task.py)
    wanted = shlex.quote(str(snapshot.parent)) + "/$SLURM_JOB_ID.requeue"
    # a job that is being cancelled is COMPLETING: requeued then, it would come back
    running = 'scontrol show job -o "$SLURM_JOB_ID" | grep -q JobState=RUNNING'
    asked = f'if [ -e {wanted} ]; then rm -f {wanted}; {running} && scontrol requeue "$SLURM_JOB_ID"; fi'
    # the exit code of the job is that of its command, not of what follows it
    options["teardown"] = ["code=$?", *options.get("teardown", []), asked, "exit $code"]
    # one rank's failure ends the step on all nodes at once; requeue: a lost node is not the end of the job
    options["srun_args"] = [*options.get("srun_args", []), "--kill-on-bad-exit=1"]
    options["additional_parameters"] = {"requeue": True, **(options.get("additional_parameters") or {})}
    return options


def job_variables(profile: Profile, snapshot: Path) -> dict[str, str]:
    """A job imports the copy of the code beside its logs; the folder it was sent from must not come before that."""
    # without it Python puts the working directory first: the checkout, edited meanwhile
    variables = {**profile.environment, "PYTHONSAFEPATH": "1"}
    inherited = variables.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    variables["PYTHONPATH"] = f"{snapshot}:{inherited}" if inherited else str(snapshot)
    return variables


def _python_with_signals_deferred(profile: Profile) -> str:
    return " ".join(["bash", "-c", shlex.quote(DEFER_SIGNALS), shlex.quote(profile.python or sys.executable)])


def _start_local(commands: list[list[str]], profile: Profile, snapshot: Path, runs: list[str], dry_run: bool) -> None:
    """Processes of this machine by submitit's LocalExecutor, one command after the other, in the foreground."""
    if dry_run:
        print("\n".join(f"{profile.ranks} processes: ssl-locat {shlex.join(command)}" for command in commands))
        return
    for command, run in zip(commands, runs, strict=True):
        executor = submitit.LocalExecutor(snapshot.parent)
        # submitit ends a local job after 5 minutes unless told otherwise
        gpus = profile.options.get("gpus_per_node", 0)
        executor.update_parameters(timeout_min=60 * 24 * 365, tasks_per_node=profile.ranks, gpus_per_node=gpus)
        # ignored by submitit's controller, which on Ctrl-C would kill the processes while they save
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        with submitit.helpers.clean_env(), _variables(job_variables(profile, snapshot)):
            job: Any = executor.submit(_Worker(), command, str(snapshot.parent), os.getcwd(), 0)
        signal.signal(signal.SIGINT, interrupt)
        log.info("%s: %d processes, logs in %s", run, profile.ranks, snapshot.parent)
        code = registry.follow_local(job, snapshot.parent)
        if code:
            sys.exit(code)


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started inside."""
    former = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(former)


def _start_torchrun(commands: list[list[str]], profile: Profile, snapshot: Path, runs: list[str], dry_run: bool) -> None:
    """torchrun on this machine (on each of several, started by hand, with nnodes and rdzv_endpoint)."""
    words = [profile.python or sys.executable, "-m", "torch.distributed.run"]
    # flags without a value: true says one, false leaves it out
    for key, value in {"nproc_per_node": 1, **profile.options}.items():
        if value is True:
            words.append(f"--{key}")
        elif value is not False:
            words.append(f"--{key}={value}")
    command = [*words, "-m", "ssl_locat", *commands[0]]
    if dry_run:
        print(shlex.join(command))
        return
    code = subprocess.run(command, env={**os.environ, **job_variables(profile, snapshot)}, check=False).returncode
    if code:
        sys.exit(code)
