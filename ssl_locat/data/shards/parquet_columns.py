"""Which columns of a Parquet file hold a sample, and what a row of them is as members.

The image is the column whose `huggingface` feature is an Image (or a list of Images), else one named image, img, jpg, ...: bytes,
struct<bytes, path>, or lists of these. The label is the ClassLabel, else an integer column named label, cls, ...
"""

import json
from typing import Any, NamedTuple

from ssl_locat.data.images.decode import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from ssl_locat.data.shards.tar import Damage
from ssl_locat.errors import DataError
from ssl_locat.text.shown import shown

# names of columns, in this order
_IMAGES = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "tif", "npy", "pixel_values", "picture", "photo")
_LABELS = ("label", "cls", "class", "labels", "fine_label", "target")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32")
_NUMBERS = (*_INTEGERS, "uint64", "float", "double", "halffloat", "bool")
_BYTES = ("binary", "large_binary")
_TEXTS = ("string", "large_string")
_MOST_IMAGES = 1000  # of one row: a burst or a stack, no data set

# the first bytes of files, where a path tells no ending
_MAGIC = {
    b"\x93NUMPY": "npy",
    b"\x89PNG": "png",
    b"PK\x03\x04": "npz",
    b"II\x2a\x00": "tif",
    b"MM\x00\x2a": "tif",
    b"II\x2b\x00": "tif",
}


class Columns(NamedTuple):
    image: str
    label: str | None
    classes: tuple[str, ...]
    further: tuple[str, ...] = ()  # of numbers, texts and bytes, read where a sample's metadata is asked for

    def read(self, metadata: bool) -> list[str]:
        return [self.image, *([self.label] if self.label else []), *(self.further if metadata else ())]


def choose_columns(footer: Any, url: str) -> Columns:
    """Image, label and names of the classes, by the Hugging Face's features where the file has them, else by the columns' names."""
    schema = footer.schema.to_arrow_schema()
    try:
        features = json.loads((footer.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    features = features if isinstance(features, dict) else {}
    names = [name for name in schema.names if schema.names.count(name) == 1]
    kinds = {name: schema.field(name).type for name in names}
    holds = [name for name in names if _holds_images(kinds[name])]
    image = next((name for name in holds if _feature(features.get(name)) == "Image"), None)
    image = image or next((name for wish in _IMAGES for name in holds if name.lower() == wish), None)
    image = image or (holds[0] if len(holds) == 1 else None)
    if image is None:
        raise DataError(
            f"{shown(url)}: no column of images among {', '.join(schema.names) or 'none'}; expected bytes, bytes and path, or lists of these, in "
            f"one named {', '.join(_IMAGES[:3])}, ..."
        )
    numbers = [name for name in names if str(kinds[name]) in _INTEGERS]
    label = next((name for name in numbers if _feature(features.get(name)) == "ClassLabel"), None)
    label = label or next((name for wish in _LABELS for name in numbers if name.lower() == wish), None)
    classes = features[label].get("names") if label and _feature(features.get(label)) == "ClassLabel" else None
    further = [name for name in names if name not in (image, label)]
    further = [name for name in further if str(kinds[name]) in (*_NUMBERS, *_TEXTS) or _holds_bytes(kinds[name])]
    return Columns(image, label, tuple(map(str, classes)) if isinstance(classes, list) else (), tuple(further))


def _feature(feature: Any) -> str | None:
    """A feature's type; that of its items, of a list."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
        feature = feature.get("feature")
    found = feature.get("_type") if isinstance(feature, dict) else None
    return found if isinstance(found, str) else None


def _holds_images(kind: Any) -> bool:
    return _holds_bytes(kind) or (str(kind).startswith(("list<", "large_list<")) and _holds_bytes(kind.value_type))


def _holds_bytes(kind: Any) -> bool:
    """bytes, or a struct of which one field is `bytes`."""
    if str(kind) in _BYTES:
        return True
    return str(kind).startswith("struct<") and any(
        kind.field(place).name == "bytes" and str(kind.field(place).type) in _BYTES for place in range(kind.num_fields)
    )


def row_members(row: dict[str, Any], columns: Columns, key: str, shard: str) -> tuple[dict[str, bytes], str] | Damage:
    """(members, path of the image where the row only names it) of a row: column -> value."""
    image, path = row[columns.image], ""
    members: dict[str, bytes] = {}
    if isinstance(image, list):
        # each by its place: `find_image` takes the first, data.image_key another
        if len(image) > _MOST_IMAGES:
            return Damage(key, shard, f"{len(image)} images in one row; read are up to {_MOST_IMAGES}")
        for place, one in enumerate(image):
            content, name = _content(one)
            if content is None:
                return Damage(key, shard, f"no image at place {place} of column {columns.image}")
            members[f"{place}.{ending_of(content, name)}"] = content
        if not image:
            return Damage(key, shard, f"an empty list in column {columns.image}")
    else:
        content, path = _content(image)
        if content is not None:
            members[ending_of(content, path)] = content
            path = ""
        elif not path:
            return Damage(key, shard, f"no image in column {columns.image}")
    if columns.label and row[columns.label] is not None:
        members["cls"] = b"%d" % row[columns.label]
    return members, path


def further_members(row: dict[str, Any], columns: Columns) -> dict[str, bytes]:
    """The other columns: bytes as members of their own, numbers and texts together as `json`."""
    found: dict[str, bytes] = {}
    plain = {}
    for name in columns.further:
        content, path = _content(row[name])
        if content is not None:
            found[f"{_as_extension(name)}.{ending_of(content, path)}"] = content
        elif not isinstance(row[name], dict | bytes):
            plain[name] = row[name]
    if any(value is not None for value in plain.values()):
        found["json"] = json.dumps(plain, ensure_ascii=False).encode()
    return found


def _content(value: Any) -> tuple[bytes | None, str]:
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
        return (value if isinstance(value, bytes) else None), path if isinstance(path, str) else ""
    return (value if isinstance(value, bytes) else None), ""


def ending_of(content: bytes, path: str) -> str:
    ending = path.rpartition(".")[2].lower()
    if ending in (*IMAGE_EXTENSIONS, *ARRAY_EXTENSIONS):
        return ending
    return next((ending for magic, ending in _MAGIC.items() if content.startswith(magic)), "jpg")


def _as_extension(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in name.lower())
