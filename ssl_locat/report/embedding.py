"""A scatter of images by their features: the first two principal components, coloured by label where there is one."""

import base64
import io
from collections import Counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

WIDTH, HEIGHT, MARGIN = 720, 440, 14  # of the drawing
COLOURS = 12  # labels with a colour of their own, the commonest ones; the others are grey
SPRITE = 40  # pixels of a thumbnail, which is shown under the pointer


def scatter(features: Tensor, labels: list[str | None], thumbnails: list[np.ndarray]) -> dict[str, Any] | None:
    """features [n, D], a label or None for each, uint8 [S, S, 3] each -> what embedding in page.html draws; None for too few images."""
    if len(features) < 8:
        return None
    unit = F.normalize(features.double(), dim=-1)
    centred = unit - unit.mean(0)
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    places = centred @ directions[:2].T
    places = places * torch.where(places.abs().amax(0) == places.amax(0), 1.0, -1.0)  # the same side each time
    shares = (strengths.square() / strengths.square().sum().clamp_min(1e-12))[:2].tolist()
    low, high = places.amin(0), places.amax(0)
    scaled = (places - low) / (high - low).clamp_min(1e-9)
    common = [label for label, _ in Counter(label for label in labels if label is not None).most_common(COLOURS)]
    common.sort(key=lambda label: (len(label), label) if label.isdigit() else (99, label))
    colour = {label: number for number, label in enumerate(common)}
    points = [
        {
            "x": round(MARGIN + (WIDTH - 2 * MARGIN) * x, 1),
            "y": round(MARGIN + (HEIGHT - 2 * MARGIN) * (1 - y), 1),
            "colour": colour.get(label or "", -1) if label is not None else 0 if not common else -1,
            "label": label,
        }
        for (x, y), label in zip(scaled.tolist(), labels, strict=True)
    ]
    sprite, columns = _sprite(thumbnails)
    more = len({label for label in labels if label is not None}) > len(common)
    return {"points": points, "legend": list(colour.items()), "more": more, "shares": shares, "width": WIDTH, "height": HEIGHT,
            "sprite": sprite, "columns": columns, "tile": SPRITE}  # fmt: skip


def _sprite(thumbnails: list[np.ndarray]) -> tuple[str, int]:
    """All thumbnails in one square picture, and how many lie in a row."""
    columns = int(np.ceil(np.sqrt(len(thumbnails))))
    canvas = Image.new("RGB", (columns * SPRITE, -(-len(thumbnails) // columns) * SPRITE))
    for index, tile in enumerate(thumbnails):
        small = Image.fromarray(tile).resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        canvas.paste(small, (index % columns * SPRITE, index // columns * SPRITE))
    return encoded(canvas), columns


def encoded(picture: Image.Image) -> str:
    """As WebP in base64: a tenth of PNG for photographs, with transparency."""
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=85, method=4)
    return base64.b64encode(out.getvalue()).decode()
