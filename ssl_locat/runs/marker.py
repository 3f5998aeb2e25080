"""checkpoint.json: what a checkpoint folder holds besides tensors, and whether the folder is what it says.

    {"format": 1, "step", "meta", "scaler", "scalars", "groups", "saved",
     "files": {name: bytes}, "sha256": {name: of the whole file}, "seal": sha256 of all of the above}

`problem` looks at names, sizes and headers in milliseconds; with `contents` it reads every byte (about a second for a GB and core) and
finds what those cannot show: a flipped bit, a block of zeros, files or names that were swapped. Checkpoints of version 0.1 have neither
"sha256" nor "seal"; they load, and a line in the log says that their contents cannot be checked.
"""

import hashlib
import json
import logging
import math
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from ssl_locat.errors import CheckpointError
from ssl_locat.text.shown import redacted

log = logging.getLogger(__name__)

FORMAT = 1
MARKER = "checkpoint.json"

# of what a marker must hold; bool is no int here
KINDS = {"step": int, "meta": dict, "scaler": dict | None, "scalars": list, "groups": list, "files": dict}
# bytes of an element, by safetensors' names
DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
DTYPES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows


def write_seal(content: dict[str, Any]) -> str:
    """The text of checkpoint.json for this content, without the credentials in it."""
    content = redacted(content)
    return json.dumps(content | {"seal": _seal(content)})


def problem(path: str | Path, contents: bool = False) -> str | None:
    """What is wrong with the checkpoint folder `path`; None if it is whole. `contents`: read all of it and compare the hashes."""
    path = Path(path)
    wrong = _outside(path)
    return wrong or (damage(path, hashes(path)) if contents else None)


def hashes(path: Path) -> dict[str, str]:
    """{file: sha256} of a checkpoint without a `problem`; {} of version 0.1."""
    found: dict[str, str] = json.loads((path / MARKER).read_text()).get("sha256", {})
    return found


def damage(path: Path, expected: dict[str, str], names: Iterable[str] | None = None) -> str | None:
    """The first of the files (or of `names` among them) whose bytes are not those that were written."""
    for name in expected if names is None else names:
        try:
            # inode, size and time are part of the cache's key: a replaced file is read again
            stat = (path / name).stat()
            found = _sha256(path / name, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if found != expected[name]:
            return f"{name} does not hold the bytes that were written (its SHA-256 is another): the file was damaged or exchanged"
    return None


@cache
def _sha256(file: Path, *_same_file: int) -> str:
    """Kept while the process lives, as long as inode, size and time are the same: one load asks more than once."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_marker(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint; CheckpointError if the folder is not whole by names, sizes and headers."""
    if wrong := problem(path):
        raise CheckpointError(f"{path} is not a whole checkpoint: {wrong}. Expected a folder step_NNNNNNNN with {MARKER} in it.")
    content: dict[str, Any] = json.loads((path / MARKER).read_text())
    return content


def require_intact(path: Path) -> None:
    """CheckpointError unless every byte is as it was written; a line in the log where that cannot be told."""
    if wrong := problem(path, contents=True):
        raise CheckpointError(f"{path} is damaged: {wrong}. Take another checkpoint of this run, or put back a copy of this one.")
    if not hashes(path):
        log.info("%s was written by version 0.1, without hashes: its contents cannot be checked", path)


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, by step."""
    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdecimal()), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name[5:])


def _outside(path: Path) -> str | None:
    try:
        text = (path / MARKER).read_text(encoding="utf-8")
        content = json.loads(text)
        if not isinstance(content, dict):
            return f"{MARKER} holds no object"
        if content.get("format") != FORMAT:
            return f"its format is {content.get('format')!r}, this version reads {FORMAT}"
        if lacking := [name for name in KINDS if name not in content]:
            return f"{MARKER} lacks {', '.join(lacking)}"
        for name, kind in KINDS.items():
            if not isinstance(content[name], kind) or isinstance(content[name], bool):
                return f"{MARKER}: {name} is {content[name]!r:.60}"
        if "sha256" in content:
            if content.get("seal") != _seal({key: value for key, value in content.items() if key != "seal"}):
                return f"{MARKER} does not hold what was written (its seal is another): the file was damaged or edited"
            if content["sha256"].keys() != content["files"].keys():
                return f"{MARKER}: files and hashes are not of the same names"
        if path.name.startswith("step_") and path.name[5:].isdecimal() and step_of(path) != content["step"]:
            return f"it is of step {content['step']}: folders were exchanged or renamed"
        # a shard of an older save among them would be loaded with the rest
        unlisted = {file.name for file in path.glob("*.safetensors")} - content["files"].keys()
        if unlisted:
            return f"it holds {', '.join(sorted(unlisted))}, which {MARKER} does not list"
        for name, size in content["files"].items():
            # a listed "../x" must not lead out of the folder
            if Path(name).name != name:
                return f"{MARKER} lists {name!r}, which is no name of a file"
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if wrong := _wrong_header(path / name, size):
                return f"{name}: {wrong}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _wrong_header(file: Path, size: int) -> str | None:
    """What is wrong with a safetensors header, by itself and for a file of this size."""
    with file.open("rb") as stream:
        # safetensors: 8 bytes of length, JSON of that length, then the tensors
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(LONGEST_HEADER, size - 8):
            return f"its header would be {length} bytes long"
        header = json.loads(stream.read(length))
    end = 0
    for name, info in header.items():
        if name == "__metadata__":
            continue
        first, last = info["data_offsets"]
        wanted = math.prod(info["shape"]) * DTYPES.get(info["dtype"], 1)
        if any(side < 0 for side in info["shape"]) or first < 0 or (info["dtype"] in DTYPES and last - first != wanted):
            return f"{name} of shape {info['shape']} and type {info['dtype']} does not fit {last - first} bytes"
        end = max(end, last)
    return None if 8 + length + end == size else "its header does not match its size"


def _seal(content: dict[str, Any]) -> str:
    # a round trip first: tuples become lists and keys strings, as they will be when read
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()
