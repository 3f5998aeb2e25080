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
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import timm
import torch
from jinja2 import Environment, StrictUndefined
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssl_locat.errors import CheckpointError, UserError
from ssl_locat.export.hub import push
from ssl_locat.models.backbone import find_checkpoint, is_run_or_checkpoint, load_backbone
from ssl_locat.models.tokens import class_token, forward_tokens, refine
from ssl_locat.runs.checkpoint import read_weights
from ssl_locat.runs.history import Run, is_run, open_run
from ssl_locat.shown import redacted, shown, to_json

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
}
TOLERANCE = {"timm": 1e-6, "pt2": 1e-4, "onnx": 1e-4}  # greatest difference of features, relative to their largest value


class BothTokens(nn.Module):
    """images [B, 3, H, W] -> (class_token [B, D] as a head sees it, patch_tokens [B, N, D] as dense probes read them)."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raw = forward_tokens(self.backbone, images)
        return class_token(self.backbone, refine(self.backbone, raw)), raw.patches


def export(
    model: str,
    out: str,
    *,
    format: str = "timm",
    which: str | None = None,
    step: int | None = None,
    with_head: bool = False,
    push_to_hub: str | None = None,
) -> Path:
    """Write MODEL's backbone into the folder `out`, whole or not at all; returns it.

    Args:
        format: timm, or onnx or pt2, which add their file to timm's.
        which, step: of a run: "teacher" (default) or "student", at a checkpoint (newest by default).
        with_head: the projection head too, as head.safetensors; runs only.
        push_to_hub: upload to this repository of the Hugging Face hub afterwards.

    Raises:
        UserError: MODEL is none, or OUT exists and is no earlier export.
        CheckpointError: what was written does not give the same features as what was trained.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; known: {', '.join(FORMATS)}.")
    target = Path(out)
    _check_target(target)
    backbone = load_backbone(model, which=which, step=step)
    run = open_run(model) if is_run(model) else None
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_for_hf(backbone, partial, safe_serialization=True, data_config={"input_size": backbone.pretrained_cfg["input_size"]})
        differences = {"timm": compare(backbone, _timm_outputs(partial), _shapes(backbone), TOLERANCE["timm"])}
        sizes = _shapes(backbone)
        if format != "timm":
            outputs, sizes = write_program(backbone, partial / f"model.{format}")
            differences[format] = compare(backbone, outputs, sizes, TOLERANCE[format])
        if with_head:
            _write_head(Path(model), which or "teacher", step, partial / "head.safetensors")
        card = model_card(backbone, target.name, run, which or "teacher", step, format, sizes, differences)
        (partial / "README.md").write_text(card, encoding="utf-8")
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


def _write_head(model: Path, which: str, step: int | None, path: Path) -> None:
    if not is_run_or_checkpoint(model):
        raise UserError(f"--with-head needs a run folder or a checkpoint; {model} holds a backbone alone.")
    save_file(read_weights(find_checkpoint(model, step), f"{which}.heads."), path)


# --- parity ---------------------------------------------------------------------------------------------------------------


