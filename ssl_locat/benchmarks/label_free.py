"""What the label-free measures cost beside the training they watch: each one, and the forward passes that they share, as a share of an epoch.

The share is that of one probe for each epoch of CIFAR-10's 50,000 images, which is closer than people watch: shipped recipes probe every
fifth of ImageNet's epochs. Smaller sets are probed with the same images, so that their share grows as the set shrinks.
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
from ssl_locat.label_free.uniformity import alignment, uniformity, unit
from ssl_locat.models.tokens import class_token, features, forward_tokens, refine

IMAGES, VIEWS, EPOCH = 256, 4, 50_000  # the protocol's defaults; images of an epoch
BATCH = 32  # images of a training step, and of a forward pass


def rows(repeats: int, count: int = IMAGES) -> list[dict]:
    """Per cent of an epoch's training time, of the 2.7 M network at 32 px (2 x 32 + 4 x 16 px crops, fp32). count: images measured."""
    model, objective = tiny_pair(4096)
    step = our_stepper(model, objective)
    backbone = model.teacher.backbone.eval()
    globals_, locals_ = (torch.randn(n * BATCH, 3, s, s, device=device()) for n, s in ((2, 32), (4, 16)))
    images = torch.randn(count, 3, 32, 32, device=device())
    crops = torch.randn(count * VIEWS, 3, 32, 32, device=device())

    @torch.no_grad()
    def by_batches(crops: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [features(backbone, part) for part in crops.split(BATCH)]
        ).cpu()  # as the protocol does: memory stays bounded

    with torch.no_grad():
        tokens = forward_tokens(backbone, images)
        patches, classes = tokens.patches.cpu(), class_token(backbone, refine(backbone, tokens)).cpu()
        views = by_batches(crops)
    measures: dict[str, Callable[[], object]] = {
        "DSE": partial(dse, patches),
        "RankMe": partial(rankme, classes),
        "LiDAR": partial(lidar, views, VIEWS),
        "alpha-ReQ": partial(alpha_req, classes),
        "uniformity": lambda: uniformity(unit(classes)),
        "alignment": lambda: alignment(unit(views[0::VIEWS]), unit(views[1::VIEWS])),
        "norm outliers": partial(norm_outlier_share, patches),
        "forward passes, images": torch.no_grad()(lambda: forward_tokens(backbone, images)),
        "forward passes, crops": partial(by_batches, crops),
    }
    timings = side_by_side({"step": lambda: step(globals_, locals_), **measures}, repeats, warmup=1)
    epoch = timings["step"].seconds * EPOCH / BATCH
    shares = {name: 100 * timings[name].seconds / epoch for name in measures}
    shares["all"] = sum(shares.values())
    case = f"label-free measures of {count} images, {VIEWS} crops each, in an epoch of {EPOCH:,}"
    return make_rows("step", case, "share of an epoch", "%", shares, "all")
