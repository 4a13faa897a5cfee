"""How much processor time this node may use, and who uses it: the quota of its control group, or its whole machine.

A container with a quota sees the processor use of all of its machine, but may use only its own part. Reads control
groups of Linux, version 1 and 2 (cgroups(7), and Documentation/scheduler/sched-bwc.rst of the kernel).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["ControlGroup", "ProcessorUse", "Use", "limiting_group", "own_groups"]

_SMALL_BYTES = 16 * 1024  # of a file of the kernel at most
_MAX_BACKGROUND = 0.99  # something is always left, if little


@dataclass(frozen=True)
class ControlGroup:
    """A control group: the folder of its quota, and the folder and version of its accounting (None: not mounted)."""

    folder: Path
    accounting: Path | None
    version: int

    def cores(self) -> float | None:
        """The quota in cores; None without one, or after the group has gone."""
        try:
            if self.version == 2:
                quota, period = _text(self.folder / "cpu.max").split()
            else:
                quota, period = (_text(self.folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
        except (OSError, ValueError):
            return None

    def used_s(self) -> float | None:
        """Processor time of all processes in the group so far; None where it is not counted."""
        if self.accounting is None:
            return None
        try:
            if self.version == 2:
                return _counter(self.accounting / "cpu.stat", "usage_usec") / 1e6
            return int(_text(self.accounting / "cpuacct.usage")) / 1e9
        except (OSError, ValueError):
            return None

    def throttled_s(self) -> float:
        """Time in which processes of the group had to wait for the next period of the quota, so far."""
        try:
            if self.version == 2:
                return _counter(self.folder / "cpu.stat", "throttled_usec") / 1e6
            return _counter(self.folder / "cpu.stat", "throttled_time") / 1e9
        except (OSError, ValueError):
            return 0.0


@dataclass(frozen=True)
class Use:
    """The use of a node's processors over a period.

    `cores` is what the node may use. `background` and `own` are shares of that, used by others and by this process.
    `throttled` is the share of the period in which the quota made processes wait.
    """

    cores: float
    background: float
    own: float
    throttled: float = 0.0


@dataclass(frozen=True)
class _Counters:
    """Readings of counters, all in seconds. `group_s` is None without a group that limits this process."""

    at_s: float
    own_s: float
    machine_s: float
    group_s: float | None = None
    throttled_s: float = 0.0


class ProcessorUse:
    """The use of processors from one call of `since_last` to the next. The limit is read anew each time."""

    def __init__(self, groups: tuple[ControlGroup, ...] | None = None, machine_cores: float | None = None) -> None:
        self._groups = own_groups() if groups is None else groups
        self._machine_cores = machine_cores or float(psutil.cpu_count() or 1)
        self._group = limiting_group(self._groups, self._machine_cores)
        self._last = self._seen()

    def since_last(self) -> Use:
        """The use since the last call, or since the start."""
        before, group = self._last, self._group
        now = self._seen()
        quotas = {each: each.cores() for each in self._groups}  # each file is read once: that costs an idle node most
        limit = (quotas[group] if group else None) or self._machine_cores
        self._group = _least(quotas, self._machine_cores)
        self._last = now if self._group == group else self._seen()
        return _use(before, now, min(limit, self._machine_cores))

    def _seen(self) -> _Counters:
        machine = psutil.cpu_times()
        idle_s = machine.idle + getattr(machine, "iowait", 0.0) + getattr(machine, "guest", 0.0)
        return _Counters(
            time.monotonic(),
            time.process_time(),
            sum(machine) - idle_s,
            self._group.used_s() if self._group else None,
            self._group.throttled_s() if self._group else 0.0,
        )


def limiting_group(groups: tuple[ControlGroup, ...], machine_cores: float) -> ControlGroup | None:
    """The group with the least quota, the innermost of equal ones; None if none has less than the machine."""
    return _least({group: group.cores() for group in groups}, machine_cores)


def _least(quotas: Mapping[ControlGroup, float | None], machine_cores: float) -> ControlGroup | None:
    least = min(quotas, key=lambda group: quotas[group] or machine_cores, default=None)
    return least if least and (quotas[least] or machine_cores) < machine_cores else None


def own_groups(process: Path = Path("/proc/self")) -> tuple[ControlGroup, ...]:
    """The control groups that this process is in, innermost first; none where control groups are not mounted."""
    try:
        member = _memberships((process / "cgroup").read_text())
        mounts = _mounts((process / "mountinfo").read_text())
    except OSError:
        return ()
    if "cpu" in mounts and "cpu" in member:
        folders = _upwards(*mounts["cpu"], member["cpu"])
        counted = _upwards(*mounts["cpuacct"], member["cpuacct"]) if {"cpuacct"} <= mounts.keys() & member else []
        # The two hierarchies may differ: only a group of the same name counts the same processes.
        same = counted if [each.name for each in counted[:-1]] == [each.name for each in folders[:-1]] else []
        return tuple(ControlGroup(folder, same[i] if same else None, 1) for i, folder in enumerate(folders))
    if "" in mounts and "" in member:
        return tuple(ControlGroup(folder, folder, 2) for folder in _upwards(*mounts[""], member[""]))
    return ()


def _use(before: _Counters, now: _Counters, cores: float) -> Use:
    """What was used between two readings. Without a group the others are those of the whole machine."""
    available_s = max(now.at_s - before.at_s, 1e-3) * cores
    own_s = max(0.0, now.own_s - before.own_s)
    if before.group_s is not None and now.group_s is not None:
        all_s = now.group_s - before.group_s
    elif before.group_s is None and now.group_s is None:
        all_s = now.machine_s - before.machine_s
    else:  # the group came or went meanwhile
        all_s = own_s
    own = min(1.0, own_s / available_s)
    others = max(0.0, all_s - own_s) / available_s
    waited = (now.throttled_s - before.throttled_s) / max(now.at_s - before.at_s, 1e-3)
    return Use(cores, min(_MAX_BACKGROUND, others, max(0.0, 1.0 - own)), own, min(1.0, max(0.0, waited)))


def _memberships(text: str) -> dict[str, str]:
    """The path of the process in the hierarchy of each controller; "" is that of version 2."""
    paths = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _mounts(text: str) -> dict[str, tuple[Path, str]]:
    """Where the hierarchy of each controller is mounted, and which of its paths is the root there; "" is version 2."""
    mounts: dict[str, tuple[Path, str]] = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        controllers = options.split(",") if kind == "cgroup" else [""] if kind == "cgroup2" else []
        mounts.update(dict.fromkeys(controllers, (Path(point), root)))
    return mounts


def _upwards(point: Path, root: str, path: str) -> list[Path]:
    """The folder of a group and those of its parents up to the mount point.

    A container often sees only its own group, at the mount point, while its path is named from outside.
    """
    within = path.removeprefix(root.rstrip("/")).strip("/") if path.startswith(root) else ""
    folder = point / within
    if not folder.is_dir():
        folder = point
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(point))]


def _counter(path: Path, name: str) -> int:
    """A line `name value` of a file of counters; ValueError if it has none."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    raise ValueError(f"{path} has no {name}")


def _text(path: Path) -> str:
    """The content of a small file of the kernel: a text file of Python takes twice as long."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _SMALL_BYTES).decode()
    finally:
        os.close(descriptor)
