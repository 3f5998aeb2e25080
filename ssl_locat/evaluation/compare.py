"""`ssl-locat compare MODEL [MODEL ...] data.train=... data.test=...`: did it help?

Raw pixels, an untrained network of the first MODEL's shape, and each MODEL, by the same heads on the same labels; then each MODEL against the
first (a single one against the untrained network), with an interval, and in words. Test images that training has seen are looked for before
any number. Each finished row is a file below `results`, so that the same command goes on where it stopped. A MODEL with braces is several seeds
of one recipe, which is then what is judged.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from braceexpand import braceexpand
from pydantic import Field

from ssl_locat.config.data_section import Cache, DataSpec
from ssl_locat.config.schema import Section, parse
from ssl_locat.config.yaml_files import dump_yaml, load_yaml
from ssl_locat.errors import ConfigError, UserError
from ssl_locat.evaluation.evaluate import check_inputs, fingerprint
from ssl_locat.evaluation.shared.tallies import read_tallies, write_tallies
from ssl_locat.intervals.paired import Difference, Tally, difference, interval
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import say
from ssl_locat.text.shown import redacted, to_json

if TYPE_CHECKING:
    import torch

    from ssl_locat.evaluation.compare_rows import Column, FeatureSets

log = logging.getLogger(__name__)

PIXELS, UNTRAINED = "raw pixels", "untrained"
MEASURED_AS = 2  # 2: least squares with exact leave-one-out. Rows kept from before are measured anew
DENSE = ("hummingbird",)


class ComparedData(Section):
    """Labelled sets, and what was trained on without labels."""

    train: DataSpec | None = None
    test: DataSpec | None = None
    unlabelled: DataSpec | None = Field(default=None, description="images that a MODEL was trained on, for the leak check")
    train_images: int | None = Field(default=None, gt=0, description="how many of train, chosen by their keys; null: all")
    test_images: int | None = Field(default=None, gt=0, description="likewise of test")
    num_classes: int | None = Field(default=None, gt=0)
    layout: str | None = Field(default=None, description="of masks (seg_datasets.py), as the five keys below")
    train_split: str | None = None
    test_split: str | None = None
    ignore_index: int | None = None
    reduce_zero_label: bool | None = None
    mask_key: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    max_bad: float | None = Field(default=None, ge=0, le=1)
    retry_minutes: float | None = Field(default=None, gt=0)
    cache: Cache | None = None


class CompareConfig(Section):
    data: ComparedData = ComparedData()
    protocols: list[Literal["knn", "linear", "hummingbird"]] = Field(
        min_length=1, description="knn and linear, of labels; or hummingbird, of masks"
    )
    fractions: list[float] = Field(min_length=1, description="shares of the labels, above 0 and at most 1")
    draws: int = Field(ge=1, description="of labels, at each share below 1")
    k: int = Field(ge=1, description="neighbours that vote")
    temperature: float = Field(gt=0, description="of the vote's weights exp(cosine / T)")
    margin: float = Field(ge=0, description="points that are no gain to speak of")
    leaks: bool = Field(description="look for test images among the others first")
    image_size: int | None = Field(gt=0, description="pixels; the backbone's own")
    resize_size: int | None = Field(gt=0, description="pixels of the shorter side before the centre crop")
    batch_size: int = Field(ge=1)
    workers: int | None = Field(ge=0, description="loader processes; chosen from the cores")
    precision: Literal["bf16", "fp32"] | None = Field(description="of the features; bf16 on a GPU, fp32 on a CPU")
    seed: int
    results: str = Field(description="folder of the finished rows, compare.json, the table and the pictures")


def load_compare(arguments: Sequence[str]) -> tuple[list[str], CompareConfig]:
    """(MODELs, the config) of a command line: what is key=value changes eval/compare.yaml, the rest are models."""
    # `timm:NAME?key=value` and paths have letters that no key has
    keys = [item for item in arguments if "=" in item and re.fullmatch(r"[a-z_.]+", item.partition("=")[0])]
    models = list(dict.fromkeys(item for item in arguments if item not in keys))
    loaded = load_yaml("compare", "eval", keys)
    config = parse(CompareConfig, loaded)
    if not models:
        raise UserError(
            "compare needs a MODEL: a run or export folder, a checkpoint, timm:NAME, hf-hub:NAME. The first is what others are compared with."
        )
    missing = [f"data.{name}" for name in ("train", "test") if not getattr(config.data, name)]
    if missing:
        raise ConfigError(f"compare needs {' and '.join(missing)}. Give them on the command line: {missing[0]}=SHARDS_OR_FOLDER.")
    if wrong := [share for share in config.fractions if not 0 < share <= 1]:
        raise ConfigError(
            f"{loaded.place(('fractions',))}: fractions has {wrong[0]}; expected shares above 0, at most 1, such as 0.01."
        )
    if len({protocol in DENSE for protocol in config.protocols}) > 1:
        raise ConfigError(
            f"{loaded.place(('protocols',))}: protocols is {config.protocols}: hummingbird reads masks, knn and linear labels. Compare twice."
        )
    return models, config


def check(arguments: Sequence[str]) -> tuple[list[str], CompareConfig]:
    """All that can be found wrong before a model is loaded."""
    models, config = load_compare(arguments)
    data = config.data.model_dump(mode="json", exclude_none=True)
    for training in [seed for model in models for seed in seeds_of(model)]:
        check_inputs(training, config.protocols[0], {"data": _of_protocol(data, config)})
    if config.data.unlabelled:
        from ssl_locat.evaluation.shared.samples import open_spec, open_store

        open_spec(data["unlabelled"], open_store(data))
    return models, config


def _of_protocol(data: dict[str, Any], config: CompareConfig) -> dict[str, Any]:
    """What the protocols' readers take: they refuse keys that they do not know."""
    masks = ("layout", "train_split", "test_split", "ignore_index", "reduce_zero_label", "mask_key")
    other = ("label_key",) if config.protocols[0] in DENSE else masks
    return {key: value for key, value in data.items() if key not in ("unlabelled", *other)}


