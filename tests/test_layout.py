"""The package's arrows point one way, importing it is cheap, and everything that ships is where the commands look for it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from ssl_locat.yaml_files import names, shipped

PACKAGE = Path(__file__).resolve().parent.parent / "ssl_locat"

# lower layers first; a module may import its own layer and those above it in this list
LAYERS = [
    {"errors", "seeds"},
    {"yaml_files", "config", "distributed", "log", "schedules", "optim"},
    {"data", "models", "diagnosis", "run_folder"},
    {"objectives"},
    {"student_teacher"},
    {"backbone", "checkpoint"},
    {"evaluation"},
    {"probes", "run_parts"},
    {"benchmarks"},
]  # everything else is a program; cli is above them all


def layer(part: str) -> int:
    for level, parts in enumerate(LAYERS):
        if part in parts:
            return level
    return len(LAYERS) + (part == "cli")


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# the one knot: the table of stores opens remote ones on demand, with extras that may not be installed, and they share its errors
ALLOWED = {("ssl_locat.data.store", "ssl_locat.data.remote")}


def imported(tree: ast.AST) -> dict[str, str]:
    """{name in the file: what it stands for, dotted} of all imports, anywhere in it; `import a.b` is found under "a.b"."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: say where it lies"
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(path: Path) -> set[str]:
    """Modules of ssl_locat that a file imports, or imports names from."""
    names = imported(ast.parse(path.read_text())).values()
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & set(MODULES)


def part_of(module: str) -> str:
    """The file or folder directly under ssl_locat that holds the module; '' for the package itself."""
    return module.removeprefix("ssl_locat").lstrip(".").partition(".")[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # names only, loaded on access
    upward = {module for module in imported_modules(path) if layer(part_of(module)) > layer(own)}
    assert not upward, f"{own} imports {upward}, which lies above it"


def test_imports_have_no_cycle():
    """Neither among files nor among the folders that hold them; imports inside functions count."""
    files = {
        module: {other for other in imported_modules(path) - {module} if (module, other) not in ALLOWED}
        for module, path in MODULES.items()
    }
    parts: dict[str, set[str]] = {}
    for module, others in files.items():
        parts.setdefault(part_of(module), set()).update({part_of(other) for other in others} - {part_of(module)})
    for graph in (files, parts):
        TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_importing_the_package_is_cheap():
    code = "import sys, ssl_locat, ssl_locat.cli; assert not {'torch', 'timm', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_load():
    import ssl_locat

    for name in ssl_locat.__all__:
        assert getattr(ssl_locat, name) is not None
    with pytest.raises(AttributeError, match="it offers"):
        ssl_locat.nonsense  # noqa: B018


def test_shipped_folders_hold_yaml():
    assert "quickstart" in names("configs/pretrain")
    assert {"knn"} <= set(names("eval"))
    assert {"local", "slurm"} <= set(names("launch"))
    for folder in ("configs", "launch", "eval"):
        assert shipped(folder).is_dir()


def test_no_pickle_and_no_shell():
    """Nothing from data, checkpoints or configs is ever unpickled or executed."""
    forbidden = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    shells = {"eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen", "subprocess.getoutput"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = imported(tree)
        assert not forbidden & {name.split(".")[0] for name in names.values()}, path
        assert not shells & set(names.values()), path
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            first, *rest = ast.unparse(node.func).split(".")
            called = ".".join([names.get(first, first), *rest])
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in shells, f"{path}:{node.lineno}"
            assert keywords.get("shell", "False") == "False", f"{path}:{node.lineno}"
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
            if called == "numpy.load":
                assert keywords.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
