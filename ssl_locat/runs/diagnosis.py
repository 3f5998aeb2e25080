"""Is it learning? Signals computed inside the step, and the words that explain them when they look wrong.

`pretraining/loop.py` logs the signals with the other metrics and, each time metrics reach the host, asks `Diagnosis.check`. A warning says what was
seen, what it means and what people change. Only the kinds that the YAML names as fatal stop a run; NaN always does.
"""

import math
from collections import defaultdict, deque
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ssl_locat.config.schema import Config
from ssl_locat.errors import ConfigError, Diverged, UserError, did_you_mean

# --- signals --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """features [B, D] -> []: spread of the directions, 1 for isotropic ones, 0 when all images look the same.

    Standard deviation per dimension of the unit vectors, averaged, times sqrt(D) (SimSiam, arXiv:2011.10566, section 4.1)."""
    # isotropic unit vectors spread by 1 / sqrt(D) in each dimension
    spread: Tensor = F.normalize(features.float(), dim=-1).std(dim=0, unbiased=False).mean()
    return spread * float(features.shape[-1] ** 0.5)


@torch.no_grad()
def patch_cls_similarity(class_token: Tensor, patches: Tensor) -> Tensor:
    """class_token [B, D], patches [B, N, D] -> []: mean cosine of every patch with its image's class token (the paper's Appendix F)."""
    return F.cosine_similarity(patches.float(), class_token.float().unsqueeze(1), dim=-1).mean()


@torch.no_grad()
def center_drift(center: Tensor, batch_center: Tensor, teacher_temp: float) -> Tensor:
    """center, batch_center [K] (teacher logits) -> []: how far the running centre lags behind the batch, in units of the temperature.

    Above 1, targets say how the batch differs from the past rather than how an image differs from the others."""
    return (batch_center.float() - center.float()).square().mean().sqrt() / teacher_temp


# --- words ----------------------------------------------------------------------------------------------------------------


class Warning(NamedTuple):
    """`kind` is stable, for scripts and the YAML's list of fatal ones; `str()` is for people."""

    kind: str
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.message} What people change: {self.advice}"


# {name}: words that depend on the recipe, see WORDS; an empty one is left out with its comma
ADVICE = {
    "loss_at_ln_k": "a lower teacher temperature (0.04 at first) or a longer warm-up of it, a higher lr if the gradient norm is tiny, "
    "teacher momentum further from 1 for short runs (0.99), normalised prototypes, and more steps: small data needs hundreds of epochs.",
    "uniform": "a lower teacher temperature, {centre}, fewer prototypes for small data.",
    "collapse": "{targets}, a higher teacher temperature, {last_layer}, a lower lr, a larger global batch.",
    "features_collapsing": "a higher teacher momentum (0.996), a lower lr or a longer warm-up, a larger global batch, gradient clipping, "
    "{koleo}, a head in fp32.",
    "rank_falling": "{koleo}, less weight decay at the end, a larger global batch, more varied data, a lower lr.",
    "patches_collapsing": "{locat}, {registers}, {ibot}, Gram anchoring, an earlier checkpoint for dense tasks; k-NN may keep rising meanwhile.",
    "center_drifting": "a lower lr or a longer warm-up, a higher teacher momentum, a quicker centre (center_momentum 0.9), "
    "a larger global batch.",
}
# trait of a recipe -> (word, what is said without it, what is said where the recipe has it)
WORDS = {
    "koleo": ("koleo", "the KoLeo objective beside DINO", "more weight on KoLeo"),
    "sinkhorn": ("targets", "centring on (center_momentum 0.9) or Sinkhorn targets", ""),
    "no_centre": ("centre", "a slower centre (center_momentum 0.9 to 0.99)", ""),
    "frozen_prototypes": ("last_layer", "the last layer frozen longer", ""),
    "locat": ("locat", "LocAt on (gaug and prr)", ""),
    "registers": ("registers", "register tokens", ""),
    "ibot": ("ibot", "the iBOT objective", "more weight on iBOT"),
}


def traits(config: Config) -> set[str]:
    """What a recipe has already, of what advice might name: keys of WORDS."""
    objectives = {objective.name: objective.options for objective in config.objectives}
    options = config.backbone.options
    sinkhorn = any(given.get("targets") == "sinkhorn" for given in objectives.values())
    frozen = max((given.get("frozen_last_layer_epochs", 0) for given in objectives.values()), default=0)
    found = {
        "koleo": "koleo" in objectives,
        "ibot": "ibot" in objectives,
        "sinkhorn": sinkhorn,
        "no_centre": sinkhorn,
        "frozen_prototypes": frozen >= (config.optim.epochs or float("inf")),
        "locat": config.backbone.name.startswith("locat")
        and options.get("gaug") is not False
        and options.get("prr") is not False,
        "registers": "reg" in config.backbone.name or bool(options.get("reg_tokens")),
    }
    return {name for name, there in found.items() if there}


