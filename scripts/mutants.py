"""Print the share of mutants that the tests kill, by package, and the survivors: `python -m scripts.mutants`.

It reads the results of `mutmut run` in mutants/. A mutant counts as killed if a test fails, hangs or crashes because of
it. A mutant that no test runs counts as a survivor. `mutmut show NAME` shows the change.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from mutmut.stats import status_by_exit_code

KILLED = ("killed", "timeout", "segfault", "suspicious")
SURVIVED = ("survived", "no tests")


def main() -> None:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for name, status in verdicts(Path("mutants")):
        counts[package_of(name)][status] += 1
        if status in SURVIVED:
            survivors.append(f"{status:8} {name}")
    print("\n".join(sorted(survivors)))
    print(f"{'package':20} {'killed':>8} {'of':>6} {'share':>7} {'not run yet':>12}")
    for package, by_status in sorted(counts.items()):
        killed, survived = (sum(by_status[status] for status in group) for group in (KILLED, SURVIVED))
        share = f"{100 * killed / (killed + survived):.1f} %" if killed + survived else "-"
        print(f"{package:20} {killed:8} {killed + survived:6} {share:>7} {by_status['not checked']:12}")


def verdicts(folder: Path) -> Iterator[tuple[str, str]]:
    """The name and the status of every mutant."""
    for file in sorted(folder.rglob("*.meta")):
        for name, exit_code in json.loads(file.read_text())["exit_code_by_key"].items():
            yield name, status_by_exit_code[exit_code]


def package_of(mutant: str) -> str:
    """The first two parts of a mutant's name, for example `resplit.cost` of resplit.cost.fit.x_fit__mutmut_1."""
    return ".".join(mutant.split(".")[:2])


if __name__ == "__main__":
    main()
