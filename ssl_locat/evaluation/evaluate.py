"""`ssl-locat evaluate PROTOCOL MODEL [key=value ...]`: load the protocol's YAML and a frozen backbone, evaluate it, print the metrics.

PROTOCOL is the name of a YAML in eval/, or the path of one; its `protocol:` key names the function in evaluation/ whose keyword
arguments the other keys are. Several processes (torchrun, Slurm) share the work and print one result.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ssl_locat.config.models import check_exists
from ssl_locat.config.signatures import keyword_names
from ssl_locat.config.yaml_files import LoadedYaml, dump_yaml, load_yaml
from ssl_locat.errors import ConfigError, UserError, did_you_mean
from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.evaluation.shared.options import annotations, check_arguments, describe
from ssl_locat.runs.best import parse_step
from ssl_locat.runs.durable import write_atomically
from ssl_locat.runs.log import console, say
from ssl_locat.text.shown import redacted, to_json

if TYPE_CHECKING:
    from torch import nn

DUMP = "ssl_locat.evaluation.protocols.dump:dump"  # `ssl-locat features`
CARD_START, CARD_END = "<!-- scores -->", "<!-- end of scores -->"


def load_protocol(name: str, overrides: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """(protocol, its keyword arguments), checked against the function's signature before torch is imported.

    Raises ConfigError for an unknown protocol or key, with the place and the nearest known one.
    """
    loaded = load_yaml(name, "eval", overrides)
    protocol = pop_protocol(loaded)
    check_arguments(PROTOCOLS[protocol], loaded.data, loaded)
    _check_data(protocol, loaded)
    return protocol, loaded.data


def pop_protocol(loaded: LoadedYaml) -> str:
    """The protocol that a YAML names, taken out of it: what remains are the protocol's options."""
    protocol = loaded.data.pop("protocol", None)
    if not isinstance(protocol, str) or protocol not in PROTOCOLS:
        raise ConfigError(
            f"{loaded.place(('protocol',))}: protocol is {protocol!r}; known: {', '.join(PROTOCOLS)}.{did_you_mean(protocol, PROTOCOLS)}"
        )
    return protocol


def _check_data(protocol: str, loaded: LoadedYaml) -> None:
    """Answer a forgotten data set at once, not after the model was loaded."""
    known = keyword_names(PROTOCOLS[protocol]) or []
    if "data" not in known:
        return
    data = loaded.data.get("data")
    if data is None:
        raise ConfigError(
            f"{loaded.place(('data',))}: {protocol} needs data. Give it on the command line: data.test=SHARDS_OR_FOLDER."
        )
    needed = ["train"] if loaded.data.get("folds") else ["train", "test"]
    missing = [name for name in needed if name in data and not data[name]]
    if missing:
        raise ConfigError(
            f"{loaded.name}: {protocol} needs {' and '.join('data.' + name for name in missing)}. Give them on the command line: "
            f"{' '.join(f'data.{name}=SHARDS_OR_FOLDER' for name in missing)}."
        )


