"""Pictures for the report, made from a run's checkpoints on a few fixed images of its data.

Attention of the class token per head and of chosen patches, principal components of patch features over checkpoints, nearest neighbours, a
scatter of images (embedding.py), and what GAug learned (sigma and alpha per layer). The crops of the first batch come from the run itself.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.images.tiles import GAP, TILE, as_tiles, montage
from ssl_locat.errors import EXPECTED, CorruptSample
from ssl_locat.evaluation.shared.image_views import as_picture, channels_of
from ssl_locat.evaluation.shared.samples import Members
from ssl_locat.models.backbone import load_backbone
from ssl_locat.models.gaug import GAug
from ssl_locat.models.tokens import class_token, forward_tokens, refine
from ssl_locat.report.charts import Chart, Line
from ssl_locat.report.embedding import encoded, scatter
from ssl_locat.runs.history import Run
from ssl_locat.runs.log import progress
from ssl_locat.runs.marker import problem

log = logging.getLogger(__name__)

NUM_IMAGES = 4  # rows of every picture
NUM_CHECKPOINTS = 5  # columns of the component pictures
NUM_NEIGHBOURS = 6
NUM_SEARCHED = 256  # images among which neighbours are looked for, and dots of the scatter: a glance, not a score
MOST_BYTES = 20_000_000  # of a picture that a run left: one that is larger is not of ours

GAUG_CHARTS = [
    ("Width of the Gaussian, sigma", "In patches, per layer.", "Small keeps attention near the patch."),
    ("Height of the Gaussian, alpha", "In logits, per layer.", "Large means that nearness counts much."),
]

_made: dict[tuple, dict] = {}  # (run, newest checkpoint) -> pictures: a live page asks again and again


class Shot(NamedTuple):
    """What one checkpoint makes of the images [B, 3, H, W]."""

    features: Tensor  # [B, D]
    patches: Tensor  # [B, rows, cols, D]
    attention: Tensor | None  # [B, heads, T, T] of the last block, T = R + rows * cols; None where it is windowed
    num_prefix: int


def pictures(run: Run) -> dict:
    """{"sections": [{title, meaning, pictures}], "note"} for the page; no sections, and the reason, where there is nothing to show."""
    folders = sorted((run.path / "checkpoints").glob("step_" + "[0-9]" * 8))
    whole = [path for path in folders if problem(path) is None]
    crops = _crops_section(run)
    if not whole:
        return {"sections": crops, "note": ""}
    key = (str(run.path.resolve()), whole[-1].name)
    if key not in _made:
        try:
            found = _sections(run, [int(path.name[5:]) for path in whole])
            _made[key] = {"sections": found, "note": f"By the teacher of step {int(whole[-1].name[5:]):,}."}
        except (*EXPECTED, OSError) as error:  # data that has moved must not cost the rest of the page
            log.warning("The report goes without pictures of the checkpoints: %s", error)
            _made[key] = {"sections": [], "note": f"No pictures: {error}"}
    return _made[key] | {"sections": [*crops, *_made[key]["sections"]]}


def _crops_section(run: Run) -> list[dict]:
    """Crops of the first batch, which the run left as a picture; [] for a run of a version that left none."""
    path = run.path / "pictures" / "crops.png"
    try:
        if path.stat().st_size > MOST_BYTES:
            return []
        with Image.open(path, formats=["PNG"]) as file:
            picture = file.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return []
    columns = (picture.width + GAP) // (TILE + GAP)
    meaning = (
        "Crops of the first batch after augmentation, as the networks saw them: in each row one image, first its two global crops, then local "
        "ones, all drawn at one size. Grey patches are hidden from the student. What you would not recognise yourself is too much."
    )
    alt = f"{(picture.height + GAP) // (TILE + GAP)} images, {columns} augmented crops each."
    return [{"title": "What it was trained on", "meaning": meaning, "pictures": [_inlined(picture, alt)]}]


def _sections(run: Run, steps: list[int]) -> list[dict]:
    # evenly over the checkpoints that are left, the newest always among them
    chosen = sorted({steps[round(place)] for place in np.linspace(0, len(steps) - 1, NUM_CHECKPOINTS)})
    backbones = ((step, load_backbone(str(run.path), step=step)) for step in chosen)
    components: list[tuple[int, Tensor]] = []
    images: Tensor | None = None
    with progress("pictures", total=len(chosen) + 1, unit="checkpoints") as bar:
        for step, backbone in backbones:
            if images is None:
                images, labels = _fixed_images(run, backbone)
            shot = _capture(backbone, images[:NUM_IMAGES])
            # the former picture fixes the signs of the components
            components.append((step, _components(shot.patches, components[-1][1] if components else None)))
            bar.update()
        assert images is not None, "there is at least one checkpoint"
        everything = torch.cat([_capture(backbone, part).features for part in images.split(16)])
        bar.update()
    thumbnails = as_tiles(
        images,
        backbone.pretrained_cfg["mean"],
        backbone.pretrained_cfg["std"],
        (backbone.pretrained_cfg.get("channels") or {}).get("show"),
    )
    sections = [
        _scatter_section(everything, labels, thumbnails),
        _neighbour_section(everything, thumbnails),
        _component_section(components, thumbnails),
        *_attention_sections(shot, thumbnails),
    ]
    return [section for section in [*sections, *_gaug_sections(backbone, images[:16])] if section]


# --- looking --------------------------------------------------------------------------------------------------------------


def _fixed_images(run: Run, backbone: nn.Module) -> tuple[Tensor, list[str | None]]:
    """[n, C, S, S], normalised as the backbone wants it, and the name of each one's class, if it has one: the same images for every
    checkpoint, spread over the data."""
    data = run.config["data"]
    members = Members(data.get("test") or data["train"], run_filters=False)
    size = int(backbone.pretrained_cfg["input_size"][-1])
    # spread, as classes may lie one after the other
    places = np.linspace(0, len(members) - 1, min(NUM_SEARCHED, len(members))).round().astype(int)
    images, labels = [], []
    for place in places.tolist():
        try:
            sample = members[place]
            pixels = decode_image(find_image(sample.members, data.get("image_key")), channels=channels_of(backbone))
        except CorruptSample:
            continue
        labels.append(_class_name(sample.members, data.get("label_key"), members.dataset.classes))
        images.append(
            torch.from_numpy(np.array(as_picture(pixels, lambda picture: _square(picture, size)))).permute(2, 0, 1) / 255
        )
    mean, std = (torch.tensor(backbone.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (torch.stack(images) - mean) / std, labels


def _class_name(members: dict, label_key: str | None, classes: list[str]) -> str | None:
    try:
        label = find_label(members, label_key)
    except CorruptSample:
        return None
    return classes[label] if label < len(classes) else str(label)


def _square(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


class _Recorder(TorchFunctionMode):
    """Keeps the weights [B, heads, T, T] of every attention that is computed: whatever the model adds to the logits is in its mask."""

    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k = args[:2]
            scale, mask = kwargs.get("scale"), kwargs.get("attn_mask")
            logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
            self.weights.append((logits if mask is None else logits + mask).softmax(-1))
        return function(*args, **kwargs)


@torch.no_grad()
def _capture(backbone: nn.Module, images: Tensor) -> Shot:
    recorder = _Recorder()
    with recorder:
        raw = forward_tokens(backbone, images)
    rows, cols = raw.grid
    num_prefix = raw.prefix.shape[1]
    # of the last block
    weights = recorder.weights[-1] if recorder.weights else None
    # [B, heads, T, T] with T of the whole image
    if weights is not None and weights.shape[::3] != (len(images), num_prefix + rows * cols):
        weights = None  # windowed attention: no map of the whole image
    return Shot(class_token(backbone, refine(backbone, raw)), raw.patches.unflatten(1, (rows, cols)), weights, num_prefix)


def _components(patches: Tensor, former: Tensor | None) -> Tensor:
    """[B, rows, cols, D] -> [B, rows, cols, 3] in 0..1: the first three principal components of all patches, as colours.

    Signs follow the former checkpoint's picture, so that colours do not flip from column to column."""
    # [B * rows * cols, D]: one set of axes for all images, so that like parts look alike
    flat = patches.flatten(0, 2)
    flat = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    projected = flat @ directions[:3].T
    if former is not None:
        projected = projected * torch.where((projected * (former.flatten(0, 2) - 0.5)).sum(0) < 0, -1.0, 1.0)
    # quantiles, as a few outlier tokens would take the whole range of colours
    low, high = projected.quantile(0.02, dim=0), projected.quantile(0.98, dim=0)
    return ((projected - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).unflatten(0, patches.shape[:3])


# --- sections -------------------------------------------------------------------------------------------------------------


def _attention_sections(shot: Shot, thumbnails: list[np.ndarray]) -> list[dict]:
    if shot.attention is None:
        return []
    rows, cols = shot.patches.shape[1:3]
    sections = []
    if shot.num_prefix:
        # [B, heads, T, T] -> [B, heads, rows, cols]: what the class token gives to each patch
        maps = shot.attention[:, :, 0, shot.num_prefix :].unflatten(-1, (rows, cols))
        heads = min(maps.shape[1], 6)
        tiles = [[thumbnails[index], *(_heat(maps[index, head]) for head in range(heads))] for index in range(len(maps))]
        meaning = "Where the class token of the last block looks: each row an image, each further column a head. Bright is much."
        alt = f"Attention of the class token: {len(maps)} images, {heads} heads each."
        sections.append({"title": "Attention of the class token", "meaning": meaning, "pictures": [_picture(tiles, alt)]})
    places = [(rows // 2, cols // 2), (rows // 4, cols // 4), (3 * rows // 4, 3 * cols // 4)]
    tiles = []
    for index in range(len(shot.attention)):
        maps = [shot.attention[index, :, shot.num_prefix + y * cols + x, shot.num_prefix :].mean(0) for y, x in places]
        drawn = [_marked(_heat(m.unflatten(0, (rows, cols))), y, x, rows, cols) for m, (y, x) in zip(maps, places, strict=True)]
        tiles.append([thumbnails[index], *drawn])
    meaning = "Where chosen patches (marked) of the last block look, mean over heads. LocAt keeps some of it near the patch."
    alt = f"Attention of three patches in each of {len(tiles)} images."
    return [*sections, {"title": "Attention of patches", "meaning": meaning, "pictures": [_picture(tiles, alt)]}]


def _component_section(components: list[tuple[int, Tensor]], thumbnails: list[np.ndarray]) -> dict:
    tiles = [
        [thumbnails[index], *(_resized((colours[index] * 255).byte().numpy()) for _, colours in components)]
        for index in range(NUM_IMAGES)
        if index < len(components[0][1])
    ]
    steps = ", ".join(str(step) for step, _ in components)
    meaning = "Patch features' first three principal components as red, green and blue. Parts of one object take one colour."
    alt = f"Principal components of patch features of {len(tiles)} images at steps {steps}."
    picture = _picture(tiles, alt) | {"caption": f"Columns: image, then steps {steps}."}
    return {"title": "Patch features over the run", "meaning": meaning, "pictures": [picture]}


def _scatter_section(features: Tensor, labels: list[str | None], thumbnails: list[np.ndarray]) -> dict | None:
    drawing = scatter(features, labels, thumbnails)
    if drawing is None:
        return None
    first, second = (f"{100 * share:.0f} %" for share in drawing["shares"])
    of_what = "coloured by label" if drawing["legend"] else "without labels"
    meaning = (
        f"Each dot is an image, {of_what}: the first two principal components of its features, which hold {first} and {second} "
        "of their variance. Good: dots of one colour lie together. In two dimensions much of that is lost."
    )
    return {"title": "Images by their features", "meaning": meaning, "pictures": [], "scatter": drawing}


def _neighbour_section(features: Tensor, thumbnails: list[np.ndarray]) -> dict | None:
    if len(features) <= NUM_NEIGHBOURS:
        return None
    similarity = F.normalize(features, dim=-1) @ F.normalize(features, dim=-1).T
    similarity.fill_diagonal_(-2)  # no image is its own neighbour; cosines end at -1
    queries = np.linspace(0, len(features) - 1, NUM_IMAGES + 1).astype(int)[:NUM_IMAGES]
    tiles = [[thumbnails[q], *(thumbnails[i] for i in similarity[q].topk(NUM_NEIGHBOURS).indices.tolist())] for q in queries]
    meaning = (
        f"The first image of a row, then its nearest among {len(features)} by cosine of features. They should share what matters."
    )
    alt = f"{len(tiles)} images, each with its {NUM_NEIGHBOURS} nearest neighbours."
    return {"title": "Nearest neighbours", "meaning": meaning, "pictures": [_picture(tiles, alt)]}


@contextmanager
def _recorded(modules: list[GAug]) -> Iterator[dict]:
    """What each GAug predicts during the block: index -> (sigma, alpha), flat."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(index: int):
        def hook(module, args, output) -> None:
            along_cols, along_rows = module.deviation(output)
            seen[index] = (torch.cat([along_cols.flatten(), along_rows.flatten()]), output.alpha.flatten())

        return hook

    handles = [module.register_forward_hook(note(index)) for index, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _gaug_sections(backbone: nn.Module, images: Tensor) -> list[dict]:
    modules = [module for module in backbone.modules() if isinstance(module, GAug)]
    if not modules:
        return []
    with _recorded(modules) as seen:
        forward_tokens(backbone, images)
    layers = list(range(1, len(modules) + 1))
    charts = []
    for which, (name, what, good) in enumerate(GAUG_CHARTS):
        quantiles = torch.stack(
            [torch.quantile(_few(seen[index][which]), torch.tensor([0.1, 0.5, 0.9])) for index in range(len(modules))]
        )
        labels = ("10 % of patches below", "median", "90 % below")
        lines = [
            Line(label, layers, quantiles[:, i].tolist(), color=i, dashed=i != 1, dots=True) for i, label in enumerate(labels)
        ]
        charts.append(Chart(name, what, lines, "layer", good, whole_run=False))
    return [
        {
            "title": "What GAug learned",
            "meaning": "The Gaussian that LocAt adds to each patch's attention.",
            "pictures": [],
            "charts": charts,
        }
    ]


def _few(values: Tensor) -> Tensor:
    """100 000 of them, about: torch.quantile takes no more than 16 million."""
    return values[:: max(1, len(values) // 100_000)].float()


# --- tiles ----------------------------------------------------------------------------------------------------------------


def _heat(values: Tensor) -> np.ndarray:
    """[rows, cols] -> uint8 [TILE, TILE, 3]."""
    scaled = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    return _resized((matplotlib.colormaps["magma"](scaled.numpy())[..., :3] * 255).astype(np.uint8))


def _resized(pixels: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST))


def _marked(tile: np.ndarray, y: int, x: int, rows: int, cols: int) -> np.ndarray:
    top, left, bottom, right = TILE * y // rows, TILE * x // cols, TILE * (y + 1) // rows - 1, TILE * (x + 1) // cols - 1
    tile[[top, bottom], left : right + 1] = tile[top : bottom + 1, left] = tile[top : bottom + 1, right] = (80, 220, 255)
    return tile


def _picture(tiles: list[list[np.ndarray]], alt: str) -> dict:
    return _inlined(montage(tiles), alt)


def _inlined(picture: Image.Image, alt: str) -> dict:
    return {"webp": encoded(picture), "width": picture.width, "height": picture.height, "alt": alt, "caption": ""}
