"""Foreign weights: reading them without unpickling, fitting them into a backbone whose names are timm's.

Whose layout a file has is told by layouts.py. Tensors may lie under `teacher`, `model`, ... and have `module.`, `backbone.`, `_orig_mod.` in
front of their names.
"""

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from ssl_locat.errors import CheckpointError
from ssl_locat.models.attach import set_initial_grid
from ssl_locat.models.families import FAMILIES, timms_filter
from ssl_locat.models.jumbo import drop_copies_of_the_shared_mlp
from ssl_locat.models.layouts import Known, Weights
from ssl_locat.models.positions import (
    embed_special_tokens,
    own_grid,
    own_windows,
    resize_positions,
    size_unknown,
)

log = logging.getLogger(__name__)

TORCH_STARTS = (b"PK", b"\x80")  # a zip archive; older, a bare pickle
NESTED = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model", "student")  # first one found holds the weights
PREFIXES = ("module.", "backbone.", "teacher.", "student.")
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch puts these anywhere into a name
HEADS = ("head.", "head_dist.", "dino_head.", "ibot_head.", "last_layer.", "mlp.")  # what hangs behind a backbone
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # where transformers, timm and open_clip put weights


def read_file(path: Path) -> Weights:
    """Tensors of a .safetensors file (or the index of several) or of a torch file (.pth, .pt, .bin), out of nesting and prefixes.

    Torch files are read with weights_only. Of Python's classes, argparse.Namespace alone is let in, whose values obey the same rule: the
    checkpoints of DINO, iBOT and MAE hold their `args` in one. CheckpointError for a file that needs more, is damaged or holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            return unpack(load_file(path), path)
        if path.name.endswith(".index.json"):
            parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            return unpack({name: t for part in parts for name, t in load_file(path.with_name(Path(part).name)).items()}, path)
        with path.open("rb") as file:
            if not file.read(2).startswith(TORCH_STARTS):  # torch's unpickler runs into text with errors of every kind
                raise CheckpointError(f"{path} is no file of weights: expected what torch.save wrote, or a .safetensors.")
        with torch.serialization.safe_globals([Namespace]):
            return unpack(torch.load(path, map_location="cpu", weights_only=True), path)
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, EOFError, OSError, LookupError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from None
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # told by its name: no module of this project imports pickle
            raise
        raise CheckpointError(
            f"{path} holds Python objects besides weights, which could run code when read; only weights are read "
            f"(weights_only). Convert it where you trust it, to safetensors. ({str(error).splitlines()[0]})"
        ) from None


def read_heads(path: Path) -> dict[str, dict[str, Tensor]]:
    """`dino`, `ibot` -> tensors of the projection heads that a training checkpoint of DINO, iBOT or DINOv2 keeps beside its teacher's backbone;
    {} for other files. For files that `read_file` reads."""
    if path.suffix == ".safetensors":
        content: Any = load_file(path)
    else:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    content = next((content[key] for key in NESTED if isinstance(content, dict) and isinstance(content.get(key), dict)), content)
    tensors = content.items() if isinstance(content, dict) else ()
    state = {unwrapped(name).removeprefix("module."): value for name, value in tensors if isinstance(value, Tensor)}
    found: dict[str, dict[str, Tensor]] = {}
    for prefix, objective in (("head.", "dino"), ("dino_head.", "dino"), ("ibot_head.", "ibot")):
        head = {name.removeprefix(prefix): value.float() for name, value in state.items() if name.startswith(prefix)}
        # torch's newer weight_norm
        names = {
            "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
            "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
        }
        if any(name.startswith("last_layer.") for name in head):
            found[objective] = {names.get(name, name): value for name, value in head.items()}
    return found


def unpack(content: dict, source: Path | str, around: frozenset[str] = frozenset()) -> Weights:
    """The state dict inside a checkpoint: the teacher or averaged weights where there are several, without wrappers' prefixes.

    Half-precision weights become float32, in which everything here computes unless told otherwise.
    """
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            names = {name for name in content if isinstance(name, str)}
            return unpack(content[key], source, around | names)
    items = content.items() if isinstance(content, dict) else ()
    state = {unwrapped(name): value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    while state and (prefix := next((p for p in PREFIXES if any(name.startswith(p) for name in state)), None)):
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        # DDP wraps everything; a backbone lies beside its heads, which are left out
        state = (
            inside
            if prefix in ("backbone.", "teacher.")
            else {**{n: v for n, v in state.items() if not n.startswith(prefix)}, **inside}
        )
    if not state:
        raise CheckpointError(f"{source} holds no weights: expected a state dict, alone or under {', '.join(NESTED)}")
    return Weights({name: value.float() if value.is_floating_point() else value for name, value in state.items()}, around)


def unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def fit(backbone: nn.Module, known: Known, source: str) -> list[str]:
    """Load weights into `backbone`; positional embeddings and patch kernels are resized where they differ, classifiers left out if so.

    Only LocAt's weights (GAug, class-attention pooling) and the classifier may be missing; the names of what was missing are returned. GAug weights bring the grid that they
    were trained at along, which fixes its constants. Raises CheckpointError for weights of another architecture, and says what differs.
    """
    state = dict(known.state)
    own = backbone.state_dict()
    drop_copies_of_the_shared_mlp(backbone, state, "")
    fit_channels(backbone, state, source)
    convert = timms_filter(backbone) if isinstance(backbone, tuple(family.base for family in FAMILIES)) else None
    if isinstance(backbone, SwinTransformer):
        table = fit_windows(backbone, state, known, source)
    else:
        table = fit_positions(backbone, state, known, source)
    try:
        converted = state if convert is None else convert(state, backbone)
    except (RuntimeError, LookupError) as error:
        raise CheckpointError(
            f"the weights of {source} do not fit this {type(backbone).__name__}: {error}. They must be of such a model."
        ) from None
    state = {n: v for n, v in (converted | table).items() if n in own or not n.startswith(HEADS)}
    state = {n: v for n, v in state.items() if not (n.startswith("head.") and n in own and own[n].shape != v.shape)}
    # DINOv3's released biases are zero but for its own training; timm's models of that name have none
    state = {n: v for n, v in state.items() if n in own or not (n.endswith((".q_bias", ".v_bias")) and not v.any())}
    missing = [name for name in own if name not in state and not name.startswith("head.")]
    wrong = {
        "lack": [name for name in missing if ".gaug." not in name and not name.startswith("prr.")],
        "have besides": [name for name in state if name not in own],
        "differ in shape": [
            f"{n} ({tuple(v.shape)}, not {tuple(own[n].shape)})" for n, v in state.items() if n in own and own[n].shape != v.shape
        ],
    }
    for what, names in wrong.items():
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(
                f"the weights of {source} ({known.layout.name}) do not fit this {type(backbone).__name__}: they {what} {listed}. Choose the "
                "backbone.name and options (patch_size, init_values for LayerScale, reg_tokens, no_embed_class, ...) that they were trained with."
            )
    backbone.load_state_dict(state, strict=False)
    if missing:
        log.info("%s: %d tensors of LocAt are not in these weights and stay as initialised", source, len(missing))
    return missing


def fit_channels(backbone: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Give the patch kernels as many input channels as the backbone takes, by timm's rule (`adapt_input_conv`): for one channel they are
    summed; else repeated in their order, cut at the end and scaled by old / new, so that a patch of one grey value gives the same token."""
    name = "patch_embed.proj.weight"
    own, given = getattr(getattr(backbone.patch_embed, "proj", None), "weight", None), state.get(name)
    if own is None or given is None or own.ndim != 4 or given.ndim != 4 or own.shape[1] == given.shape[1]:
        return
    state[name] = adapt_input_conv(own.shape[1], given, base_chans=given.shape[1])
    log.info("%s: patch kernels of %d channels are made to take %d, by timm's rule", source, given.shape[1], own.shape[1])


