"""What a command can say before torch is imported, which takes seconds: missing paths, unknown profiles, protocols, models, probes.

Only what is quick to know: nothing is read but names. The programs themselves check again, and more (pretraining/parts.py, evaluation/evaluate.py).
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ssl_locat.config.habits import in_our_words
from ssl_locat.config.models import check_exists, doubt
from ssl_locat.config.schema import Config, Options, Section
from ssl_locat.errors import ConfigError, DataError, UserError, did_you_mean
from ssl_locat.evaluation.probe_options import check_probes
from ssl_locat.text.shown import redact

log = logging.getLogger(__name__)

FEWEST = 8  # images to pretrain on: below it a batch has nothing to compare


def yaml_to_write(source: str, out: str | None = None) -> Path:
    """Where `init` writes the YAML for the images at `source`. UserError if it exists, or its folder cannot hold it."""
    target = Path(out or f"{name_of(source)}.yaml")
    if target.exists():
        raise UserError(f"{target} exists; give another file with --out, or remove it.")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise UserError(
            f"{target} cannot be written: its folder is missing or read-only. Give the path of a file with --out, or make the folder."
        )
    return target


def name_of(source: str) -> str:
    """A name for the YAML and the run: the last part of the path, without what files and shells do not like."""
    last = redact(source).rstrip("/").rpartition("/")[2]
    last = Path(source).resolve().name if last in ("", ".", "..") else last
    return re.sub(r"[^\w-]+", "_", last.partition(".")[0]).strip("_") or "images"


def check_config(config: Config, on: str | None = None) -> None:
    """UserError for what a run could not start with."""
    if on:
        from ssl_locat.cluster.launch import load_profile

        load_profile(on)
    check_probes(config)
    suspect(config.backbone.name)
    init = config.backbone.init
    if init and not init.startswith(("timm:", "hf-hub:")):
        check_exists(init)
    made = config.data.make.folder if config.data.make else None
    for name in ("train", "test"):
        check_data(getattr(config.data, name), made)


def check_model(model: str) -> None:
    """UserError if MODEL is a path and nothing is there; a word about a name that timm hardly knows."""
    check_exists(model)
    if model.startswith("timm:"):
        suspect(model.removeprefix("timm:").partition("?")[0])


def check_adaptation(model: str, images: str, overrides: Sequence[str], on: str | None) -> None:
    """UserError for a model, images, a key or a profile that is not there."""
    if on:
        from ssl_locat.cluster.launch import load_profile

        load_profile(on)
    check_model(model)
    check_data(images)
    check_enough(images)
    for override in overrides:
        check_key(override)
    check_data(
        [
            item.partition("=")[2]
            for item in overrides
            if item.startswith(("data.validation=", "data.test=")) and item[-5:] != "=null"
        ]
    )


def check_key(override: str) -> None:
    """ConfigError for a key=value whose key no section has; options of a part are checked with the rest."""
    name, _, value = override.partition("=")
    first, *more = name.split(".")
    section = Config.model_fields[first].annotation if first in Config.model_fields else None
    known, part = Config.model_fields, first
    # below `backbone` and `objective` any key may be one of the named part
    if more and isinstance(section, type) and issubclass(section, Section) and not issubclass(section, Options):
        known, part = section.model_fields, more[0]
    if part not in known:
        words = in_our_words(part, value) or did_you_mean(part, known)
        raise ConfigError(f"{override!r}: unknown key {name!r}.{words} Known here: {', '.join(known)}.")


def check_evaluation(protocol: str, model: str, overrides: Sequence[str], on: str | None) -> None:
    """UserError for a protocol, a key, a profile, a model or data that is not there."""
    from ssl_locat.evaluation.evaluate import divide, load_protocol

    may_come = False
    if on not in (None, "local"):
        # a job that runs first may yet write the model: then a path that is not there proves nothing
        from ssl_locat.cluster.launch import load_profile, waits_for_a_job

        may_come = waits_for_a_job(load_profile(on))
    _, options = load_protocol(protocol, divide(overrides)[1])
    if not may_come:
        check_model(model)
    data = options.get("data") or {}
    for name in ("train", "test"):
        check_data(data.get(name))


def check_comparison(arguments: Sequence[str]) -> None:
    """UserError for a key, a model or data of `compare` that is not there."""
    from ssl_locat.evaluation.compare import load_compare, seeds_of

    models, config = load_compare(arguments)
    for model in models:
        for seed in seeds_of(model):
            check_model(seed)
    for spec in (config.data.train, config.data.test, config.data.unlabelled):
        check_data(spec)


def suspect(name: str) -> None:
    """Say at once that a model's name looks wrong. timm is asked later and has the last word."""
    if odd := doubt(name):
        log.warning("%s timm itself is asked now, which takes some seconds.", odd)


