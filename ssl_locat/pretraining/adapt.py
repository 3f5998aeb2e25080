"""`ssl-locat adapt MODEL IMAGES`: choose a recipe for continuing MODEL on IMAGES, write it with its reasons, and check that it can run.

What trains is `pretrain` with that YAML: the same loop, run folder and resume. What makes it safe is the guard (guard.py).
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ssl_locat.config.schema import EITHER, Config, load
from ssl_locat.config.yaml_files import overridden
from ssl_locat.errors import UserError
from ssl_locat.pretraining.adapt_choices import Choices, Machine, choose, fit_length, to_yaml
from ssl_locat.pretraining.adapt_look import Images, Start, look_at_images, look_at_model
from ssl_locat.pretraining.precision_choice import low_precision
from ssl_locat.pretraining.step_times import expected_seconds
from ssl_locat.runs.distributed import is_main
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import progress
from ssl_locat.text.shown import carries_credentials, redact

log = logging.getLogger(__name__)

FILE = "adapt.yaml"


def name_of(text: str) -> str:
    """The last part of a path or a name, as a part of a folder's name."""
    last = (
        redact(text.partition("?")[0]).rstrip("/").rpartition("/")[2].partition(":")[2]
        or redact(text).partition("?")[0].rstrip("/").rpartition("/")[2]
    )
    return re.sub(r"[^\w-]+", "_", last.partition(".")[0]).strip("_") or "images"


def run_dir_of(model: str, images: str, overrides: Sequence[str]) -> str:
    told = overridden({}, overrides).get("run_dir")
    return str(told or f"runs/adapt_{name_of(model)}_{name_of(images)}")


def machine_of(on: str | None) -> Machine:
    """This one; with --on another, of which only its profile is known."""
    cores = os.cpu_count() or 1
    if on not in (None, "local"):
        return Machine(40.0, 8, f"where --on {on} leads a GPU of 40 GB is taken for granted, which")
    if torch.cuda.is_available():
        gb = torch.cuda.get_device_properties(0).total_memory / 1e9
        return Machine(gb, cores, f"this machine ({torch.cuda.get_device_name(0)}, {gb:.0f} GB)")
    return Machine(0.0, cores, "this machine, without a GPU,", low_precision(torch.device("cpu")) == "bf16")


@contextmanager
def recipe_for(model: str, images: str, overrides: Sequence[str], locat: bool, on: str | None, dry_run: bool) -> Iterator[Path]:
    """The YAML that runs: RUN/adapt.yaml. Written anew, or that of the first start; with `dry_run` it goes again.

    Raises UserError for a MODEL or IMAGES that cannot be used, and for a run folder of another adaptation."""
    run_dir = run_dir_of(model, images, overrides)
    kept = Path(run_dir).expanduser() / FILE
    if kept.is_file():
        require_same(kept, model, images, locat)
        log.info("%s was written at the first start, and is used as it is", kept)
        yield kept
        return
    with TemporaryDirectory() as folder:
        target = Path(folder) / FILE
        if is_main():
            write_atomically(
                target,
                compose(model, images, overrides, locat, on, run_dir, target),
                private=carries_credentials([model, images]),
            )
        if not dry_run:
            if is_main():
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(kept, target.read_text(encoding="utf-8"), private=carries_credentials([model, images]))
            _wait_for(kept)
            target = kept
        yield target


def _wait_for(path: Path) -> None:
    """Other ranks have not met yet: rank 0 looks at model and machine for seconds, and they need what it wrote."""
    import time

    until = time.monotonic() + 600
    while not path.is_file():
        if time.monotonic() > until:
            raise UserError(f"{path} was not written by rank 0 within ten minutes; its log says why.")
        time.sleep(0.5)


def require_same(path: Path, model: str, images: str, locat: bool) -> None:
    """UserError if the run folder holds another adaptation."""
    config = load(str(path))
    trains, has_locat = config.data.train, bool(config.backbone.options.get("gaug"))
    mine = {images, f"{images.rstrip('/')}/train", f"{images.rstrip('/')}/*train*.tar"}
    if config.backbone.init != model or trains not in mine:
        raise UserError(
            f"{path} is of {config.backbone.init} on {trains}. Give another run_dir=FOLDER, or run that one: ssl-locat pretrain {path}"
        )
    if locat and not has_locat:
        raise UserError(f"{path} began without --locat. Give another run_dir=FOLDER, or the same command without it.")


def compose(model: str, images: str, overrides: Sequence[str], locat: bool, on: str | None, run_dir: str, target: Path) -> str:
    """Look at model, images and machine; the YAML's text, whose length a CPU has measured. Leaves a draft in `target`."""
    given = overridden({}, overrides)
    told = given.get("data") or {}
    with progress("looking at the model and the images"):
        backbone, start = look_at_model(model)
        seen = look_at_images(images, backbone, told.get("validation"))
        check_sizes(model, start, seen)
    log.info("%s: licence %s; %s.", model, start.licence.name, start.licence.words)
    machine = machine_of(on)
    made = choose(model, seen, start, machine, given, locat, run_dir)
    if "probes.held_out" not in made.made:
        log.warning(
            "no labelled images to judge by: nothing will be called better, and the start is exported unless guard.unverified=trained. With some "
            "labels: data.validation=IMAGES (class folders, or shards with .cls)."
        )
    if locat and start.has_gaug:
        log.info("--locat: %s carries LocAt already", model)
    target.write_text(written(made, model, start, seen, overrides), encoding="utf-8")
    if not machine.gpu_gb and not any(made.told(key) for key in ("optim.epochs", "optim.total_steps")):
        config: Config = load(str(target))
        with progress("trying a few steps"):
            seconds, steps = expected_seconds(config)
        fit_length(made, steps * config.optim.global_batch_size, seconds)
    return written(made, model, start, seen, overrides)


def check_sizes(model: str, start: Start, seen: Images) -> None:
    if seen.side < 2 * start.patch:
        raise UserError(
            f"the images have {seen.side} px on the shorter side, {model} has patches of {start.patch} px: fewer than two a side leave nothing to "
            "compare. Give larger images, or a model with smaller patches."
        )


def written(made: Choices, model: str, start: Start, seen: Images, overrides: Sequence[str]) -> str:
    values: dict[str, Any] = {}
    for key, (value, _) in made.made.items():
        *parents, last = key.split(".")
        place = values
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    values = overridden(values, overrides)
    for pair in EITHER:  # epochs in place of total_steps
        section = values.get(pair[0], {})
        if pair[1] == "epochs" and section.get("epochs") is not None:
            section.pop("total_steps", None)
    head = [
        f"Written by `ssl-locat adapt` for {redact(model)} on {seen.count:,} images in {redact(seen.train)}.",
        f"Licence of the weights it starts from: {start.licence.name}; {start.licence.words}.",
        "Each value has its reason beside it; those that are not here are the base's (configs/adapt/default.yaml).",
        "Again, or with changes: ssl-locat pretrain THIS_FILE [key=value ...]      Read by: ssl_locat/pretraining/loop.py",
    ]
    return to_yaml(made, head, values)
