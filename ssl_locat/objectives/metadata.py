"""What is known of the images beside their pixels, as a help or a harm (arXiv:2606.05107): a small head predicts each named field of data.metadata
from the class token. Of an informative one (season, organ) its gradient goes into the backbone as it is; of a nuisance (camera, scanner, site) it is
reversed (Ganin and Lempitsky, arXiv:1409.7495), so that the head learns to read it and the backbone to hide it."""

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.errors import ConfigError, did_you_mean
from ssl_locat.objectives import Needs, Progress, Views
from ssl_locat.objectives.linear_reader import LinearReader
from ssl_locat.objectives.neighbours import NeighbourReader


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """ConfigError for a name that is not among those of data.metadata."""
    for name in names:
        if name not in known:
            raise ConfigError(
                f"objective metadata names {name!r}, which data.metadata does not describe; it has: {', '.join(known) or 'nothing'}."
                f"{did_you_mean(name, known)} Say there which member of a sample holds it, and its values (docs/metadata.md)."
            )


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -strength."""

    @staticmethod
    def forward(ctx, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


class MetadataHead(nn.Module):
    """A small MLP for each field, on the class token of every view.

    Args:
        fields: number of values of each. reversal: strength for each; None: not reversed.
    """

    def __init__(self, embed_dim: int, fields: Sequence[int], reversal: Sequence[float | None], hidden_dim: int, layers: int):
        super().__init__()
        self.reversal = tuple(reversal)
        widths = [embed_dim, *[hidden_dim] * (layers - 1)]
        self.fields = nn.ModuleList()
        for count in fields:
            hidden = [part for ins, outs in pairwise(widths) for part in (nn.Linear(ins, outs), nn.GELU())]
            # the token's scale moves during training, and would be the step size of what reads it
            self.fields.append(
                nn.Sequential(nn.LayerNorm(embed_dim, elementwise_affine=False), *hidden, nn.Linear(widths[-1], count))
            )

    def forward(self, views: Views) -> Tensor:
        """-> logits of all fields side by side, and the class tokens themselves, [V, B, K1 + K2 + ... + D]."""
        read = (views.cls if strength is None else _Reversed.apply(views.cls, strength) for strength in self.reversal)
        return torch.cat([*(field(cls) for field, cls in zip(self.fields, read, strict=True)), views.cls], dim=-1)


class Metadata(nn.Module):
    """Cross-entropy of the fields, summed over them; the mean over all views of all images, of which those that say nothing count 0.

    So each image weighs the same in any batch, on any number of ranks and micro-batches, however many others say nothing.

    Args:
        nuisance: names of data.metadata that features should not tell.
        informative: names that they should.
        reversal: of a nuisance, how much stronger its gradient is in the backbone than in the head (which Adam scales anyway).
        neighbours, linear: of a nuisance, weights of what neighbours and a linear reader tell of it (neighbours.py, linear_reader.py), whom the backbone cannot outrun.
        hidden_dim, layers: of the head of each field; 1 layer: linear.
        min_images: with a nuisance that neighbours or a linear reader read, refuse to run with fewer images per micro-batch on all ranks: they compare them.
    """

    needs = Needs(metadata=True)

    def __init__(
        self,
        nuisance: Sequence[str] = (),
        informative: Sequence[str] = (),
        reversal: float = 0.1,
        neighbours: float = 2.0,
        linear: float = 1.0,
        hidden_dim: int = 256,
        layers: int = 2,
        min_images: int = 64,
    ):
        super().__init__()
        for option, names in {"nuisance": nuisance, "informative": informative}.items():
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"metadata.{option} is {names!r}; expected a list of names of data.metadata")
        self.names = (*nuisance, *informative)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError(
                f"metadata: nuisance is {list(nuisance)}, informative {list(informative)}; expected at least one name of data.metadata, each once"
            )
        if min(reversal, neighbours, linear) < 0 or hidden_dim < 1 or layers < 1:
            raise ConfigError(
                f"metadata: reversal is {reversal}, neighbours {neighbours}, linear {linear}, hidden_dim {hidden_dim}, layers {layers}; expected three "
                "numbers of at least 0, and whole numbers of at least 1"
            )
        self.reversal = tuple(reversal if name in nuisance else None for name in self.names)
        self.neighbours, self.linear, self.hidden_dim, self.layers = neighbours, linear, hidden_dim, layers
        self.min_images = min_images if nuisance and (neighbours or linear) else 1
        self.neighbour_readers, self.linear_readers = nn.ModuleDict(), nn.ModuleDict()  # of nuisances
        self.columns: list[int] = []
        self.sizes: list[int] = []

    def make_head(self, embed_dim: int, metadata: dict[str, int]) -> MetadataHead:
        check_names(self.names, metadata)
        self.columns = [list(metadata).index(name) for name in self.names]
        self.sizes = [metadata[name] for name in self.names]
        nuisances = [name for name, strength in zip(self.names, self.reversal, strict=True) if strength is not None]
        self.neighbour_readers = nn.ModuleDict({name: NeighbourReader(embed_dim) for name in nuisances if self.neighbours})
        self.linear_readers = nn.ModuleDict({name: LinearReader(embed_dim, metadata[name]) for name in nuisances if self.linear})
        return MetadataHead(embed_dim, self.sizes, self.reversal, self.hidden_dim, self.layers)

    def forward(self, student: Tensor, metadata: Tensor, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """student [S, B, K1 + K2 + ... + D] logits and class tokens, metadata int64 [B, M], -1 where unknown -> loss [], metrics."""
        views, batch = student.shape[:2]
        loss = student.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        parts = student.float().split([*self.sizes, student.shape[-1] - sum(self.sizes)], -1)
        for name, column, logits in zip(self.names, self.columns, parts[:-1], strict=True):
            truth = metadata[:, column]  # [B]
            known = truth >= 0
            wanted = truth.expand(views, batch).flatten()
            # a sum over what is known by the count of all: no number of other ranks is needed for the mean over the whole batch
            entropy = F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=-1, reduction="sum") / (views * batch)
            loss = loss + entropy
            hits = ((logits.argmax(-1) == truth) & known).float().mean()  # []: of all images, too
            metrics |= {f"{name}_accuracy": hits / known.float().mean().clamp(min=1e-6), f"{name}_known": known.float().mean()}
            if name in self.neighbour_readers:
                told = self.neighbour_readers[name](parts[-1], truth)
                loss = loss + self.neighbours * told
                metrics[f"{name}_neighbours"] = told.detach()
            if name in self.linear_readers:
                explained = self.linear_readers[name](parts[-1], truth)
                loss = loss + self.linear * explained
                metrics[f"{name}_explained"] = explained.detach()
        return loss, metrics

    def finish_step(self) -> dict[str, Tensor]:
        return {}

    def frozen(self, head: nn.Module, progress: Progress) -> list[nn.Parameter]:
        return []
