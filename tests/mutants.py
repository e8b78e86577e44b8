"""
Mutation sample: small changes to the source, one at a time, that some test must notice.

    python tests/mutants.py                         # 200 of blocks, ops and topology; build/mutants/report.md
    python tests/mutants.py --count 10 --seed 1     # others
    python tests/mutants.py --show blocks/sizes.py  # every mutant of a file, nothing is run

First every test runs once, and the functions that it enters are noted (kept in `build/mutants` while neither sources
nor tests change). Then each mutant meets the tests that enter its function, its file, and those of the folder that
mirrors its room, until one fails: one case of each test first, the fastest first, within a budget of seconds. A mutant
is killed by a failure, by an error on import or by running out of time.

torch and transformers are imported once: each run is a fork that imports the package, with the mutated source in the
place of the file's. No file is changed.
"""

import argparse
import ast
import contextlib
import copy
import fnmatch
import hashlib
import importlib
import importlib.machinery
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_dynsparse"
RESULTS = ROOT / "build" / "mutants"
ROOMS = ("blocks", "ops", "topology")
LEFT_OUT = ("ops/triton*.py",)  # needs a GPU, or the interpreter, which is too slow for this
TESTS = ("blocks", "ops", "topology", "nn", "optim", "models", "compress", "checkpoints", "training", "invariants")
FLAGS = ["-q", "-n0", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
FLAGS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that were imported before the fork

EXCHANGED: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}


class Mutant(NamedTuple):
    file: str  # inside the package
    line: int
    operator: str
    begin: int  # of the replaced bytes
    end: int
    new: str

    def source(self) -> bytes:
        old = (PACKAGE / self.file).read_bytes()
        return old[: self.begin] + self.new.encode() + old[self.end :]

    def __str__(self) -> str:
        old = (PACKAGE / self.file).read_bytes()[self.begin : self.end].decode()
        flat = [" ".join(text.split()) for text in (old, self.new)]
        return f"{self.file}:{self.line}: {self.operator}: `{flat[0]}` -> `{flat[1]}`"


# The mutants of a file


