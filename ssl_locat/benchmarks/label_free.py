"""What the label-free measures cost beside the training they watch: each one, and the forward passes that they share, as a share of an epoch.

A probe runs once per run by default, and once per epoch where people watch closely; the share is that of one evaluation in an epoch of
CIFAR-10's 50,000 images, the dearer of the two.
"""

from collections.abc import Callable
from functools import partial

import torch

from ssl_locat.benchmarks.networks import our_stepper, tiny_pair
from ssl_locat.benchmarks.timing import device, make_rows, side_by_side
from ssl_locat.label_free.alpha_req import alpha_req
from ssl_locat.label_free.dse import dse
from ssl_locat.label_free.lidar import lidar
from ssl_locat.label_free.norm_outliers import norm_outlier_share
from ssl_locat.label_free.rankme import rankme
from ssl_locat.label_free.uniformity import uniformity, unit
from ssl_locat.models.tokens import class_token, features, forward_tokens, refine

IMAGES, VIEWS, EPOCH = 256, 4, 50_000  # the protocol's defaults; images of an epoch
BATCH = 32


def rows(repeats: int) -> list[dict]:
    """Per cent of an epoch's training time, of the 2.7 M network at 32 px (2 x 32 + 4 x 16 px crops, fp32)."""
    model, objective = tiny_pair(4096)
    step = our_stepper(model, objective)
    backbone = model.teacher.backbone.eval()
    globals_, locals_ = (torch.randn(n * BATCH, 3, s, s, device=device()) for n, s in ((2, 32), (4, 16)))
    images = torch.randn(IMAGES, 3, 32, 32, device=device())
    crops = torch.randn(IMAGES * VIEWS, 3, 32, 32, device=device())
    with torch.no_grad():
        tokens = forward_tokens(backbone, images)
        patches, classes = tokens.patches.cpu(), class_token(backbone, refine(backbone, tokens)).cpu()
        views = features(backbone, crops).cpu()
    measures: dict[str, Callable[[], object]] = {
        "DSE": partial(dse, patches),
        "RankMe": partial(rankme, classes),
        "LiDAR": partial(lidar, views, VIEWS),
        "alpha-ReQ": partial(alpha_req, classes),
        "uniformity": lambda: uniformity(unit(classes)),
        "norm outliers": partial(norm_outlier_share, patches),
        "forward passes, images": torch.no_grad()(lambda: forward_tokens(backbone, images)),
        "forward passes, crops": torch.no_grad()(lambda: features(backbone, crops)),
    }
    timings = side_by_side({"step": lambda: step(globals_, locals_), **measures}, repeats, warmup=1)
    epoch = timings["step"].seconds * EPOCH / BATCH
    shares = {name: 100 * timings[name].seconds / epoch for name in measures}
    shares["all"] = sum(shares.values())
    case = f"label-free measures of {IMAGES} images, {VIEWS} crops each, in an epoch of {EPOCH:,}"
    return make_rows("step", case, "share of an epoch", "%", shares, "all")
