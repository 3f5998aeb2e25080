"""Which of timm's names LocAt can be attached to, seen on models as small as they get, and the table of docs/locat-on-timm.md:

python -m ssl_locat.models.served
"""

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssl_locat.errors import UserError
from ssl_locat.models.attach import attach_locat
from ssl_locat.models.families import FAMILIES, REFUSED
from ssl_locat.models.families.front import GaugFront

REFUSED_MODULES = tuple(kind.__module__.rpartition(".")[2] for kind in REFUSED)
MODULES = (*(module for family in FAMILIES for module in family.modules), *REFUSED_MODULES)
PLAIN: dict[str, Any] = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": 24}
STAGES: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
# timm's module -> what makes its models small in width, depth and image, and leaves what is special about a name: attention, norms, pooling, ...
SMALL: dict[str, dict[str, Any]] = {
    "vision_transformer": PLAIN,
    "vision_transformer_hybrid": {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 64},
    "vision_transformer_relpos": {**PLAIN, "rel_pos_dim": 16},
    "vision_transformer_sam": {**PLAIN, "img_size": 40, "window_size": 2, "depth": 2, "global_attn_indexes": (1,)},
    "deit": PLAIN,
    "eva": PLAIN,
    "beit": PLAIN,
    "cait": {**PLAIN, "num_heads": 4, "init_values": 1.0},
    "xcit": PLAIN,
    "swin_transformer": {**STAGES, "img_size": 40, "patch_size": 2, "window_size": 5},
    "swin_transformer_v2": {**STAGES, "img_size": 40, "patch_size": 2, "window_size": 5, "pretrained_window_sizes": (0, 0)},
    "swin_transformer_v2_cr": {**STAGES, "img_size": 40, "patch_size": 2, "window_size": 5},
    "naflexvit": {k: v for k, v in PLAIN.items() if k != "img_size"},
    "hiera": {"img_size": (64, 96), "embed_dim": 16, "stages": (1, 2, 3, 1), "global_pos_size": (4, 4)},
    "gcvit": {"img_size": 64, "window_size": (4, 4, 4, 2), "window_ratio": None, "embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)},
    "davit": {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 3},
    "twins": {"img_size": 64, "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 4), "depths": (2, 2, 2, 2)},
    "volo": {"img_size": 32, "layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 2, 2, 2), "stem_hidden_dim": 8},
    "pit": {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 2, 4)},
}  # fmt: skip
# parts of names whose own options do not allow those
EXCEPTIONS: dict[str, dict[str, Any]] = {"sapiens2": {"num_kv_heads": 1}, "_mci_": {"embed_dim": 768, "num_heads": 12}}
# images [3, H, W] where they are not as large as `img_size`
SIZES = {"naflexvit": (24, 40), "davit": (32, 48), "hiera": (64, 96)}
CLOSED = ("gcvit", "volo")  # functions of timm that take no option which they set themselves


def small(module: str, name: str, **more: Any) -> nn.Module:
    """timm's model `name` of `module`, small, with weights that are no special case: LayerScale, norms and biases as random as all others."""
    torch.manual_seed(0)
    own = {key: value for part, given in EXCEPTIONS.items() if part in name for key, value in given.items()}
    options = {**SMALL[module], **own, "num_classes": 3, **more}
    model = create_closed(module, name, options) if module in CLOSED else timm.create_model(name, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def create_closed(module: str, name: str, options: dict) -> nn.Module:
    home: Any = sys.modules[f"timm.models.{module}"]
    creator = f"_create_{module}"
    real = getattr(home, creator)
    setattr(home, creator, lambda variant, pretrained=False, **own: real(variant, pretrained, **{**own, **options}))
    try:
        return timm.create_model(name)
    finally:
        setattr(home, creator, real)


def images_of(module: str) -> Tensor:
    """Two images for the small models of a module."""
    side = SMALL[module].get("img_size", 24)
    return torch.randn(2, 3, *SIZES.get(module, (side, side)), generator=torch.Generator().manual_seed(1))


@cache
def attached(module: str, name: str) -> tuple[str | None, frozenset[tuple[str, str]]]:
    """Why LocAt (GAug and PRR both) cannot be attached to timm's model `name`, None if it can; then what stands before which attentions."""
    model = small(module, name)
    try:
        attach_locat(model)
    except UserError as error:
        return str(error).partition(": ")[2], frozenset()
    fronts = {type(m) for m in model.modules() if isinstance(m, GaugFront)}
    return None, frozenset((kind.__bases__[0].__name__, kind.__bases__[1].__name__) for kind in fronts)


def why_not(module: str, name: str) -> str | None:
    return attached(module, name)[0]


def names_of(module: str) -> list[str]:
    """timm's own names of a module."""
    return [name for name in timm.list_models(module=module) if not name.startswith("locat")]


def table() -> Iterator[str]:
    """Lines of markdown."""
    counts = {module: [why_not(module, name) for name in names_of(module)] for module in MODULES}
    total, served = sum(map(len, counts.values())), sum(why is None for found in counts.values() for why in found)
    yield f"timm {timm.__version__}: {served} of {total} names are served, {served / total:.1%}.\n"
    yield "| timm's class | modules | served | where a query's bump lies | stays as it is | any image size |"
    yield "|---|---|---|---|---|---|"
    for family in FAMILIES:
        found = [why for module in family.modules for why in counts[module]]
        kept = "; ".join(f"{kind.__name__}: {why}" for kind, why in family.kept.items())
        size = ", ".join(f"`{key}={value}`" for key, value in family.any_size.items()) or family.sizes
        share = f"{found.count(None)} of {len(found)}"
        yield f"| {family.base.__name__} | {', '.join(family.modules)} | {share} | {family.where} | {kept} | {size} |"
    for kind, why in REFUSED.items():
        found = counts[kind.__module__.rpartition(".")[2]]
        yield f"| {kind.__name__} | {kind.__module__.rpartition('.')[2]} | {found.count(None)} of {len(found)} | refused: {why} | | |"
    yield ""
    for module in MODULES:
        some = [f"`{name}`" for name in names_of(module) if why_not(module, name) is None]
        if some:
            yield f"**{module}**: {', '.join(some)}\n"


if __name__ == "__main__":
    print("\n".join(table()))
