"""What a MODEL may be, as far as it can be told without torch: a path, or a name of timm's.

model_names.txt beside this file lists the names of one timm version. It serves to speak early, never to refuse: another timm, or a module of
the user's, may know more, and is asked afterwards.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ssl_locat.errors import UserError, did_you_mean

NAMES = Path(__file__).with_name("model_names.txt")


def check_exists(model: str) -> None:
    """UserError if MODEL is a path and nothing is there."""
    # a path may end in `?option=value`, as a name may, and a file may have a `?` in its own name
    if model.startswith(("timm:", "hf-hub:")) or Path(model).exists() or Path(model.partition("?")[0]).exists():
        return
    name = model.partition("?")[0]
    hint = f" Did you mean timm:{name}?" if name in (known_names() or ()) else ""
    raise UserError(
        f"there is no {model}.{hint} A MODEL is a run folder, a checkpoint folder, an export folder, a file of weights, "
        "timm:NAME or hf-hub:NAME"
    )


@cache
def known_names() -> frozenset[str] | None:
    """Names of timm's models and ours; None if the list was made from another timm than the one installed."""
    made_from, *names = NAMES.read_text(encoding="utf-8").split()
    try:
        # the package's metadata: importing timm would import torch
        return frozenset(names) if version("timm") == made_from else None
    except PackageNotFoundError:
        return None


def doubt(name: str) -> str | None:
    """What is odd about a model's name, None if nothing is. timm has the last word."""
    known = known_names()
    # a tag behind the dot names weights of one architecture: vit_small_patch16_224.dino
    if known is None or ":" in name or name.partition(".")[0] in known:
        return None
    return f"{name!r} is not among the models of timm {version('timm')}.{did_you_mean(name.partition('.')[0], known)}"
