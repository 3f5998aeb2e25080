"""Images with per-pixel labels: the published folder layouts, and shards or folders of image + mask.

A set is a dataset of undecoded pairs and a table from stored ids to class ids. Layouts read local folders; any store serves as shards.

    data: {layout: ade20k, train: /data/ADEChallengeData2016, test: /data/ADEChallengeData2016}
    data: {train: scenes-train-{000..003}.tar, test: scenes-val.tar, num_classes: 11}          # members KEY.jpg, KEY.seg.png
    data: {train: scenes/train, test: scenes/val, num_classes: 11}                             # each with images/ and masks/
"""

import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from ssl_locat.data.images.bands import Bands
from ssl_locat.data.images.decode import decode_image, decode_mask, find_image, find_mask
from ssl_locat.data.images.eight_bits import image_orientation
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.selections import some
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import ConfigError, CorruptSample, DataError, did_you_mean
from ssl_locat.evaluation.shared.metrics import VOID
from ssl_locat.evaluation.shared.options import SceneData
from ssl_locat.evaluation.shared.samples import open_split, open_store

DATA_KEYS = tuple(get_type_hints(SceneData))
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")


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
# the 19 labelIds that Cityscapes scores, in the order of its trainIds
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


class FilePairs:
    """Pairs of local files, a dataset as data/shards/index.py describes it. Every mask is looked for at once: a missing one is better
    known before an hour of training."""

    by_range, together, remote = False, 1, False

    def __init__(self, paths: list[tuple[Path, Path]], where: str, store: Store):
        missing = [path for pair in paths for path in pair if not path.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: no such file ({len(missing)} of the {2 * len(paths)} images and masks of {where} are missing)."
            )
        self.paths, self.name, self.store = paths, where, store
        names = "\0".join(f"{image.name}/{mask.name}" for image, mask in paths)
        self.manifest_hash = hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        some = paths[:: max(1, len(paths) // 32)]
        self.mean_bytes = sum(path.stat().st_size for pair in some for path in pair) / max(1, len(some))

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, start: int, stop: int) -> list[RawSample | Damage]:
        return [self._read(*pair) for pair in self.paths[start:stop]]

    def parse(self, entry: RawSample | Damage) -> RawSample | Damage:
        return entry

    def read(self, start: int, stop: int) -> list[RawSample | Damage]:
        return self.fetch(start, stop)

    def key_crcs(self) -> np.ndarray:
        names = (image.stem.encode("utf-8", "surrogateescape") for image, _ in self.paths)
        return np.fromiter(map(zlib.crc32, names), np.uint32, len(self))

    def _read(self, image: Path, mask: Path) -> RawSample | Damage:
        try:
            # the names only say what is what: decoders go by the bytes
            return RawSample({"jpg": image.read_bytes(), "seg.png": mask.read_bytes()}, str(mask), self.name)
        except OSError as error:
            return Damage(str(mask), self.name, f"cannot be read: {error.strerror or error}")


class Scenes:
    """A set of labelled scenes: `scenes[i]` is (image [H, W, C], mask int64 [H, W] of class ids 0..C-1 or 255).

    dataset: of the undecoded pairs (data/shards/index.py); `decode` makes a scene of one of its samples.
    """

    def __init__(
        self, dataset: Dataset, num_classes: int, table: np.ndarray, image_key: str | None = None, mask_key: str | None = None
    ):
        self.dataset, self.num_classes, self.table = dataset, num_classes, table
        self.image_key, self.mask_key = image_key, mask_key
        self.channels: Bands | int = 3  # of the images, as a backbone takes them: set by who reads
        if not len(dataset):
            raise DataError("the set holds no image. Expected images with masks; is the split's name right?")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        (raw,) = self.dataset.read(index, index + 1)
        if isinstance(raw, Damage):
            raise DataError(f"{raw.shard}: {raw.key}: {raw.reason}.")
        try:
            return self.decode(raw)
        except CorruptSample as error:
            raise DataError(f"{raw.shard}: {raw.key}: {error.reason}.") from None

    def decode(self, raw: RawSample) -> tuple[np.ndarray, np.ndarray]:
        """(image, mask). Raises CorruptSample for a pair that is damaged, DataError for one that the settings do not fit."""
        name = f"{raw.shard}: {raw.key}"
        encoded = find_image(raw.members, self.image_key)
        image = decode_image(encoded, channels=self.channels)
        stored = decode_mask(find_mask(raw.members, self.mask_key), orientation=image_orientation(encoded))
        if image.shape[:2] != stored.shape:
            raise DataError(
                f"{name}: the mask is {stored.shape[1]} x {stored.shape[0]} pixels, its image {image.shape[1]} x {image.shape[0]}. They must be equal."
            )
        mask = self.table[np.minimum(stored, len(self.table) - 1)]
        if (mask < 0).any():
            raise DataError(
                f"{name}: holds class id {stored[mask < 0].max()}; expected 0..{self.highest} and {VOID} for void. "
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


def zero_is_other(data: Mapping[str, Any]) -> bool:
    """Whether id 0 of a set means "none of the classes", by its layout or by data.reduce_zero_label."""
    layout = LAYOUTS.get(data.get("layout") or "")
    return layout.reduce_zero_label if layout else bool(data.get("reduce_zero_label"))


def open_scenes(data: Mapping[str, Any], name: str, *, other_is_a_class: bool = False) -> Scenes:
    """The scenes of `data.train` or `data.test` (name: 'train' or 'test').

    other_is_a_class: where id 0 means "other", ids stay as stored, 0..C, instead of 0 becoming void and the rest moving down.
    """
    for key in data:
        if key not in DATA_KEYS:
            raise ConfigError(f"unknown key 'data.{key}'.{did_you_mean(key, DATA_KEYS)} Known here: {', '.join(DATA_KEYS)}.")
    source, layout, limit = data.get(name), data.get("layout"), data.get(f"{name}_images")
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
        pairs = FilePairs(known.find(Path(source), chosen), f"{source} ({chosen})", open_store(data))
        num_classes = known.num_classes + other
        table = id_table(num_classes, remap=known.remap, reduce_zero_label=reduce_zero_label, ignore_index=ignore)
        return Scenes(some(pairs, limit), num_classes, table)
    if not data.get("num_classes"):
        raise ConfigError("data.num_classes is missing: masks cannot tell how many classes there are. Give it, or data.layout.")
    num_classes = data["num_classes"] + other
    table = id_table(num_classes, reduce_zero_label=reduce_zero_label, ignore_index=ignore)
    if isinstance(source, str) and (Path(source) / "images").is_dir():
        root = Path(source)
        masks = next((folder for folder in ("masks", "annotations", "labels") if (root / folder).is_dir()), "masks")
        pairs = FilePairs(_beside(root, "images", masks, lambda stem: f"{stem}.png"), source, open_store(data))
        return Scenes(some(pairs, limit), num_classes, table)
    return Scenes(open_split(data, name), num_classes, table, data.get("image_key"), data.get("mask_key"))
