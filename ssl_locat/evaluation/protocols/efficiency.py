"""Parameters and multiply-accumulates of a backbone, beside what the paper publishes (arXiv:2603.04892, table 1).

ssl-locat evaluate efficiency MODEL

The paper's "GFLOPs" are multiply-accumulates of one image through backbone and classifier. Counted here are those of matrix products,
convolutions and attention, by torch's own counter; the paper's tool adds norms and bias additions, which are 0.1 to 0.4 % more.
"""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_locat.errors import UserError
from ssl_locat.evaluation.shared.features import check_image_size
from ssl_locat.evaluation.shared.options import Count
from ssl_locat.models.attention import forced_backend
from ssl_locat.runs.log import console

# family -> {size: (parameters in millions, GMAC) of the vanilla model, and of its LocAt twin}
PUBLISHED = {
    "vit_{}": {"tiny": ((6, 1.26), (6, 1.27)), "base": ((86, 17.58), (86, 17.64))},
    "regvit_{}": {"tiny": ((6, 1.29), (6, 1.30)), "base": ((86, 17.95), (86, 18.02))},
    "vit_{}_rope_mixed": {"tiny": ((6, 1.26), (6, 1.27)), "base": ((86, 17.58), (86, 17.64))},
    "swin_{}": {"tiny": ((28, 4.50), (28, 4.51)), "base": ((88, 15.46), (88, 15.47))},
    "jumbo_{}": {"tiny": ((17, 1.40), (17, 1.42)), "base": ((260, 19.74), (260, 19.81))},
}


@torch.no_grad()
def evaluate(backbone: nn.Module, *, image_size: Count = 224, num_classes: Count = 1000) -> dict[str, float]:
    """-> params and gmacs with a classifier of `num_classes`, params_backbone without, params_added by LocAt; published_* where the paper has
    such a model.

    image_size: pixels, square. gmacs: billions of multiply-accumulates for one image.
    """
    model = copy.deepcopy(backbone).cpu().float().eval()
    if not hasattr(model, "reset_classifier"):
        raise UserError(
            f"{type(model).__name__} has no reset_classifier, by which timm's models get a classifier; give a timm model"
        )
    check_image_size(backbone, image_size)
    # timm: no classifier, so that the backbone alone is counted
    model.reset_classifier(0)
    found: dict[str, float] = {"params_backbone": count_parameters(model)}
    model.reset_classifier(num_classes)
    found["params_added"] = sum(p.numel() for name, p in model.named_parameters() if of_locat(name) and is_locat(model))
    found |= {"params": count_parameters(model), "gmacs": count_macs(model, image_size) / 1e9}
    published = published_for(backbone)
    # at other sizes there is nothing to compare with
    if published and (image_size, num_classes) == (224, 1000):
        millions, gmacs = published
        found |= {"published_params_millions": millions, "published_gmacs": gmacs}
        console().print(f"{found['params'] / 1e6:.2f} M parameters, published {millions} M")
        console().print(f"{found['gmacs']:.3f} GMAC, published {gmacs} ({found['gmacs'] / gmacs - 1:+.2%})")
    return found


def of_locat(name: str) -> bool:
    """Whether a parameter of this name is one that a vanilla twin lacks: GAug's, PRR's norms, and LocAtJumbo's norm of patches."""
    return ".gaug." in name or name.startswith(("prr.", "norm_patches."))


def is_locat(model: nn.Module) -> bool:
    return bool(getattr(model, "has_gaug", False)) or getattr(model, "prr", None) is not None


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image through a model on the CPU."""
    # the counter cannot look into kernels of our own, nor torch 2.11's into the CPU's fused attention
    with FlopCounterMode(display=False) as counter, forced_backend("sdpa"), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, model.in_chans, image_size, image_size))
    return counter.get_total_flops() // 2  # the counter takes a multiply-accumulate for two operations


def published_for(backbone: nn.Module) -> tuple[int, float] | None:
    """(millions of parameters, GMAC) of table 1 for a model by its name in timm's registry; None if the paper does not have it."""
    name = (getattr(backbone, "pretrained_cfg", None) or {}).get("architecture", "")
    locat = name.startswith("locat") and getattr(backbone, "has_gaug", False)
    # the twin has its vanilla model's name behind `locat`; patch and window are the same within a family
    name = name.removeprefix("locat").replace("_patch16", "").removesuffix("_patch4_window7_224").removesuffix("_224")
    for family, sizes in PUBLISHED.items():
        for size, (vanilla, twin) in sizes.items():
            if name == family.format(size):
                return twin if locat else vanilla
    return None
