"""`make mutate`: would our tests notice if we broke the code? Faults are planted one by one, and the tests that cover them are run.

    python tests/mutate.py measure              which tests call which functions, once: FOLDER/coverage.jsonl
    python tests/mutate.py run [--each 36]      draws, plants, tests; goes on where it stopped: FOLDER/results.jsonl
    python tests/mutate.py show                 what lived, and the table of docs/reliability.md

mutants.py says which faults there are. A server imports torch, timm and pytest once, and nothing of ours; each fault is tested in a process
forked from it, in a copy of this checkout, by the tests that run its line, quickest first, until one fails. Tests over 10 s and those
marked slow are left out, so that what lives here is no proof that nothing would notice. mutants.yaml lists faults that change no behaviour
and those that we let live, each with the reason.
"""

import argparse
import ctypes
import gc
import inspect
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import yaml
from leftovers import PR_SET_CHILD_SUBREAPER, descendants, end
from mutants import AREAS, ROOT, Mutant, drawn, files, matches

SEED = 26
# CPU-seconds, as measured without a fault: of a test, above which it is left out, and of all tests for one fault
LONGEST, TOGETHER = 10.0, 10.0
DEEP = 300.0  # both, for what lived
# where the tests of the areas lie; others run their lines, too, but cost many times more than they add
TESTS = (
    "evaluation/test_metrics.py objectives data/stream data/images/test_crops.py data/images/test_bands.py data/images/test_extras.py pretraining/test_dino_steps.py runs/test_checkpoint.py "
    "runs/test_integrity.py runs/test_power_cut.py export/test_parts.py export/test_export.py pretraining/test_probes.py optim "
    "data/stores/test_web.py pretraining/test_adapt.py pretraining/test_guard.py pretraining/test_crop_stages.py "
    "models/test_fewer_tokens.py"
)
OPTIONS = [
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
    "-m",
    "not slow and not slurm and not store and not gpu",
]
EXPLAINED = Path(__file__).with_name("mutants.yaml")


# --- one process of tests ------------------------------------------------------------------------------------------------------


class Tracer:
    """A pytest plugin: which functions of our files each test calls in this process, and the CPU-seconds it takes."""

    def __init__(self, paths: list[str]):
        self.paths, self.called, self.found = set(paths), {}, {}
        self.fixtures: dict[str, set[str]] = {}  # what fixtures called: shared ones run once, for all tests that ask for them

    def pytest_runtest_protocol(self, item, nextitem):
        self.called, self.began = {}, _cpu_seconds()
        sys.settrace(self._call)
        threading.settrace(self._call)

    def pytest_runtest_logreport(self, report):
        mine = self.found.setdefault(report.nodeid, {"passed": True, "called": {}, "seconds": 0.0})
        mine["passed"] &= report.passed
        if report.when == "setup":
            for path, names in self.called.items():
                self.fixtures.setdefault(path, set()).update(names)
        if report.when == "teardown":
            sys.settrace(None)
            mine["seconds"] = round(_cpu_seconds() - self.began, 3)
            mine["called"] = self.called

    def answer(self) -> dict[str, dict]:
        for one in self.found.values():
            paths = {**one["called"], **self.fixtures}
            one["called"] = {path: sorted(one["called"].get(path, set()) | self.fixtures.get(path, set())) for path in paths}
        return self.found

    def _call(self, frame, event, argument) -> None:
        """No word of single lines: those take ten times as long."""
        code = frame.f_code
        if code.co_filename in self.paths:
            self.called.setdefault(code.co_filename, set()).add(code.co_qualname.replace(".<locals>", ""))


class Failure:
    """A pytest plugin that keeps the first failure."""

    def __init__(self):
        self.test, self.words = None, None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.test is None:
            self.test = report.nodeid
            self.words = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))[:160]

    def pytest_collectreport(self, report):
        self.pytest_runtest_logreport(report)


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def in_fork(tree: Path, work: Callable[[], dict], cpu_seconds: float, seconds: float) -> dict:
    """work() in a forked process in `tree` -> what it returns, "seconds" and "cpu_seconds"; {"code": None} instead if it had to be ended, or
    {"code": "gone"} if it left without a word: a mistake of this file, and no verdict.

    cpu_seconds: of that process (an endless loop). seconds: by the clock (an endless wait); several times what an idle machine takes."""
    began, answered = time.monotonic(), tree.parent / "answer.json"
    answered.unlink(missing_ok=True)
    if not (pid := os.fork()):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1, int(cpu_seconds) + 5))
        output = os.open(tree.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        enter(tree)
        try:
            answered.write_text(json.dumps(work()))
        finally:
            os._exit(0)
    try:
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < began + seconds:
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        end(descendants(os.getpid()))  # what it started and did not end is ours by adoption
    spent = {"seconds": round(time.monotonic() - began, 2), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2)}
    nothing = {"code": "gone" if os.WIFEXITED(status) else None}
    return (json.loads(answered.read_text()) if answered.exists() else nothing) | spent


