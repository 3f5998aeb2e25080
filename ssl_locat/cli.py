"""The commands; dispatch only. Each imports its program when it is called, so that `ssl-locat --help` needs no torch.

Exit codes: 0 done, 2 the user's mistake (one message, no trace), 3 data budget exceeded, 4 outage or preempted (start it again),
5 diverged. People's text goes to stderr; stdout belongs to `--json`.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from safetensors import SafetensorError

from ssl_locat import __version__
from ssl_locat.errors import EXPECTED, Outage, UserError, disk_error_message
from ssl_locat.runs import log

app = typer.Typer(
    name="ssl-locat",
    help="Pretrain vision backbones without labels: DINO-style self-distillation with LocAtViT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="--quiet (warnings only) and --verbose work with every command.",
)
shards = typer.Typer(help="WebDataset shards: pack folders, build indexes, look for damage.", no_args_is_help=True)
app.add_typer(shards, name="shards")

Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, over what the YAML says", metavar="[key=value ...]")]
On = Annotated[
    str | None,
    typer.Option("--on", help="where it runs: a launch profile (local, torchrun, slurm, ...) or a YAML", metavar="PROFILE"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, show what would run, run nothing")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


def _version(value: bool) -> None:
    if value:
        print(f"ssl-locat {__version__}")
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


@app.command()
def init(
    source: Annotated[str, typer.Argument(metavar="FOLDER_OR_URL")],
    out: Annotated[str | None, typer.Option(help="the YAML to write; default: NAME.yaml here")] = None,
) -> None:
    """Look at your images and this machine, and write a commented YAML that `pretrain` runs."""
    from ssl_locat.doctor.init import init

    init(source, out)


@app.command()
def pretrain(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML, or the name of a shipped recipe (quickstart, ...)")],
    overrides: Overrides = None,
    on: On = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint", metavar="auto|never|PATH")] = "auto",
    dry_run: DryRun = False,
    replay: Annotated[
        Path | None, typer.Option(help="run one saved batch again and say where it stops being finite", metavar="FILE")
    ] = None,
) -> None:
    """Pretrain a backbone; the same command again goes on where it stopped."""
    from ssl_locat.config.schema import load

    loaded = load(config, overrides or [])
    if replay and (on or dry_run or loaded.sweep):
        raise UserError("--replay looks at one saved batch here and now: it goes with neither --on nor --dry-run nor a sweep.")
    if on and (on != "local" or loaded.sweep):
        from ssl_locat.cluster.launch import submit_pretrain

        submit_pretrain(loaded, on, resume=resume, dry_run=dry_run)
        return
    if loaded.sweep:
        raise UserError(
            "This config holds a sweep, one job for each combination: start it with --on slurm, or --on local for one after the other."
        )
    if dry_run:
        from ssl_locat.pretraining.summary import dry_run as show

        show(loaded)
        return
    if replay:
        from ssl_locat.pretraining.replay import replay as again

        again(loaded, replay)
        return
    from ssl_locat.pretraining.loop import pretrain as run
    from ssl_locat.pretraining.summary import print_summary

    print_summary(loaded, run(loaded, resume))


@app.command()
def evaluate(
    protocol: Annotated[str, typer.Argument(metavar="PROTOCOL", help="knn, linear, segmentation, hummingbird, ... or a YAML")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="run or export folder, checkpoint, timm:NAME, hf-hub:NAME")],
    overrides: Overrides = None,
    on: On = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Judge a frozen backbone by one protocol."""
    if on not in (None, "local"):
        from ssl_locat.cluster.launch import submit_evaluate

        submit_evaluate(protocol, model, overrides or [], on, as_json=as_json, dry_run=dry_run)
        return
    from ssl_locat.evaluation.evaluate import dry_run as show_plan
    from ssl_locat.evaluation.evaluate import run, show

    if dry_run:
        show_plan(protocol, model, overrides or [])
        return

    result = run(protocol, model, overrides or [])
    _print_json(result) if as_json else show(result)


@app.command()
def table(
    name: Annotated[str, typer.Argument(metavar="TABLE", help="a shipped table or a YAML")],
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL ...]")] = None,
    on: On = None,
    dry_run: DryRun = False,
) -> None:
    """Models x protocols x data sets: our number beside the published one."""
    if on not in (None, "local"):
        from ssl_locat.cluster.launch import submit_table

        submit_table(name, models or [], on, dry_run=dry_run)
        return
    from ssl_locat.evaluation.table import dry_run as show_plan
    from ssl_locat.evaluation.table import run

    show_plan(name, models or []) if dry_run else run(name, models or [])


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write")],
    format: Annotated[Literal["timm", "onnx", "pt2"], typer.Option(help="what the folder is for")] = "timm",
    which: Annotated[Literal["teacher", "student"] | None, typer.Option(help="which network of a run; default: teacher")] = None,
    step: Annotated[int | None, typer.Option(help="of this checkpoint; default: the newest")] = None,
    with_head: Annotated[bool, typer.Option("--with-head", help="the projection head too")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="upload to this repository of the Hugging Face hub", metavar="NAME")
    ] = None,
) -> None:
    """Write a backbone that timm, Hugging Face or ONNX users load."""
    from ssl_locat.export.export import export

    target = export(model, out, format=format, which=which, step=step, with_head=with_head, push_to_hub=push_to_hub)
    log.next_steps(
        f"""python -c "import ssl_locat.models, timm; timm.create_model('local-dir:{target}', pretrained=True)\"""",
        f"ssl-locat evaluate knn {target} data.train=DATA data.test=DATA",
    )


