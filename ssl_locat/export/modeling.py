"""One Python file beside the weights, with which transformers opens a model where ssl_locat is not installed (`trust_remote_code=True`).

The file is cut out of this package: the definitions that the model needs, found by following names from `ROOTS` through the modules of
`ssl_locat.models`, in the order of their imports, with the comments above them. Nothing is written twice; what follows them are the few
classes that transformers asks for. The fused CUDA kernel stays behind; PyTorch's own attention takes its place, to rounding.
"""

import ast
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from timm.models import model_entrypoint

from ssl_locat.models import families, registry
from ssl_locat.models.families.front import Family
from ssl_locat.models.registry import MODELS, TWINS, default_cfgs

FILE = "modeling_ssl_locat.py"
AUTO_MAP = {  # goes into config.json
    "AutoModel": f"{FILE.removesuffix('.py')}.SslLocatModel",
    "AutoModelForImageClassification": f"{FILE.removesuffix('.py')}.SslLocatForImageClassification",
    "AutoBackbone": f"{FILE.removesuffix('.py')}.SslLocatBackbone",
}
REGISTRY = "ssl_locat.models.registry"
# definitions that change: without its kernel, a function that would import it
INSTEAD = {
    ("ssl_locat.models.attention", "HAS_TRITON"): "HAS_TRITON = False  # the fused kernel is in ssl_locat alone",
    (
        "ssl_locat.models.attention",
        "triton",
    ): 'def triton(*_):\n    raise UserError("the fused kernel is in ssl_locat alone; use another backend")',
}
IMPORTS = """from transformers import TimmBackbone, TimmBackboneConfig, TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification, TimmWrapperModel"""
CLASSES = '''
class SslLocatModel(TimmWrapperModel):
    """AutoModel: last_hidden_state [B, R + N, D] after the final norm, pooler_output [B, D] (after PRR where the model has it)."""


class SslLocatForImageClassification(TimmWrapperForImageClassification):
    """AutoModelForImageClassification: the same network with a classifier."""


class SslLocatBackbone(TimmBackbone):
    """AutoBackbone: feature maps [B, D, rows, cols] of the blocks `out_indices`; of a folder or a repository of the hub."""

    config_class = TimmWrapperConfig  # of the repository's config.json, which AutoBackbone compares

    @classmethod
    def from_pretrained(cls, name, *args, config=None, out_indices=(-1,), **kwargs):
        source = "local-dir" if Path(name).is_dir() else "hf-hub"
        channels = config.pretrained_cfg["input_size"][0]
        config = TimmBackboneConfig(backbone=f"{source}:{name}", num_channels=channels, out_indices=tuple(out_indices))
        return cls._from_config(config, pretrained=True)
'''


class Module:
    """The top level of a module of ours, as text: {name: lines}, and where its imported names come from."""

    def __init__(self, name: str):
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None, f"{name} has no source"
        self.name, self.text = name, Path(spec.origin).read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.nodes: dict[str, ast.stmt] = {}
        self.ours: dict[str, str] = {}  # name -> module of ssl_locat that defines it
        self.theirs: dict[str, str] = {}  # name -> the import statement that brings it
        for node in ast.parse(self.text).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssl_locat"):
                self.ours |= {alias.name: node.module or "" for alias in node.names}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    one = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], 0)
                    self.theirs[alias.asname or alias.name.partition(".")[0]] = ast.unparse(one)
            else:
                self.nodes |= dict.fromkeys(defined(node), node)

    def source(self, node: ast.stmt) -> str:
        """A definition with its decorators and the comment lines right above it."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and self.lines[first - 1].startswith("#") and not self.lines[first - 1].startswith("# ---"):
            first -= 1
        return "\n".join(self.lines[first : node.end_lineno])


def defined(node: ast.stmt) -> list[str]:
    """Names that a statement at a module's top defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def names_in(tree: ast.AST) -> list[str]:
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


