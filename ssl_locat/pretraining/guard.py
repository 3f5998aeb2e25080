"""The guard of `adapt`: a run that began with released weights hands those back, unless a checkpoint is better than them by more than the noise.

The start is evaluated as step 0 by the run's own probes (RUN/start holds it). At the end one checkpoint, the best of those that the probe
`held_out` measured, is compared with the start on the same labelled images: a paired interval, whose level is raised for the number of
checkpoints that were looked at (Bonferroni: 1 - 0.05 / m), since the best of m is the best by luck, too. It is better if the whole interval of
the mean figure lies above 0 (guard.margin), and no single figure's, at FALL_LEVEL, lies below. All of it follows from files of the run, so that a run which
was killed and resumed decides as one that was not.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_locat.config.schema import Config
from ssl_locat.config.yaml_files import load_yaml
from ssl_locat.errors import CheckpointError, UserError
from ssl_locat.evaluation.probe_options import judged
from ssl_locat.evaluation.shared.tallies import read_tallies
from ssl_locat.export.export import export
from ssl_locat.export.licences import OWN, Licence, licence_of
from ssl_locat.export.timm_folder import write_timm
from ssl_locat.intervals.paired import LEVEL, Difference, Tally, difference
from ssl_locat.models.backbone import is_foreign, is_run_or_checkpoint, load_backbone, split_options
from ssl_locat.models.foreign import read_json, read_known
from ssl_locat.pretraining.probes import tallies_of
from ssl_locat.runs.best import best_of, guard_measure, kept_measures
from ssl_locat.runs.distributed import barrier, broadcast_object, is_main
from ssl_locat.text.shown import redacted

log = logging.getLogger(__name__)

UNVERIFIED = "not verified by labels"
FALL_LEVEL = (
    0.8  # of one figure's interval when it falls: a loss is believed sooner than a gain, for the start is what the user had
)


# --- the start ------------------------------------------------------------------------------------------------------------


def start_folder(run_dir: str | Path) -> Path:
    """The start as an export folder: what MODEL was when the run began."""
    return Path(run_dir) / "start"


def source_of(init: str) -> str:
    """`backbone.init` as a MODEL: `timm:NAME` means its pretrained weights there."""
    plain = init.startswith("timm:") and "pretrained" not in init.partition("?")[2].split("&")
    return f"{init}{'&' if '?' in init else '?'}pretrained" if plain else init


def keep_start(config: Config) -> None:
    """Write RUN/start, if it is not there. All ranks call it. CheckpointError if what was written is not what was read."""
    folder = start_folder(config.run_dir)
    if is_main() and not (folder / "config.json").is_file():
        assert config.backbone.init is not None  # the schema asks for it
        backbone = load_backbone(source_of(config.backbone.init))
        # kept with the weights, wherever they go from here
        backbone.pretrained_cfg = {**backbone.pretrained_cfg, "license": licence_of_model(config.backbone.init, backbone).name}
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_timm(backbone, partial)
        written, given = load_backbone(partial).state_dict(), backbone.state_dict()
        if written.keys() != given.keys() or any(not torch.equal(written[name], given[name]) for name in given):
            raise CheckpointError(f"{config.backbone.init}: written to {folder} and read again, its weights are not the same.")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    barrier()


def load_start(config: Config, device: torch.device) -> nn.Module:
    """The start, whatever has become of MODEL since."""
    return load_backbone(start_folder(config.run_dir)).to(device)


# --- the judgement --------------------------------------------------------------------------------------------------------


def judge(config: Config, results: Mapping[str, Sequence[Mapping[str, Any]]], images: int) -> dict[str, Any]:
    """What summary.json says under `guard`; the same on all ranks. results: probe -> its records, that of the start as step 0;
    images: that were trained on.

    Keys: model, start, best (figures; step), difference (value, low, high, level, images, checkpoints), columns, verdict, verified_by, exported
    ("start", or "step N"; None if the run refuses), sentence, licence."""
    return broadcast_object(_judge(config, results, images) if is_main() else None)


def _judge(config: Config, results: Mapping[str, Sequence[Mapping[str, Any]]], images: int) -> dict[str, Any]:
    guard, measure = config.guard, guard_measure(config)
    assert guard is not None and config.backbone.init is not None
    found: dict[str, Any] = {
        "model": redacted(config.backbone.init),
        "licence": licence(config)._asdict(),
        **how_far(config, images),
    }
    if measure is None:
        return found | _unverified(config, results)
    records = list(results[measure.probe])
    best = best_of(records, measure)
    if best is None:
        raise UserError(f"the guard has nothing to judge: no figure of {measure} after the start.")
    first = next(record for record in records if record["step"] == 0)
    chosen = next(record for record in records if record["step"] == best.step)
    looked_at = sum(record["step"] > 0 for record in records)
    before, after = (_tallies(config, measure.probe, step) for step in (0, best.step))
    level = 1 - (1 - LEVEL) / looked_at
    names = list(before)
    # the same images and folds: paired, image by image
    overall = difference([before[n] for n in names], [after[n] for n in names], margin=guard.margin, level=level)
    columns = {name: difference([before[name]], [after[name]], level=FALL_LEVEL) for name in names}
    fallen = [name for name, one in columns.items() if one.verdict == "harmed"]
    better = overall.verdict == "helped" and not fallen
    exported = f"step {best.step}" if better else "start" if guard.otherwise == "start" else None
    found |= {
        "start": _figures(first),
        "best": {"step": best.step, **_figures(chosen)},
        "difference": _plain(overall, looked_at, level),
        "columns": {name: _plain(one, 1, FALL_LEVEL) for name, one in columns.items()},
        "verdict": "helped" if better else "harmed" if overall.verdict == "harmed" else "no difference that this data can show",
        "verified_by": verified_by(config, overall.images, names),
        "exported": exported,
        "steps": best.step if better else max(record["step"] for record in records),
    }
    return found | {"sentence": sentence(found, fallen, config.data.validation is None and config.data.test is not None)}


def _tallies(config: Config, probe: str, step: int) -> dict[str, Tally]:
    path = tallies_of(config.run_dir, probe, step)
    found = read_tallies(path)
    if found is None:
        raise UserError(
            f"{path} is missing or damaged, so the guard cannot compare step {step}. Take the line of step {step} out of "
            f"{path.parent}.jsonl, and start the same command again: it is measured anew."
        )
    return found


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in record.items() if name not in ("step", "test_images")}


def _plain(found: Difference, looked_at: int, level: float) -> dict[str, Any]:
    return {
        "value": round(found.value, 3),
        "low": round(found.low, 3),
        "high": round(found.high, 3),
        "level": round(level, 5),
        "images": found.images,
        "checkpoints": looked_at,
    }


def _unverified(config: Config, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Without labels nothing is called better: label-free measures follow a run, and are no proof (docs/label-free.md)."""
    assert config.guard is not None
    kept = kept_measures(config).get("dense")
    records = results[kept.probe] if kept else []
    best = best_of(records, kept) if kept else None
    figures: dict[str, Any] = {}
    if kept and best:
        first = next((kept.value(record) for record in records if record["step"] == 0), None)
        figures = {"start": {str(kept): first}, "best": {"step": best.step, str(kept): best.value}}
    if config.guard.unverified == "start":
        exported = "start" if config.guard.otherwise == "start" else None
    else:
        exported = f"step {best.step}" if best else "last"
    what = f"The exported backbone is the start, unchanged; the trained ones are checkpoints of {config.run_dir}. "
    if exported is None:
        what = "Nothing is exported, as guard.otherwise=refuse asks. "
    elif exported != "start":
        what = f"The exported backbone is the trained one ({exported}), as guard.unverified=trained asks. "
    words = (
        f"{UNVERIFIED[0].upper()}{UNVERIFIED[1:]}: without labelled images nobody can tell whether this is better than the start. {what}"
        "To know: data.validation=LABELLED_IMAGES"
        + ("." if exported != "start" else "; to take the trained one as it is: guard.unverified=trained.")
    )
    steps = best.step if best else max((record["step"] for of in results.values() for record in of), default=0)
    return {**figures, "steps": steps, "verdict": UNVERIFIED, "verified_by": None, "exported": exported, "sentence": words}