def divide(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that choose a network of a run folder, and the protocol's."""
    own = [item for item in overrides if item.partition("=")[0] in ("which", "step")]
    for item in own:
        name, _, value = item.partition("=")
        if name == "step":
            parse_step(value)
        elif value not in ("teacher", "student"):
            raise ConfigError(f"{item!r}: expected which=teacher or which=student.")
    return own, [item for item in overrides if item not in own]


def check(
    protocol: str, model: str, overrides: Sequence[str] = (), model_may_come: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """All that can be found wrong before the model is loaded: keys, the model's path, the data sets.

    Returns the overrides that choose a network of a run folder, and the rest resolved, as a protocol's YAML that says the same.
    `model_may_come`: a job that runs before this one may yet write the model.
    """
    own, overrides = divide(overrides)
    name, options = load_protocol(protocol, overrides)
    check_inputs(model, name, options, model_may_come)
    return own, {"protocol": name, **options}


def check_inputs(model: str, protocol: str, options: dict[str, Any], model_may_come: bool = False) -> None:
    """UserError if the model or a data set is not there; data is opened as the protocol will open it, and not read."""
    if not model_may_come:
        check_exists(model)

    import timm

    from ssl_locat.evaluation.shared.samples import open_spec, open_store
    from ssl_locat.evaluation.shared.seg_datasets import open_scenes
    from ssl_locat.models.backbone import split_options

    if model.startswith("timm:"):
        name, _ = split_options(model.removeprefix("timm:"))
        if not timm.is_model(name):
            raise UserError(f"timm has no model {name!r}.{did_you_mean(name, timm.list_models())}")
    data = options.get("data") or {}
    for name in ("train", "test"):
        if data.get(name):
            given = {key: value for key, value in data.items() if value is not None}
            open_scenes(given, name) if protocol in ("segmentation", "hummingbird") else open_spec(data[name], open_store(given))


def dry_run(protocol: str, model: str, overrides: Sequence[str] = ()) -> None:
    """Check everything and print the resolved protocol, without running it."""
    say(dump_yaml(redacted(check(protocol, model, overrides)[1])).rstrip())


def describe_keys(protocol: str) -> str:
    """The keys of a protocol with what they take and their values in its YAML, a line each: the end of `evaluate PROTOCOL --help`."""
    loaded = load_yaml(protocol, "eval")
    target = DUMP if protocol == "features" else PROTOCOLS[pop_protocol(loaded)]
    kinds = annotations(target)
    lines = [f"Keys of {protocol} (KEY=VALUE; values of {loaded.name}):"]
    for name in keyword_names(target) or []:
        if name in ("backbone", "data", "out"):
            continue
        value = f"   {loaded.data[name]}" if loaded.data.get(name) is not None else ""
        lines.append(f"  {name:<22}{describe(kinds[name]) if name in kinds else 'anything'}{value}")
    if "data" in kinds and protocol != "features":
        inside = next((part for part in (kinds["data"], *get_args(kinds["data"])) if hasattr(part, "__annotations__")), None)
        lines += [f"  data.{name}" for name in inside.__annotations__] if inside else []
    return "\n".join(lines)


def function_of(protocol: str) -> Callable[..., dict[str, float]]:
    """The `evaluate(backbone, *, ...)` of a protocol."""
    module, _, name = PROTOCOLS[protocol].partition(":")
    return getattr(import_module(module), name)


def run(protocol: str, model: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate MODEL; {"protocol", "model", "data", "metrics", "seconds"} on every process.

    Keys beside the protocol's own: `which` (teacher or student) and `step` (a number, last, best-dense, best-global), of a run folder. If MODEL is an export folder, its model card
    gets a row.
    """
    own, overrides = divide(overrides)
    name, options = load_protocol(protocol, overrides)
    # `divide` made sure of both: step is a number or a name, which one of two words
    chosen: dict[str, Any] = dict(item.split("=", 1) for item in own)
    if "step" in chosen:
        chosen["step"] = parse_step(chosen["step"])

    import torch

    from ssl_locat.evaluation.shared.stopping import stoppable
    from ssl_locat.models.backbone import load_backbone
    from ssl_locat.runs.distributed import is_main, lost_ranks_named, setup, shutdown

    device = setup()
    torch.manual_seed(options.get("seed", 0))  # `timm:NAME` without weights is the same network each time, on every process
    kept = options | progress_option(name, options, progress_file(model, chosen, name, options))
    try:
        with lost_ranks_named(), stoppable():
            backbone = load_backbone(model, **chosen).to(device)
            result = run_protocol(backbone, name, kept, model)
        # a file that the user named stays: it is theirs
        if is_main() and not options.get("resume_file"):
            forget_progress(kept.get("resume_file"))
    finally:
        shutdown()
    if is_main() and Path(model, "config.json").is_file():
        add_to_card(Path(model), {**result, "name": Path(protocol).stem, "tokens": tokens_read(name, options)})
    return result


def fingerprint(model: str) -> str:
    """MODEL and what it holds now: a run that has trained further, or a replaced export, is evaluated anew."""
    path = Path(model.partition("?")[0])
    if not path.exists():
        return model
    # by name and time: reading gigabytes to hash them would take longer than many a cell of a table
    newest = [*sorted(path.glob("checkpoints/step_*"))[-1:], *path.glob("model.safetensors"), *([path] if path.is_file() else [])]
    marks = [f"{item.name} {int(item.stat().st_mtime)}" for item in newest]
    return " ".join([str(path.resolve()), model.partition("?")[2], *marks])


def progress_file(model: str, chosen: dict[str, Any], protocol: str, options: dict[str, Any]) -> Path:
    """Where the progress of this very command is kept until it has finished: in the user's state, which the nodes of a cluster share."""
    # the folder belongs to it: relative paths among the options mean other data elsewhere
    about = json.dumps([fingerprint(model), chosen, protocol, options, os.getcwd()], sort_keys=True, default=str)
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    name = f"{protocol}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"
    return state / "ssl_locat" / "progress" / name


def progress_option(protocol: str, options: dict[str, Any], file: Path) -> dict[str, Any]:
    """`resume_file` for the protocols that train, unless the user gave one: a training of days must not begin again."""
    takes = "resume_file" in (keyword_names(PROTOCOLS[protocol]) or [])
    return {"resume_file": str(file)} if takes and not options.get("resume_file") else {}


def forget_progress(file: str | None) -> None:
    """The training has finished: what it would resume from is of no more use."""
    if file:
        Path(file).unlink(missing_ok=True)


def run_protocol(backbone: "nn.Module", protocol: str, options: dict[str, Any], model: str) -> dict[str, Any]:
    """One protocol on a loaded backbone, as the dict that `run` returns."""
    began = time.monotonic()
    metrics = function_of(protocol)(backbone, **options)
    data = {name: value for name, value in (options.get("data") or {}).items() if value is not None}
    return {
        "protocol": protocol,
        "model": model,
        "data": data,
        # JSON has no NaN: null stands for it, and refuse_not_finite ends the command
        "metrics": {name: round(float(value), 6) if math.isfinite(value) else None for name, value in metrics.items()},
        "seconds": round(time.monotonic() - began, 2),
    }


def evaluate(model: "str | os.PathLike | nn.Module", protocol: str = "knn", **options: Any) -> dict[str, float]:
    """Evaluate a backbone from Python: `evaluate(backbone, "knn", data={"train": ..., "test": ...}, k=[20])` -> metrics.

    `model` is a timm-like module, or anything that `load_backbone` opens. Options are the protocol's YAML keys; what is not given comes from
    its shipped YAML.
    """
    from ssl_locat.models.backbone import load_backbone

    loaded = load_yaml(protocol, "eval")
    name = pop_protocol(loaded)
    # key by key: the shipped YAML has defaults inside `data`, too
    data = {**(loaded.data.get("data") or {}), **options.pop("data", {})}
    given = LoadedYaml(f"evaluate({protocol!r})", {**loaded.data, **options})
    if data:
        given.data["data"] = data
    check_arguments(PROTOCOLS[name], given.data, given)
    _check_data(name, given)
    backbone = load_backbone(model if isinstance(model, str) else Path(model)) if isinstance(model, str | os.PathLike) else model
    return function_of(name)(backbone, **given.data)


def refuse_not_finite(result: dict[str, Any]) -> None:
    """UserError for a result that holds no number somewhere: it is shown, with null in JSON, and ends with code 2."""
    lost = [name for name, value in result["metrics"].items() if value is None]
    if lost:
        raise UserError(
            f"{result['protocol']} of {result['model']}: {', '.join(lost)} not finite. Are the weights whole (a run that diverged has NaN in "
            "them), and does the data hold what the protocol counts?"
        )


def tokens_read(protocol: str, options: dict[str, Any]) -> str:
    """In words, which tokens a protocol's score was measured on."""
    # dense protocols read raw patches, as the paper does; global ones what the head saw (docs/architecture.md, Tokens)
    if protocol in ("segmentation", "hummingbird"):
        return "patches after norm and PRR" if options.get("norm") else "raw patches"
    return "class token after norm and PRR" if protocol in ("knn", "linear", "linear_sweep") else "whole network"


def show(result: dict[str, Any]) -> None:
    """The result as a small table for people, once."""
    if int(os.environ.get("RANK", 0)):
        return
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result["metrics"].items():
        if value is None:
            table.add_row(name, "not finite")
            continue
        table.add_row(name, f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.2f}")
    console().print(f"{result['protocol']} of {result['model']}  ({result['seconds']:.1f} s)", markup=False, soft_wrap=True)
    console().print(table)


def add_to_card(folder: Path, result: dict[str, Any]) -> None:
    """Write a result into an export: one entry of scores.json, one row of the table in README.md. The same protocol and data replace theirs."""
    path, card = folder / "scores.json", folder / "README.md"
    entry = redacted({name: result[name] for name in ("name", "protocol", "tokens", "data", "metrics")})
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    known = [old for old in known if (old["name"], old["data"]) != (entry["name"], entry["data"])] + [entry]
    write_atomically(path, to_json(known, indent=1) + "\n")
    rows = ["| protocol | read from | data | scores |", "|---|---|---|---|"]
    for item in known:
        data = "; ".join(f"{name}: {value}" for name, value in item["data"].items() if name in ("train", "test"))
        finite = [(name, value) for name, value in item["metrics"].items() if value is not None]
        shown = ", ".join(f"{name} {value:.2f}" for name, value in finite[:8])
        rows.append(f"| {item['name']} | {item['tokens']} | {data} | {shown} |")
    block = "\n".join([CARD_START, *rows, CARD_END])
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    # only what stands between our marks is replaced: the rest of the card may be the user's own
    if CARD_START in text and CARD_END in text:
        before, rest = text.split(CARD_START, 1)
        text = before + block + rest.split(CARD_END, 1)[1]
    else:
        text = text.rstrip() + f"\n\n## Scores\n\n{block}\n"
    write_atomically(card, text)


def features(model: str, data: str, out: str, overrides: Sequence[str] = ()) -> None:
    """`ssl-locat features MODEL DATA OUT`: class and patch tokens of every image, in shards; keys as in eval/features.yaml."""
    loaded = load_yaml("features", "eval", overrides)
    check_arguments(DUMP, loaded.data, loaded)
    for name in ("data", "out"):
        if name in loaded.data:
            raise ConfigError(
                f"{loaded.place((name,))}: {name} is given twice. Its place is before the keys: features MODEL DATA OUT."
            )

    check_exists(model)
    from ssl_locat.evaluation.protocols.dump import check_out, dump
    from ssl_locat.models.backbone import load_backbone
    from ssl_locat.runs.distributed import setup, shutdown

    # before the model is loaded, which may take minutes
    check_out(out)
    device = setup()
    try:
        dump(load_backbone(model).to(device), data=data, out=out, **loaded.data)
    finally:
        shutdown()
