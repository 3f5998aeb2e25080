"""The commands; dispatch only. Each imports its program when it is called, so that `ssl-locat --help` needs no torch, and says before
that what can be known without it (doctor/early.py)."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from ssl_locat import __version__
from ssl_locat.cli.options import DryRun, Json, On, Overrides, among, examples
from ssl_locat.cli.shards import shards
from ssl_locat.config.yaml_files import names
from ssl_locat.errors import UserError
from ssl_locat.runs import log
from ssl_locat.text.shown import to_json

app = typer.Typer(
    name="ssl-locat",
    help="Pretrain vision backbones without labels: DINO-style self-distillation with LocAtViT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's takes as long to import as all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExamples:\n  ssl-locat init path/to/images\n  ssl-locat pretrain images.yaml\n  ssl-locat COMMAND --help\n\n"
    "--quiet (warnings only) and --verbose work with every command.",
)
app.add_typer(shards, name="shards")


class _Evaluate(TyperCommand):
    """`evaluate PROTOCOL --help` ends with the protocol's keys."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # --help is answered before arguments are parsed: the protocol is looked for among the raw words
        ctx.meta["protocol"] = next((word for word in args if not word.startswith("-")), None)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        if protocol := ctx.meta.get("protocol"):
            # from the protocol's signature as its source has it: no torch
            from ssl_locat.evaluation.evaluate import describe_keys

            formatter.write("\n" + describe_keys(protocol) + "\n")


def _version(value: bool) -> None:
    if value:
        print(f"ssl-locat {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    pass


@app.command(epilog=examples("ssl-locat init path/to/images", "ssl-locat init 's3://bucket/train-*.tar' --out mine.yaml"))
def init(
    source: Annotated[str, typer.Argument(metavar="FOLDER_OR_URL", help="a folder of images, or shards")],
    out: Annotated[str | None, typer.Option(help="the YAML to write; default: NAME.yaml here")] = None,
) -> None:
    """Look at your images and this machine, and write a commented YAML that `pretrain` runs."""
    from ssl_locat.doctor.early import check_data, check_enough, yaml_to_write

    # what costs no import of torch comes first, here and below (doctor/early.py)
    yaml_to_write(source, out)
    check_data(source)
    check_enough(source)
    from ssl_locat.doctor.init import init

    init(source, out)


@app.command(
    epilog=examples(
        "ssl-locat pretrain path/to/images                  what init and pretrain do, in one command",
        "ssl-locat pretrain images.yaml                     resumes from the newest checkpoint, if there is one",
        "ssl-locat pretrain images.yaml optim.epochs=200 run_dir=runs/longer",
        "ssl-locat pretrain images.yaml --on slurm,nodes=2",
        "torchrun --nproc-per-node 8 --no-python ssl-locat pretrain images.yaml",
    )
)
def pretrain(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|IMAGES",
            help=f"a YAML, a shipped recipe ({', '.join(names('configs/pretrain'))}), or a folder of images or shards",
            autocompletion=among("configs/pretrain"),
        ),
    ],
    overrides: Overrides = None,
    on: On = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint", metavar="auto|never|PATH")] = "auto",
    allow: Annotated[
        list[str] | None,
        typer.Option(help="settings that may differ from the checkpoint's, on purpose: optim.epochs,optim.lr", metavar="KEY,..."),
    ] = None,
    dry_run: DryRun = False,
    replay: Annotated[
        Path | None, typer.Option(help="run one saved batch again and say where it stops being finite", metavar="FILE")
    ] = None,
) -> None:
    """Pretrain a backbone. The same command again resumes from the newest checkpoint."""
    from ssl_locat.config.schema import check_allow, load
    from ssl_locat.doctor.early import check_config
    from ssl_locat.doctor.from_images import config_for

    # a folder of images has its YAML written here, as `init` does; a dry run leaves none behind
    with config_for(config, overrides or [], dry_run) as path:
        loaded = load(path, overrides or [])
    # before torch: paths, names, divisibility
    check_config(loaded, on)
    # --allow a,b and --allow a --allow b are the same
    allowed = [key for keys in allow or [] for key in keys.split(",") if key]
    check_allow(loaded, allowed)
    if replay and (on or dry_run or loaded.sweep):
        raise UserError("--replay looks at one saved batch here and now: it goes with neither --on nor --dry-run nor a sweep.")
    # "local" is this process, but for a sweep: its combinations are processes of their own, one after the other
    if on and (on != "local" or loaded.sweep):
        from ssl_locat.cluster.launch import submit_pretrain

        submit_pretrain(loaded, on, resume=resume, allow=allowed, dry_run=dry_run)
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

    print_summary(loaded, run(loaded, resume, allowed))


