"""The picture of the first batch: crops as the networks saw them, hidden patches in grey, once in a run."""

import numpy as np
import torch
from PIL import Image

from ssl_locat.data.images.tiles import GAP, TILE
from ssl_locat.pretraining.first_crops import FirstCrops

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def crops(views: int, images: int, size: int) -> torch.Tensor:
    """[V*B, 3, size, size], view-major; crop v of image i is plain, of brightness (10 * i + v) / 100, as normalised."""
    plain = torch.tensor([[(10 * image + view) / 100 for image in range(images)] for view in range(views)]).flatten()
    return (plain.view(-1, 1, 1, 1).expand(-1, 3, size, size) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )


def test_rows_are_images_and_columns_their_crops(tmp_path):
    first = FirstCrops(tmp_path, MEAN, STD)
    hidden = torch.zeros(12, 16, dtype=torch.bool)
    hidden[6 + 1, 5] = True  # second view of the second image: patch in row 1, column 1 of 4 x 4
    first.show(crops(2, 6, 32), crops(3, 6, 16), hidden)
    picture = np.array(Image.open(tmp_path / "pictures/crops.png"))
    assert picture.shape == (4 * (TILE + GAP) - GAP, 5 * (TILE + GAP) - GAP, 4)
    for image in range(4):
        for column in range(5):
            view = column if column < 2 else column - 2
            top, left = image * (TILE + GAP), column * (TILE + GAP)
            tile = picture[top : top + TILE, left : left + TILE, :3]
            wanted = np.full_like(tile, round(255 * (10 * image + view) / 100))
            if (image, column) == (1, 1):
                wanted[TILE // 4 : TILE // 2, TILE // 4 : TILE // 2] = 128
            assert np.abs(tile.astype(int) - wanted).max() <= 1
    written = (tmp_path / "pictures/crops.png").stat().st_mtime_ns
    first.show(crops(2, 6, 32), None, None)
    FirstCrops(tmp_path, MEAN, STD).show(crops(2, 6, 32), None, None)  # of a resumed run
    assert (tmp_path / "pictures/crops.png").stat().st_mtime_ns == written


def test_many_channels_and_few_images(tmp_path):
    FirstCrops(tmp_path, (0.5,) * 5, (0.2,) * 5).show(torch.randn(4, 5, 32, 32), torch.randn(40, 5, 16, 16), None)
    assert Image.open(tmp_path / "pictures/crops.png").size == (8 * (TILE + GAP) - GAP, 2 * (TILE + GAP) - GAP)
