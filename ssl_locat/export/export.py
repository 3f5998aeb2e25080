"""`ssl-locat export MODEL OUT`: a trained backbone as other people load it.

timm   model.safetensors + config.json in timm's hub format + README.md, the model card. `timm.create_model("local-dir:OUT", pretrained=True)`
       loads it, after `import ssl_locat.models` where the model carries LocAt; so does the Hugging Face hub (`hf-hub:NAME`).
onnx   model.onnx besides: images [B, 3, H, W] -> class_token [B, D] (after norm and PRR), patch_tokens [B, N, D] (last block, raw).
pt2    model.pt2 besides: the same, as a torch.export program that loads with torch alone.

What is written is opened again and compared with what was trained, before the folder appears.
"""

import logging
import os
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from safetensors.torch import save_file
from torch import nn

from ssl_locat.errors import UserError
from ssl_locat.export.hub import push
from ssl_locat.export.modeling import FILE
from ssl_locat.export.parity import TOLERANCE, compare, outputs_of_timm, shapes_of
from ssl_locat.export.program import write_program
from ssl_locat.export.timm_folder import obey_umask, write_timm
from ssl_locat.models.backbone import chosen_checkpoints, is_run_or_checkpoint, load_backbone, mean_weights
from ssl_locat.runs.best import read_best
from ssl_locat.runs.history import Run, is_run, open_run
from ssl_locat.runs.marker import read_marker, step_of
from ssl_locat.text.shown import redacted, shown, to_json

log = logging.getLogger(__name__)

FORMATS = ("timm", "onnx", "pt2")
# every file of an export, by this module, by timm and by `evaluate`
WRITTEN = {
    "README.md",
    "config.json",
    "model.safetensors",
    "head.safetensors",
    "scores.json",
    "model.onnx",
    "model.onnx.data",
    "model.pt2",
    FILE,
}


def export(
    model: str,
    out: str,
    *,
    format: str = "timm",
    which: str | None = None,
    step: int | str | None = None,
    average: int | None = None,
    with_head: bool = False,
    with_code: bool = False,
    push_to_hub: str | None = None,
    adapted: dict[str, Any] | None = None,
) -> Path:
    """Write MODEL's backbone into the folder `out`, whole or not at all; returns it.

    Args:
        format: timm, or onnx or pt2, which add their file to timm's.
        which, step: of a run: "teacher" (default) or "student", at a checkpoint: its step, "last" (default), "best-dense" or "best-global".
        average: the uniform mean of so many checkpoints up to that one: the last milestones, where the run keeps such.
        with_head: the projection head too, as head.safetensors; runs only.
        with_code: a modeling file too, with which transformers opens the folder where ssl_locat is not installed.
        push_to_hub: upload to this repository of the Hugging Face hub afterwards.
        adapted: what the guard of a run says (pretraining/guard.py), for the card; of a finished run it is read from its summary.

    Raises:
        UserError: MODEL is none, or OUT exists and is no earlier export.
        CheckpointError: what was written does not give the same features as what was trained.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; known: {', '.join(FORMATS)}.")
    target = Path(out)
    _check_target(target)
    backbone = load_backbone(model, which=which, step=step, average=average)
    run = open_run(model) if is_run(model) else None
    chosen = chosen_checkpoints(Path(model), step, average) if run else []
    # beside the target: within a disk a rename is one step
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_timm(backbone, partial, with_code)
        # compared at the sizes that the model serves, not at the one it was trained at alone
        sizes = shapes_of(backbone)
        differences = {"timm": compare(backbone, outputs_of_timm(partial), sizes, TOLERANCE["timm"])}
        if format != "timm":
            outputs, sizes = write_program(backbone, partial / f"model.{format}")
            differences[format] = compare(backbone, outputs, sizes, TOLERANCE[format])
        if with_head:
            _write_head(Path(model), which or "teacher", step, average, partial / "head.safetensors")
        card = model_card(backbone, target.name, run, which or "teacher", chosen, format, sizes, differences, with_code, adapted)
        (partial / "README.md").write_text(card, encoding="utf-8")
        obey_umask(partial)
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("Exported to %s; features differ by at most %.1e from what was trained.", target, max(differences.values()))
    if push_to_hub:
        push(target, push_to_hub)
    return target


def _check_target(target: Path) -> None:
    """UserError for what may not be replaced: anything but an export of ours without additions."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file. Give a folder that does not exist yet, or an export to replace.")
    found = {path.name for path in target.iterdir()} if target.exists() else set()
    card = target / "README.md"
    ours = card.is_file() and "Made with ssl_locat" in card.read_text(encoding="utf-8", errors="replace")
    if foreign := sorted(found - WRITTEN if ours else found):
        raise UserError(
            f"{target} holds what is no export of ours and would be lost: {', '.join(foreign[:5])}{', ...' if len(foreign) > 5 else ''}. "
            "Give a folder that does not exist yet, or an export to replace."
        )


