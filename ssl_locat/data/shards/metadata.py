"""What a sample's members say beside its image, as numbers that a loss reads: `data.metadata` of a config.

    metadata:
      camera: {member: json, key: exif.model, values: [D90, X100]}      # a text or number inside a JSON member
      season: {member: season.txt, values: [winter, summer]}            # a member that holds the value itself

A value is the number of its place in `values`; UNKNOWN where a sample lacks the member or the key, or holds what is not listed. Such a sample
trains like any other, and that one field says nothing of it; with `otherwise: corrupt` it is quarantined. A JSON member that is none is damage either way.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ssl_locat.config.data_section import as_text
from ssl_locat.data.shards.filters import filtered
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import Damage
from ssl_locat.errors import ConfigError, CorruptSample, did_you_mean
from ssl_locat.text.shown import shown

UNKNOWN = -1
MAX_BYTES = 1 << 20  # of a member: metadata is a few hundred bytes, and JSON of more takes longer to read than a small image
_LOOKED_AT = 8  # samples, spread over a data set, of which one at least must hold a listed value
_SHOWN = 5  # values in a message


class Field(NamedTuple):
    """One entry of `data.metadata`."""

    name: str
    member: str  # extension, as in `camera.txt` or `json`
    key: str | None  # within JSON, dots between levels; None: the member is the value
    values: tuple[str, ...]
    otherwise: str = "ignore"  # or "corrupt"

    def read(self, members: Mapping[str, bytes]) -> int:
        """The number of a sample's value, or UNKNOWN. Raises CorruptSample."""
        found = self.text(members)
        if found in self.values:
            return self.values.index(found)
        if self.otherwise == "ignore":
            return UNKNOWN
        place = f"member {self.member!r}" + (f", key {self.key!r}" if self.key else "")
        raise CorruptSample(
            f"data.metadata.{self.name}: {place} is {'missing' if found is None else repr(found[:80])}; expected one of {_some(self.values)}"
        )

    def text(self, members: Mapping[str, bytes]) -> str | None:
        """The value as text; None where there is none. Raises CorruptSample for a member that is no JSON, or no text."""
        data = next((content for name, content in members.items() if name.lower() == self.member), None)
        if data is None:
            return None
        if len(data) > MAX_BYTES:
            raise CorruptSample(f"member {self.member!r} has {len(data)} bytes; metadata is read up to {MAX_BYTES}")
        try:
            text = data.decode()
            if self.key is None:
                return text.strip()
            value: Any = json.loads(text)
        except (ValueError, RecursionError):  # of UTF-8 and of JSON alike
            raise CorruptSample(f"member {self.member!r} is no {'text' if self.key is None else 'JSON'}") from None
        for name in self.key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return as_text(value)


def fields_of(section: Mapping[str, Mapping[str, Any]] | None) -> tuple[Field, ...]:
    """Of `data.metadata` as plain values, in its order."""
    return tuple(
        Field(name, part["member"], part.get("key"), tuple(part["values"]), part.get("otherwise", "ignore"))
        for name, part in (section or {}).items()
    )


def read_all(fields: Sequence[Field], members: Mapping[str, bytes]) -> tuple[int, ...]:
    """One number for each field. Raises CorruptSample."""
    return tuple(field.read(members) for field in fields)


def check_fields(fields: Sequence[Field], datasets: Sequence[Dataset]) -> None:
    """Look at a few samples of each data set: ConfigError for a field of which none of them holds a listed value, with what they hold.

    A misspelt key would otherwise train for days on nothing."""
    known = {field.name: False for field in fields}
    found: dict[str, dict[str, None]] = {field.name: {} for field in fields}
    names: dict[str, None] = {}
    for dataset in datasets if fields else ():
        places = sorted({round(share * (len(dataset) - 1) / (_LOOKED_AT - 1)) for share in range(_LOOKED_AT)})
        for place in places:
            raw = dataset.read(place, place + 1)[0]
            if isinstance(raw, Damage):
                continue
            try:
                members = filtered(raw, place).members
                names |= dict.fromkeys(members)
                for field in fields:
                    text = field.text(members)
                    known[field.name] |= text in field.values
                    found[field.name] |= {} if text is None else {text: None}
            except CorruptSample:
                continue  # the stream will name it
    for field in fields:
        if known[field.name] or not names:
            continue
        where = f"member {field.member!r}" + (f" with the key {field.key!r}" if field.key else "")
        held = f"they hold {_some(list(found[field.name]))}" if found[field.name] else f"their members are {', '.join(names)}"
        bare = " Files of a folder and windows of a raster have none but the image and its class: write tars, zip archives (KEY.jpg, KEY.json) or Parquet, or make the member in a filter."
        hint = "" if any(field.member in names for field in fields) else bare
        raise ConfigError(
            f"data.metadata.{field.name}: of the samples looked at none has a {where} that is one of {_some(field.values)}: {shown(held)}."
            f"{did_you_mean(field.member, names) if field.member not in names else ''}{hint}"
        )


def _some(values: Sequence[str]) -> str:
    return ", ".join(repr(value[:80]) for value in values[:_SHOWN]) + (", ..." if len(values) > _SHOWN else "")