def mutants_of(file: str) -> list[Mutant]:
    """Every mutant of a file of the package, in its order."""
    source = (PACKAGE / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, operator, new in _changes(ast.parse(source)):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        text = new if isinstance(new, str) else f"({ast.unparse(new)})"
        found.append(Mutant(file, node.lineno, operator, begin, end, text))
    return sorted(set(found), key=lambda mutant: (mutant.begin, mutant.end, mutant.new))


def _changes(tree: ast.Module) -> Iterator[tuple[Any, str, ast.AST | str]]:
    """Nodes to replace, by what kind of change, and what by. Types and the texts of errors stay as they are."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        todo += _children(node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield node, "comparison", _with(node, ops=[EXCHANGED[type(node.ops[0])]()])
        elif isinstance(node, ast.BoolOp):
            yield node, "boolean", _with(node, op=EXCHANGED[type(node.op)]())
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, "boolean", node.operand
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            if not isinstance(node.test, ast.Compare | ast.UnaryOp):  # these have changes of their own
                yield node.test, "boolean", ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.BinOp) and type(node.op) in EXCHANGED and not _is_text(node):
            yield node, "arithmetic", _with(node, op=EXCHANGED[type(node.op)]())
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "constant", ast.Constant(not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node, "constant", ast.Constant(node.value + 1)
        elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
            yield node, "return", "return None"
        elif (
            isinstance(node, ast.Raise | ast.AugAssign)
            or (isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple))
            or isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and not _is_log(node.value)
        ):
            yield node, "deleted statement", "pass"


def _children(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Raise | ast.JoinedStr) or _is_log(node):
        return []
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value else []
    if isinstance(node, ast.arg):
        return []
    if isinstance(node, ast.FunctionDef):
        return [*node.body, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return []
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "cast", "TypeVar"):
        return [] if ast.unparse(node.func) == "TypeVar" else node.args[:1]
    return list(ast.iter_child_nodes(node))


def _with(node: Any, **changed: Any) -> Any:
    made = copy.copy(node)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def _is_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) for side in sides) or any(
        isinstance(side, ast.Constant) and isinstance(side.value, str) for side in sides
    )


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_log(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("logger.", "warnings.warn"))


def function_at(file: str, line: int) -> int:
    """First line, decorators included, of the innermost function around a line; 0 for the module itself."""
    best = (0, 0)
    for node in ast.walk(ast.parse((PACKAGE / file).read_bytes())):
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0):
            best = max(best, (node.lineno, min([node.lineno, *(part.lineno for part in node.decorator_list)])))
    return best[1]


# Forks


def in_fork(work: Callable[[], Any], seconds: float) -> Any:
    """What `work` returns in a fork of this process, `None` if it ends without, `"timeout"` if it does not end."""
    with tempfile.NamedTemporaryFile() as answer:
        process = start(work, answer.name)
        if not wait(process, time.monotonic() + seconds):
            return "timeout"
        return json.loads(Path(answer.name).read_text() or "null")


def start(work: Callable[[], Any], answer: str) -> int:
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        log = os.open(RESULTS / "last.log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for stream in (0, 1, 2):
            os.dup2(log, stream)
        Path(answer).write_text(json.dumps(work()))
    finally:
        os._exit(0)


def wait(process: int, deadline: float) -> bool:
    """Whether it ended in time; what did not is killed, with all that it started."""
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return False
        time.sleep(0.02)
    return True


def parallel(works: list[Callable[[], Any]], seconds: list[float], jobs: int) -> Iterator[tuple[int, Any]]:
    """Number and answer of each of `works`, as they end."""
    with tempfile.TemporaryDirectory() as folder:
        rest, running = list(range(len(works))), dict[int, tuple[int, float]]()
        while rest or running:
            while rest and len(running) < jobs:
                number = rest.pop(0)
                process = start(works[number], f"{folder}/{number}")
                running[number] = process, time.monotonic() + seconds[number]
            for number, (process, deadline) in list(running.items()):
                late = time.monotonic() > deadline
                if late or os.waitpid(process, os.WNOHANG) != (0, 0):
                    if late:
                        wait(process, 0)
                    del running[number]
                    answer = Path(f"{folder}/{number}")
                    yield number, "timeout" if late else json.loads(answer.read_text()) if answer.exists() else None
            time.sleep(0.02)


def preload(modules: list[str]) -> None:
    """Import them once, for all forks to come."""
    for name in modules:
        with contextlib.suppress(ImportError):  # registered by another one, under a name of its own
            importlib.import_module(name)


# Which test enters which function


class Recorder:
    """Notes for each test its time and the functions of the package that it enters, those of its fixtures included."""

    def __init__(self) -> None:
        self.entered: set[str] = set()
        self.tests: dict[str, dict[str, Any]] = {}

    def _trace(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if code.co_filename.startswith(str(PACKAGE)):
            self.entered.add(f"{code.co_filename[len(str(PACKAGE)) + 1 :]}:{code.co_firstlineno}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.entered = set()
        begin = time.perf_counter()
        sys.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            seconds = time.perf_counter() - begin
            test = self.tests.setdefault(item.nodeid, {"passed": False})
            test.update(seconds=seconds, entered=sorted(self.entered))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.tests[report.nodeid] = {"passed": report.passed}


def record(file: str) -> dict[str, Any]:
    """The tests of a file that pass, and the modules of other packages that are loaded then."""
    recorder = Recorder()
    pytest.main([*(flag for flag in FLAGS if flag != "-x"), file], plugins=[recorder])
    tests = {name: test for name, test in recorder.tests.items() if test["passed"] and "entered" in test}
    ours = (str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "examples"))
    others = [
        name
        for name, module in sys.modules.items()
        if not str(getattr(module, "__file__", None) or ours[0]).startswith(ours) and not name.startswith("triton")
    ]
    return {"tests": tests, "modules": others}


def record_all(folders: list[str], jobs: int) -> dict[str, Any]:
    """All of [`record`], kept while sources and tests stay as they are."""
    chosen = [path for folder in folders for path in sorted((ROOT / "tests" / folder).rglob("test_*.py"))]
    files = [str(path.relative_to(ROOT)) for path in chosen]
    digest = hashlib.sha256(" ".join(files).encode())
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        if path != Path(__file__):
            digest.update(path.read_bytes())
    kept = RESULTS / "entered.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["digest"] == digest.hexdigest():
        return found
    importlib.import_module("transformers")
    tests, modules = dict[str, Any](), list[set[str]]()
    first = in_fork(lambda: record(files[0]), 900)
    preload(first["modules"] if isinstance(first, dict) else [])
    works = [lambda file=file: record(file) for file in files]
    for number, answer in parallel(works, [900.0] * len(files), jobs):
        print(f"  {files[number]}: {'lost' if not isinstance(answer, dict) else len(answer['tests'])}", flush=True)
        if isinstance(answer, dict):
            tests |= answer["tests"]
            modules.append(set(answer["modules"]))
    found = {"digest": digest.hexdigest(), "tests": tests, "modules": sorted(set.intersection(*modules))}
    kept.write_text(json.dumps(found))
    return found


# A mutant and its tests


def tests_for(mutant: Mutant, tests: dict[str, Any], budget: float) -> list[str]:
    """Those that enter its function, its file, its folder's mirror: of each test the fastest case first."""
    spot = f"{mutant.file}:{function_at(mutant.file, mutant.line)}"
    mirror = f"tests/{mutant.file.split('/')[0]}/"
    chosen, seconds = list[str](), 0.0
    wishes: tuple[Callable[[str], bool], ...] = (
        lambda name: spot in tests[name]["entered"],
        lambda name: any(place.startswith(f"{mutant.file}:") for place in tests[name]["entered"]),
        lambda name: name.startswith(mirror),
    )
    for wanted in wishes:
        cases = defaultdict(list)
        for name in filter(wanted, sorted(tests, key=lambda name: tests[name]["seconds"])):
            cases[name.partition("[")[0]].append(name)
        rounds = sorted((turn, tests[name]["seconds"], name) for of in cases.values() for turn, name in enumerate(of))
        for _, cost, name in rounds:
            if name not in chosen and seconds + cost <= budget:
                chosen.append(name)
                seconds += cost
    return chosen


class Only:
    """Runs the chosen tests in their order, and remembers which of them failed."""

    def __init__(self, chosen: list[str]) -> None:
        self.chosen, self.failed = chosen, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.chosen if name in found]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def try_mutant(mutant: Mutant | None, chosen: list[str]) -> dict[str, Any]:
    """Run the tests with the mutant, or with the source as it is, in a fork; which of them failed."""
    if mutant is not None:
        path, text = str(PACKAGE / mutant.file), mutant.source()
        plain = importlib.machinery.SourceFileLoader.get_code

        def get_code(self: Any, name: str) -> Any:
            return compile(text, path, "exec") if self.get_filename(name) == path else plain(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    only = Only(chosen)
    code = pytest.main([*FLAGS, *sorted({name.partition("::")[0] for name in chosen})], plugins=[only])
    return {"code": int(code), "failed": only.failed}


def main() -> None:
    parser = argparse.ArgumentParser(description="Change the source a little, and see whether a test notices.")
    parser.add_argument("--count", type=int, default=200, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="*", default=ROOMS, help="folders of the package")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="folders of tests")
    parser.add_argument("--seconds", type=float, default=60, help="budget of tests for a mutant")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--show", help="list the mutants of a file of the package, and run nothing")
    chosen = parser.parse_args()
    files = [path.relative_to(PACKAGE).as_posix() for room in chosen.rooms for path in (PACKAGE / room).rglob("*.py")]
    files = [file for file in sorted(files) if not any(fnmatch.fnmatch(file, pattern) for pattern in LEFT_OUT)]
    every = [mutant for file in ([chosen.show] if chosen.show else files) for mutant in mutants_of(file)]
    if chosen.show:
        print(*every, sep="\n")
        return
    sample = sorted(random.Random(chosen.seed).sample(every, min(chosen.count, len(every))))
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(ROOT / "src")]
    RESULTS.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(sample)} of {len(every)} mutants in {len(files)} files. Which test enters which function:", flush=True
    )
    recorded = record_all(list(chosen.tests), chosen.jobs)
    preload(recorded["modules"])
    plans = [tests_for(mutant, recorded["tests"], chosen.seconds) for mutant in sample]
    limits = [30 + 5 * sum(recorded["tests"][name]["seconds"] for name in plan) for plan in plans]
    untouched = in_fork(lambda: try_mutant(None, plans[0]), limits[0])
    if untouched in ("timeout", None) or untouched["code"] != 0:
        sys.exit(f"The tests must pass before anything is changed. Got {untouched}.")
    outcomes = dict[int, str]()
    works = [lambda m=mutant, p=plan: try_mutant(m, p) for mutant, plan in zip(sample, plans, strict=True)]
    for number, answer in parallel(works, limits, chosen.jobs):
        if isinstance(answer, dict) and answer["code"] == 0:
            outcomes[number] = f"SURVIVED {len(plans[number])} tests"
        elif isinstance(answer, dict):
            outcomes[number] = f"killed by {answer['failed'] or 'an error on import'}"
        else:
            outcomes[number] = f"killed by {'time' if answer == 'timeout' else 'a crash'}"
        print(f"{len(outcomes)}/{len(sample)} {sample[number]}: {outcomes[number]}", flush=True)
    lines = [f"- {sample[number]}: {outcomes[number]}" for number in sorted(outcomes)]
    survivors = [line for line in lines if "SURVIVED" in line]
    share = 100 * (1 - len(survivors) / len(lines))
    head = f"{share:.1f} % of {len(lines)} mutants killed (seed {chosen.seed}, of {len(every)})."
    (RESULTS / "report.md").write_text("\n".join([head, "", "Survivors:", *survivors, "", "All:", *lines]) + "\n")
    print(head, *survivors, sep="\n")


if __name__ == "__main__":
    main()
