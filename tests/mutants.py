"""Faults for `make mutate`: which there are in a file, what each makes of its text, and which are drawn. Run by mutate.py.

A fault is small and syntactic, as a slip of the hand: a comparison that is off by one, a sign, a constant, a condition that always holds, a
statement left out. None is planted where no behaviour is promised: in log lines, texts of errors, annotations and docstrings.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# area -> its files
AREAS = {
    "objectives": ["ssl_locat/objectives/*.py"],
    "optim": ["ssl_locat/optim/*.py"],
    "plan": ["ssl_locat/data/stream/plan.py"],
    "stream": ["ssl_locat/data/stream/stream.py"],
    "quarantine": ["ssl_locat/data/stream/quarantine.py"],
    "checkpoint": ["ssl_locat/runs/checkpoint.py", "ssl_locat/runs/durable.py", "ssl_locat/runs/marker.py"],
    "metrics": ["ssl_locat/evaluation/shared/metrics.py"],
    "crops": ["ssl_locat/data/images/crops.py", "ssl_locat/data/images/draws.py"],
    "export": ["ssl_locat/export/export.py", "ssl_locat/export/parity.py", "ssl_locat/export/timm_folder.py"],
}

OTHER = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in", ast.NotIn: "in"}
OTHER |= {
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "//",
}
OTHER |= {
    ast.Pow: "*",
    ast.BitOr: "&",
    ast.BitAnd: "|",
    ast.MatMult: "*",
    ast.LShift: ">>",
    ast.RShift: "<<",
    ast.And: "or",
    ast.Or: "and",
}
OTHER |= {ast.BitXor: "|"}


class Mutant(NamedTuple):
    path: str
    line: int  # of the first character that changes
    function: str  # dotted, within the file
    before: str
    after: str
    start: int  # offsets into the file's bytes
    end: int
    number: int  # among those of this function that read alike

    @property
    def name(self) -> str:
        """Stays the same when lines move."""
        return f"{self.path} {self.function} #{self.number}: {' '.join(self.before.split())} -> {self.after}"

    def apply(self, source: bytes) -> bytes:
        # the lines below stay where they are, so that what a failing test says leads to the right one
        statement = self.after in ("pass", "return None", "break", "continue")
        lost = source[self.start : self.end].count(b"\n") * (b"\n" if statement else b" \\\n")
        return source[: self.start] + self.after.encode() + lost + source[self.end :]


def files(area: str) -> list[Path]:
    return sorted(path for pattern in AREAS[area] for path in ROOT.glob(pattern))


def drawn(area: str, count: int, seed: int) -> list[Mutant]:
    """`count` of an area's faults, by chance: those whose names have the smallest hashes, so that an edit elsewhere draws no others."""
    faults = [mutant for path in files(area) for mutant in mutants(path)]
    faults.sort(key=lambda mutant: sha256(f"{seed} {mutant.name}".encode()).digest())
    return list(islice(filter(_compiles, faults), count))


def _compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.apply((ROOT / mutant.path).read_bytes()), mutant.path, "exec")
    except SyntaxError:
        return False
    return True


def mutants(path: Path) -> Iterator[Mutant]:
    """All faults of a file, in its order; a few do not compile, and are none."""
    source = path.read_bytes()
    seen: dict[tuple, int] = {}
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    for node, function in _nodes(ast.parse(source), ""):
        for part, after in _faults(node, source.decode()):
            start = offsets[part.lineno - 1] + part.col_offset
            end = offsets[part.end_lineno - 1] + part.end_col_offset
            before = source[start:end].decode()
            name = str(path.relative_to(ROOT))
            number = seen[function, before, after] = seen.get((function, before, after), -1) + 1
            yield Mutant(name, part.lineno, function, before, after, start, end, number)


def _nodes(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str]]:
    """(node, dotted name of the function around it), but for what is no behaviour."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_comment", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_silent(child):
                continue
            inside = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{function}.{child.name}".lstrip(".")
            yield child, inside
            if not isinstance(child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
                yield from _nodes(child, inside)


def _is_silent(node: ast.AST) -> bool:
    """Docstrings, log lines, the list of public names."""
    if isinstance(node, ast.Expr):
        value = node.value
        return isinstance(value, ast.Constant) or (isinstance(value, ast.Call) and ast.unparse(value.func).startswith("log."))
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _faults(node: ast.AST, source: str) -> Iterator[tuple[ast.AST, str]]:
    """(node whose text is replaced, the new text)"""

    def text(part: ast.AST) -> str:
        return f"({ast.unparse(part)})"

    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in OTHER:
            yield node, f"{text(left)} {OTHER[type(operator)]} {text(right)}"
        case ast.BinOp(left=left, op=operator, right=right):
            yield node, f"({text(left)} {OTHER[type(operator)]} {text(right)})"
        case ast.AugAssign(target=target, op=operator, value=value):
            yield node, f"{ast.unparse(target)} {OTHER[type(operator)]}= {text(value)}"
        case ast.BoolOp(op=operator, values=values):
            yield node, "(" + f" {OTHER[type(operator)]} ".join(map(text, values)) + ")"
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, text(operand)
        case ast.Constant(value=bool() as value):
            yield node, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield node, f"({value!r} + 1)"
        case ast.If(test=test) | ast.IfExp(test=test):
            yield test, "True"
            yield test, "False"
        case ast.Return(value=value) if value is not None and text(value) != "(None)":
            yield node, "return None"
        case ast.Break():
            yield node, "continue"
        case ast.Continue():
            yield node, "break"
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield node, "pass"


def matches(mutant: Mutant, pattern: str) -> bool:
    return fnmatch(mutant.name, f"*{pattern}*")
