"""The processor time of a node: that of its machine, or the quota of its control group, in both versions of Linux."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from resplit.node.processor import ControlGroup, ProcessorUse, limiting_group, own_groups


@dataclass
class Files:
    """A process's view of control groups, as files below `root`: what the kernel writes there."""

    root: Path

    def mounted(self, version: int, root: str = "/") -> None:
        """The control groups are mounted, with `root` as the path of the mount's own folder."""
        kinds = [("cpu", "cgroup"), ("cpuacct", "cgroup")] if version == 1 else [("", "cgroup2")]
        lines = [
            f"3{i} 20 0:2{i} {root} {self.mount(name)} rw,relatime shared:9 - {kind} {kind} rw,{name or 'nsdelegate'}"
            for i, (name, kind) in enumerate(kinds)
        ]
        (self.root / "mountinfo").write_text("20 1 8:1 / / rw - ext4 /dev/root rw\n" + "\n".join(lines) + "\n")
        for name, _ in kinds:
            self.mount(name).mkdir()

    def member(self, text: str) -> None:
        (self.root / "cgroup").write_text(text)

    def mount(self, controller: str) -> Path:
        return self.root / f"mount-{controller}"

    def group1(self, path: str, quota_us: int, period_us: int = 100_000, used_s: float = 0.0) -> Path:
        folder, counted = self.mount("cpu") / path, self.mount("cpuacct") / path
        for each in (folder, counted):
            each.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text(f"{quota_us}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period_us}\n")
        (folder / "cpu.stat").write_text("nr_periods 9\nnr_throttled 3\nthrottled_time 250000000\n")
        (counted / "cpuacct.usage").write_text(f"{round(used_s * 1e9)}\n")
        return folder

    def group2(self, path: str, quota: str, used_s: float = 0.0, throttled_s: float = 0.0) -> Path:
        folder = self.mount("") / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{quota}\n")
        self.used2(folder, used_s, throttled_s)
        return folder

    def used2(self, folder: Path, used_s: float, throttled_s: float = 0.0) -> None:
        counters = f"usage_usec {round(used_s * 1e6)}\nnr_periods 8\nthrottled_usec {round(throttled_s * 1e6)}\n"
        (folder / "cpu.stat").write_text(counters)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_the_quota_of_version_1_is_read_with_its_use_and_the_time_that_it_cost(files: Files) -> None:
    files.mounted(1)
    files.member("2:cpuacct:/app/node\n1:cpu:/app/node\n0::/\n")
    files.group1("app/node", 25_000, used_s=3.5)
    group = own_groups(files.root)[0]
    assert (group.cores(), group.used_s(), group.throttled_s()) == (0.25, 3.5, 0.25)


def test_the_quota_of_version_2_is_read_with_its_use_and_the_time_that_it_cost(files: Files) -> None:
    files.mounted(2)
    files.member("0::/app/node\n")
    files.group2("app/node", "150000 100000", used_s=3.5, throttled_s=0.25)
    group = own_groups(files.root)[0]
    assert (group.cores(), group.used_s(), group.throttled_s()) == (1.5, 3.5, 0.25)


def test_without_a_quota_no_group_limits(files: Files) -> None:
    files.mounted(2)
    files.member("0::/app\n")
    files.group2("app", "max 100000")
    assert limiting_group(own_groups(files.root), 4) is None
    files.group2("app", "400000 100000")
    assert limiting_group(own_groups(files.root), 4) is None, "as much as the machine has"


def test_without_control_groups_there_are_none(files: Files) -> None:
    assert own_groups(files.root) == ()


def test_the_parent_of_a_group_can_be_what_limits(files: Files) -> None:
    files.mounted(1)
    files.member("2:cpuacct:/app/node\n1:cpu:/app/node\n")
    parent = files.group1("app", 30_000)
    files.group1("app/node", -1)
    found = limiting_group(own_groups(files.root), 2)
    assert found is not None
    assert found.folder == parent
    assert found.cores() == 0.3


def test_a_container_reads_its_group_at_the_mount_point_whatever_its_path_is_called_outside(files: Files) -> None:
    files.mounted(1, root="/docker/4f2a")
    files.member("2:cpuacct:/docker/4f2a\n1:cpu:/docker/4f2a\n")
    files.group1("", 50_000)
    assert [group.cores() for group in own_groups(files.root)] == [0.5]
    files.member("2:cpuacct:/kubepods/pod7/4f2a\n1:cpu:/kubepods/pod7/4f2a\n")
    assert [group.cores() for group in own_groups(files.root)] == [0.5]


def test_the_use_of_a_group_of_another_name_is_not_taken_for_that_of_the_limited_one(files: Files) -> None:
    files.mounted(1)
    files.member("2:cpuacct:/all\n1:cpu:/app\n")
    files.group1("app", 50_000)
    files.group1("all", 50_000, used_s=9.0)
    group = own_groups(files.root)[0]
    assert (group.cores(), group.used_s()) == (0.5, None)


def test_what_others_in_the_group_use_is_background_and_not_what_others_on_the_machine_use(files: Files) -> None:
    files.mounted(2)
    folder = files.group2("", "20000 100000")
    group = ControlGroup(folder, folder, 2)
    seen = ProcessorUse((group,), machine_cores=2)
    began_s, worked_from_s = time.monotonic(), time.process_time()
    while time.process_time() < worked_from_s + 0.1:  # the group's counter stands still: the machine is all that works
        pass
    alone = seen.since_last()
    assert alone.cores == 0.2
    assert alone.background == 0.0
    assert alone.own >= min(0.9, 0.1 / 0.2 / (time.monotonic() - began_s))


def test_half_of_the_quota_used_by_others_is_half_background(files: Files) -> None:
    files.mounted(2)
    folder = files.group2("", "100000 100000")
    seen = ProcessorUse((ControlGroup(folder, folder, 2),), machine_cores=64)
    began_s = time.monotonic()
    time.sleep(0.2)
    files.used2(folder, (time.monotonic() - began_s) / 2, throttled_s=0.05)
    use = seen.since_last()
    assert 0.35 < use.background < 0.55
    assert 0.15 < use.throttled < 0.3


def test_a_quota_that_changes_is_noticed_and_one_that_goes_leaves_the_machine(files: Files) -> None:
    files.mounted(2)
    folder = files.group2("", "100000 100000")
    seen = ProcessorUse((ControlGroup(folder, folder, 2),), machine_cores=4)
    assert seen.since_last().cores == 1.0
    files.group2("", "20000 100000")
    assert seen.since_last().cores == 0.2
    files.group2("", "max 100000")
    seen.since_last()
    assert seen.since_last().cores == 4.0


def test_without_a_quota_the_machine_counts() -> None:
    use = ProcessorUse((), machine_cores=2)
    time.sleep(0.05)
    seen = use.since_last()
    assert seen.cores == 2
    assert 0.0 <= seen.background <= 0.99
    assert 0.0 <= seen.own <= 1.0
    assert seen.background + seen.own <= 1.0