def sentence(found: Mapping[str, Any], fallen: Sequence[str], saw_test: bool) -> str:
    """What the terminal, the report and the card say."""
    gained, best, start = found["difference"], found["best"], found["start"]
    figures = ", ".join(f"{name} {start[name]:.1f} -> {best[name]:.1f}" for name in start if name != "score" or len(start) == 1)
    interval = f"{gained['value']:+.2f} points, {gained['low']:+.2f} to {gained['high']:+.2f}"
    looked = gained["checkpoints"]
    how = f"{figures}; {interval} at {100 * gained['level']:.4g} %, of {gained['images']:,} images" + (
        f" and for {looked} checkpoints looked at" if looked > 1 else ""
    )
    test = " The guard saw data.test: report figures of other images." if saw_test else ""
    if found["verdict"] == "helped":
        return f"Better than the start by more than the noise: step {best['step']} ({how}). It is exported.{test}"
    ends = "The start is exported, unchanged." if found["exported"] else "Nothing is exported, as guard.otherwise=refuse asks."
    if fallen:
        falls = ", ".join(
            f"{name} fell ({c['value']:+.2f}, {c['low']:+.2f} to {c['high']:+.2f} at {100 * c['level']:.4g} %)"
            for name, c in found["columns"].items()
            if name in fallen
        )
        return f"Not better than the start: {falls} (best: step {best['step']}, {how}). {ends}{test}"
    if found["verdict"] == "harmed":
        return f"Worse than the start, also at its best, step {best['step']} ({how}). {ends}{test}"
    return f"Nothing better than the start was found: no difference that this data can show (best: step {best['step']}, {how}). {ends}{test}"