def fit_positions(backbone: nn.Module, state: dict[str, Tensor], known: Known, source: str) -> dict[str, Tensor]:
    """Take the positional embeddings out of `state` and return them as the backbone has them: its grid, resized as the source resizes,
    and its convention about special tokens (whose embeddings change in `state` where theirs is another)."""
    own, gaug = getattr(backbone, "pos_embed", None), any(".gaug." in name for name in state)
    if own is None or state.get("pos_embed") is None or state["pos_embed"].ndim != 3:
        if gaug and "pos_embed" not in state and getattr(backbone, "has_gaug", False):
            if known.grid is None:
                raise size_unknown(source)
            set_initial_grid(backbone, known.grid)
        return {}
    new = tuple(backbone.patch_embed.grid_size)
    wanted = own.shape[1] - new[0] * new[1]
    # vanilla weights of the same shape are taken to be alike; GAug's constants follow the grid, which another model's does not prove
    hint, no_embed_class = (None, None) if gaug else (new, wanted == 0)
    told: Any = known.grid  # (rows, cols): of a Swin it would be windows
    prefix, old = own_grid(state, known.layout.prefix, told, source, hint, no_embed_class)
    if gaug:
        set_initial_grid(backbone, old)
    moved = embed_special_tokens(state, prefix, wanted)
    state.clear()
    state |= {name: value for name, value in moved.items() if name != "pos_embed"}
    patches = resize_positions(moved["pos_embed"][:, wanted:], old, new, known.layout.pos_resize)
    return {"pos_embed": torch.cat([moved["pos_embed"][:, :wanted], patches], dim=1)}


def fit_windows(backbone: SwinTransformer, state: dict[str, Tensor], known: Known, source: str) -> dict[str, Tensor]:
    """Take the tables of relative positions out of `state` and return them as the backbone's windows have them; GAug is told its own."""
    own = windows_of(backbone)
    gaug = any(".gaug." in name for name in state)
    windows = own_windows(state, known.grid, source, hint=None if gaug else own)
    if gaug and len(windows) == len(own):
        set_initial_grid(backbone, tuple(windows))
    tables = {}
    for name, table in backbone.state_dict().items():
        if name.endswith("relative_position_bias_table") and name in state:
            stage = int(name.split(".")[1])
            given = state.pop(name)
            tables[name] = resize_rel_pos_bias_table(given, own[stage], (*table.shape[:1], *given.shape[1:]), windows[stage])
    return tables


def windows_of(backbone: SwinTransformer) -> list[tuple[int, int]]:
    """Window (rows, cols) of each stage, already no larger than the stage's map."""
    return [tuple(stage.blocks[0].window_size) for stage in backbone.layers]