def _shapes(backbone: nn.Module) -> list[tuple[int, int, int]]:
    """(batch, height, width) to compare at: the size it was trained at, and two others where the model takes any."""
    _, height, width = backbone.pretrained_cfg["input_size"]
    patch = backbone.patch_embed.patch_size
    rows, cols = (patch, patch) if isinstance(patch, int) else patch
    if not getattr(backbone, "dynamic_img_size", False):
        return [(1, height, width), (3, height, width)]
    return [(1, height, width), (3, height + rows, width + 3 * cols), (2, max(rows, height // 2 // rows * rows), width)]


@torch.inference_mode()
def compare(backbone: nn.Module, outputs: Callable, shapes: list[tuple[int, int, int]], tolerance: float) -> float:
    """Greatest difference between the backbone's two outputs and `outputs(images)`, relative to their largest value.

    Raises CheckpointError above `tolerance`."""
    module = BothTokens(backbone.eval())
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, height, width in shapes:
        images = torch.randn(batch, backbone.pretrained_cfg["input_size"][0], height, width, generator=generator)
        for name, expected, given in zip(("class token", "patch tokens"), module(images), outputs(images), strict=True):
            difference = ((given - expected).abs().max() / expected.abs().max()).item()
            if not difference <= tolerance:
                raise CheckpointError(
                    f"the exported {name} at {batch} x {height} x {width} differs by {difference:.1e} from the trained model's "
                    f"(allowed: {tolerance:.0e}). Nothing was written. Please report this with the config."
                )
            worst = max(worst, difference)
    return worst


def _timm_outputs(folder: Path) -> Callable:
    return BothTokens(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())


# --- programs -------------------------------------------------------------------------------------------------------------


def write_program(backbone: nn.Module, path: Path) -> tuple[Callable, list[tuple[int, int, int]]]:
    """Write model.onnx or model.pt2; returns the written file as a function, and the sizes (batch, height, width) it was made for.

    Any batch size; any image size where the architecture's graph allows it, else the size it was trained at.
    """
    module, (channels, height, width) = BothTokens(backbone.eval()), backbone.pretrained_cfg["input_size"]
    shapes = _shapes(backbone)
    images = torch.zeros(2, channels, height, width)
    write = {".onnx": _write_onnx, ".pt2": _write_pt2}[path.suffix]
    if len({shape[1:] for shape in shapes}) > 1:
        try:
            outputs = write(module, images, {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, path)
            compare(backbone, outputs, shapes, TOLERANCE[path.suffix[1:]])
            return outputs, shapes
        except Exception as error:  # exporters raise whatever they like for a shape that they cannot keep open
            log.debug("%s with open image sizes failed: %s", path.suffix[1:], error)
            log.warning(
                "%s: this architecture exports at %d x %d only; other formats take any size.", path.suffix[1:], height, width
            )
    return write(module, images, {0: Dim.AUTO}, path), [(1, height, width), (3, height, width)]


class PlainOperations(TorchFunctionMode):
    """While exporting: what exporters translate wrongly, said in operations that they know.

    Fused attention has strides that the decomposition for ONNX gets wrong; repeat_interleave with a symbolic count does not repeat there.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        plain = {F.scaled_dot_product_attention: _plain_attention, torch.Tensor.repeat_interleave: _plain_repeat}
        return plain.get(function, function)(*args, **(kwargs or {}))


def _plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v


def _plain_repeat(x, repeats, dim):
    dim %= x.ndim
    return x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :]).flatten(dim, dim + 1)


def _program(module: nn.Module, images: Tensor, dynamic: dict) -> torch.export.ExportedProgram:
    with PlainOperations(), torch.no_grad():
        return torch.export.export(module, (images,), dynamic_shapes={"images": dynamic})


def _write_pt2(module: nn.Module, images: Tensor, dynamic: dict, path: Path) -> Callable:
    # decomposed, since the regions without autocast that GAug opens cannot be written with symbolic sizes
    torch.export.save(_program(module, images, dynamic).run_decompositions(), path)
    return torch.export.load(path).module()


def _write_onnx(module: nn.Module, images: Tensor, dynamic: dict, path: Path) -> Callable:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError:
        raise UserError("ONNX export needs onnx, onnxruntime and onnxscript: pip install 'ssl_locat[onnx]'.") from None
    names = ["class_token", "patch_tokens"]
    program = torch.onnx.export(_program(module, images, dynamic), input_names=["images"], output_names=names, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(array) for array in session.run(names, {"images": images.numpy()})]


# --- model card ----------------------------------------------------------------------------------------------------------


def _safe(value: object) -> object:
    """Of everything that the card says: it is made to be published, so no credentials."""
    return value if isinstance(value, int | float) else shown(redacted(value) if isinstance(value, dict | list) else value)


def model_card(
    backbone: nn.Module,
    name: str,
    run: Run | None,
    which: str,
    step: int | None,
    format: str,
    sizes: list[tuple[int, int, int]],
    differences: dict[str, float],
) -> str:
    """README.md of the export: what it is, how to load it, data, recipe, scores, and how near it is to what was trained."""
    # Markdown: nothing to escape but line breaks, which would begin a paragraph of their own
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_safe)
    template = environment.from_string(files("ssl_locat").joinpath("export/model_card.md").read_text(encoding="utf-8"))
    is_locat = bool(getattr(backbone, "has_gaug", False) or getattr(backbone, "prr", None))
    return template.render(
        name=name,
        architecture=backbone.pretrained_cfg.get("architecture", type(backbone).__name__),
        parameters=sum(parameter.numel() for parameter in backbone.parameters()) / 1e6,
        width=backbone.num_features,
        input_size=backbone.pretrained_cfg["input_size"],
        mean=backbone.pretrained_cfg["mean"],
        std=backbone.pretrained_cfg["std"],
        locat=is_locat,
        which=which,
        format=format,
        sizes=sizes,
        any_size=len({size[1:] for size in sizes}) > 1,
        differences=differences,
        run=run,
        step=step if step is not None else run and run.last["step"],
        scores={protocol: records[-1] for protocol, records in run.probes.items() if records} if run else {},
        knn=(run.summary.get("knn") or {}) if run else {},
        config=to_json(run.config.get("optim", {})) if run else None,
    )
