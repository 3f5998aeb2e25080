"""Options checked against the signature of what they go to.

The signature is read from the source, not by importing it: a misspelt key is answered in a second, before torch is loaded.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from ssl_locat.config.yaml_files import LoadedYaml
from ssl_locat.errors import ConfigError, did_you_mean


def source_of(module: str) -> Path | None:
    """The file of a module; one of ours is found without importing its package, which may import torch."""
    parts = module.split(".")
    if parts[0] == "ssl_locat":
        path = Path(__file__).parents[1].joinpath(*parts[1:]).with_suffix(".py")
        return path if path.is_file() else None
    try:
        # imports the packages above the module, though not the module: fine for what the user wrote, too slow for ours
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


@cache
def keyword_defaults(target: str) -> dict[str, str | None] | None:
    """Keyword arguments of 'package.module:name' (a function, or a class by its __init__) -> source text of the default, None where there
    is none. `None` as a whole: it takes any.

    A class of ours that takes `**rest` hands it to its base class, whose arguments are then its own, too.
    """
    module, _, name = target.partition(":")
    source = source_of(module)
    if source is None:
        raise ConfigError(f"{target!r}: there is no module {module!r}. Expected 'package.module:name' of something installed.")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    node = definition(tree, name)
    if node is None:
        raise ConfigError(f"{target!r}: {module} holds no {name!r}.")
    function = definition(node, "__init__") if isinstance(node, ast.ClassDef) else node
    if not isinstance(function, ast.FunctionDef):
        return {}
    plain, keyword_only = function.args.args, function.args.kwonlyargs
    # ast lists the defaults of the last arguments only; the first have none
    missing = [None] * (len(plain) - len(function.args.defaults))
    defaults = zip([*plain, *keyword_only], [*missing, *function.args.defaults, *function.args.kw_defaults], strict=True)
    own = {argument.arg: ast.unparse(value) if value else None for argument, value in defaults if argument.arg != "self"}
    # without `**rest` nothing else can be meant
    if function.args.kwarg is None:
        return own
    # the class of a user may take anything: its base cannot be followed, and None lets every key pass
    base = base_target(tree, node)
    inherited = keyword_defaults(base) if base else None
    # what the class gives its base by position is not the caller's to give: those have no default and stand before the `*`
    return None if inherited is None else own | {key: value for key, value in inherited.items() if key not in own and value}


def definition(tree: ast.Module | ast.ClassDef, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    """The class or function of that name in a module's or a class's body."""
    found = (item for item in tree.body if isinstance(item, ast.ClassDef | ast.FunctionDef) and item.name == name)
    return next(found, None)


def base_target(tree: ast.Module, node: ast.ClassDef | ast.FunctionDef) -> str | None:
    """'package.module:name' of the first base class if it is one of ours, imported by name."""
    if not isinstance(node, ast.ClassDef) or not node.bases or not isinstance(node.bases[0], ast.Name):
        return None
    for item in tree.body:
        if not isinstance(item, ast.ImportFrom) or not (item.module or "").startswith("ssl_locat."):
            continue
        if any(alias.name == node.bases[0].id for alias in item.names):
            return f"{item.module}:{node.bases[0].id}"
    return None


def keyword_names(target: str) -> list[str] | None:
    """Keyword arguments of 'package.module:name'; None if it takes any."""
    defaults = keyword_defaults(target)
    return None if defaults is None else list(defaults)


def check_options(target: str, options: dict[str, Any], loaded: LoadedYaml, key: tuple = ()) -> None:
    """Refuse an option that `target` does not take, naming the place and the nearest one it does."""
    known = keyword_names(target)
    if known is None:
        return
    for name in options:
        if name not in known:
            full = ".".join(map(str, (*key, name)))
            raise ConfigError(
                f"{loaded.place((*key, name))}: unknown key {full!r}.{did_you_mean(name, known)} "
                f"{target.rpartition(':')[2]} takes: {', '.join(known)}."
            )
