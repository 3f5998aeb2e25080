"""ILSVRC2012's archives, as they come, filled with small pictures: a tar of one tar per class, and a flat tar with a list of labels."""

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import simplejpeg

TRAIN, TEST = 1_281_167, 50_000
_DISTINCT = 4096
_SIDE = 40  # pixels


def write_source(folder: Path, train: int, test: int, classes: int) -> int:
    """ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and val.csv under `folder`; returns their bytes.

    A few thousand distinct JPEGs serve all keys: what is counted is how often and how they are read, not what they show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_picture(number) for number in range(min(_DISTINCT, train))]
    names = [f"n{number:08d}" for number in range(classes)]
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, name in enumerate(names):
            # to the image, whatever the number of classes: rounded shares that sum to all of them
            count = train * (number + 1) // classes - train * number // classes
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for i in range(count):
                    # 1301: neighbouring classes begin at other pictures
                    _add(archive, f"{name}_{i}.JPEG", pictures[(number * 1301 + i) % len(pictures)])
            _add(outer, f"{name}.tar", inner.getvalue())
    lines = ["name,class"]
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for i in range(test):
            _add(archive, f"ILSVRC2012_val_{i:08d}.JPEG", pictures[i % len(pictures)])
            lines.append(f"ILSVRC2012_val_{i:08d},{names[i % classes]}")
    (folder / "val.csv").write_text("\n".join(lines) + "\n")
    return sum(path.stat().st_size for path in folder.iterdir())


def _picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(
        np.kron(coarse, np.ones((_SIDE // 5, _SIDE // 5, 1), np.uint8)), quality=random.Random(seed).randint(50, 90)
    )


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
