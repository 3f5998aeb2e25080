"""docs/config.md, made from the schema: every key with its type, default and meaning. A test fails when the file is not current.

python -m ssl_locat.config.reference > docs/config.md
"""

import ast
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ssl_locat.config.schema import OBJECTIVES, Config
from ssl_locat.config.signatures import base_target, definition, keyword_defaults, source_of

HEADER = """# Config reference

Every key, its type, default and meaning; for looking one up:

```bash
ssl-locat pretrain quickstart --dry-run                # checks a config, and prints it with every key resolved
ssl-locat pretrain quickstart optim.epochs=5           # the same recipe with another value
```

A run is one YAML. Every key below may stand in it, or on the command line as `key.sub=value`, which wins. A YAML may name another
one as `base:` and say only what differs. Unknown keys, wrong types and values out of range are refused, with the file, the line and the
nearest key that exists.

The resolved config lies in the run folder (`config.yaml`) and alone rebuilds the run. Shipped recipes are in `configs/pretrain/`.

This page is made from the schema (`ssl_locat/config/schema.py`) by `python -m ssl_locat.config.reference > docs/config.md`.
"""

OPTIONS_HEADER = """## Options of the parts

`backbone`, `objective` and `probes` are names with options of their own:

- **backbone**: the constructor's arguments of the timm model (`img_size`, `patch_size`, `embed_dim`, `depth`, `num_heads`, ...) and of
  LocAt: `gaug` and `prr`, each `true`, `false` or a mapping of options, and `pos_resize`.
- **probes**: each further key is a protocol of `eval/` with its options, such as `knn: {k: [20]}`; `data` is the run's own.
- **objective**: the arguments below. An objective of your own is named `package.module:Class`.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEADER, *_section(Config, ""), OPTIONS_HEADER]
    for name, target in OBJECTIVES.items():
        parts.append(_objective(name, target))
    return "\n".join(parts).rstrip() + "\n"


def _section(schema: type[BaseModel], prefix: str) -> list[str]:
    """A table of the section's own keys, then its sub-sections, depth first."""
    rows, inner = [], []
    told: set[Any] = set()  # sections that a value may be instead of text: described once
    for name, field in schema.model_fields.items():
        section = _subsection(field.annotation)
        other = None if section else _alternative(field.annotation)
        if other and other not in told:
            inner += _section(other, f"{prefix}{name}.{'NAME.' if get_origin(_given(field.annotation)) is dict else ''}")
            told.add(other)
        if section is None:
            rows.append(
                f"| `{prefix}{name}` | {_type(field.annotation)} | {_default(field)} | {_cell(field.description or '')} |"
            )
        else:
            rows.append(f"| `{prefix}{name}` | section | {_default(field)} | {_cell(field.description or 'see below')} |")
            inner += _section(section, f"{prefix}{name}.")
    title = f"## {prefix.rstrip('.')}" if prefix else "## The top level"
    about = (schema.__doc__ or "").strip().split("\n")[0]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return [title, "", *([about, ""] if about and prefix else []), *table, *inner]


def _subsection(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):  # `Cache | None`: a section that may be left out
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return _subsection(parts[0]) if len(parts) == 1 else None
    return None


def _given(annotation: Any) -> Any:
    """`X` of `X | None`."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return parts[0] if get_origin(annotation) in (Union, types.UnionType) and len(parts) == 1 else annotation


def _alternative(annotation: Any) -> type[BaseModel] | None:
    """The section that is one of several things which a value may be, or each value of a mapping whose keys are names of the user's."""
    if get_origin(_given(annotation)) is dict:
        return _subsection(get_args(_given(annotation))[1])
    if get_origin(annotation) not in (Union, types.UnionType):
        return None
    return next((found for part in get_args(annotation) if (found := _subsection(part))), None)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not type(None)))
    if origin is Annotated:  # a number with bounds
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        inner = [_type(part) for part in arguments if part is not Ellipsis]
        return f"list of {inner[0]}" if origin is list else f"[{', '.join(inner)}]"
    if origin is dict:
        return "mapping"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Any": "anything"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, "mapping" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else name)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:  # no default, or one that a factory makes
        return "**required**" if field.is_required() else "empty"
    if field.default is None:
        return "none"
    if isinstance(field.default, BaseModel):
        return "as below"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")  # a bare bar would end the cell


def _objective(name: str, target: str) -> str:
    """Arguments of an objective, from its source: importing it would import torch."""
    arguments = keyword_defaults(target) or {}
    rows = [f"| `{key}` | {f'`{_plain(default)}`' if default else '**required**'} |" for key, default in arguments.items()]
    about, meanings = _docstring(target)
    bullets = "\n".join(f"- {line}" if re.match(r"[a-z_]+(, [a-z_]+)*: ", line) else f"  {line}" for line in meanings)
    return f"### objective: {name}\n\n{about}\n\n| key | default |\n|---|---|\n" + "\n".join(rows) + f"\n\n{bullets}\n"


def _docstring(target: str) -> tuple[str, list[str]]:
    """The first line of a class's docstring, and the lines below its `Args:`, then those of the base that it hands `**rest` to."""
    module, _, attribute = target.partition(":")
    source = source_of(module)
    assert source is not None, f"{target} has no source"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    node = definition(tree, attribute)
    assert isinstance(node, ast.ClassDef), f"{target} is no class"
    lines = (ast.get_docstring(node) or "").split("\n")
    meanings = [line.strip() for line in lines[lines.index("Args:") + 1 :] if line.strip()] if "Args:" in lines else []
    if base := base_target(tree, node):  # what is handed on is described there
        meanings = [line for line in meanings if not line.startswith("prototypes: ")] + _docstring(base)[1]
    return lines[0], meanings


def _plain(value: str) -> str:
    """A Python literal as YAML writes it."""
    return {"True": "true", "False": "false", "None": "null"}.get(
        value, value.replace("(", "[").replace(")", "]").replace("'", "")
    )


if __name__ == "__main__":
    print(reference(), end="")