def verified_by(config: Config, images: int, columns: Sequence[str]) -> str:
    data = config.data.model_dump(mode="json")
    set_ = judged(data)
    where = "data.held_out of data.train, not trained on" if set_["train"] else f"{redacted(set_['test'])}"
    kinds = {"knn": "k-NN", "linear": "linear", "miou": "Hummingbird"}
    return f"the labels of {images:,} images ({where}), each judged by the others': {', '.join(kinds[name] for name in columns)}"


def licence(config: Config) -> Licence:
    """Of the start's weights, as RUN/start notes it."""
    noted = read_json(start_folder(config.run_dir) / "config.json").get("pretrained_cfg") or {}
    return licence_of(config.backbone.init or "", config.backbone.name, noted.get("license") or "")


def licence_of_model(model: str, backbone: nn.Module) -> Licence:
    """Of MODEL, which was loaded as `backbone`: by what it notes itself, its name, or its layout."""
    path = split_options(model)[0]
    if is_run_or_checkpoint(path):
        run = Path(path) if Path(path, "config.yaml").is_file() else Path(path).parent.parent
        began = (load_yaml(str(run / "config.yaml")).data.get("backbone") or {}).get("init")
        noted = (read_json(start_folder(run) / "config.json").get("pretrained_cfg") or {}).get("license")
        return licence_of(began or "", noted=noted or ("" if began else OWN.name))
    local = not model.startswith(("timm:", "hf-hub:"))
    layout = read_known(Path(path))[0].layout.name if local and is_foreign(model) else ""
    architecture = backbone.pretrained_cfg.get("architecture") or ""
    return licence_of(model, f"{layout} {architecture}", backbone.pretrained_cfg.get("license") or "")


def how_far(config: Config, images: int) -> dict[str, Any]:
    """On what, and how far, the run went."""
    optim = config.optim
    return {
        "data": {"train": redacted(config.data.model_dump(mode="json")["train"]), "images": images},
        "batch": optim.global_batch_size,
        "lr": optim.lr * optim.global_batch_size / 256,
        "moved": moved(config),
    }


def moved(config: Config) -> str:
    """In words, what was trained."""
    moving = getattr(config.backbone, "trainable", "full")
    last = getattr(config.backbone, "last_blocks", None)
    return {
        "full": "all weights",
        "last": "the last block" if last == 1 else f"the last {last} blocks",
        "lora": "LoRA adapters, merged",
    }.get(moving, str(moving))


# --- the end --------------------------------------------------------------------------------------------------------------


def hand_back(config: Config, verdict: Mapping[str, Any]) -> None:
    """Write RUN/export with what the verdict says; nothing where the run refuses, or was not asked to export. Rank 0."""
    exported = verdict["exported"]
    if exported is None or not config.export:
        return
    target = str(Path(config.run_dir) / "export")
    if exported == "start":
        export(str(start_folder(config.run_dir)), target, adapted=dict(verdict))
    else:
        step = exported.removeprefix("step ")
        export(config.run_dir, target, step=int(step) if step.isdecimal() else step, adapted=dict(verdict))


def refuse(verdict: Mapping[str, Any]) -> None:
    """UserError (exit code 2) where the run was told to refuse what is not better."""
    if verdict["exported"] is None:
        raise UserError(verdict["sentence"])