@app.command()
def features(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="shards (brace, glob, URL) or a folder")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write")],
    overrides: Overrides = None,
) -> None:
    """Write class and patch tokens of images."""
    from ssl_locat.evaluation.evaluate import features

    features(model, data, out, overrides or [])


@shards.command("pack")
def shards_pack(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="images, class folders, or tars of tars")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder for the shards")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value ...]",
            help="resize=256 (shorter side of stored images, px), max_shard_mb=256, workers=8, labels=auto|none|FILE.csv, masks=FOLDER, "
            "max_pixels=100_000_000, seed=0",
        ),
    ] = None,
) -> None:
    """Pack images into WebDataset shards; started again, it goes on."""
    from ssl_locat.data.shards.pack import pack_command

    pack_command(source, out, options or [])


@shards.command("index")
def shards_index(data: Annotated[list[str], typer.Argument(metavar="DATA...")]) -> None:
    """Write the index beside the shards, so that opening them takes no scan."""
    from ssl_locat.data.shards.index import write_index

    write_index(data if len(data) > 1 else data[0])


@shards.command("check")
def shards_check(data: Annotated[list[str], typer.Argument(metavar="DATA...")], as_json: Json = False) -> None:
    """Read everything once and report damage by shard and key; exit 3 if there is any."""
    from ssl_locat.data.shards.check import check_command

    raise typer.Exit(check_command(data if len(data) > 1 else data[0], as_json))


@shards.command("show")
def shards_show(data: Annotated[list[str], typer.Argument(metavar="DATA...")], as_json: Json = False) -> None:
    """Print counts, sizes and the first samples."""
    from ssl_locat.data.shards.check import show_command

    show_command(data if len(data) > 1 else data[0], as_json)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...")],
    out: Annotated[str | None, typer.Option(help="the page to write; default: RUN/report.html")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="serve it on loopback and refresh")] = False,
    port: Annotated[int, typer.Option(help="for --watch; 0: any free one")] = 0,
) -> None:
    """One self-contained HTML page about one run, or several compared."""
    from ssl_locat.report.page import report

    report(runs, out=out, watch=watch, port=port)


@app.command()
def doctor(
    target: Annotated[str | None, typer.Argument(metavar="[CONFIG|RUN]")] = None,
    overrides: Overrides = None,
    on: On = None,
) -> None:
    """Look at this machine, a config before it runs, or a run that went wrong, and say what to do."""
    from ssl_locat.doctor.doctor import doctor

    raise typer.Exit(doctor(target, overrides or [], on))


@app.command()
def bench(
    what: Annotated[Literal["attention", "step", "crops", "stream", "all"], typer.Argument()] = "all",
    as_json: Json = False,
    compare: Annotated[Path | None, typer.Option(help="show beside the numbers of an earlier --json", metavar="FILE")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a short look: fewer cases and repeats")] = False,
) -> None:
    """Measure side by side on this machine, as ratios."""
    from ssl_locat.benchmarks.bench import run

    result = run(what, as_json=as_json, compare=compare, quick=quick)
    if as_json:
        _print_json(result)
    if result["failed"]:  # each was named when it failed
        raise typer.Exit(1)


@app.command()
def jobs(
    action: Annotated[Literal["list", "logs", "stop", "requeue"], typer.Argument()] = "list",
    names: Annotated[list[str] | None, typer.Argument(metavar="[JOB|RUN ...]")] = None,
) -> None:
    """Jobs on the cluster: list, logs, stop, requeue."""
    from ssl_locat.cluster.jobs import ACTIONS

    ACTIONS[action](names or [])


# click's base of all usage errors; newer typer carries a copy of click of its own, so it is reached through a public name
_Usage = typer.BadParameter.__mro__[2]


def _print_json(value: dict[str, Any]) -> None:
    if not int(os.environ.get("RANK", 0)):  # one object, however many processes
        print(json.dumps(value))


def main() -> None:
    """The console script. A user's mistake is one message; a stack trace means our own."""
    arguments = sys.argv[1:]
    quiet, verbose = "--quiet" in arguments, "--verbose" in arguments
    log.setup(quiet=quiet, verbose=verbose)
    try:
        code = app([word for word in arguments if word not in ("--quiet", "--verbose")], standalone_mode=False)
    except _Usage as error:
        error.show()
        code = error.exit_code
        if (option := getattr(error, "option_name", "") or "").startswith("--") and "." in option:
            print(f"What a YAML says is overridden without dashes: {option.lstrip('-')}=VALUE", file=sys.stderr)
    except EXPECTED as error:
        print(f"ssl-locat: {error}", file=sys.stderr)
        code = error.exit_code
    except (OSError, SafetensorError) as error:
        if verbose or not (refusal := disk_error_message(error)):
            raise
        print(f"ssl-locat: {refusal}", file=sys.stderr)
        code = Outage.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has gone
        code = 0
    if code == 130:  # typer turns Ctrl-C into this, too
        print("ssl-locat: stopped.", file=sys.stderr)
    logging.shutdown()
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