def dry_run(arguments: Sequence[str]) -> None:
    """Check everything and say which rows are at hand."""
    models, config = check(arguments)
    for name, _ in rows_of(models, config):
        state = "done" if read_tallies(row_file(config, name, seeds_of(models[0])[0])) is not None else "to do"
        say(f"{state:<6} {name}")
    say(dump_yaml(redacted(config.model_dump(mode="json"))).rstrip())


def seeds_of(model: str) -> list[str]:
    """The trainings that a MODEL stands for: `runs/adapted-{0,1,2}` for three seeds of one recipe."""
    return list(braceexpand(model)) if "{" in model else [model]


def rows_of(models: Sequence[str], config: CompareConfig) -> list[tuple[str, str | None]]:
    """(name, MODEL or None) of every row; raw pixels have no patches to retrieve."""
    pixels = [] if config.protocols[0] in DENSE else [(PIXELS, None)]
    return [*pixels, (UNTRAINED, None), *((seed, seed) for model in models for seed in seeds_of(model))]


def row_file(config: CompareConfig, name: str, first: str) -> Path:
    """Where a row's tallies are kept: named by all that they depend on."""
    settings = config.model_dump(mode="json", exclude={"results", "leaks", "margin", "workers", "batch_size"})
    # pixels are those of the channels that the first MODEL reads
    model = fingerprint(name) if name not in (PIXELS, UNTRAINED) else f"{name} {fingerprint(first)}"
    about = json.dumps([model, settings, MEASURED_AS], sort_keys=True)
    return Path(config.results) / "rows" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.npz"


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure the rows that are missing and compare; what `--json` prints, on every process. Files are written to `results`."""
    began = time.monotonic()
    models, config = check(arguments)
    from ssl_locat.evaluation.shared.stopping import stoppable
    from ssl_locat.runs.distributed import is_main, lost_ranks_named, setup, shutdown

    device = setup()
    try:
        with lost_ranks_named(), stoppable():
            leaks, rows = _measure(models, config, device)
    finally:
        shutdown()
    result = {
        **judged(models, rows, config, leaks),
        "data": redacted(config.data.model_dump(mode="json", exclude_none=True)),
        "seconds": round(time.monotonic() - began, 1),
    }
    if is_main():
        from ssl_locat.evaluation.compare_text import draw, to_markdown

        folder = Path(config.results)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "compare.json", to_json(result, indent=1) + "\n")
        write_atomically(folder / "compare.md", to_markdown(result))
        draw(result, folder / "compare.png")
    return result


def _measure(models: list[str], config: CompareConfig, device: "torch.device") -> tuple[dict | None, dict[str, dict[str, Tally]]]:
    """(leaks or None, row -> column -> tally)."""
    import torch

    from ssl_locat.evaluation.compare_rows import Column, read_tables
    from ssl_locat.evaluation.shared.image_views import channels_of
    from ssl_locat.models.backbone import load_backbone
    from ssl_locat.runs.distributed import barrier, broadcast_object, is_main

    columns = [Column(protocol, share) for protocol in config.protocols for share in config.fractions]
    data = config.data.model_dump(mode="json", exclude_none=True)
    known = _of_protocol(data, config)
    settings = {
        "image_size": config.image_size,
        "resize_size": config.resize_size,
        "batch_size": config.batch_size,
        "workers": config.workers,
    }
    dense = config.protocols[0] in DENSE
    tables: FeatureSets | None = None
    first = seeds_of(models[0])[0]
    leaks = _leaks_kept(config, first) if config.leaks and is_main() else None
    leaks = broadcast_object(leaks)
    if config.leaks and leaks is None:
        torch.manual_seed(config.seed)  # the same network as in its row, if it is an untrained `timm:NAME`
        backbone = load_backbone(first)
        if not dense:
            tables = read_tables(backbone.to(device), known, settings, config.precision)
        if is_main():
            from ssl_locat.evaluation.compare_leaks import find_leaks

            picture = Path(config.results) / "leaks.png"
            channels = channels_of(backbone)
            leaks = find_leaks(known, data.get("unlabelled"), tables, config.workers, picture, channels=channels, dense=dense)
            write_atomically(_leaks_file(config, first), to_json(leaks) + "\n")
        leaks = broadcast_object(leaks)
    if leaks and is_main():
        _warn_of(leaks)
    found = {}
    for name, _ in rows_of(models, config):
        path = row_file(config, name, first)
        kept = broadcast_object(read_tallies(path) is not None if is_main() else None)
        if not kept:
            tallies = _row(name, first, config, columns, known, settings, tables if name == first else None, device)
            if is_main():
                write_tallies(path, tallies)
            barrier()
        row = read_tallies(path)
        assert row is not None, f"{path} was written a moment ago"
        found[name] = row
    return leaks, found


def _row(
    name: str, first: str, config: CompareConfig, columns: "Sequence[Column]", data: dict[str, Any], settings: dict[str, Any],
    tables: "FeatureSets | None", device: "torch.device",
) -> dict[str, Tally]:  # fmt: skip
    import torch

    from ssl_locat.evaluation import compare_rows
    from ssl_locat.models.backbone import load_backbone

    torch.manual_seed(config.seed)  # `timm:NAME` without weights is the same network each time, on every process
    if tables is None:
        backbone = load_backbone(first if name in (UNTRAINED, PIXELS) else name)
        backbone = (compare_rows.untrained(backbone, config.seed) if name == UNTRAINED else backbone).to(device)
        if config.protocols[0] in DENSE:
            return compare_rows.dense_tallies(backbone, data, columns, settings, draws=config.draws, seed=config.seed)
        if name == PIXELS:
            tables = compare_rows.read_pixels(backbone, data, config.workers)
        else:
            tables = compare_rows.read_tables(backbone, data, settings, config.precision)
    return compare_rows.global_tallies(
        tables, columns, k=config.k, temperature=config.temperature, draws=config.draws, seed=config.seed, device=device,
        num_classes=config.data.num_classes,
    )  # fmt: skip


def _leaks_file(config: CompareConfig, first: str) -> Path:
    about = json.dumps([fingerprint(first), config.data.model_dump(mode="json")], sort_keys=True)
    folder = Path(config.results) / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"leaks-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def _leaks_kept(config: CompareConfig, first: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(_leaks_file(config, first).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _warn_of(leaks: Mapping[str, Any]) -> None:
    for name, found in leaks.items():
        if found["images"]:
            log.warning(
                "%d test images are the same picture as one of data.%s: their answers may be remembered. They are drawn in leaks.png.",
                found["images"],
                name,
            )


def judged(
    models: Sequence[str], rows: Mapping[str, Mapping[str, Tally]], config: CompareConfig, leaks: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Figures with intervals, differences, and the sentence that is said of each MODEL."""
    first = models[0] if len(models) > 1 else UNTRAINED
    kinds = {**{name: [name] for name in rows if name in (PIXELS, UNTRAINED)}, **{name: seeds_of(name) for name in models}}
    together = {name: _together([rows[seed] for seed in seeds]) for name, seeds in kinds.items()}
    columns = list(together[models[0]])
    leaked = sorted({pair["test"] for found in (leaks or {}).values() for pair in found["pairs"]})
    differences = {}
    for name in models[1:] or models:
        ours, theirs = together[name], together[first]
        settings: dict[str, Any] = {"seeds": (len(kinds[first]), len(kinds[name])), "margin": config.margin, "seed": config.seed}
        whole = difference([theirs[c] for c in columns], [ours[c] for c in columns], **settings)
        each = {c: difference([theirs[c]], [ours[c]], **settings) for c in columns}
        differences[name] = {
            "all": _plain(whole),
            "columns": {c: _plain(one) for c, one in each.items()},
            "fallen": fallen(each),
            "sentence": sentence(name, first, whole, each),
        }
        # with images left out as damaged, numbers in the set are not rows of the tallies
        if 0 < len(leaked) < whole.images - 1 and not config.data.max_bad:
            kept = np.setdiff1d(np.arange(whole.images), leaked)
            pairs = [[_some(row[c], kept) for c in columns] for row in (theirs, ours)]
            differences[name]["without_leaks"] = _plain(difference(*pairs, **settings))
    figures = {
        name: {
            c: [round(value, 4) for value in interval(tally, seeds=len(kinds[name]), seed=config.seed)]
            for c, tally in row.items()
        }
        for name, row in together.items()
    }
    return {
        "models": list(models),
        "compared_with": first,
        "protocols": list(config.protocols),
        "fractions": list(config.fractions),
        "draws": config.draws,
        "rows": figures,
        "differences": differences,
        "leaks": leaks,
    }


