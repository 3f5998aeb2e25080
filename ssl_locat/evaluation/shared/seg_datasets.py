"""Images with per-pixel labels: the published folder layouts, and shards or folders of image + mask.

A set is a sequence of `Pair`s and a table from stored ids to class ids. Layouts read local folders; any store serves as shards.

    data: {layout: ade20k, train: /data/ADEChallengeData2016, test: /data/ADEChallengeData2016}
    data: {train: scenes-train-{000..003}.tar, test: scenes-val.tar, num_classes: 11}          # members KEY.jpg, KEY.seg.png
    data: {train: scenes/train, test: scenes/val, num_classes: 11}                             # each with images/ and masks/
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_locat.data.images.decode import decode_image, decode_mask, find_image, find_mask, image_orientation
from ssl_locat.errors import ConfigError, CorruptSample, DataError, did_you_mean
from ssl_locat.evaluation.shared.metrics import VOID
from ssl_locat.evaluation.shared.options import SceneData
from ssl_locat.evaluation.shared.samples import Members

DATA_KEYS = tuple(SceneData.__annotations__)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


class Pair(NamedTuple):
    """One image and its mask, still encoded, and the name to show when something is wrong with them."""

    image: bytes
    mask: bytes
    name: str


@dataclass(frozen=True)
class Layout:
    """Where a published data set keeps its files, and what its ids mean.

    find(root, split) -> [(image, mask)]; remap: stored id -> class id, None keeps ids; anything not in it is VOID.
    """

    find: Callable[[Path, str], list[tuple[Path, Path]]]
    num_classes: int
    splits: tuple[str, str]  # names of the training and the test split
    remap: dict[int, int] | None = None
    reduce_zero_label: bool = False


def _beside(root: Path, images: str, masks: str, mask_name: Callable[[str], str], pattern: str = "*") -> list[tuple[Path, Path]]:
    """Every image below `images` with the mask of the same relative place below `masks`."""
    folder = root / images
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Expected the published layout below {root}: {images}/ and {masks}/.")
    found = sorted(path for path in folder.rglob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES)
    return [(path, root / masks / path.relative_to(folder).parent / mask_name(path.stem)) for path in found]


def _listed(root: Path, list_file: str, images: str, masks: str) -> list[tuple[Path, Path]]:
    """The pairs whose stems a VOC-style list file names."""
    path = root / list_file
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. Expected the published layout: it lists the images of the split, one name a line."
        )
    stems = path.read_text(encoding="utf-8").split()
    return [(root / images / f"{stem}.jpg", root / masks / f"{stem}.png") for stem in stems]


def _voc(root: Path, split: str) -> list[tuple[Path, Path]]:
    augmented = split == "trainaug"  # VOC 2012 + SBD; its masks have a folder of their own
    return _listed(
        root, f"ImageSets/Segmentation/{split}.txt", "JPEGImages", "SegmentationClassAug" if augmented else "SegmentationClass"
    )


def _coco_stuff(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Masks as published (raw ids 0..181). mmseg's converted `_labelTrainIds.png` beside them are passed over: same content."""
    return _beside(root, f"images/{split}", f"annotations/{split}", lambda stem: f"{stem}.png")


def _cityscapes(root: Path, split: str) -> list[tuple[Path, Path]]:
    return _beside(
        root, f"leftImg8bit/{split}", f"gtFine/{split}", lambda stem: stem.removesuffix("_leftImg8bit") + "_gtFine_labelIds.png"
    )


# COCO's 91 things have 11 ids that were never used; stuff follows; stored as id - 1
_COCO_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
_COCO_STUFF = {stored: new for new, stored in enumerate(i for i in range(182) if i not in _COCO_UNUSED)}
_CITYSCAPES = {
    stored: new for new, stored in enumerate((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))
}

LAYOUTS = {
    "ade20k": Layout(
        lambda root, split: _beside(root, f"images/{split}", f"annotations/{split}", lambda stem: f"{stem}.png"),
        150, ("training", "validation"), reduce_zero_label=True,
    ),
    "pascal_context": Layout(
        lambda root, split: _listed(root, f"ImageSets/SegmentationContext/{split}.txt", "JPEGImages", "SegmentationClassContext"),
        59, ("train", "val"), reduce_zero_label=True,
    ),
    "coco_stuff": Layout(_coco_stuff, 171, ("train2017", "val2017"), remap=_COCO_STUFF),
    "voc": Layout(_voc, 21, ("trainaug", "val")),
    "cityscapes": Layout(_cityscapes, 19, ("train", "val"), remap=_CITYSCAPES),
    "camvid": Layout(  # SegNet's 11 classes; 11 is "unlabelled"
        lambda root, split: _beside(root, split, f"{split}annot", lambda stem: f"{stem}.png"),
        11, ("train", "val"), remap={i: i for i in range(11)},
    ),
}  # fmt: skip


class FilePairs(Sequence):
    """Pairs of local files. Every mask is looked for at once: a missing one is better known before an hour of training."""

    def __init__(self, paths: list[tuple[Path, Path]], where: str):
        missing = [path for pair in paths for path in pair if not path.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: no such file ({len(missing)} of the {2 * len(paths)} images and masks of {where} are missing)."
            )
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pair:
        image, mask = self.paths[index]
        return Pair(image.read_bytes(), mask.read_bytes(), str(mask))


