"""Small shards for tests: keys and contents tell where a sample came from."""

import io
import json
import random
import tarfile
import zlib
from pathlib import Path

from ssl_locat.data.shards.tar import RawSample


def write_shard(path: Path, keys: list[str], size: int = 600, format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of KEY.bin (around `size` random bytes, never the same) and KEY.cls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for key in keys:
            content = random.Random(f"{path.name}/{key}").randbytes(size // 2 + zlib.crc32(key.encode()) % size)
            add(archive, f"{key}.bin", content)
            add(archive, f"{key}.cls", str(zlib.crc32(key.encode()) % 10).encode())
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, counts: list[int], size: int = 600) -> str:
    """Shards 000.tar, 001.tar, ... with so many samples each; returns their glob."""
    for number, count in enumerate(counts):
        write_shard(folder / f"{number:03d}.tar", [f"{number:03d}_{i:05d}" for i in range(count)], size)
    return str(folder / "*.tar")


def write_parquet(path: Path, rows: list[dict], per_group: int, features: dict | None = None) -> Path:
    """A file with a row group for each `per_group` rows; `features` as the Hugging Face's datasets write them."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=per_group)
    return path


def write_parquets(folder: Path, counts: list[int], per_group: int = 16, size: int = 600) -> str:
    """Files 000.parquet, ... with so many rows each, contents as in `write_shards`; returns their glob."""
    for number, count in enumerate(counts):
        keys = [f"{number:03d}_{i:05d}" for i in range(count)]
        rows = [
            {
                "image": {
                    "bytes": random.Random(key).randbytes(size // 2 + zlib.crc32(key.encode()) % size),
                    "path": f"{key}.jpg",
                },
                "label": zlib.crc32(key.encode()) % 10,
            }
            for key in keys
        ]
        write_parquet(folder / f"{number:03d}.parquet", rows, per_group)
    return str(folder / "*.parquet")


def fingerprint(raw: RawSample, seed: int) -> tuple[str, int, int]:
    """A `prepare` for streams: key, crc of all bytes, augmentation seed."""
    return raw.key, zlib.crc32(b"".join(name.encode() + raw.members[name] for name in sorted(raw.members))), seed


def as_list(samples: list) -> list:
    """A `collate` for streams."""
    return samples