class Cut:
    """What is taken so far: {module: names}, and the imports of others' packages. instead: definitions that change."""

    def __init__(self, instead: dict[tuple[str, str], str]):
        self.instead = instead
        self.modules: dict[str, Module] = {}
        self.taken: dict[str, set[str]] = {}
        self.imports: set[str] = set()
        self.order: list[str] = []  # modules, those that others import first

    def module(self, name: str) -> Module:
        if name not in self.modules:
            self.modules[name] = Module(name)
            for other in dict.fromkeys(self.modules[name].ours.values()):
                self.module(other)
            self.order.append(name)
        return self.modules[name]

    def take(self, module_name: str, name: str) -> None:
        """A definition and all that it names, here or in other modules of ours."""
        module = self.module(module_name)
        if name in module.ours:
            return self.take(module.ours[name], name)
        if name in module.theirs:
            self.imports.add(module.theirs[name])
        elif name in module.nodes and name not in self.taken.setdefault(module_name, set()):
            self.taken[module_name].update(defined(module.nodes[name]))
            instead = self.instead.get((module_name, name))
            for used in names_in(ast.parse(instead) if instead else module.nodes[name]):
                self.take(module_name, used)
        return None

    def text(self) -> str:
        """Everything taken, in an order that can be executed. ValueError where two modules define one name."""
        owners: dict[str, str] = {}
        parts = []
        for module_name in self.order:
            module, names = self.modules[module_name], self.taken.get(module_name, set())
            if not names:
                continue
            for name in names:
                if owners.setdefault(name, module_name) != module_name:
                    raise ValueError(f"{module_name} and {owners[name]} both define {name}: one of them needs another name")
            nodes = dict.fromkeys(module.nodes[name] for name in module.nodes if name in names)
            parts.append(f"# --- {module_name} ---")
            parts += [self.instead.get((module_name, defined(node)[0]), module.source(node)) for node in nodes]
        return "\n\n\n".join(parts)


def only_family(architecture: str) -> dict[tuple[str, str], str]:
    """In the file stands the one family of models that it needs."""
    home = families.__name__
    if architecture in MODELS:
        chosen = [name for name, value in vars(families).items() if is_family_of(value, MODELS[architecture][0])]
    else:
        module = model_entrypoint(architecture.removeprefix("locat_")).__module__.rpartition(".")[2]
        chosen = [name for name, value in vars(families).items() if isinstance(value, Family) and module in value.modules]
    return {(home, "FAMILIES"): f"FAMILIES = ({''.join(f'{name},' for name in chosen)})", (home, "REFUSED"): "REFUSED: dict = {}"}


def is_family_of(value: object, base: type) -> bool:
    return isinstance(value, Family) and issubclass(base, value.base)


def write_modeling(architecture: str, path: Path) -> None:
    path.write_text(modeling_code(architecture), encoding="utf-8")


def modeling_code(architecture: str) -> str:
    """The whole file for an architecture by its name in the registry; without LocAt for timm's own names, which timm makes itself."""
    timms = architecture.removeprefix("locat_")
    cut, footer = Cut(INSTEAD | only_family(architecture)), ""
    if architecture in MODELS:
        base, defaults, load_filter = MODELS[architecture]
        # what register() needs besides its own names: the class, its options, the filter of its state dicts
        filter_name = next(name for name in ("filter_vit", "filter_eva", "filter_swin") if getattr(registry, name) is load_filter)
        for name in ("register", "generate_default_cfgs", base.__name__, filter_name):
            cut.take(REGISTRY, name)
        config = default_cfgs[architecture].default.to_dict(remove_null=True)
        footer = (
            f"NAME = {architecture!r}\n"
            f"default_cfgs = generate_default_cfgs({{NAME: {config!r}}})\n"
            f"if not is_model(NAME):  # ssl_locat may be there, too\n    register(NAME, {base.__name__}, {defaults!r}, {filter_name})"
        )
    elif timms in TWINS and architecture.startswith("locat_"):
        cut.take(REGISTRY, "register_twin")
        footer = f"NAME = {architecture!r}\nif not is_model(NAME):  # ssl_locat may be there, too\n    register_twin({timms!r}, {TWINS[timms]!r})"
    imports = sorted({*cut.imports, "from pathlib import Path", "from timm import is_model"})
    head = (
        f'"""{architecture}, to be opened by transformers with trust_remote_code=True: needs torch, timm and transformers alone.\n\n'
        f'Generated from ssl_locat {version("ssl_locat")} (Apache-2.0), cut out of its modules; do not edit.\n"""\n'
    )
    return "\n\n".join(part for part in (head + "\n" + "\n".join(imports) + "\n" + IMPORTS, cut.text(), footer, CLASSES) if part)