def _replace(partial: Path, target: Path) -> None:
    """The new folder takes the old one's place; a kill between the two renames leaves the old one under a dotted name."""
    former = target.with_name(f".{target.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        os.replace(target, former)
    os.replace(partial, target)
    shutil.rmtree(former, ignore_errors=True)


def _write_head(model: Path, which: str, step: int | str | None, average: int | None, path: Path) -> None:
    if not is_run_or_checkpoint(model):
        raise UserError(f"--with-head needs a run folder or a checkpoint; {model} holds a backbone alone.")
    save_file(mean_weights(chosen_checkpoints(model, step, average), f"{which}.heads."), path)


# --- model card ----------------------------------------------------------------------------------------------------------


def _safe(value: object) -> object:
    """Of everything that the card says: it is made to be published, so no credentials."""
    return value if isinstance(value, int | float) else shown(redacted(value) if isinstance(value, dict | list) else value)


def model_card(
    backbone: nn.Module,
    name: str,
    run: Run | None,
    which: str,
    checkpoints: list[Path],
    format: str,
    sizes: list[tuple[int, int, int]],
    differences: dict[str, float],
    with_code: bool = False,
    adapted: dict[str, Any] | None = None,
) -> str:
    """README.md of the export: what it is, how to load it, data, recipe, scores, and how near it is to what was trained."""
    # Markdown: nothing to escape but line breaks, which would begin a paragraph of their own
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_safe)
    template = environment.from_string(files("ssl_locat").joinpath("export/model_card.md").read_text(encoding="utf-8"))
    is_locat = bool(getattr(backbone, "has_gaug", False) or getattr(backbone, "prr", None))
    kept, steps = read_best(run.path) if run else {}, [step_of(path) for path in checkpoints]
    adapted = adapted or (run.summary.get("guard") if run else None)
    exported = adapted and (adapted.get("exported") if not run else f"step {steps[0]}" if len(steps) == 1 else "an average")
    return template.render(
        name=name,
        architecture=backbone.pretrained_cfg.get("architecture", type(backbone).__name__),
        parameters=sum(parameter.numel() for parameter in backbone.parameters()) / 1e6,
        width=backbone.num_features,
        input_size=backbone.pretrained_cfg["input_size"],
        mean=backbone.pretrained_cfg["mean"],
        std=backbone.pretrained_cfg["std"],
        channels=backbone.pretrained_cfg.get("channels"),
        locat=is_locat,
        code=with_code,
        which=which,
        format=format,
        sizes=sizes,
        any_size=len({size[1:] for size in sizes}) > 1,
        differences=differences,
        run=run,
        steps=steps,
        seen=read_marker(checkpoints[-1])["meta"]["samples_seen"] if run else None,
        best=[f"{choice} ({best.measure} {best.value:.4g})" for choice, best in kept.items() if steps == [best.step]],
        scores=scores_at(run, steps) if run else {},
        knn=(run.summary.get("knn") or {}) if run and len(steps) == 1 else {},
        adapted=adapted,
        judged=bool(adapted and adapted.get("exported") in (exported, "last")),
        is_start=exported == "start",
        licence=(adapted or {}).get("licence"),
        config=to_json(run.config.get("optim", {})) if run else None,
    )


def scores_at(run: Run, steps: list[int]) -> dict[str, dict]:
    """Probe -> its last record up to the exported step, which the card names; of an average nothing was measured during training."""
    if len(steps) != 1:
        return {}
    # an earlier probe is said to be of its own step; a later one would flatter or shame another network
    found = {probe: [record for record in records if record["step"] <= steps[0]] for probe, records in run.probes.items()}
    return {probe: records[-1] for probe, records in found.items() if records}
