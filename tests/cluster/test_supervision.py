"""A process that ends is started again after growing waits, and the report says so. The clock is simulated."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from resplit.cluster.local import Cluster, start_process
from resplit.cluster.supervision import Restarts, Supervisor, describe_restarts, read_restarts, supervised
from resplit.config import parse_cluster
from resplit.errors import DataError
from tests.support.cluster import CLUSTER

NAME = "gamma"
FAILS = [sys.executable, "-S", "-c", "import sys; sys.exit('resplit: no keys here')"]
LIVES = ["sleep", "60"]


class Simulation:
    """A cluster whose only process runs `command`, its supervisor, and the clock that the supervisor reads."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "log").mkdir()
        config = parse_cluster(yaml.safe_load(CLUSTER), "test.yaml")
        self.cluster = Cluster("http://127.0.0.1:1", folder, config, "tiny-llama")
        self.command, self.now_s = FAILS, 0.0
        monkeypatch.setattr("resplit.cluster.local._command", lambda *_: self.command)
        start_process(self.cluster, NAME)
        self.supervisor = Supervisor(self.cluster, [NAME], lambda: self.now_s)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.cluster.processes[NAME]

    def seconds_until_restart(self) -> int:
        """Notice the end of the process, then let whole seconds pass until it is started again."""
        ended, seconds = self.process, 0
        ended.wait()
        self.supervisor.check()
        while self.process is ended:
            seconds += 1
            self.now_s += 1
            self.supervisor.check()
        return seconds

    def report(self) -> Restarts:
        return read_restarts(self.cluster.state)[NAME]


@pytest.fixture
def simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    made = Simulation(tmp_path, monkeypatch)
    yield made
    made.cluster.stop()


def test_a_process_that_ends_at_once_each_time_is_restarted_after_growing_waits(simulation: Simulation) -> None:
    assert [simulation.seconds_until_restart() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize(("lived_s", "wait_s"), [(59, 8), (60, 1)])
def test_a_long_life_makes_the_next_wait_the_first_one_again(
    simulation: Simulation, lived_s: float, wait_s: int
) -> None:
    assert [simulation.seconds_until_restart() for _ in range(3)] == [1, 2, 4]
    simulation.now_s += lived_s
    assert [simulation.seconds_until_restart() for _ in range(2)] == [wait_s, 2 * wait_s]


def test_the_report_says_how_a_process_ended_and_how_long_it_waits(simulation: Simulation) -> None:
    assert read_restarts(simulation.cluster.state) == {}
    simulation.process.wait()
    simulation.supervisor.check()
    assert simulation.report() == Restarts(0, "exit status 1, no keys here", 1.0)
    simulation.command = LIVES
    simulation.now_s = 1.0
    simulation.supervisor.check()
    assert simulation.report() == Restarts(1, "exit status 1, no keys here", None)
    simulation.process.kill()
    simulation.process.wait()
    simulation.supervisor.check()
    assert simulation.report() == Restarts(1, "killed by SIGKILL", 2.0)
    shown = "restarted once, last end: killed by SIGKILL, starts again after 2 s"
    assert describe_restarts(simulation.report()) == shown


def test_a_process_that_cannot_be_started_is_tried_again(simulation: Simulation) -> None:
    simulation.command = ["/absent"]
    simulation.process.wait()
    simulation.supervisor.check()
    simulation.now_s = 1.0
    simulation.supervisor.check()
    assert simulation.report() == Restarts(0, "could not be started: No such file or directory", 2.0)
    simulation.command = LIVES
    simulation.now_s = 3.0
    simulation.supervisor.check()
    assert simulation.process.poll() is None
    assert simulation.report().count == 1


def test_a_report_that_cannot_be_written_does_not_end_supervision(simulation: Simulation) -> None:
    (simulation.cluster.state / "restarts.json").mkdir()
    assert [simulation.seconds_until_restart() for _ in range(2)] == [1, 2]


def test_the_report_of_a_supervisor_that_has_ended_is_ignored(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    entry = {"count": 1, "ended": "killed by SIGKILL", "wait_s": None}
    (tmp_path / "restarts.json").write_text(json.dumps({"supervisor": ended.pid, "processes": {NAME: entry}}))
    assert read_restarts(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "[]", '{"supervisor": 1}'])
def test_a_malformed_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "restarts.json").write_text(content)
    with pytest.raises(DataError, match=r"restarts\.json: .*same version"):
        read_restarts(tmp_path)


def test_supervision_ends_with_its_block_and_leaves_no_report(simulation: Simulation) -> None:
    with supervised(simulation.cluster, [NAME]) as watching:
        assert not watching.done()
    assert watching.done()
    assert not (simulation.cluster.state / "restarts.json").exists()


def test_a_process_ends_when_its_parent_lets_go_of_its_standard_input() -> None:
    code = "from resplit.cluster.parent import end_with_parent; end_with_parent(); import signal; signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.poll() is None
        _, said = child.communicate(timeout=60)  # closes the pipe
    assert said == b"resplit: the parent process has ended\n"
    assert child.returncode == 1


def test_a_process_that_is_held_down_stays_down_until_it_is_started_again(simulation: Simulation) -> None:
    simulation.command = LIVES
    simulation.cluster.start_again(NAME)
    held = simulation.process
    simulation.cluster.hold_down(NAME)
    for _ in range(100):
        simulation.now_s += 1
        simulation.supervisor.check()
    assert simulation.process is held
    simulation.cluster.start_again(NAME)
    back = simulation.process
    simulation.supervisor.check()
    assert (back.poll(), simulation.process) == (None, back)
    assert read_restarts(simulation.cluster.state) == {}
