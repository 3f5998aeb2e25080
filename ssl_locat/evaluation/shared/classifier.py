"""The accuracy of a whole classifier: what `supervised` and `validate` end in."""

import torch
from torch import nn

from ssl_locat.evaluation.shared.metrics import top_hits
from ssl_locat.evaluation.shared.samples import Pass, check_damage
from ssl_locat.evaluation.shared.stopping import stop_if_asked
from ssl_locat.runs.distributed import all_reduce_sum_, world_size
from ssl_locat.runs.log import progress


@torch.no_grad()
def test_accuracy(classifier: nn.Module, images: Pass, device: torch.device) -> dict[str, float]:
    """top1 and top5 in percent over all processes."""
    classifier.eval()
    counts = torch.zeros(3, device=device)
    with progress("testing", total=len(images), unit="images") as bar:
        for batch in images:
            logits, labels, valid = classifier(batch.images.to(device)).float(), batch.labels.to(device), batch.valid.to(device)
            counts += torch.stack([*(top_hits(logits, labels, k)[valid].sum() for k in (1, 5)), valid.sum()])
            bar.update(int(batch.valid.sum()) * world_size())
            stop_if_asked("testing")
    one, five, seen = all_reduce_sum_(counts).tolist()
    check_damage(len(images) - int(seen), len(images), images.max_bad)
    return {"top1": 100 * one / seen, "top5": 100 * five / seen}