@app.command(
    epilog=examples(
        "ssl-locat adapt timm:vit_small_patch14_dinov2.lvd142m path/to/images",
        "ssl-locat adapt dinov3_vits16.pth path/to/images data.validation=path/to/labelled      judged by labels",
        "ssl-locat adapt runs/mine 's3://bucket/train-*.tar' --locat --on slurm",
        "ssl-locat adapt MODEL IMAGES guard.otherwise=refuse                  exit code 2 where nothing is better than the start",
    )
)
def adapt(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="what to continue: run or export folder, a file of weights, timm:NAME, hf-hub:NAME"),
    ],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="a folder of images, or shards")],
    overrides: Overrides = None,
    locat: Annotated[bool, typer.Option("--locat", help="attach LocAt, small at first")] = False,
    on: On = None,
    dry_run: DryRun = False,
) -> None:
    """Continue released weights on your images; what is exported is never worse than the start, as far as labels can tell.

    Writes RUN/adapt.yaml with a reason beside each choice, and trains. The same command again resumes."""
    from ssl_locat.config.schema import load
    from ssl_locat.doctor.early import check_adaptation, check_config

    check_adaptation(model, images, overrides or [], on)
    from ssl_locat.pretraining.adapt import recipe_for

    with recipe_for(model, images, overrides or [], locat, on, dry_run) as path:
        loaded, text = load(str(path), overrides or []), path.read_text(encoding="utf-8")
    check_config(loaded, on)
    if on and on != "local":
        from ssl_locat.cluster.launch import submit_pretrain

        if dry_run:
            log.say(text.rstrip())
        submit_pretrain(loaded, on, dry_run=dry_run)
        return
    if dry_run:
        from ssl_locat.pretraining.summary import dry_run as show

        show(loaded, text)
        return
    from ssl_locat.pretraining.loop import pretrain as run
    from ssl_locat.pretraining.summary import print_summary

    print_summary(loaded, run(loaded))


@app.command(
    cls=_Evaluate,
    epilog=examples(
        "ssl-locat evaluate knn --help                      the protocol's keys",
        "ssl-locat evaluate knn runs/mine data.train=photos/train data.test=photos/val",
        "ssl-locat evaluate linear timm:vit_small_patch16_224.dino?pretrained data.train=... data.test=... --json",
    ),
)
def evaluate(
    protocol: Annotated[
        str,
        typer.Argument(
            metavar="PROTOCOL", help=f"{', '.join(names('eval'))}, or a YAML of your own", autocompletion=among("eval")
        ),
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="run or export folder, checkpoint, timm:NAME, hf-hub:NAME")],
    overrides: Overrides = None,
    on: On = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Evaluate a frozen backbone by one protocol. `evaluate PROTOCOL --help` lists its keys."""
    from ssl_locat.doctor.early import check_evaluation

    check_evaluation(protocol, model, overrides or [], on)
    if on not in (None, "local"):
        from ssl_locat.cluster.launch import submit_evaluate

        submit_evaluate(protocol, model, overrides or [], on, as_json=as_json, dry_run=dry_run)
        return
    from ssl_locat.evaluation.evaluate import dry_run as show_plan
    from ssl_locat.evaluation.evaluate import refuse_not_finite, run, show

    if dry_run:
        show_plan(protocol, model, overrides or [])
        return

    result = run(protocol, model, overrides or [])
    # printed even if a number is not finite: the rest of the result may be sound; then exit code 2
    _print_json(result) if as_json else show(result)
    refuse_not_finite(result)


@app.command(
    epilog=examples(
        "ssl-locat compare timm:vit_small_patch16_224.dino?pretrained runs/adapted data.train=photos/train data.test=photos/val",
        "ssl-locat compare runs/mine data.train=... data.test=... data.unlabelled='shards/*.tar' draws=10",
        "ssl-locat compare START 'runs/adapted-{0,1,2}' data.train=... data.test=...      # three seeds of one recipe",
        "ssl-locat compare START ADAPTED data.train=... data.test=... data.num_classes=11 protocols=[hummingbird]",
    )
)
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [MODEL ...] [key=value ...]",
            help="the first is what the others are compared with; keys as in eval/compare.yaml",
        ),
    ],
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Did it help? Networks on the same labels and images, with intervals, a leak check and a verdict."""
    from ssl_locat.doctor.early import check_comparison

    check_comparison(arguments)
    from ssl_locat.evaluation.compare import dry_run as show_plan
    from ssl_locat.evaluation.compare import run, show

    if dry_run:
        show_plan(arguments)
        return
    result = run(arguments)
    _print_json(result) if as_json else show(result)


