"""Foreign weights: reading them without unpickling, recognising their layout, fitting them into a backbone.

Layouts: the official LocAtViT release (its names are ours), timm, DINO (`teacher` / `student` with heads), DINOv2 (`mask_token`,
`register_tokens`), each possibly under `module.`, `backbone.` or `_orig_mod.`.
"""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as filter_eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as filter_swin
from timm.models.vision_transformer import checkpoint_filter_fn as filter_vit
from torch import Tensor, nn

from ssl_locat.errors import CheckpointError
from ssl_locat.models.jumbo import drop_copies_of_the_shared_mlp

log = logging.getLogger(__name__)

TORCH_STARTS = (b"PK", b"\x80")  # a zip archive; older, a bare pickle
NESTED = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model", "student")  # first one found holds the weights
PREFIXES = ("module.", "_orig_mod.", "backbone.", "teacher.", "student.")
HEADS = ("head.", "head_dist.", "dino_head.", "ibot_head.", "last_layer.", "mlp.")  # what hangs behind a backbone


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a torch file (.pth, .pt, .bin), unpacked from nesting and prefixes.

    Torch files are read with weights_only; CheckpointError for one that needs unpickling, is damaged or holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            return unpack(load_file(path), path)
        with path.open("rb") as file:
            if not file.read(2).startswith(TORCH_STARTS):  # torch's unpickler runs into text with errors of every kind
                raise CheckpointError(f"{path} is no file of weights: expected what torch.save wrote, or a .safetensors.")
        return unpack(torch.load(path, map_location="cpu", weights_only=True), path)
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, EOFError, OSError, LookupError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from None
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # told by its name: no module of this project imports pickle
            raise
        raise CheckpointError(
            f"{path} holds Python objects besides weights, which could run code when read; only weights are read "
            f"(weights_only). Convert it where you trust it, to safetensors. ({str(error).splitlines()[0]})"
        ) from None


def unpack(content: dict, source: Path | str) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: the teacher or averaged weights where there are several, without wrappers' prefixes."""
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return unpack(content[key], source)
    items = content.items() if isinstance(content, dict) else ()
    state = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
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
    return state


def trained_grid(state: dict[str, Tensor], num_prefix_tokens: int = 1) -> tuple[int, int] | None:
    """The square grid (rows, cols) that a state dict's positional embeddings were trained at; None if it has none."""
    if "pos_embed" not in state or state["pos_embed"].ndim != 3:
        return None
    tokens = state["pos_embed"].shape[1]
    side = next((int(n**0.5) for n in (tokens, tokens - num_prefix_tokens) if int(n**0.5) ** 2 == n), None)
    return (side, side) if side else None


def fit(backbone: nn.Module, state: dict[str, Tensor], source: str) -> list[str]:
    """Load `state` into `backbone`; positional embeddings and patch kernels are resized where they differ, classifiers left out if so.

    Only LocAt's weights (GAug, class-attention pooling) and the classifier may be missing; the names of what was missing are returned. GAug weights bring the grid that they
    were trained at along, which fixes its constants. Raises CheckpointError for weights of another architecture, and says what differs.
    """
    state = dict(state)
    has_gaug = any(".gaug." in name for name in state)
    grid = trained_grid(state, getattr(backbone, "num_prefix_tokens", 1))
    if has_gaug and grid and not isinstance(backbone, SwinTransformer):
        set_initial_grid(backbone, grid)
    convert = filter_swin if isinstance(backbone, SwinTransformer) else filter_eva if isinstance(backbone, Eva) else filter_vit
    own = backbone.state_dict()
    drop_copies_of_the_shared_mlp(backbone, state, "")
    try:
        converted = convert(state, backbone)
    except (RuntimeError, LookupError) as error:
        raise CheckpointError(
            f"the weights of {source} do not fit this {type(backbone).__name__}: {error}. They must be of such a model."
        ) from None
    state = {n: v for n, v in converted.items() if n in own or not n.startswith(HEADS)}
    state = {n: v for n, v in state.items() if not (n.startswith("head.") and n in own and own[n].shape != v.shape)}
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
                f"the weights of {source} do not fit this {type(backbone).__name__}: they {what} {listed}. Choose the backbone.name and "
                "options (patch_size, init_values for LayerScale, reg_tokens, no_embed_class, ...) that they were trained with."
            )
    backbone.load_state_dict(state, strict=False)
    if missing:
        log.info("%s: %d tensors of LocAt are not in these weights and stay as initialised", source, len(missing))
    return missing


def set_initial_grid(backbone: nn.Module, grid: tuple[int, int]) -> None:
    """Tell every GAug which grid its weights were trained at, and remember it for exports."""
    for module in backbone.modules():
        if hasattr(module, "set_initial_grid"):
            module.set_initial_grid(grid)
    if getattr(backbone, "has_gaug", False):
        backbone.gaug_options["initial_grid"] = tuple(grid)
