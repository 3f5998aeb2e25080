"""The package's arrows point one way, importing it is cheap, and everything that ships is where the commands look for it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from house_picture import PICTURE, draw

from ssl_locat.config.yaml_files import names, shipped

PACKAGE = Path(__file__).resolve().parent.parent / "ssl_locat"

# The floors of the house, the ground first. A room may import its own modules, and rooms on floors below it.
FLOORS = [
    {"text", "seeds", "intervals"},
    {"errors"},
    {"config", "optim", "label_free"},
    {"runs"},
    {"data.stores", "data.images"},
    {"data.shards"},
    {"data.stream", "models"},
    {"objectives"},
    {"evaluation.shared", "export"},
    {"evaluation.protocols"},
    {"evaluation", "measure"},
    {"pretraining"},
    {"tables"},
    {"report", "benchmarks", "cluster"},
    {"doctor"},
    {"cli"},
    {"worker", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The room that holds a module, the innermost one: `ssl_locat.data.images.crops` is in `data.images`; '' for the package itself."""
    inside = module.removeprefix("ssl_locat").lstrip(".")
    while inside and inside not in FLOOR:
        inside = inside.rpartition(".")[0]
    return inside


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


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


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"ssl_locat"}))
def test_imports_point_down(module):
    """Imports inside functions count, too."""
    own = room_of(module)
    assert own or module == "ssl_locat.data", f"{module} lies in no room of FLOORS: say on which floor it stands"
    upward = {
        other
        for other in imported_modules(MODULES[module])
        if room_of(other) not in ("", own) and FLOOR[room_of(other)] >= FLOOR.get(own, 0)
    }
    assert not upward, f"{own} imports {upward}, which does not lie below it"


def test_imports_have_no_cycle():
    """Neither among files nor among the rooms that hold them."""
    files = {module: imported_modules(path) - {module} for module, path in MODULES.items()}
    rooms: dict[str, set[str]] = {}
    for module, others in files.items():
        rooms.setdefault(room_of(module), set()).update({room_of(other) for other in others} - {room_of(module), ""})
    for graph in (files, rooms):
        TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_every_room_says_what_it_is():
    """A paragraph that a newcomer reads first; the front door holds nothing but rooms and what everything stands on."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors", "seeds"}
    for path in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert path.parent == PACKAGE or ("Imported by" in text and "Begin with" in text), (
            f"{path}: what it holds, who imports it, where to begin"
        )


def test_the_picture_of_the_house_is_current():
    assert PICTURE.read_text() == draw(FLOORS), "run: python tests/house_picture.py"


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
