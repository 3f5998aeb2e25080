"""How a teacher's scores become targets: centring (DINO) or Sinkhorn-Knopp (SwAV, DINOv2), and the cross-entropy against them.

All functions give and take log-probabilities in float32, so that no temperature overflows: the references' Sinkhorn exponentiates
the scores as they are, which leaves float32 beyond scores of about 88 * temperature.
"""

import torch
from torch import Tensor, nn

from ssl_locat.errors import UserError, did_you_mean
from ssl_locat.runs.distributed import all_gather_cat, all_reduce_sum_

TARGETS = ("centering", "sinkhorn")


def check_targets(objective: str, targets: str) -> None:
    if targets not in TARGETS:
        raise UserError(f"{objective}: targets is {targets!r}; expected {' or '.join(TARGETS)}.{did_you_mean(targets, TARGETS)}")


def centered(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """log softmax((scores - center) / temperature); scores [..., K], center [1, K] (DINO, arXiv:2104.14294, eq. 4)."""
    return ((scores.float() - center) / temperature).log_softmax(-1)


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Log-targets [n, K] of scores [n, K]: every row sums to 1, and the prototypes share all rows of all ranks as equally as
    `iterations` rounds make them (DINOv2, arXiv:2304.07193, section 4; three rounds there).

    Ranks may hold different numbers of rows, none included; all must call. The numbers of rows and of prototypes cancel out of what the
    reference divides by, so that alternating log-normalisations are the whole algorithm.
    """
    log_q = scores.float() / temperature
    for _ in range(iterations):
        log_q = log_q - all_gather_cat(log_q.logsumexp(0, keepdim=True)).logsumexp(0)  # each prototype's mass, over all ranks
        log_q = log_q.log_softmax(-1)  # rows: each a distribution again
    return log_q


class Center(nn.Module):
    """Running mean of teacher scores, over the rows of every micro-batch and rank (counted, since ranks mask different numbers of patches).

    Args:
        momentum: center = momentum * center + (1 - momentum) * mean.
    """

    def __init__(self, num_prototypes: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self.seen: list[Tensor] = []  # per micro-batch [K + 1]: sum of its rows, and their number

    @torch.no_grad()
    def add(self, scores: Tensor) -> None:
        """scores [n, K] of one micro-batch; the centre itself moves in `finish_step`."""
        self.add_sums(scores.float().sum(0), len(scores))

    @torch.no_grad()
    def add_sums(self, sums: Tensor, rows: int) -> None:
        """The same of what `rows` scores sum to, [K]; of the first prototypes alone, where no others are in use."""
        self.seen.append(torch.cat([sums, sums.new_full((1,), rows)]))

    @torch.no_grad()
    def finish_step(self) -> None:
        """All ranks call it. A step without any row leaves the centre where it is."""
        total = all_reduce_sum_(torch.stack(self.seen).sum(0))
        self.seen.clear()
        count = total[-1:]
        mean = total[:-1] / count.clamp(min=1)
        center = self.center[:, : len(mean)]  # of the prototypes in use
        center.lerp_(torch.where(count > 0, mean, center[0])[None], 1 - self.momentum)


def pair_loss(scores: Tensor, targets: Tensor, temperature: float, same_view: bool = False) -> Tensor:
    """Mean over images and (teacher, student) pairs of views of -sum_k q_tk log p_sk, p = softmax(scores / temperature), in float32.

    scores [S, B, K] of the student, targets [T, B, K] probabilities; the first T student views are the teacher's.
    Pairs of a view with itself are left out unless `same_view`: S*T - T pairs (DINO, eq. 3; DINOv3 by its ignore_diagonal; DINOv2 keeps
    them but never forms them, and sums over pairs instead).
    """
    return _PairLoss.apply(scores, targets, temperature, same_view)


class _PairLoss(torch.autograd.Function):
    """Since log p = z - logsumexp(z) and sum_k q_k = 1, a student view needs its teachers' sum alone. View by view and with its own
    backward pass, it holds one view beside scores and gradient, where autograd would keep several copies of all (65536 prototypes)."""

    @staticmethod
    def forward(ctx, scores: Tensor, targets: Tensor, temperature: float, same_view: bool) -> Tensor:
        ctx.temperature, ctx.same_view = temperature, same_view
        ctx.pairs = len(targets) * (len(scores) - (not same_view))
        total: Tensor | float = 0.0
        log_norms: list[Tensor] = []
        for view, (teachers, count) in _PairLoss.partners(len(scores), targets, same_view):
            z = scores[view].float() / temperature  # [B, K], the only copy in float32 at a time
            log_norms.append(z.logsumexp(-1))
            total = total + count * log_norms[-1] - z.mul_(teachers).sum(-1)
        ctx.save_for_backward(scores, targets, *log_norms)
        return torch.as_tensor(total).mean() / ctx.pairs

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        scores, targets, *log_norms = ctx.saved_tensors
        scale = gradient / (ctx.pairs * scores.shape[1] * ctx.temperature)
        result = torch.empty_like(scores)
        for view, (teachers, count) in _PairLoss.partners(len(scores), targets, ctx.same_view):
            # softmax by the saved logsumexp: [B, K]
            p = (scores[view].float() / ctx.temperature).sub_(log_norms[view][:, None]).exp_()
            result[view] = p.mul_(count).sub_(teachers).mul_(scale)  # d/dz of count * logsumexp(z) - sum(q z)
        return result, None, None, None

    @staticmethod
    def partners(num_student: int, targets: Tensor, same_view: bool):
        """(view, (sum of the targets it is compared with [B, K], their number)) for each student view."""
        everyone = targets.sum(0)  # [B, K]: sum over teachers, made once for all student views
        for view in range(num_student):
            own = view < len(targets) and not same_view
            yield view, (everyone - targets[view] if own else everyone, len(targets) - own)