def check_data(spec: object, made: str | None = None) -> None:
    """DataError if a local path is not there, a pattern meets nothing, or a folder may not be read. Stores are asked later.

    made: a folder that the run itself will fill.
    """
    parts = spec if isinstance(spec, list | tuple) else [spec]
    for part in parts:
        shards = getattr(part, "shards", part.get("shards") if isinstance(part, dict) else part)
        for source in shards if isinstance(shards, list | tuple) else [shards]:
            # what is no path at all (a number, null) is for the schema to name
            if isinstance(source, str | os.PathLike) and not (made and str(source).startswith(made)):
                _check_source(str(source))


def _check_source(source: str) -> None:
    if "://" in source and not source.startswith("file://"):
        return
    path = Path(source.removeprefix("file://")).expanduser()
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"{source}: this folder may not be read (permission denied). Mend it: chmod -R u+rX {source}")
        return
    if path.is_file() and ".tar" not in path.name and path.suffix.lower() not in (".parquet", ".zip"):
        raise DataError(f"{source} is a file. Expected a folder of images, tar shards, or a quoted pattern of them.")
    if path.exists():
        return
    if not any(letter in source for letter in "{*?["):
        folder = path.absolute().parent
        near = did_you_mean(path.name, os.listdir(folder)) if os.path.isdir(folder) else ""
        raise DataError(f"{source} does not exist.{near} Expected a folder of images, tar shards, or a quoted pattern of them.")
    from ssl_locat.data.shards.index import open_dataset
    from ssl_locat.data.stores.store import Store

    urls = list(Store().expand(source))  # DataError for a pattern that meets nothing
    # braces expand to names that may not exist; first and last tell of a wrong range without a stat of thousands
    if not all(os.path.exists(url) for url in (urls[0], urls[-1])):
        open_dataset(source)  # says what is missing, and what has nearly its name


def check_enough(source: str) -> None:
    """UserError for a local folder that holds fewer images than can be compared with each other. Stops counting as soon as there are enough."""
    if not os.path.isdir(source):
        return
    from ssl_locat.data.images.decode import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS

    count = 0
    for _, _, files in os.walk(source, followlinks=False):
        endings = [name.rpartition(".")[2].lower() for name in files if not name.startswith("._")]
        if {"tar", "parquet", "zip"} & set(endings):  # shards: how many samples are in them, only their index tells
            return
        # a name is enough here; what does not decode counts as damage later
        count += sum(ending in (*IMAGE_EXTENSIONS, *ARRAY_EXTENSIONS) for ending in endings)
        if count >= FEWEST:
            return
    for path, folders, _ in os.walk(source):
        if any(os.path.islink(os.path.join(path, name)) for name in folders):
            return  # links are followed where all is read
    if not count:
        raise DataError(f"{source} holds neither images ({', '.join(IMAGE_EXTENSIONS)}) nor .tar shards.")
    raise UserError(
        f"{source} holds {count} image{'s' * (count > 1)}. Pretraining compares images with each other: at least {FEWEST}, better "
        "thousands. With so few, take released weights as they are: ssl-locat features timm:NAME?pretrained ..."
    )


def check_runs(runs: list[str]) -> None:
    """UserError unless all are run folders, or one is a folder of runs or the results of a comparison."""
    from ssl_locat.runs.history import check_run, find_runs, is_run

    if len(runs) == 1 and os.path.isfile(os.path.join(runs[0], "compare.json")):
        return
    if len(runs) == 1 and os.path.isdir(runs[0]) and not is_run(runs[0]) and find_runs(runs[0]):
        return
    for run in runs:
        check_run(run)
