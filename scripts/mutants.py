"""Print the share of mutants that the tests kill, by package, and the survivors: `python -m scripts.mutants`.

`python -m scripts.mutants resplit.decide 100` prints the names of 100 random mutants instead, always the same ones, for
`mutmut run`. The share of a sample has a 95 % interval (Wilson, 1927). The mutants must have been generated before: by
`mutmut run 'none'`, which then finds nothing to run.

It reads the results of `mutmut run` in mutants/. A mutant counts as killed if a test fails, hangs or crashes because of
it. A mutant that no test runs counts as a survivor. `mutmut show NAME` shows the change.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from mutmut.stats import status_by_exit_code

KILLED = ("killed", "timeout", "segfault", "suspicious")
SURVIVED = ("survived", "no tests")


def main() -> None:
    if len(sys.argv) == 3:
        print(" ".join(sample(sys.argv[1], int(sys.argv[2]))))
        return
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for name, status in verdicts(Path("mutants")):
        counts[package_of(name)][status] += 1
        if status in SURVIVED:
            survivors.append(f"{status:8} {name}")
    print("\n".join(sorted(survivors)))
    print(f"{'package':20} {'killed':>8} {'of':>6} {'share':>7} {'95 %':>14} {'not run yet':>12}")
    for package, by_status in sorted(counts.items()):
        killed, survived = (sum(by_status[status] for status in group) for group in (KILLED, SURVIVED))
        total, waiting = killed + survived, by_status["not checked"]
        share = f"{100 * killed / total:.1f} %" if total else "-"
        low, high = interval(killed, total) if total and waiting else (math.nan, math.nan)
        span = f"{100 * low:.1f} - {100 * high:.1f} %" if total and waiting else "-"
        print(f"{package:20} {killed:8} {total:6} {share:>7} {span:>14} {waiting:12}")


def sample(package: str, count: int) -> list[str]:
    """The names of `count` random mutants of a package (a prefix of their names)."""
    names = sorted(name for name, _ in verdicts(Path("mutants")) if name.startswith(package))
    return sorted(random.Random(11).sample(names, min(count, len(names))))


def interval(killed: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `killed` of `total` are a random sample (Wilson, 1927)."""
    z, share = 1.96, killed / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return middle - half, middle + half


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
