"""Under whose licence weights are that somebody else released, as far as their name or layout tells. No legal advice: their page has the last word."""

import re
from pathlib import Path
from typing import NamedTuple

import timm


class Licence(NamedTuple):
    name: str
    words: str  # what it means for what was trained from them


UNKNOWN = Licence("unknown", "look at the page of the weights that it was made from: what they allow holds for these too")
OWN = Licence("your own", "a run of yours trained them from nothing; the images' own terms remain")
DINOV3 = Licence(
    "DINOv3 License",
    "Meta's own licence for DINOv3, which holds for what is derived from its weights too: it has to be passed on with them, and restricts "
    "some uses (ai.meta.com/resources/models-and-libraries/dinov3-license)",
)


def _free(name: str) -> Licence:
    return Licence(name, f"the released weights of this kind are under {name}: keep their notice")


# what a name or a layout holds -> the licence that its makers released such weights under; from the top, the first that fits
TABLE: list[tuple[str, Licence]] = [
    (r"dinov3", DINOV3),
    (r"dinov2", _free("Apache-2.0")),
    (r"ibot|siglip|augreg|deit", _free("Apache-2.0")),
    (
        r"\bmae\b|masked autoencoder",
        Licence("CC BY-NC 4.0", "MAE's released weights are for non-commercial use, and so is what is made from them"),
    ),
    (r"\bdino\b", _free("Apache-2.0")),
    (r"\.openai|openai.*clip", _free("MIT")),
]
OF_TIMM = {"apache-2.0": _free("Apache-2.0"), "mit": _free("MIT"), "dinov3-license": DINOV3}


def licence_of(model: str, layout: str = "", noted: str = "") -> Licence:
    """Of MODEL's weights. layout: what its file was recognised as; noted: what an export of ours says about its own origin."""
    if noted:
        rows = (DINOV3, OWN, UNKNOWN, *(row for _, row in TABLE))
        return OF_TIMM.get(noted) or next((known for known in rows if known.name == noted), Licence(noted, UNKNOWN.words))
    if model.startswith("timm:"):
        config = timm.get_pretrained_cfg(model.removeprefix("timm:").partition("?")[0], allow_unregistered=True)
        said = getattr(config, "license", None) if config else None
        if said:
            return OF_TIMM.get(said, Licence(said, f"timm says {said} of these weights, and it holds for what is made from them"))
    # of a path its last part: folders above it say what people call their projects
    text = f"{model if ':' in model else Path(model).name} {layout}".lower()
    return next((licence for pattern, licence in TABLE if re.search(pattern, text)), UNKNOWN)
