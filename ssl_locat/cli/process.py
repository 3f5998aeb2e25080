"""From a command line to the end of its process: messages, exit codes, leaving.

Exit codes: 0 done, 2 the user's mistake (one message, no trace), 3 data budget exceeded, 4 outage or preempted (start it again),
5 diverged. People's text goes to stderr; stdout belongs to `--json`.
"""

import atexit
import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, NoReturn

import typer
from safetensors import SafetensorError

from ssl_locat.cli.commands import app
from ssl_locat.config.habits import HABITS, in_our_words, plain
from ssl_locat.errors import EXPECTED, Outage, disk_error_message
from ssl_locat.runs import log
from ssl_locat.text.shown import redact

# click's base of all usage errors; newer typer carries a copy of click of its own, so it is reached through a public name
_Usage: Any = typer.BadParameter.__mro__[2]


def _report_fault(error: Exception) -> int:
    """The trace of a mistake of ours, which may quote a URL; Python's own exit code for it."""
    log.say("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
    return 1


def _corrected(error: Exception, arguments: list[str]) -> str | None:
    """What to type in place of an option that is none: `--lr 0.1`, `--optim.lr=0.1`, `--batch-size 64`."""
    # only "no such option" has a name; other usage errors explain themselves
    option = getattr(error, "option_name", None) or ""
    if not option.startswith("--"):
        return None
    # the option as typed: click tells its name, not its value
    at = next((place for place, word in enumerate(arguments) if word.partition("=")[0] == option), None)
    value = None
    if at is not None:
        _, equals, value = arguments[at].partition("=")
        following = arguments[at + 1] if at + 1 < len(arguments) else "-"
        value = value if equals else None if following.startswith("-") else following
    name = option.lstrip("-")
    if "." in name:
        return f"What a YAML says is overridden without dashes: {name}={value or 'VALUE'}"
    if arguments[:1] in (["evaluate"], ["features"]):
        return f"Keys of a protocol are given without dashes: {plain(name)}={value or 'VALUE'}"
    if words := in_our_words(name, value or ("VALUE" if plain(name) in HABITS else None)):
        return f"{words.strip()} Keys are given without dashes."
    return None


def main() -> NoReturn:
    """The console script."""
    leave(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """One command line -> its exit code. A user's mistake is one message; a stack trace means our own."""
    quiet, verbose = "--quiet" in arguments, "--verbose" in arguments
    log.setup(quiet=quiet, verbose=verbose)
    # taken out by hand: as options of the app they would have to stand before the command
    words = [word for word in arguments if word not in ("--quiet", "--verbose")]
    try:
        code = app(words, standalone_mode=False)  # else click prints errors and exits by itself
    except _Usage as error:
        error.message = redact(str(error.message))
        error.show()
        code = error.exit_code
        if correction := _corrected(error, words):
            log.say(correction, sys.stderr)
    # before OSError: what is expected may be one, with a message of its own
    except EXPECTED as error:
        log.say(f"ssl-locat: {error}", sys.stderr)
        code = error.exit_code
    except (OSError, SafetensorError) as error:
        refusal = None if verbose else disk_error_message(error)
        code = _report_fault(error) if refusal is None else Outage.exit_code
        if refusal:
            log.say(f"ssl-locat: {refusal}", sys.stderr)
    # 128 + SIGINT, as a shell reports it
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # so that flushing at exit does not fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has gone
        code = 0
    except Exception as error:
        code = _report_fault(error)
    if code == 130:  # typer turns Ctrl-C into this, too
        print("ssl-locat: stopped.", file=sys.stderr)
    # a command returns nothing; of a typer.Exit, its code is returned
    return code if isinstance(code, int) else 0


def leave(code: int) -> NoReturn:
    """End the process as Python does, up to the last exit handler: threads are waited for, children ended, streams flushed. What comes after,
    taking torch apart module by module, is left out: it took half of the CPU time of a short command (docs/performance.md)."""
    threading._shutdown()  # type: ignore[attr-defined]  # private; waits for threads, those of executors too; multiprocessing's own children end like this
    with suppress(Exception):  # a handler's error is printed, and changes no exit code
        atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone; closed
            stream.flush()
    # the code alone: sys.exit would begin the taking apart that this avoids
    os._exit(code)