@app.command(
    epilog=examples(
        "ssl-locat table quick",
        "ssl-locat table main --dry-run --tflops 300              every job and what it costs",
        "ssl-locat table main data.imagenet.train=... data.imagenet.test=... --on slurm",
    )
)
def table(
    name: Annotated[
        str,
        typer.Argument(
            metavar="TABLE",
            help=f"{', '.join(names('eval/tables'))}, or a YAML of your own",
            autocompletion=among("eval/tables"),
        ),
    ],
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL ...]")] = None,
    on: On = None,
    dry_run: DryRun = False,
    tflops: Annotated[
        float | None,
        typer.Option(help="with --dry-run: hours too, for a GPU that sustains so many 10^12 FLOP a second", min=1e-3),
    ] = None,
) -> None:
    """Models x protocols x data sets: our number beside the published one. What has no weights is trained first."""
    if tflops and not dry_run:
        raise UserError("--tflops is about what --dry-run lists; add --dry-run.")
    if on not in (None, "local"):
        from ssl_locat.cluster.launch import submit_table

        submit_table(name, models or [], on, dry_run=dry_run)
        return
    if dry_run:
        from ssl_locat.tables.cost import dry_run as show_plan

        show_plan(name, models or [], tflops)
        return
    from ssl_locat.tables.table import run

    _, error = run(name, models or [])
    if error:  # the table is written, with what could be measured
        raise error


@app.command(
    epilog=examples(
        "ssl-locat export runs/mine backbone/",
        "ssl-locat export runs/mine backbone/ --step best-dense",
        "ssl-locat export runs/mine backbone/ --format onnx --which student --step 2000",
    )
)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a run folder, a checkpoint, a file of weights, timm:NAME")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write")],
    format: Annotated[Literal["timm", "onnx", "pt2"], typer.Option(help="what the folder is for")] = "timm",
    which: Annotated[Literal["teacher", "student"] | None, typer.Option(help="which network of a run; default: teacher")] = None,
    step: Annotated[
        str | None,
        typer.Option(help="which checkpoint of a run; default: last", metavar="N|last|best-dense|best-global"),
    ] = None,
    average: Annotated[
        int | None, typer.Option(help="the mean of so many checkpoints up to that one: milestones, where there are", metavar="N")
    ] = None,
    with_head: Annotated[bool, typer.Option("--with-head", help="the projection head too")] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="a modeling file too: transformers without ssl_locat, by trust_remote_code")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="upload to this repository of the Hugging Face hub", metavar="NAME")
    ] = None,
) -> None:
    """Write a backbone that timm, Hugging Face or ONNX users load."""
    from ssl_locat.doctor.early import check_model
    from ssl_locat.runs.best import parse_step

    check_model(model)
    # None and "last" are not the same: of a file of weights no step can be asked for
    chosen = parse_step(step) if step is not None else None
    from ssl_locat.export.export import export

    target = export(
        model,
        out,
        format=format,
        which=which,
        step=chosen,
        average=average,
        with_head=with_head,
        with_code=with_code,
        push_to_hub=push_to_hub,
    )
    log.next_steps(
        f"""python -c "import ssl_locat.models, timm; timm.create_model('local-dir:{target}', pretrained=True)\"""",
        f"ssl-locat evaluate knn {target} data.train=DATA data.test=DATA",
    )


@app.command(
    epilog=examples(
        "ssl-locat features runs/mine path/to/images features/",
        "ssl-locat features runs/mine path/to/images features/ patches=false format=parquet max_bad=0.01",
    )
)
def features(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="run or export folder, checkpoint, timm:NAME, hf-hub:NAME")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="shards (brace, glob, URL) or a folder")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write")],
    overrides: Overrides = None,
) -> None:
    """Write class and patch tokens of images; keys as in eval/features.yaml."""
    from ssl_locat.doctor.early import check_data, check_model

    check_model(model)
    check_data(data)
    from ssl_locat.evaluation.evaluate import features

    features(model, data, out, overrides or [])