def enter(tree: Path) -> None:
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "TMPDIR": str(tree.parent)}
    tempfile.tempdir = None
    if str(tree) not in sys.path:  # once: after that the first place is that of a folder of tests
        sys.path[0] = str(tree)


def main_of(tree: Path, arguments: list[str], plugin: Any) -> int:
    return int(pytest.main([*OPTIONS, "--basetemp", str(tree.parent / "pytest"), *arguments], [plugin]))


def server() -> None:
    """Become one: orphans come to it, TERM ends it in order, and what tests need and is not ours is imported."""
    import hypothesis
    import matplotlib
    import timm  # noqa: F401
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torchmetrics  # noqa: F401
    import torchvision  # noqa: F401
    import webdataset  # noqa: F401

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    matplotlib.use("agg")
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    # a busy machine must not look like a fault
    hypothesis.settings.register_profile("mutate", deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    hypothesis.settings.load_profile("mutate")
    assert not any(name.partition(".")[0] == "ssl_locat" for name in sys.modules)


def copy_tree(folder: Path) -> Path:
    """This checkout without its history, in a folder where `shared` is found beside it."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    ignore = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "runs_here", "site")
    shutil.copytree(ROOT, tree, ignore=ignore, symlinks=True)
    (folder / "shared").unlink(missing_ok=True)
    (folder / "shared").symlink_to(ROOT.parent / "shared")
    return tree


# --- the three commands --------------------------------------------------------------------------------------------------------


def measure(folder: Path) -> None:
    """One process for each file of tests; goes on where it stopped."""
    path = folder / "coverage.jsonl"
    known = {line["file"] for line in _lines(path)}
    server()
    tree = copy_tree(folder)
    ours = {str(tree / file.relative_to(ROOT)) for area in AREAS for file in files(area)}
    found: dict[Path, None] = {}  # in order, each once
    for name in (os.environ.get("MUTATE_TESTS") or TESTS).split():
        place = tree / "tests" / name
        found |= dict.fromkeys([place] if name.endswith(".py") else sorted(place.rglob("test_*.py")))
    for file in found:
        name = str(file.relative_to(tree))
        if name in known:
            continue
        tracer = Tracer(list(ours))
        work = lambda: {"code": main_of(tree, [name, "--timeout=900"], tracer), "tests": tracer.answer()}  # noqa: B023, E731
        got = in_fork(tree, work, 900, 3000)
        tests = {
            test: {
                "seconds": one["seconds"],
                "called": {str(Path(p).relative_to(tree)): names for p, names in one["called"].items()},
            }
            for test, one in got.get("tests", {}).items()
            if one["passed"]
        }
        _append(
            path,
            {"file": name, "code": got["code"], "seconds": got["seconds"], "cpu_seconds": got["cpu_seconds"], "tests": tests},
        )
        print(f"{name}: {len(tests)} tests, code {got['code']}, {got['cpu_seconds']:.0f} CPU-s", flush=True)


def run(folder: Path, areas: list[str], each: int, only: str | None, deep: bool) -> None:
    """Test the drawn faults that have no result yet, a share of each area in turns; `deep`: those that lived, by more tests."""
    tests = {test: one for line in _lines(folder / "coverage.jsonl") for test, one in line["tests"].items()}
    server()
    tree = copy_tree(folder)
    files = sorted({test.partition("::")[0] for test in tests})
    campaign = Campaign(tree, folder / "results.jsonl", tests, deep)
    # functions are exchanged in a process that has collected the tests; what is left needs one that has imported nothing of ours
    for quick in True, False:
        campaign.todo = todo_of(folder, areas, each, only, deep, tests, campaign.done if quick else campaign.tested())
        if quick and not (pid := os.fork()):
            enter(tree)
            try:
                main_of(tree, ["-q", "-s", "--timeout=600", *files], campaign)
            finally:
                os._exit(0)
        if quick:
            os.waitpid(pid, 0)
        else:
            campaign.plant_files()


def todo_of(
    folder: Path, areas: list[str], each: int, only: str | None, deep: bool, tests: dict[str, dict], done: set[str]
) -> list[tuple[str, Mutant]]:
    """(area, fault) of all that are to be tested now."""
    known = {line["name"]: line for line in _lines(folder / "results.jsonl")}
    excused = yaml.safe_load(EXPLAINED.read_text()) or {}
    draws = [drawn(area, each, SEED) for area in areas]
    # no fault at all, in each area: a test that fails then says nothing of the others
    todo = [(area, draw[0]._replace(function="CONTROL", after=draw[0].before)) for area, draw in zip(areas, draws, strict=True)]
    todo += [(area, draw[i]) for i in range(each) for area, draw in zip(areas, draws, strict=True) if i < len(draw)]

    def wanted(mutant: Mutant) -> bool:
        before = known.get(mutant.name)
        # deep looks cost minutes: none for what is known to live, nor for a control
        lives = before and not before["state"].startswith("killed") and not before.get("deep")
        lives = lives and mutant.name not in excused.get("accepted", {}) and mutant.function != "CONTROL"
        measured = any(mutant.path in one["called"] for one in tests.values())
        if mutant.name in done or not measured or mutant.name in excused.get("equivalent", {}):
            return False
        return matches(mutant, only) if only else bool(lives) if deep else not before

    return [(area, mutant) for area, mutant in todo if wanted(mutant)]


class Campaign:
    """Plants faults and keeps the results; a pytest plugin, too, that tests faults where other sessions run their tests."""

    def __init__(self, tree: Path, results: Path, tests: dict[str, dict], deep: bool):
        self.tree, self.results, self.tests, self.deep = tree, results, tests, deep
        self.todo: list[tuple[str, Mutant]] = []
        self.done: set[str] = set()
        self.began = results.stat().st_size if results.exists() else 0

    def tested(self) -> set[str]:
        """Names of the faults that have a result by now, also of the forked process."""
        with suppress(FileNotFoundError), open(self.results) as file:
            file.seek(self.began)
            return {json.loads(line)["name"] for line in file}
        return set()

    def pytest_runtestloop(self, session) -> bool:
        items = {item.nodeid: item for item in session.items}
        functions = functions_of({str(self.tree / mutant.path) for _, mutant in self.todo})
        failure = Failure()
        session.config.pluginmanager.register(failure)

        def work(chosen: list[str], found: list[tuple[FunctionType, CodeType]]) -> dict:
            for function, code in found:
                function.__code__ = code
            wanted = [items[test] for test in chosen if test in items]
            for item, following in zip(wanted, [*wanted[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if failure.test:
                    break
            return {"code": int(failure.test is not None), "test": failure.test, "words": failure.words}

        for area, mutant in self.todo:
            found = exchanged(self.tree / mutant.path, mutant, functions)
            if found or mutant.function == "CONTROL":
                self.test_one(area, mutant, partial(work, found=found))
        return True

    def plant_files(self) -> None:
        for area, mutant in self.todo:
            failure = Failure()

            def work(chosen: list[str], failure: Failure = failure) -> dict:
                code = main_of(self.tree, [*chosen, "-x", "--timeout=600"], failure)
                return {"code": code, "test": failure.test, "words": failure.words}

            self.test_one(area, mutant, work)

    def test_one(self, area: str, mutant: Mutant, work: Callable[[list[str]], dict]) -> None:
        chosen, expected = covering(mutant, self.tests, self.deep)
        target = self.tree / mutant.path
        source, compiled = target.read_bytes(), Path(cache_from_source(str(target)))
        try:
            target.write_bytes(mutant.apply(source))  # what tests start by themselves reads it
            compiled.unlink(missing_ok=True)  # of another fault: told apart by second and size alone
            got = in_fork(self.tree, lambda: work(chosen), 8 + 3 * expected, 120 + 20 * expected)
        finally:
            target.write_bytes(source)
            compiled.unlink(missing_ok=True)
        state = {0: "survived", None: "killed (time)", "gone": "no verdict"}.get(got["code"], "killed")
        result = {"area": area, "name": mutant.name, "line": mutant.line, "deep": self.deep, "state": state}
        _append(self.results, result | {"tests": len(chosen), "expected": round(expected, 1), **got})
        print(f"{state} {got['cpu_seconds']:.1f} CPU-s {mutant.name[:150]}", file=sys.stderr, flush=True)


def functions_of(paths: set[str]) -> dict[str, list[FunctionType]]:
    """file -> its functions and methods that have been made in this process, but for those within others."""
    found: dict[str, list[FunctionType]] = {}
    for one in gc.get_objects():
        # by type: isinstance asks some objects of torch what they are, which warns
        if type(one) is FunctionType and one.__code__.co_filename in paths and "<locals>" not in one.__code__.co_qualname:
            found.setdefault(one.__code__.co_filename, []).append(one)
    return found


def exchanged(target: Path, mutant: Mutant, functions: dict[str, list[FunctionType]]) -> list[tuple[FunctionType, CodeType]]:
    """Functions that a fault changes, with their new code; none where it lies elsewhere: in a default, in a class, at the file's own level."""

    def codes(code: CodeType) -> Iterator[CodeType]:
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield inner
                yield from codes(inner) if not inner.co_flags & inspect.CO_OPTIMIZED else ()  # class bodies hold methods

    new = {code.co_qualname: code for code in codes(compile(mutant.apply(target.read_bytes()), str(target), "exec"))}
    found = ((function, new.get(function.__code__.co_qualname)) for function in functions.get(str(target), []))
    return [
        (function, code)
        for function, code in found
        # what a function takes from around it is fixed when it is made: `super()` is such a thing
        if code is not None and code != function.__code__ and code.co_freevars == function.__code__.co_freevars
    ]


def covering(mutant: Mutant, tests: dict[str, dict], deep: bool) -> tuple[list[str], float]:
    """The quickest tests that call the fault's function; where there are none (it lies in none, or runs in a worker process) those that call
    anything of its file; for a deep look all of theirs, too, that stand in one file with such a test."""
    longest, together = (DEEP, DEEP) if deep else (LONGEST, TOGETHER)
    near = {test for test, one in tests.items() if mutant.path in one["called"]}
    exact = {test for test in near if mutant.function in tests[test]["called"][mutant.path]}
    beside = {test.partition("::")[0] for test in near}
    pool = {test for test in tests if test.partition("::")[0] in beside} if deep else exact or near
    usable = {test: tests[test] for test in pool if tests[test]["seconds"] <= longest}
    chosen, total = [], 0.0
    for test in sorted(usable, key=lambda test: (test not in exact, usable[test]["seconds"])):
        if chosen and total + usable[test]["seconds"] > together:
            break
        chosen.append(test)
        total += usable[test]["seconds"]
    return chosen, total


def show(folder: Path, each: int) -> None:
    """Of the faults that are drawn today; results of others, from code that is gone, stay in the file."""
    explained = yaml.safe_load(EXPLAINED.read_text()) or {}
    latest = {line["name"]: line for line in _lines(folder / "results.jsonl")}
    counts: dict[str, Counter] = {area: Counter() for area in AREAS}
    for line in latest.values():
        if " CONTROL " in line["name"] and line["state"] != "survived":
            print(f"without any fault: {line['state']}, {line.get('test')}: {line.get('words')}")
    for area in AREAS:
        for mutant in drawn(area, each, SEED):
            line = latest.get(mutant.name, {"state": "not planted", "tests": 0})
            state = "equivalent" if mutant.name in explained["equivalent"] else line["state"].partition(" (")[0]
            counts[area][state] += 1
            if state not in ("equivalent", "killed"):
                why = explained["accepted"].get(mutant.name)
                print(f"{state}: {mutant.name} (line {mutant.line}, {line['tests']} tests)" + (f"\n    {why}" if why else ""))
    counts["all"] = sum(counts.values(), Counter())
    print("\n| Area | drawn | change nothing | planted | caught | lived | caught of the planted |\n|---|---|---|---|---|---|---|")
    for area, one in counts.items():
        planted = one.total() - one["equivalent"] - one["not planted"]
        numbers = one.total(), one["equivalent"], planted, one["killed"], planted - one["killed"]
        print(f"| {area} | {' | '.join(map(str, numbers))} | {100 * one['killed'] / max(1, planted):.1f} % |")
    spent = [line["cpu_seconds"] for line in latest.values()]
    print(f"\n{sum(spent):.0f} CPU-s, {sum(spent) / max(1, len(spent)):.1f} each")


def _lines(path: Path) -> list[dict]:
    """A last line that was cut off by a kill is left out, and ended, so that the next one stands alone."""
    if not path.exists():
        return []
    text = path.read_text()
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    return [json.loads(line) for line in text.splitlines()]


def _append(path: Path, record: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["measure", "run", "show"])
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build/mutate", help="for the map, the results and a copy of the checkout"
    )
    parser.add_argument("--each", type=int, default=36, help="faults of each area")
    parser.add_argument(
        "--areas", nargs="+", choices=AREAS, help="these alone: several can run side by side, each in a folder of its own"
    )
    parser.add_argument("--deep", action="store_true", help="those that lived, by all tests that may have to do with their file")
    parser.add_argument("--only", help="those whose name has this in it, again")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "measure":
        measure(options.folder)
    elif options.what == "run":
        run(options.folder, options.areas or list(AREAS), options.each, options.only, options.deep)
    else:
        show(options.folder, options.each)
