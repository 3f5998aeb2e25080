"""What several commands take, and how their help is written."""

from collections.abc import Callable
from typing import Annotated

import typer

from ssl_locat.config.yaml_files import names


def examples(*commands: str) -> str:
    """An epilog; `\\b` keeps its lines as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def among(folder: str) -> Callable[[str], list[str]]:
    """Completes shipped names; where none fits, the shell completes files."""
    return lambda incomplete: [name for name in names(folder) if name.startswith(incomplete)]


Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, over what the YAML says", metavar="[key=value ...]")]
# profiles are listed from their folder: --help knows one that was added
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        help=f"where it runs: a launch profile ({', '.join(names('launch'))}) or a YAML; NAME,key=value changes a key",
        metavar="PROFILE",
        autocompletion=among("launch"),
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, show what would run, run nothing")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
