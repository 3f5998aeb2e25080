"""Where a run starts from: nothing, the newest checkpoint of its folder, or one that is named; with its settings, or with others on purpose.

The one mechanism for every change of settings on the way (docs/branching.md): `--resume auto|PATH --allow KEY,...`. The full state is taken over,
the keys that are allowed may differ, everything else must not. In the run's own folder the run itself changes; with the checkpoint of another
run it becomes a branch, in a folder of its own that names its parent. The order of data never changes: `resume_plan` refuses that.
"""

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssl_locat.config.schema import Config, check_allow
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.stream.plan import Plan, resume_plan
from ssl_locat.errors import CheckpointError, ConfigError, UserError
from ssl_locat.pretraining.parts import Since, check_backbone, run_length, scheduled
from ssl_locat.runs import distributed
from ssl_locat.runs.checkpoint import Checkpointer
from ssl_locat.runs.folder import Difference, differences, saved_config
from ssl_locat.runs.log import read_jsonl
from ssl_locat.runs.marker import MARKER, problem, read_marker, step_folders

# which settings a key of --allow covers besides itself and what stands below it
TOGETHER = {"optim.epochs": ("optim.total_steps",), "optim.total_steps": ("optim.epochs",)}
# changes of these begin the schedules that do not span the whole run anew
SCHEDULED = ("optim.", "teacher.momentum")


class Origin(NamedTuple):
    """What a run starts from. config: as given, with what the checkpoint's weights decide."""

    config: Config
    checkpoint: Path | None = None  # None: from nothing
    plan: Plan | None = None  # the order of the data, as the run began it
    changes: tuple[Difference, ...] = ()  # settings that were changed on purpose
    parent: dict[str, Any] | None = None  # of a branch: {"checkpoint", "step", "samples_seen"} where it left its parent
    since: Since | None = None  # where schedules begin that do not span the whole run
    new_branch: bool = False


def find_origin(
    config: Config,
    checkpointer: Checkpointer,
    datasets: list[Dataset],
    weights: list[float],
    resume: str,
    allow: Iterable[str] = (),
) -> Origin:
    """Where `--resume` and `--allow` lead; all ranks call it. What lies ahead of a checkpoint that is resumed from is set aside.

    Raises UserError for settings that differ and are not allowed to, CheckpointError for checkpoints that cannot be used.
    """
    check_allow(config, allow)
    path = _find_checkpoint(config, checkpointer, resume)
    if path is None:
        if config.optim.schedule in ("restart", "decay"):
            raise ConfigError(
                f"optim.schedule={config.optim.schedule} begins at a checkpoint: give one with --resume PATH --allow optim.schedule; a run "
                "from nothing takes cosine or wsd."
            )
        return Origin(config)
    marker, saved = read_marker(path)["meta"], saved_config(path)
    config, changes = _compared(path, saved, config, allow)
    plan = resume_plan(marker["plan"], datasets, weights, config.seed)
    if changes:
        _require_same_parts(path, changes)
        check_backbone(config)
    since = Since(**marker["since"]) if marker.get("since") else None
    before = scheduled(saved, run_length(saved, datasets), marker["samples_seen"], since)
    if config.optim.schedule not in ("restart", "decay"):
        since = None
    elif since is None or any(change.key.startswith(SCHEDULED) for change in changes):
        since = Since(marker["samples_seen"], *before)
    length = run_length(config, datasets)
    if changes and marker["samples_seen"] > length.total_samples:
        raise UserError(
            f"{path} has seen {marker['samples_seen']:,} images, more than the {length.total_samples:,} of the whole run with these settings: "
            "give more optim.epochs (or total_steps), or resume from an earlier checkpoint."
        )
    own = _inside(path, checkpointer.folder)
    parent = marker.get("parent")
    if not own:
        step = read_marker(path)["step"]
        parent = {"checkpoint": str(path.resolve()), "step": step, "samples_seen": marker["samples_seen"]}
    if resume not in ("auto", "never"):
        checkpointer.set_aside(path)
    return Origin(config, path, plan, changes, parent, since, new_branch=not own)


def check_resume(config: Config, resume: str, allow: Iterable[str] = ()) -> None:
    """What `find_origin` would refuse about settings and paths, before a job waits for hours to say it. Reads markers, no weights."""
    found = reversed(step_folders(Path(config.run_dir, "checkpoints")))
    path = next((path for path in found if not problem(path)), None)
    if resume not in ("auto", "never") and not (path and _begun_at(path, resume)):
        path = _named(resume)
    if path:
        _compared(path, saved_config(path), config, allow)


def _compared(path: Path, saved: Config, config: Config, allow: Iterable[str]) -> tuple[Config, tuple[Difference, ...]]:
    """The config as the checkpoint's weights need it, and the settings that were changed on purpose. UserError for other differences."""
    config = _with_the_models_size(saved, config)
    changes = tuple(differences(saved.model_dump(mode="json"), config.model_dump(mode="json")))
    if refused := [change for change in changes if not _allowed(change.key, allow)]:
        keys = ",".join(dict.fromkeys(change.key for change in refused))
        raise UserError(
            f"{path} is of a run with other settings: {'; '.join(map(str, refused))}. Give the same settings to resume; or, to continue with these on "
            f"purpose, add --allow {keys}; or start a new run from its weights: backbone.init={path}."
        )
    return config, changes


