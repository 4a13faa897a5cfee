"""The processors of the testbed: a control group for each node, with a quota, in version 1 or 2 of Linux.

In a node's group are two: `node` with its process, and `others` with a process that only uses up time. Gateway,
controller and relay are in the group `control`. All together go before whatever else runs on this machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.testbed.layout import quota
from resplit.errors import ResplitError

__all__ = ["Groups", "remove_groups"]

MOUNT = Path("/sys/fs/cgroup")
_NAME, _CONTROL = "resplit-testbed", "control"
_CONTROLLERS = ("cpu", "cpuacct")  # of version 1: quota, and accounting
_WEIGHT, _GREATEST_WEIGHT = 1000, 10_000
_GONE_WITHIN_S = 5.0


@dataclass
class Groups:
    """The groups of some nodes. `mount` is where control groups are mounted."""

    mount: Path = MOUNT
    _burners: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def make(self, nodes: Sequence[str]) -> None:
        """Make the groups, without quotas, and move this process to that of control."""
        for root in _roots(self.mount):
            for name in (_CONTROL, *(f"{node}/{part}" for node in nodes for part in ("node", "others"))):
                (root / name).mkdir(parents=True, exist_ok=True)
        root = _roots(self.mount)[0]
        if not _is_version_1(self.mount):
            for folder in (self.mount, root, *(root / node for node in nodes)):
                (folder / "cgroup.subtree_control").write_text("+cpu")
        self._set_weight(root, _GREATEST_WEIGHT)
        self.join(_CONTROL, os.getpid())

    def join(self, name: str, process: int) -> None:
        """Move a process, with its threads, to a group."""
        for root in _roots(self.mount):
            (root / name / "cgroup.procs").write_text(str(process))

    def limit(self, node: str, share: float, background: float, core: int) -> None:
        """Give a node a share of `core`, of which others use the share `background` whenever they can."""
        self._end_burner(node)
        folder = _roots(self.mount)[0] / node
        # A group may not have more than its parent, so the inner quota is taken away first.
        self._set_quota(folder / "others", None)
        self._set_quota(folder, share)
        for name, part in (("node", 1 - background), ("others", background)):
            self._set_weight(folder / name, max(2, round(_WEIGHT * part)))
        if background:
            self._set_quota(folder / "others", share * background)
            self._burners[node] = subprocess.Popen([sys.executable, "-c", _BURN], stdin=subprocess.PIPE)
            self.join(f"{node}/others", self._burners[node].pid)
            os.sched_setaffinity(self._burners[node].pid, {core})

    def stop(self) -> None:
        """End the processes that use up time, and move this one out of the groups."""
        for node in list(self._burners):
            self._end_burner(node)
        for root in _roots(self.mount):
            (root.parent / "cgroup.procs").write_text(str(os.getpid()))

    def _end_burner(self, node: str) -> None:
        burner = self._burners.pop(node, None)
        if burner is not None:
            burner.kill()
            burner.wait()
            if burner.stdin is not None:
                burner.stdin.close()

    def _set_quota(self, folder: Path, share: float | None) -> None:
        if _is_version_1(self.mount):
            (folder / "cpu.cfs_quota_us").write_text("-1")
            if share is not None:
                quota_us, period_us = quota(share)
                (folder / "cpu.cfs_period_us").write_text(str(period_us))
                (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (folder / "cpu.max").write_text("max" if share is None else " ".join(map(str, quota(share))))

    def _set_weight(self, folder: Path, weight: int) -> None:
        (folder / ("cpu.shares" if _is_version_1(self.mount) else "cpu.weight")).write_text(str(weight))


# Uses a whole core until its standard input ends, as that of a process whose parent has ended does.
_BURN = """
import select
while not select.select([0], [], [], 0)[0]:
    sum(range(10_000))
"""


def remove_groups(mount: Path = MOUNT) -> None:
    """End what runs in the groups of the testbed, and remove them. ResplitError if something does not end."""
    for root in _roots(mount):
        until_s = time.monotonic() + _GONE_WITHIN_S
        while processes := [int(pid) for path in root.rglob("cgroup.procs") for pid in path.read_text().split()]:
            if time.monotonic() > until_s:
                raise ResplitError(f"{root}: processes {processes} do not end")
            for process in processes:
                _kill(process)
            time.sleep(0.05)
        folders = [path for path in root.rglob("*") if path.is_dir()] if root.exists() else []
        for folder in [*sorted(folders, reverse=True), *([root] if root.exists() else [])]:
            folder.rmdir()


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may end by itself
        os.kill(process, signal.SIGKILL)


def _roots(mount: Path) -> list[Path]:
    """The testbed's folder in each hierarchy; the first one has the quotas."""
    if not _is_version_1(mount):
        return [mount / _NAME]
    roots = {(mount / controller).resolve() for controller in _CONTROLLERS}  # often one hierarchy with two names
    return [root / _NAME for root in sorted(roots)]


def _is_version_1(mount: Path) -> bool:
    return (mount / "cpu").exists()
