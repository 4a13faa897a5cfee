"""What is measured on a busy machine is measured again when it is quiet."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from resplit.cluster import busy_machine
from resplit.cluster.busy_machine import EmulationCheck, OthersUse, measured_again_when_quiet
from resplit.errors import ResplitError, SlowMachineError


class Shares(OthersUse):
    """A machine that others use by these shares, one after another."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)

    def share(self) -> float:
        return self.shares.pop(0)


class Check:
    """A check that fails the first times, because the machine is too slow by a factor."""

    def __init__(self, failures: int, factor: float = 1.5) -> None:
        self.failures, self.factor, self.calls = failures, factor, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise SlowMachineError("nodes.hub.emulate", "too slow", self.factor)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_machine, "CHECK_EVERY_S", 0.001)


@pytest.fixture
def busy_process() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield process.pid
        process.kill()


def test_the_use_by_others_is_that_of_all_processes_but_the_own_ones(busy_process: int) -> None:
    without, with_it = OthersUse(lambda: [os.getpid()]), OthersUse(lambda: [os.getpid(), busy_process])
    busy = psutil.Process(busy_process)
    until_s = busy.cpu_times().user + 0.5
    while busy.cpu_times().user < until_s:
        os.sched_yield()
    assert without.share() > with_it.share()
    assert 0 <= with_it.share() <= 1


def test_an_own_process_that_has_ended_is_no_error() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    others = OthersUse(lambda: [ended.pid])
    ended.wait()
    assert 0 <= others.share() <= 1


async def test_a_check_that_fails_on_a_quiet_machine_is_an_error_at_once() -> None:
    with pytest.raises(SlowMachineError, match="too slow"):
        await EmulationCheck(Check(1), Shares(0.0, 0.1)).at_start()


async def test_a_machine_that_would_be_too_slow_even_if_quiet_is_an_error_at_once() -> None:
    with pytest.raises(SlowMachineError, match="too slow"):
        await EmulationCheck(Check(1, factor=3.5), Shares(0.0, 0.9)).at_start()


async def test_a_check_that_fails_on_a_busy_machine_is_repeated_when_it_is_quiet() -> None:
    check = Check(1)
    emulation = EmulationCheck(check, Shares(0.0, 0.9, 0.9, 0.5, 0.3, 0.02))
    await emulation.at_start()
    assert "busy" in emulation.warning
    assert "too slow" in emulation.warning
    assert check.calls == 1
    await asyncio.wait_for(emulation.when_quiet(), 10)
    assert (check.calls, emulation.warning) == (2, "")


async def test_a_machine_that_is_too_slow_although_quiet_is_reported() -> None:
    emulation = EmulationCheck(Check(2), Shares(0.0, 0.9, 0.9, 0.0))
    await emulation.at_start()
    await asyncio.wait_for(emulation.when_quiet(), 10)
    assert emulation.warning.startswith("this machine is too slow for this cluster, and measurements are wrong: nodes.")


@pytest.mark.parametrize("shares", [[0.0], [0.0, 0.9]], ids=["quiet", "busy"])
async def test_a_machine_without_headroom_gets_a_warning_and_is_not_checked_again(shares: list[float]) -> None:
    check = Check(9, factor=1.05)
    emulation = EmulationCheck(check, Shares(*shares))
    await emulation.at_start()
    await asyncio.wait_for(emulation.when_quiet(), 10)
    assert emulation.warning.startswith("this machine is only just fast enough for this cluster")
    assert check.calls == 1


async def test_a_busy_machine_that_proves_to_have_no_headroom_says_so() -> None:
    check = Check(1)
    emulation = EmulationCheck(check, Shares(0.0, 0.9, 0.9, 0.02))
    await emulation.at_start()
    check.failures, check.factor = 9, 1.05
    await asyncio.wait_for(emulation.when_quiet(), 10)
    assert "only just fast enough" in emulation.warning


async def test_a_check_that_succeeds_is_not_repeated() -> None:
    check = Check(0)
    emulation = EmulationCheck(check, Shares(0.0))
    await emulation.at_start()
    await emulation.when_quiet()
    assert check.calls == 1


def test_nodes_are_timed_again_once_the_machine_is_quiet() -> None:
    others, measured = Shares(0.5, 0.6, 0.3, 0.05), threading.Event()
    with measured_again_when_quiet(others, measured.set):
        assert measured.wait(10)
    assert others.shares == []


def test_nodes_that_were_timed_on_a_quiet_machine_are_not_timed_again() -> None:
    calls: list[int] = []
    with measured_again_when_quiet(Shares(0.1), lambda: calls.append(1)):
        pass
    assert calls == []


def test_the_end_of_the_cluster_ends_the_wait_and_a_failure_is_no_error() -> None:
    with measured_again_when_quiet(Shares(*[0.9] * 100_000), lambda: None):
        pass
    tried = threading.Event()

    def measure() -> None:
        tried.set()
        raise ResplitError("the controller does not answer")

    with measured_again_when_quiet(Shares(0.9, 0.0), measure):
        assert tried.wait(10)
