"""What may be shown: text without credentials and without characters that do something to a terminal or a page.

Everything that is printed, logged or written passes through here: messages by `shown` (one value, on one line) where they are made and
by `printable` where they come out; files by `redacted` and `to_json`. The one file that keeps credentials is a run's config.yaml, which
needs them to resume and is then readable by its owner alone.
"""

import json
import re
from typing import Any

MARK = "REDACTED"  # stands in files where credentials stood: a URL that carries it cannot be opened, and says so

# Every repetition is bounded, or begins where no other does: a hostile text of any length takes linear time.
# a scheme and its slashes, one being a common slip; without any only for schemes that nothing else looks like
_SCHEME = r"(?:(?<![A-Za-z0-9+.-])(?!file:)[A-Za-z][A-Za-z0-9+.-]*:/+|\b(?:https?|s3|gs|hf|ftp):)"
# user:password@, also with a password that holds slashes, which a port never does; "@" further on is part of a path (hf://.../NAME@REVISION)
_USER = re.compile(rf"""({_SCHEME})(?:[^\s/?#"<>@]{{0,1024}}@|[^\s/?#"<>:@]{{1,128}}:(?!\d+(?:/|$))[^\s"<>@]{{0,128}}@)+""")
# in http(s) everything behind "?" or "#" may be a signature; in object stores "?" is a wildcard, and a query has key=value
_QUERY = re.compile(
    r"""(\bhttps?:/*(?:[^\s"'<>?#:]|:(?![/h]))*)[?#][^\s"'<>]*"""
    r"""|((?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*:/+(?:[^\s"'<>?:]|:(?!/))*)\?(?:[\w.-]{1,64}=|REDACTED\b)[^\s"'<>]*"""
)
_PARAMETER = re.compile(
    r"\b(x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|signature|sig|(?:access_?|auth_?)?token|api_?key|"
    r"secret(?:_?access_?key)?|passw(?:or)?d)=[^\s&'\"<>,;)]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(authorization\W{1,4}(?:basic|bearer)\s+)[^\s'\"]+", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")

# controls but for tab and line feed, C1 controls, marks that turn the direction of text or hide it, line separators, lone surrogates
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def redact(text: str, mark: str = "") -> str:
    """The text without user and password, query and fragment of the URLs in it, and without tokens; `mark` stands in their place.

    A URL without them stays as it is, so that what is redacted still tells one object from another.
    """
    if not any(sign in text for sign in "@?#=") and "hf_" not in text and "pipe:" not in text and "uthorization" not in text:
        return text  # nearly all text
    if re.match(r"\s*pipe:", text):  # a command, which nobody can tell apart
        return f"pipe:{mark}"
    text = _USER.sub(lambda match: f"{match[1]}{f'{mark}@' if mark else ''}", text)
    text = _QUERY.sub(lambda match: f"{match[1] or match[2]}{f'?{mark}' if mark else ''}", text)
    text = _PARAMETER.sub(lambda match: f"{match[1]}={mark or '...'}", text)
    return _TOKEN.sub(mark or "hf_...", _HEADER.sub(lambda match: match[1] + (mark or "..."), text))


def redacted(value: Any, mark: str = MARK) -> Any:
    """Plain values (of JSON or YAML) with every text in them redacted, the keys too."""
    if isinstance(value, str):
        return redact(value, mark)
    if isinstance(value, dict):
        return {redacted(key, mark): redacted(item, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, mark) for item in value]
    return value


def carries_credentials(value: Any) -> bool:
    """Whether a text, or one inside plain values, holds what `redact` takes out."""
    if isinstance(value, str):
        return redact(value) != value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(carries_credentials, parts))


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps`, redacted: for every JSON that is printed or written."""
    return json.dumps(redacted(value), **options)


def shown(value: object) -> str:
    """One value (URL, path, name, reason of an error) for a message: redacted, on one line, what is not printable by its number."""
    text = redact(str(value))
    return text if text.isprintable() else printable(text).replace("\n", "\\n").replace("\t", "\\t")


def printable(text: str) -> str:
    """The text as a terminal or a page may have it, lines kept: escape sequences, marks of direction and the like by their number."""
    return _UNSHOWN.sub(lambda match: _escaped(ord(match[0])), text)


def _escaped(number: int) -> str:
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