def _together(rows: Sequence[Mapping[str, Tally]]) -> dict[str, Tally]:
    """Of several seeds: their draws behind each other, column by column."""
    found = {}
    for name, tally in rows[0].items():
        hits = np.concatenate([row[name].hits for row in rows])
        found[name] = (
            Tally.of_hits(hits[..., 0]) if tally.is_accuracy else Tally(hits, np.concatenate([row[name].of for row in rows]))
        )
    return found


def _some(tally: Tally, kept: np.ndarray) -> Tally:
    return Tally.of_hits(tally.hits[:, kept, 0]) if tally.is_accuracy else Tally(tally.hits[:, kept], tally.of[:, kept])


def _plain(found: Difference) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found._asdict().items()}


def fallen(columns: Mapping[str, Difference]) -> list[str]:
    """Columns that fell beyond their own noise: a mean that rose must not hide them."""
    return [name for name, found in columns.items() if found.verdict == "harmed"]


def sentence(name: str, first: str, found: Difference, columns: Mapping[str, Difference]) -> str:
    """What may be said, what it does not hold for, and what would decide it."""
    size = f"{found.value:+.2f} points ({found.low:+.2f} to {found.high:+.2f}, 95 %)"
    over = f" on average over {len(columns)} columns" if len(columns) > 1 else ""
    over += f" and {found.seeds} seeds" if found.seeds > 1 else ""
    draws = f" and {found.draws} draws of labels" if found.draws > 1 else ""
    worse = fallen(columns) if len(columns) > 1 else []
    # "helped" alone would promise a gain to whoever uses the column that fell
    verdict = "helped on average, not everywhere" if worse and found.verdict == "helped" else found.verdict
    what = f"{name} against {first}: {verdict}, {size}{over}, by {found.images:,} test images{draws}."
    if worse:
        fell = ", ".join(f"{c} {columns[c].value:+.2f} ({columns[c].low:+.2f} to {columns[c].high:+.2f})" for c in worse)
        what = f"{what} Fell beyond the noise: {fell}."
    if found.verdict in ("helped", "harmed"):
        return what
    if found.images_to_decide:
        return f"{what} If it is as large as measured, about {found.images_to_decide:,} test images would decide it."
    more = f" More draws of labels (now {found.draws}) may." if found.draws > 1 and abs(found.value) > 0.05 else ""
    return f"{what} More test images alone would not decide it.{more}"


def show(result: Mapping[str, Any]) -> None:
    """The table for people, then the sentences."""
    from ssl_locat.evaluation.compare_text import to_markdown
    from ssl_locat.runs.log import console

    console().print(to_markdown(result), markup=False, soft_wrap=True)
