"""Judge a random sample of the mutants of some modules by their own tests, in minutes.

    python -m scripts.sample_mutants --count 35 --seed 1 src/resplit/control/recovery.py tests/control/test_recovery.py

`mutmut run` judges every mutant by all tests that reach it, which takes hours. This works on a copy of the checkout,
sets up the session's fixtures once, and judges each mutant of the sample in a fork, by those of the given tests that
call its function. A test must fail twice to count. Tests that start processes are left out: a mutant is known in this
one only. `--skip` goes on with a sample that was cut short.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import libcst as cst
import pytest
from mutmut.mutation import file_mutation, trampoline
from mutmut.mutation.file_mutation import MutationVisitor, OuterFunctionProvider, mutate_file_contents
from mutmut.mutation.trampoline import set_mutant_under_test

_COPIED = ("src", "tests", "tasks", "flows", "benchmarks", "scripts", "data", "docs", "examples", "pyproject.toml")
_AT_LEAST_S, _TIMES = 20.0, 6.0  # a test that takes longer than this, and so many times as usual, hangs
_TICK_S = 0.1
_SURVIVED, _KILLED, _HANGS = range(3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="modules below src/, and test files")
    parser.add_argument("--count", type=int, default=35)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first mutants of the sample")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants instead of a sample")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in _COPIED:
            source, target = Path(name), Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
        os.chdir(folder)
        sys.path[:0] = [f"{folder}/src", folder]
        names = [name for file in options.files if file.startswith("src/") for name in _mutate(Path(file))]
        sample = random.Random(options.seed).sample(names, min(options.count, len(names)))
        judge = Judge(options.only or sample[options.skip :], len(names))
        tests = [file for file in options.files if not file.startswith("src/")]
        with _output_to(Path("log")):
            pytest.main(["-m", "not processes", "-p", "no:cacheprovider", "--tb=short", *tests], plugins=[judge])
        if not judge.judged:
            print(Path("log").read_text(encoding="utf-8"))
    return 0 if judge.judged else 1


class _Visitor(MutationVisitor):
    """Mutates also decorated functions inside others, such as the routes of an API: each mutant makes its own."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef) and self.get_metadata(OuterFunctionProvider, node, node) is not node:
            return False
        return super()._skip_node_and_children(node)


def _mutate(file: Path) -> list[str]:
    """Put all mutants of a module into its file; returns their names."""
    vars(file_mutation)["MutationVisitor"] = _Visitor
    mutated = mutate_file_contents(str(file), file.read_text(encoding="utf-8"))
    file.write_text(mutated.code, encoding="utf-8")
    module = ".".join(file.with_suffix("").parts[1:])
    return [f"{module}.{name}" for name in mutated.mutant_names]


def _difference(mutant: str) -> str:
    """The lines that a mutant changes, before and after."""
    module, _, function = mutant.rpartition(".")
    code = ast.parse(Path("src", *module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(code) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lines = {node.name: ast.unparse(node).splitlines()[1:] for node in functions}
    original = function.rpartition("__mutmut_")[0] + "__mutmut_orig"
    return "\n".join(list(difflib.unified_diff(lines[original], lines[function], n=0, lineterm=""))[3:])


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Send what tests print to a file. `Judge.say` still prints."""
    terminal = os.dup(1)
    sys.stdout.flush()
    with file.open("wb") as log:
        os.dup2(log.fileno(), 1)
        try:
            Judge.terminal = terminal
            yield
        finally:
            sys.stdout.flush()
            os.dup2(terminal, 1)


class Judge:
    """A plugin of pytest: runs all tests once, and then for each mutant, in a fork, those that call its function."""

    terminal = 1

    def __init__(self, sample: Sequence[str], of: int) -> None:
        self.judged = False
        self._sample = sample
        self._of = of
        self._failed = False
        self._left_s = _AT_LEAST_S
        self._current: pytest.Item | None = None
        self._took_s: dict[pytest.Item, float] = {}
        self._tests_of: defaultdict[str, dict[pytest.Item, None]] = defaultdict(dict)  # by function
        vars(trampoline)["record_trampoline_hit"] = self._called

    def say(self, text: str) -> None:
        os.write(self.terminal, f"{text}\n".encode())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        set_mutant_under_test("stats")  # has each function say that it is called
        for item, following in _with_next(session.items):
            self._failed, self._current, begun_s = False, item, time.monotonic()
            _run(item, following)
            if self._failed:
                self.say(f"left out, because it fails without a mutant: {item.nodeid}")
            else:
                self._took_s[item] = time.monotonic() - begun_s
        self._current = None
        if self._verdict("", list(self._took_s)) != "survived":
            self.say("some test fails without a mutant when it runs again")
            return True
        killed = 0
        for name in self._sample:
            tests = sorted(self._tests(name), key=self._took_s.__getitem__)
            verdict = self._verdict(name, tests) if tests else "not tested"
            killed += verdict.startswith("killed")
            self.say(f"{verdict:14} {name}")
            if not verdict.startswith("killed"):
                self.say(_difference(name))
        self.say(f"{killed} of {len(self._sample)} killed, of {self._of} mutants in all")
        self.judged = True
        return True

    def _tests(self, mutant: str) -> list[pytest.Item]:
        """The tests that call the function of a mutant."""
        return [test for test in self._tests_of[mutant.rpartition("__mutmut_")[0]] if test in self._took_s]

    def _called(self, name: str, caller: str | None = None) -> None:
        if self._current is not None:
            self._tests_of[name][self._current] = None

    def _verdict(self, mutant: str, tests: Sequence[pytest.Item]) -> str:
        child = os.fork()
        if child == 0:
            os.setsid()
            set_mutant_under_test(mutant)
            verdict = _KILLED  # also if the mutant ends pytest itself
            try:
                verdict = self._judged_in_this_process(tests)
            finally:
                os._exit(verdict)
        _, status = os.waitpid(child, 0)
        return {_SURVIVED: "survived", _HANGS: "killed (hangs)"}.get(os.waitstatus_to_exitcode(status), "killed")

    def _judged_in_this_process(self, tests: Sequence[pytest.Item]) -> int:
        threading.Thread(target=self._watch, daemon=True).start()
        for item, following in _with_next(tests):
            for _ in range(2):
                self._failed, self._left_s = False, _AT_LEAST_S + _TIMES * self._took_s[item]
                _run(item, following)
                if not self._failed:
                    break
            else:
                return _KILLED
        return _SURVIVED

    def _watch(self) -> None:
        """End this process when a test hangs. Only time in which this process may run counts."""
        while self._left_s > 0:
            time.sleep(_TICK_S)
            self._left_s -= _TICK_S
        os._exit(_HANGS)


def _with_next(tests: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item]]:
    """Each test with the one after it. The last one has one, too, so that fixtures of the session stay."""
    return zip(tests, [*tests[1:], tests[0]], strict=True)


def _run(item: pytest.Item, following: pytest.Item) -> None:
    item._initrequest()  # type: ignore[attr-defined] # so that it can run again
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


if __name__ == "__main__":
    sys.exit(main())
