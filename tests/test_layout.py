"""The package's arrows point one way, importing it is cheap, and everything that ships is where the commands look for it."""

import ast
import subprocess
import sys
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


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of ssl_locat that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "ssl_locat" else [node.module or ""]
            )
        else:
            continue
        parts |= {module.split(".")[1] for module in modules if module.startswith("ssl_locat.")}
    return parts


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # names only, loaded on access
    known = {entry.name.removesuffix(".py") for entry in PACKAGE.iterdir()}
    upward = {part for part in imported_parts(path) & known if layer(part) > layer(own)}
    assert not upward, f"{own} imports {upward}, which lies above it"


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
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in {"eval", "exec", "os.system"}, f"{path}:{node.lineno}"
                assert keywords.get("shell") != "True", f"{path}:{node.lineno}"
                if called == "torch.load":
                    assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
                if called in {"np.load", "numpy.load"}:
                    assert keywords.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
