"""What samples' members say beside the image: values as numbers, what counts as unknown, and what a user is told."""

import json

import pytest

from ssl_locat.config.schema import load
from ssl_locat.data.shards.metadata import UNKNOWN, Field, check_fields, fields_of, read_all
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.errors import ConfigError, CorruptSample

CAMERA = Field("camera", "json", "exif.model", ("D90", "X100", "3", "true"))
SEASON = Field("season", "season.txt", None, ("winter", "summer"))


@pytest.mark.parametrize(
    ("content", "number"),
    [
        ({"exif": {"model": "X100"}}, 1),
        ({"exif": {"model": " D90 "}}, 0),
        ({"exif": {"model": 3}}, 2),
        ({"exif": {"model": 3.0}}, 2),
        ({"exif": {"model": True}}, 3),
        ({"exif": {"model": "x100"}}, UNKNOWN),  # cameras are not guessed at
        ({"exif": {"model": None}}, UNKNOWN),
        ({"exif": {"model": ["D90"]}}, UNKNOWN),
        ({"exif": "D90"}, UNKNOWN),
        ([], UNKNOWN),
    ],
)
def test_a_value_inside_json(content, number):
    assert CAMERA.read({"JSON": json.dumps(content).encode()}) == number


def test_a_member_that_is_the_value():
    assert SEASON.read({"jpg": b"", "season.txt": b"summer\n"}) == 1
    assert SEASON.read({"season.txt": "Frühling".encode()}) == UNKNOWN
    assert read_all((SEASON, CAMERA), {"jpg": b""}) == (UNKNOWN, UNKNOWN)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 20) + b"{}"])
def test_a_member_that_cannot_be_read_is_damage(content):
    with pytest.raises(CorruptSample, match="member 'json'"):
        CAMERA.read({"json": content})


def test_unknown_is_damage_where_it_is_asked_for():
    strict = SEASON._replace(otherwise="corrupt")
    with pytest.raises(
        CorruptSample, match=r"data.metadata.season: member 'season.txt' is missing; expected one of 'winter', 'summer'"
    ):
        strict.read({"jpg": b""})
    with pytest.raises(CorruptSample, match="is 'spring'"):
        strict.read({"season.txt": b"spring"})
    assert strict.read({"season.txt": b"winter"}) == 0


class Given(list):
    """Samples as a data set."""

    by_range = True

    def read(self, start, stop):
        return self[start:stop]


def given(*members: dict) -> Given:
    return Given(RawSample(each, "key", "shard") for each in members)


def test_one_sample_that_says_something_is_enough():
    check_fields([SEASON], [given(*[{"jpg": b""}] * 7, {"season.txt": b"winter"})])
    check_fields([SEASON], [given({"season.txt": b"winter"}), given({"jpg": b""})])
    check_fields([SEASON], [Given([Damage("", "", "gone")])])  # the stream says what is wrong with it


def test_a_misspelt_field_is_told_before_the_run():
    with pytest.raises(
        ConfigError, match=r"data.metadata.season: .*their members are jpg, seasons.txt.*Did you mean 'seasons.txt'"
    ):
        check_fields([SEASON], [given({"jpg": b"", "seasons.txt": b"winter"})])
    with pytest.raises(ConfigError, match=r"one of 'D90', .*they hold 'Nikon D90'\."):
        check_fields([CAMERA], [given({"json": b'{"exif": {"model": "Nikon D90"}}'})])
    with pytest.raises(ConfigError, match="Files of a folder"):
        check_fields([SEASON], [given({"jpg": b""})])


def section(text: str):
    return load("quickstart", [f"data.metadata={text}"]).data


def test_the_section():
    data = section("{camera: {member: .JSON, key: exif.model, values: [D90, 3, 2.0, true]}}")
    assert fields_of(data.model_dump(mode="json")["metadata"]) == (
        Field("camera", "json", "exif.model", ("D90", "3", "2", "true")),
    )
    assert load("quickstart").metadata_sizes == {} and fields_of(None) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{camera: {member: json, values: [a, b]}}", "give the key"),
        ("{camera: {member: txt, values: [a, a]}}", "each once"),
        ("{camera: {member: txt, values: [a]}}", "at least 2 items"),
        ("{camera: {member: txt, values: [a, [b]]}}", "texts or numbers"),
        ("{camera: {member: txt, values: [a, b], otherwise: drop}}", "'ignore' or 'corrupt'"),
        ("{camera: {menber: txt, values: [a, b]}}", "Did you mean 'member'"),
    ],
)
def test_mistakes_in_the_section(text, said):
    with pytest.raises(ConfigError, match=said):
        section(text)


def test_filters_run_before_values_are_looked_for():
    def add(raw, seed):
        return raw._replace(members={**raw.members, "season.txt": b"summer"}, filters=None)

    check_fields([SEASON], [Given([RawSample({"jpg": b""}, "key", "shard", add)])])