def advice(kind: str, has: Collection[str] = ()) -> str:
    """What people change against a kind of problem, in the words of a recipe that has these traits."""
    chosen = {word: with_it if trait in has else without for trait, (word, without, with_it) in WORDS.items()}
    return ", ".join(part for part in ADVICE[kind].format_map(chosen).split(", ") if part)


KINDS = tuple(ADVICE)
LASTING = 0.2  # share of a run for which RankMe must be low: seed 1 of the quickstart is for a tenth


class Diagnosis:
    """Watches a run's metrics. Each kind warns once, and again only after the problem has gone and come back.

    Args:
        num_prototypes: K of the head, for what 'uniform' means; None for an objective without prototypes.
        fatal: kinds that stop the run (raise Diverged) instead of warning.
        has: traits of the recipe (`traits`), which advice takes into account.
        warmup_fraction: share of total_steps before which nothing is checked: a loss near ln K is normal early, and the features of an
            untrained network are spread by chance, which the first steps undo.
        patience: checks in a row that must agree.
    """

    def __init__(
        self,
        num_prototypes: int | None,
        *,
        fatal: Collection[str] = (),
        has: Collection[str] = (),
        warmup_fraction: float = 0.1,
        patience: int = 3,
    ):
        for kind in fatal:
            if kind not in KINDS:
                raise ConfigError(f"{kind!r} is no kind of collapse; known: {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
        self.ln_k = math.log(num_prototypes) if num_prototypes else None
        self.has = frozenset(has)
        self.fatal, self.warmup_fraction, self.patience = frozenset(fatal), warmup_fraction, patience
        # the highest feature_std and RankMe so far: of the whole run, and since the warm-up
        self.best: dict[str, float] = defaultdict(float)
        self.best_since: dict[str, float] = defaultdict(float)
        self.low_since: int | None = None  # step from which on RankMe was low
        self.losses: deque[float] = deque()  # of the last tenth of the run
        # the last answers for each kind; a run that resumes has them from its checkpoint
        self.recent: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=patience))
        self.warned: set[str] = set()

    def state(self) -> dict:
        """What a resumed run must know of the steps before, as JSON can hold it."""
        recent = {kind: list(seen) for kind, seen in self.recent.items()}
        best = {"best": dict(self.best), "best_since": dict(self.best_since), "low_since": self.low_since}
        return {**best, "losses": list(self.losses), "recent": recent, "warned": sorted(self.warned)}

    def load_state(self, state: dict) -> None:
        self.best.update(state["best"])
        self.best_since.update(state.get("best_since", state["best"]))  # version 0.1 kept no other
        self.low_since = state.get("low_since")
        self.losses.extend(state["losses"])
        for kind, seen in state["recent"].items():
            self.recent[kind].extend(seen)
        self.warned.update(state["warned"])

    def check(self, metrics: dict, step: int, total_steps: int) -> list[Warning]:
        """`metrics`: plain floats (what MetricsLog.add returned last); those that are missing are not checked.

        Raises Diverged for a kind in `fatal`."""
        warm = step < self.warmup_fraction * total_steps
        # falls are measured against the best so far: what is normal depends on width, data and batch
        for name in ("feature_std", "rankme"):
            for best in (self.best,) if warm else (self.best, self.best_since):
                best[name] = max(best[name], metrics.get(name, 0.0))
        # DINO's own where losses are summed: ln K is a bound of that one alone
        if (loss := metrics.get("dino", metrics.get("loss"))) is not None:
            self.losses.append(loss)
            if len(self.losses) > max(1, 0.1 * total_steps):
                self.losses.popleft()
        if warm:
            return []
        seen = self._problems(metrics, step, total_steps)
        warnings = []
        for kind, sentence in seen.items():
            self.recent[kind].append(sentence is not None)
            # as many "no" as "yes" in a row: a metric at its threshold does not warn at every other step
            steady = len(self.recent[kind]) == self.patience
            if steady and all(self.recent[kind]) and kind not in self.warned:
                self.warned.add(kind)
                warnings.append(Warning(kind, f"Step {step}: {sentence}", advice(kind, self.has)))
            elif steady and not any(self.recent[kind]):
                self.warned.discard(kind)
        for warning in warnings:
            if warning.kind in self.fatal:
                raise Diverged(f"{warning} (Stopped because the config names {warning.kind!r} as fatal.)")
        return warnings

    def _problems(self, metrics: dict, step: int, total_steps: int) -> dict[str, str | None]:
        """Kind -> what looks wrong, or None where it looks well, for the metrics that are there. The thresholds lie far from where
        healthy runs of any size were seen."""
        problems: dict[str, str | None] = {}

        def flag(kind: str, wrong: bool, sentence: str) -> None:
            problems[kind] = sentence if wrong else None

        loss, entropy = (
            metrics.get("dino", metrics.get("loss")),
            metrics.get("teacher_entropy", metrics.get("dino_teacher_entropy")),
        )
        std, rank = metrics.get("feature_std"), metrics.get("rankme")
        similarity, drift = metrics.get("patch_cls_similarity"), metrics.get("center_drift")
        ln_k = self.ln_k
        active = metrics.get("active_prototypes", metrics.get("dino_active_prototypes"))
        if ln_k and active:  # of those in use at this point (objective.active_prototypes)
            ln_k = math.log(active)
        if ln_k and entropy is not None:
            flag(
                "uniform",
                entropy > 0.99 * ln_k,
                f"the teacher's entropy {entropy:.3f} is that of a uniform guess (ln K = {ln_k:.3f}): its targets say nothing.",
            )
            flag(
                "collapse",
                entropy < 0.02 * ln_k and loss is not None and loss < 0.1 * ln_k,
                f"the teacher's entropy is {entropy:.4f} of at most {ln_k:.3f} and the student agrees: every image gets the same "
                "prototype, and nothing is learned any more.",
            )
        if ln_k and loss is not None:
            # Against a student that guesses, cross-entropy is ln K whatever the targets are, and so it stays. A loss that passes ln K (Sinkhorn's
            # comes from above), or wobbles around it (by 0.5 % from step to step in the quickstart), is that of one which has learned.
            lately = list(self.losses)[-20:]
            flag(
                "loss_at_ln_k",
                all(abs(value - ln_k) < 0.003 * ln_k for value in lately),
                f"the loss {loss:.3f} still is that of guessing (ln K = {ln_k:.3f}): the student has learned nothing from its targets.",
            )
        if std is not None:
            flag(
                "features_collapsing",
                # by itself, not beside the best so far: a common direction of all features lowers the spread, too, and is harmless (0.16 of
                # 0.84 in the quickstart, and k-NN gained 25 points meanwhile)
                std < 0.05,
                f"feature std is {std:.3f} (best so far {self.best['feature_std']:.3f}): different images get nearly the same features.",
            )
        if rank is not None:
            # RankMe of an untrained network is high by chance. In the quickstart it dips to 0.3 of that during the first quarter, and doubles from
            # there on: what counts is a fall that goes on after the warm-up, and lasts.
            low = rank < min(0.4 * self.best["rankme"], 0.7 * self.best_since["rankme"])
            self.low_since = (step if self.low_since is None else self.low_since) if low else None
            flag(
                "rank_falling",
                self.low_since is not None and step - self.low_since >= LASTING * total_steps,
                f"RankMe fell to {rank:.1f} (best so far {self.best['rankme']:.1f}): features use ever fewer directions, which costs "
                "accuracy downstream.",
            )
        if similarity is not None:
            flag(
                "patches_collapsing",
                similarity > 0.9,
                f"patch tokens point where the class token does (mean cosine {similarity:.2f}): what lies where in the image is lost.",
            )
        if drift is not None:
            flag(
                "center_drifting",
                drift > 1,
                f"the centre lags {drift:.1f} temperatures behind the teacher's scores: targets follow the batch more than the image.",
            )
        return problems


