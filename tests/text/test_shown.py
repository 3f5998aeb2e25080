"""What is shown or written holds no credentials and nothing that acts on a terminal."""

import json
import time

import pytest

from ssl_locat.runs.folder import differences, write_atomically
from ssl_locat.text.shown import carries_credentials, printable, redact, redacted, shown, to_json

SECRET = "hunter2secret"

WITH_CREDENTIALS = {
    f"https://me:{SECRET}@host/a.tar": "https://host/a.tar",
    f"https://{SECRET}@host/a.tar": "https://host/a.tar",
    f"https://me:{SECRET}@x@host/a.tar": "https://host/a.tar",
    f"https://me:a/{SECRET}@host/a.tar": "https://host/a.tar",
    f"https://host/a.tar?X-Amz-Signature={SECRET}&x=1#y": "https://host/a.tar",
    f"https://host/{{a,b.tar?sig={SECRET}": "https://host/{a,b.tar",
    f"s3:/key:{SECRET}@bucket/a.tar": "s3:/bucket/a.tar",
    f"https:me:{SECRET}@host/a": "https:host/a",
    f"s3://bucket/a.tar?versionId={SECRET}": "s3://bucket/a.tar",
    f"pipe:curl -u me:{SECRET} host": "pipe:",
    f"GET failed: token={SECRET}, status 500": "GET failed: token=..., status 500",
    f"{{'Authorization': 'Bearer {SECRET}'}}": "{'Authorization': 'Bearer ...'}",
    f"see 'https://me:{SECRET}@h/a' and 'b'": "see 'https://h/a' and 'b'",
}
WITHOUT = [
    "https://host:8080/a@b/c.tar",
    "hf://datasets/user/name@main/train-{000..099}.tar",
    "s3://bucket/train-?.tar",
    "s3://bucket/a#1.tar",
    "file:///data/a@b?.tar",
    "/data/a@b?c=d#e.tar",
    '{"a":"https://host","b":"x@y"}',
    "optim.lr=0.1 is wrong?",
    "me@example.org",
]


@pytest.mark.parametrize("text", WITH_CREDENTIALS)
def test_credentials_are_taken_out(text):
    assert redact(text) == WITH_CREDENTIALS[text]
    assert SECRET not in redact(text, "REDACTED") and SECRET not in shown(text)
    assert SECRET not in to_json({"key": [text], text: 1}) and json.loads(to_json({"key": [text]}))
    assert carries_credentials({"data": {"train": [text]}})


@pytest.mark.parametrize("text", WITHOUT)
def test_what_holds_no_credentials_stays_as_it_is(text):
    assert redact(text) == redact(text, "REDACTED") == shown(text) == text
    assert not carries_credentials([{"shards": text}])


def test_redacting_twice_changes_nothing():
    for text in WITH_CREDENTIALS:
        assert redact(redact(text, "REDACTED"), "REDACTED") == redact(text, "REDACTED")
        assert redact(redact(text, "REDACTED")) == redact(text)


def test_plain_values_keep_their_kind():
    value = {"a": [1, 2.5, None, True], "b": {"c": "text"}}
    assert redacted(value) == value


def test_signatures_that_rotate_are_no_other_settings():
    old = {"backbone": {"init": "https://me:old@host/start.pth?sig=1"}}
    for given in (
        "https://you:new@host/start.pth?sig=2",
        "https://host/start.pth",
        "https://REDACTED@host/start.pth?REDACTED",
    ):
        assert not list(differences(old, {"backbone": {"init": given}}))
    (change,) = map(str, differences(old, {"backbone": {"init": "https://me:old@host/other.pth?sig=1"}}))
    assert "other.pth" in change and "old" not in change and "sig=" not in change


def test_what_acts_on_a_terminal_is_shown_by_its_number():
    name = "a\x1b]0;owned\x07\x9b31m\u202egpj.exe\u2066\u200b\ud800\rb"
    assert printable(name) == "a\\x1b]0;owned\\x07\\x9b31m\\u202egpj.exe\\u2066\\u200b\\ud800\\x0db"
    assert printable("a\n\tb") == "a\n\tb" and shown("a\n12:00:00 ERROR forged\tx") == "a\\n12:00:00 ERROR forged\\tx"
    assert shown("Grüße, 世界 🐈") == "Grüße, 世界 🐈"


def test_files_obey_the_umask_and_private_ones_are_the_owners(tmp_path):
    write_atomically(tmp_path / "shared", "x")
    write_atomically(tmp_path / "own", "x", private=True)
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "shared").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600


def test_hostile_texts_take_linear_time():
    """Names in a shard may be what somebody wrote to make this slow."""
    for piece in (
        "a",
        "http:",
        "http:x",
        "https:/",
        "a://b:c",
        "s3://?",
        "x@",
        "a=",
        "://",
        "token",
        "Authorization: ",
        "http://a?b#",
    ):
        text = piece * (200_000 // len(piece))
        began = time.process_time()
        shown(text + "@?#=")
        assert time.process_time() - began < 3, piece  # 0.3 s at most; quadratic takes minutes
