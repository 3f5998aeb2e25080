"""The kinds of timm's models that LocAt attaches to: one file each, one line in FAMILIES.

Imported by attach.py, maps.py, registry.py, export and pretraining. Begin with front.py, which says what a file here has to say; then vit.py.
"""

import sys
from collections.abc import Callable

from timm.models.xcit import Xcit
from torch import nn

from ssl_locat.errors import UserError
from ssl_locat.models.families.beit import BEIT
from ssl_locat.models.families.cait import CAIT
from ssl_locat.models.families.davit import DAVIT
from ssl_locat.models.families.eva import EVA
from ssl_locat.models.families.front import Family
from ssl_locat.models.families.gcvit import GCVIT
from ssl_locat.models.families.hiera import HIERA
from ssl_locat.models.families.naflex import NAFLEX
from ssl_locat.models.families.pit import PIT
from ssl_locat.models.families.relpos import RELPOS
from ssl_locat.models.families.sam import SAM
from ssl_locat.models.families.swin import SWIN, SWIN_V2, SWIN_V2_CR
from ssl_locat.models.families.twins import TWINS
from ssl_locat.models.families.vit import VIT
from ssl_locat.models.families.volo import VOLO

FAMILIES = (VIT, EVA, BEIT, RELPOS, NAFLEX, SAM, CAIT, SWIN, SWIN_V2, SWIN_V2_CR, GCVIT, HIERA, TWINS, PIT, DAVIT, VOLO)
REFUSED = {Xcit: "its attention is between channels: neither a query nor a key of it lies anywhere in the image"}


def family_of(model: nn.Module) -> Family:
    """The family of a timm model; UserError that says why there is none."""
    for family in FAMILIES:
        if isinstance(model, family.base):
            return family
    name = type(model).__name__
    for kind, reason in REFUSED.items():
        if isinstance(model, kind):
            raise UserError(f"LocAt cannot be attached to {name}: {reason}")
    raise UserError(
        f"LocAt cannot be attached to {name}: it serves timm's {', '.join(family.base.__name__ for family in FAMILIES)} "
        "and their subclasses; create such a model, e.g. timm.create_model('vit_small_patch16_224', dynamic_img_size=True)"
    )


def timms_filter(model: nn.Module) -> Callable | None:
    """What timm makes foreign or otherwise sized weights fit a model of this kind with; not all kinds have one."""
    return getattr(sys.modules[family_of(model).base.__module__], "checkpoint_filter_fn", None)
