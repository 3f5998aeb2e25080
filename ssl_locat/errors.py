"""The errors a user can meet, and the exit code of each. `cli` prints the message alone; a stack trace means our own mistake."""

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches

from ssl_locat.text.shown import printable, redact, shown


class Told(Exception):
    """Its message is for people: without credentials, which URLs carry, and without what acts on a terminal."""

    # cleaned where it is made: a message ends up in logs, JSON, traces and other processes
    def __init__(self, message: object = ""):
        super().__init__(printable(redact(str(message))))


class UserError(Told, ValueError):
    """Wrong input. The message says what was wrong, what was expected and how to mend it."""

    exit_code = 2


class ConfigError(UserError):
    """A YAML file, a key or an override is wrong."""


class DataError(UserError):
    """Data is missing, empty or of a kind that cannot be used at all (one damaged sample is a CorruptSample)."""


class CheckpointError(UserError):
    """A checkpoint or an export is missing, damaged or belongs to another model."""


class CorruptSample(Told):
    """One sample is damaged: it is quarantined, counted and replaced; the run continues."""

    def __init__(self, reason: str):
        self.reason = shown(reason)
        # one argument, from which it is made again on its way from a worker process
        super().__init__(self.reason)


class MissingMember(CorruptSample):
    """A sample lacks what is needed of it, by the names of its members: nothing that its bytes could mend."""


class DataBudgetExceeded(Told, RuntimeError):
    """More samples were damaged than `data.max_bad` allows."""

    exit_code = 3


class Outage(Told, RuntimeError):
    """A store did not answer within its time budget. Nothing is lost: start the same command again."""

    exit_code = 4


class Preempted(Told, RuntimeError):
    """The run was asked to stop, and saved itself first."""

    exit_code = 4


class Diverged(Told, RuntimeError):
    """The loss became NaN or infinite, or a collapse that the YAML names as fatal was seen."""

    exit_code = 5


class RankLost(RuntimeError):
    """Another process of this run is gone or does not answer; what it died of is in its own log, if it could say so."""

    exit_code = 1


EXPECTED = (UserError, DataBudgetExceeded, Outage, Preempted, Diverged, RankLost)  # reported without a stack trace


DISK_ERRORS = {
    errno.ENOSPC: "the disk is full. Make room",
    errno.EFBIG: "the file grew beyond what this disk or `ulimit -f` allows. Choose another place",
    errno.EDQUOT: "the disk quota is used up. Make room",
    errno.EROFS: "the disk is read-only. Name another place",
    errno.EACCES: "access is denied. Mend its permissions, or name another place",
    errno.EPERM: "access is denied. Mend its permissions, or name another place",
    errno.ENOTDIR: "a part of this path is a file, not a folder. Name another place",
    errno.EISDIR: "this is a folder. Name a file",
    errno.ENAMETOOLONG: "the name is too long. Name another place",
    errno.EMFILE: "too many files are open. Raise the limit (ulimit -n)",
    errno.EIO: "the disk fails. Mend it, or name another place",
    errno.ESTALE: "the network disk has gone. Mount it again",
}


def disk_error_message(error: Exception) -> str | None:
    """In words, what the operating system refused, if it is the machine's or the user's to mend; None for an error of ours."""
    number, name = getattr(error, "errno", None), getattr(error, "filename", None)
    # an OSError has a number; what safetensors raises has the number in its text
    in_words = re.search(r"os error (\d+)|Os { code: (\d+)", str(error))  # all that safetensors gives
    if number is None and in_words:
        number = int(in_words[1] or in_words[2])
    if number not in DISK_ERRORS:
        return None
    return f"{f'{name}: ' if name else ''}{DISK_ERRORS[number]} and start the same command again; what was saved before is whole."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the nearest known name, or '' if none is near."""
    # 0.5: 'lt' still finds 'lr', which difflib's own 0.6 would not
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