# --- NaN ------------------------------------------------------------------------------------------------------------------


def save_replay(path: str | Path, batch: dict[str, Tensor], *, step: int, rank: int, keys: list[str]) -> Path:
    """Save the batch that gave NaN, as `ssl-locat pretrain CONFIG --replay FILE` reads it: a safetensors file, nothing executable."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in batch.items()}
    save_file(tensors, path, metadata={"step": str(step), "rank": str(rank), "keys": "\n".join(keys)})
    return path


def load_replay(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_replay` saved: the batch, and {"step", "rank", "keys"}."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file. Replays are saved in RUN/replay/ when a run stops at NaN.")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            batch = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        meta = {}
    if "step" not in meta:
        raise UserError(f"{path}: not a replay; expected a file from RUN/replay/, saved when a run stopped at NaN.")
    return batch, {"step": int(meta["step"]), "rank": int(meta["rank"]), "keys": meta["keys"].split("\n")}


def not_finite(
    step: int, rank: int, seen: dict[str, float], keys: list[str], replay: Path | None, num_shown: int = 8
) -> Diverged:
    """The error that ends a run at NaN: where, what was seen, which samples, and what to try. The caller raises it."""
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in seen.items() if isinstance(value, int | float))
    shown = ", ".join(keys[:num_shown]) + (f" and {len(keys) - num_shown} more" if len(keys) > num_shown else "")
    again = f"The batch is saved; look at it again with --replay {replay}. " if replay else ""
    return Diverged(
        f"Not a finite number at step {step} on rank {rank}: {numbers}. Samples: {shown}. {again}"
        "What people change: precision bf16 or fp32 instead of fp16, a lower lr or a longer warm-up, a smaller gradient clip, the head in fp32. "
        "The last checkpoint is from before; the same command resumes from it, with the change."
    )