def _require_same_parts(path: Path, changes: Iterable[Difference]) -> None:
    """UserError where another part of the backbone is to move than before: what is frozen is one tensor for student and teacher, and adapters
    are names of their own."""
    for change in changes:
        if change.key.startswith(tuple(f"backbone.{key}" for key in ("trainable", "last_blocks", "lora", "also_trainable"))):
            raise UserError(
                f"{change}: what moves cannot change within a run. Start a new one from its weights: backbone.init={path}."
            )


def _begun_at(newest: Path, resume: str) -> bool:
    """Whether `newest` is of a branch that began at the checkpoint `resume`."""
    return (read_marker(newest)["meta"].get("parent") or {}).get("checkpoint") == str(Path(resume).resolve())


def _is_ahead(newest: Path, resume: str) -> bool:
    return problem(resume) is not None or read_marker(newest)["step"] > read_marker(Path(resume))["step"]


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().parent == folder.resolve()


def _require_same_run(newest: Path, config: Config, path: Path) -> None:
    """UserError if a branch would be mixed into the folder of another run; a copy of a run's own checkpoint is taken there."""
    saved = saved_config(newest)
    given = _with_the_models_size(saved, config)
    if other := list(differences(saved.model_dump(mode="json"), given.model_dump(mode="json"))):
        raise UserError(
            f"{config.run_dir} holds a run that did not begin at {path} ({newest.name}, whose {'; '.join(map(str, other))}): a branch goes into "
            "a run_dir of its own."
        )


def _named(resume: str) -> Path:
    path = Path(resume)
    if not (path / MARKER).is_file():
        raise CheckpointError(
            f"--resume {path}: there is no checkpoint (a folder with {MARKER} in it). Give RUN/checkpoints/step_NNNNNNNN, or auto."
        )
    return path


def _find_checkpoint(config: Config, checkpointer: Checkpointer, resume: str) -> Path | None:
    """The checkpoint to start from. A path, or `never`, is meant for the first start: whoever starts the same command again automatically
    (Slurm's requeue, torchrun's restart), or starts a branch again, resumes from the newest."""
    newest = checkpointer.newest()
    if resume not in ("auto", "never"):
        # the checkpoint that a branch began at may be deleted by now
        if newest and (_begun_at(newest, resume) or (restarted(config.run_dir) and _is_ahead(newest, resume))):
            return newest
        path = _named(resume)
        if newest and not _inside(path, checkpointer.folder):
            _require_same_run(newest, config, path)
        if wrong := checkpointer.verify(path):
            raise CheckpointError(f"--resume {path}: it cannot be used: {wrong}. Take another checkpoint of that run.")
        return path
    if newest and resume == "never" and not restarted(config.run_dir):
        raise UserError(
            f"--resume never, but {config.run_dir} holds {newest.name}. Give another run_dir, or remove that folder first."
        )
    if not newest and resume == "auto" and (unusable := checkpointer.unusable()):
        raise CheckpointError(
            f"none of the checkpoints of {config.run_dir} can be used: {'; '.join(unusable)}. Put whole ones back, or begin anew "
            "with --resume never (these are kept aside)."
        )
    return newest


def _allowed(key: str, allow: Iterable[str]) -> bool:
    covered = [name for given in allow for name in (given, *TOGETHER.get(given, ()))]
    return any(key == name or key.startswith(f"{name}.") for name in covered)


def _with_the_models_size(saved: Config, given: Config) -> Config:
    """Where crops become larger the weights keep the size they have: positional embeddings are resized in each forward pass."""
    if "img_size" in given.backbone.options:
        return given
    size = saved.backbone.options.get("img_size")
    if size is None and saved.crops.global_size != given.crops.global_size:
        size = saved.crops.global_size
    return given if size is None else given.model_copy(update={"backbone": given.backbone.model_copy(update={"img_size": size})})


def may_be_missing(changes: Iterable[Difference]) -> tuple[str, ...] | None:
    """Beginnings of names that a checkpoint may lack or have besides, where settings changed; None where they did not.

    An objective that comes or goes brings or takes its head, its state and its snapshot; mask tokens come with the first that needs masks.
    """
    changes = list(changes)
    if not changes:
        return None
    names = set()
    for change in changes:
        if change.key.partition(".")[0] == "objective":
            sides = ({o["name"] for o in _as_list(side)} for side in (change.saved, change.given) if side)
            before, now = [*sides, set(), set()][:2]
            names |= before ^ now
    starts = [f"{part}.{name}." for name in names for part in ("student.heads", "teacher.heads", "objective", "snapshot")]
    starts += ["student.mask_token", "teacher.mask_token"] if names else []
    return tuple(starts + [f"optimizer.{start}" for start in starts])


def _as_list(objective: Any) -> list[dict]:
    return [part for part in (objective if isinstance(objective, list) else [objective]) if isinstance(part, dict)]


def restarted(run_dir: str | Path) -> bool:
    """Whether this process was started again by Slurm or torchrun, not by a person: the same answer on all ranks."""
    counts = [os.environ.get(name) or "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    by_count = any(count.isdecimal() and int(count) for count in counts)
    started = [event for event in read_jsonl(Path(run_dir, "events.jsonl")) if event["kind"] in ("start", "resume")]
    # torchrun counts failures, not nodes that joined; but its agent lives on, and with it those of other nodes
    same_agent = bool(started and launcher() and started[-1].get("launcher") == launcher())
    return bool(distributed.sum_on_cpu_(torch.tensor([int(by_count or same_agent)])))


def launcher() -> str:
    """torchrun's agent above this process, as 'host:pid:start'; '' if there is none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]  # clock ticks since boot
    except (OSError, IndexError):
        began = ""
    return f"{socket.gethostname()}:{parent}:{began}"