@app.command(
    epilog=examples(
        "ssl-locat report runs/mine",
        "ssl-locat report runs/a runs/b --out compare.html",
        "ssl-locat report runs/mine --watch",
        "ssl-locat report runs",
    )
)
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...")],
    out: Annotated[str | None, typer.Option(help="the page to write; default: RUN/report.html")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="serve it on loopback and refresh")] = False,
    port: Annotated[int, typer.Option(help="for --watch; 0: any free one")] = 0,
) -> None:
    """One self-contained HTML page about one run, or several compared; of a folder of runs a table of them."""
    from ssl_locat.doctor.early import check_runs

    check_runs(runs)
    from ssl_locat.report.command import report

    report(runs, out=out, watch=watch, port=port)


@app.command(epilog=examples("ssl-locat doctor", "ssl-locat doctor images.yaml", "ssl-locat doctor runs/mine"))
def doctor(
    target: Annotated[str | None, typer.Argument(metavar="[CONFIG|RUN]", help="default: this machine alone")] = None,
    overrides: Overrides = None,
    on: On = None,
) -> None:
    """Look at this machine, a config before it runs, or a run that went wrong, and say what to do."""
    from ssl_locat.doctor.doctor import doctor

    # its exit code is what it found: scripts ask it before they queue
    raise typer.Exit(doctor(target, overrides or [], on))


@app.command(epilog=examples("ssl-locat bench attention --quick", "ssl-locat bench all --json > here.json"))
def bench(
    what: Annotated[
        Literal["attention", "step", "crops", "stream", "start", "memory", "rehearsal", "reliability", "all"], typer.Argument()
    ] = "all",
    as_json: Json = False,
    compare: Annotated[Path | None, typer.Option(help="show beside the numbers of an earlier --json", metavar="FILE")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a short look: fewer cases and repeats")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="of rehearsal and reliability: data, runs and results; the same resumes [runs/WHAT]")
    ] = None,
    scale: Annotated[float, typer.Option(help="of the rehearsal: share of ImageNet's samples", min=0.001, max=1)] = 1.0,
    recipe: Annotated[str, typer.Option(help="that is rehearsed", metavar="CONFIG")] = "dino_locatvit_s16",
    gpu_images_per_second: Annotated[float | None, typer.Option(help="what one GPU trains; else no GPU time is told")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="of reliability, anew: PEER, PEER:CELL or :CELL", metavar="PEER:CELL")
    ] = None,
    install: Annotated[bool, typer.Option("--install", help="make the environments that peers need (reliability)")] = False,
) -> None:
    """Measure side by side on this machine, as ratios. `rehearsal`: a recipe's whole life at ImageNet's size, with a tiny network.

    `reliability`: what seven libraries make of kills, other sizes and damaged data."""
    room = folder or Path("runs") / what
    if what in ("rehearsal", "reliability"):
        if what == "rehearsal":
            from ssl_locat.benchmarks.rehearsal import rehearse

            found = rehearse(room, recipe, scale, gpu_images_per_second)
        else:
            from ssl_locat.benchmarks.reliability.scoreboard import scoreboard

            found = scoreboard(room, only or [], install, quick)
        if as_json:
            _print_json(found)
        return
    from ssl_locat.benchmarks.bench import run

    result = run(what, as_json=as_json, compare=compare, quick=quick)
    if as_json:
        _print_json(result)
    if result["failed"]:  # each was named when it failed
        raise typer.Exit(1)


@app.command(epilog=examples("ssl-locat jobs", "ssl-locat jobs logs runs/mine", "ssl-locat jobs stop 1234"))
def jobs(
    action: Annotated[Literal["list", "logs", "stop", "requeue"], typer.Argument()] = "list",
    names: Annotated[list[str] | None, typer.Argument(metavar="[JOB|RUN ...]")] = None,
) -> None:
    """Jobs on the cluster: list, logs, stop, requeue."""
    from ssl_locat.cluster.jobs import ACTIONS

    ACTIONS[action](names or [])


def _print_json(value: dict[str, Any]) -> None:
    if not int(os.environ.get("RANK", 0)):  # one object, however many processes
        print(to_json(value))
