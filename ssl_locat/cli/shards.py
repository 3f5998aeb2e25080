"""`ssl-locat shards ...`: what is done to shards before a run. Dispatch only, as in commands.py."""

from typing import Annotated

import typer

from ssl_locat.cli.options import Json, examples

shards = typer.Typer(
    help="WebDataset shards: pack folders, build indexes, look for damage.", no_args_is_help=True, rich_markup_mode=None
)


@shards.command(
    "pack",
    epilog=examples("ssl-locat shards pack path/to/images shards/", "ssl-locat shards pack photos shards/ resize=256 workers=8"),
)
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
    """Pack images into WebDataset shards. Interrupted, the same command resumes."""
    from ssl_locat.data.shards.pack import pack_command

    pack_command(source, out, options or [])


@shards.command("index", epilog=examples("ssl-locat shards index 'shards/*.tar'"))
def shards_index(data: Annotated[list[str], typer.Argument(metavar="DATA...")]) -> None:
    """Write the index beside the shards, so that opening them takes no scan."""
    from ssl_locat.data.shards.index import write_index

    write_index(data if len(data) > 1 else data[0])


@shards.command("check", epilog=examples("ssl-locat shards check 'shards/*.tar'", "ssl-locat shards check path/to/images"))
def shards_check(data: Annotated[list[str], typer.Argument(metavar="DATA...")], as_json: Json = False) -> None:
    """Read everything once and report damage by shard and key; exit 3 if there is any."""
    from ssl_locat.data.shards.check import check_command

    # of typer, as it carries an exit code and is no error
    raise typer.Exit(check_command(data if len(data) > 1 else data[0], as_json))


@shards.command(
    "dedup",
    epilog=examples(
        "ssl-locat shards dedup 'shards/*.tar'",
        "ssl-locat shards dedup 'shards/*.tar' --against 'test/*.tar' --leave-out",
    ),
)
def shards_dedup(
    data: Annotated[list[str], typer.Argument(metavar="DATA...")],
    against: Annotated[
        str | None, typer.Option(help="another set, such as a test set, whose images should not be in DATA")
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="write shards.left_out beside the shards, which training obeys")
    ] = False,
    as_json: Json = False,
) -> None:
    """List images that are there twice: recompressed, resized, mirrored, grey or cropped by a tenth."""
    from ssl_locat.doctor.early import check_data

    check_data(data)
    if against:
        check_data(against)
    from ssl_locat.data.stream.dedup import dedup_command

    dedup_command(data if len(data) > 1 else data[0], against, leave_out, as_json)


@shards.command(
    "stats",
    epilog=examples(
        "ssl-locat shards stats path/to/images",
        "ssl-locat shards stats 'shards/*.tar' no_data=0 images=10000 base=mine.yaml --out mine_16bit.yaml",
    ),
)
def shards_stats(
    data: Annotated[str, typer.Argument(metavar="DATA", help="shards (brace, glob, URL) or a folder")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value ...]",
            help="as in data.channels: pick=[3,2,1], no_data=0, bands_first=true, window=file; image_key=tif, max_pixels=100_000_000, "
            "images=10000 (so many, spread over the set), base=CONFIG (of the YAML that is written)",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="write a YAML with what was measured", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Measure mean, deviation, percentiles and no data of each channel in one pass."""
    from ssl_locat.data.shards.stats import stats_command

    stats_command(data, options or [], out, as_json)


@shards.command("show", epilog=examples("ssl-locat shards show 'shards/*.tar'"))
def shards_show(data: Annotated[list[str], typer.Argument(metavar="DATA...")], as_json: Json = False) -> None:
    """Print counts, sizes and the first samples."""
    from ssl_locat.data.shards.check import show_command

    show_command(data if len(data) > 1 else data[0], as_json)