class ShardPairs(Sequence):
    """Pairs of members of shards."""

    def __init__(self, spec: str | list, image_key: str | None, mask_key: str | None):
        self.members, self.image_key, self.mask_key = Members(spec), image_key, mask_key

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Pair:
        sample = self.members[index]
        try:
            return Pair(
                find_image(sample.members, self.image_key),
                find_mask(sample.members, self.mask_key),
                f"{sample.shard}: {sample.key}",
            )
        except CorruptSample as error:
            raise DataError(f"{sample.shard}: {sample.key}: {error.reason}.") from None


class Scenes:
    """A set of labelled scenes: `scenes[i]` is (image uint8 [H, W, 3], mask int64 [H, W] of class ids 0..C-1 or 255)."""

    def __init__(self, pairs: Sequence[Pair], num_classes: int, table: np.ndarray):
        self.pairs, self.num_classes, self.table = pairs, num_classes, table
        if not len(pairs):
            raise DataError("the set holds no image. Expected images with masks; is the split's name right?")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        pair = self.pairs[index]
        try:
            image = decode_image(pair.image)
            stored = decode_mask(pair.mask, orientation=image_orientation(pair.image))
        except CorruptSample as error:
            raise DataError(f"{pair.name}: {error.reason}.") from None
        if image.shape[:2] != stored.shape:
            raise DataError(
                f"{pair.name}: the mask is {stored.shape[1]} x {stored.shape[0]} pixels, its image {image.shape[1]} x {image.shape[0]}. They must be equal."
            )
        mask = self.table[np.minimum(stored, len(self.table) - 1)]
        if (mask < 0).any():
            raise DataError(
                f"{pair.name}: holds class id {stored[mask < 0].max()}; expected 0..{self.highest} and {VOID} for void. "
                "Is data.num_classes right, or does the set need data.reduce_zero_label?"
            )
        return image, mask

    @property
    def highest(self) -> int:
        """The largest stored id that means a class."""
        return int(np.flatnonzero((self.table >= 0) & (self.table != VOID)).max())


def id_table(
    num_classes: int, *, remap: dict[int, int] | None = None, reduce_zero_label: bool = False, ignore_index: int = VOID
) -> np.ndarray:
    """int64 [257]: stored id -> class id, VOID, or -1 for "not allowed"; the last entry stands for everything above 255."""
    table = np.full(257, -1, dtype=np.int64)
    if remap is not None:
        table[:256] = VOID  # published remappings give up all other ids
        for stored, new in remap.items():
            table[stored] = new
    else:
        first = 1 if reduce_zero_label else 0
        table[first : first + num_classes] = np.arange(num_classes)
        if reduce_zero_label:
            table[0] = VOID
    table[VOID] = VOID
    if ignore_index != VOID and 0 <= ignore_index < VOID:
        table[ignore_index] = VOID
    return table


def zero_is_other(data: dict) -> bool:
    """Whether id 0 of a set means "none of the classes", by its layout or by data.reduce_zero_label."""
    layout = LAYOUTS.get(data.get("layout"))
    return layout.reduce_zero_label if layout else bool(data.get("reduce_zero_label"))


def open_scenes(data: dict, name: str, *, other_is_a_class: bool = False) -> Scenes:
    """The scenes of `data.train` or `data.test` (name: 'train' or 'test').

    other_is_a_class: where id 0 means "other", ids stay as stored, 0..C, instead of 0 becoming void and the rest moving down.
    """
    for key in data:
        if key not in DATA_KEYS:
            raise ConfigError(f"unknown key 'data.{key}'.{did_you_mean(key, DATA_KEYS)} Known here: {', '.join(DATA_KEYS)}.")
    source, layout = data.get(name), data.get("layout")
    if not source:
        raise ConfigError(
            f"data.{name} is missing: images with masks, as shards, a folder of images/ and masks/, or a root with data.layout."
        )
    ignore = data.get("ignore_index", VOID)
    reduce_zero_label = zero_is_other(data) and not other_is_a_class
    other = int(zero_is_other(data) and other_is_a_class)
    if layout is not None:
        if layout not in LAYOUTS:
            raise ConfigError(f"data.layout is {layout!r}; known: {', '.join(LAYOUTS)}.{did_you_mean(layout, LAYOUTS)}")
        known = LAYOUTS[layout]
        chosen = data.get(f"{name}_split") or known.splits[name == "test"]
        pairs: Sequence[Pair] = FilePairs(known.find(Path(source), chosen), f"{source} ({chosen})")
        num_classes = known.num_classes + other
        table = id_table(num_classes, remap=known.remap, reduce_zero_label=reduce_zero_label, ignore_index=ignore)
        return Scenes(pairs, num_classes, table)
    num_classes = data.get("num_classes")
    if not num_classes:
        raise ConfigError("data.num_classes is missing: masks cannot tell how many classes there are. Give it, or data.layout.")
    if isinstance(source, str) and (Path(source) / "images").is_dir():
        root = Path(source)
        masks = next((folder for folder in ("masks", "annotations", "labels") if (root / folder).is_dir()), "masks")
        pairs = FilePairs(_beside(root, "images", masks, lambda stem: f"{stem}.png"), source)
    else:
        pairs = ShardPairs(source, data.get("image_key"), data.get("mask_key"))
    num_classes += other
    return Scenes(pairs, num_classes, id_table(num_classes, reduce_zero_label=reduce_zero_label, ignore_index=ignore))
