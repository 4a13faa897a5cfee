"""The environment of the flows is prepared by entry points, not by imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.eventually import eventually

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]


def _run(code: str, folder: Path) -> list[str]:
    """The lines that `code` prints in a new process whose working directory is `folder`."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RESPLIT_STATE", "PREFECT_HOME")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_importing_flows_makes_no_folder_and_sets_no_variable(tmp_path: Path) -> None:
    code = "import os; before = dict(os.environ); import flows, flows.params; print(dict(os.environ) == before)"
    assert _run(code, tmp_path) == ["True"]
    assert list(tmp_path.iterdir()) == []


def test_preparing_makes_the_state_folder_and_keeps_variables_that_are_set(tmp_path: Path) -> None:
    code = (
        "import os; os.environ['MPLBACKEND'] = 'svg'; from flows.environment import prepare; prepare(); "
        "print(os.environ['MPLBACKEND']); print(os.environ['PREFECT_HOME'])"
    )
    assert _run(code, tmp_path) == ["svg", str(tmp_path.resolve() / ".resplit" / "prefect")]
    assert (tmp_path / ".resplit").is_dir()


def test_the_server_of_prefect_does_not_log_what_a_full_disk_does_to_it(tmp_path: Path) -> None:
    code = (
        "from flows.environment import prepare; prepare(); import logging; "
        "from prefect.logging.configuration import setup_logging; setup_logging(); "
        "print(logging.getLogger('prefect.server').isEnabledFor(logging.ERROR))"
    )
    assert _run(code, tmp_path) == ["False"]


def test_an_interruption_before_a_flow_begins_ends_it_without_a_traceback(tmp_path: Path) -> None:
    heard = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's `&` ignores it
    code = f"{heard}; from flows.environment import prepare; prepare(); os.kill(os.getpid(), signal.SIGINT)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


FULL_DISK = "No space left on device; make room there, and start again\n"
# What happens in a flow; then the status of its process and all that it says.
ENDS = {
    "it is interrupted": ("os.kill(os.getpid(), signal.SIGINT); signal.pause()", 130, ""),
    "it is interrupted, and its orderly end fails": (
        """
try:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
finally:
    raise ConnectionRefusedError("Prefect's server has ended")
""",
        130,
        "",
    ),
    "it is interrupted in Prefect, and its orderly end fails": (
        """
try:
    raise TerminationSignal(15)  # what SIGTERM raises in a flow
finally:
    raise ConnectionRefusedError("Prefect's server has ended")
""",
        130,
        "",
    ),
    "a disk is full": ("raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", 1, f"resplit: a disk: {FULL_DISK}"),
    "a known disk is full": (
        "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'a/cost.json')",
        1,
        f"resplit: a/cost.json: {FULL_DISK}",
    ),
}
# Each flow is a fork of a process that has imported Prefect, which takes seconds.
FORKS = """
import errno, os, signal, sys
import prefect.server.api.server
from prefect.exceptions import TerminationSignal
from flows.command import run_command

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
for number, work in enumerate(sys.argv[1:]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"stderr-{number}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
        run_command(lambda: exec(work))
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """The status of each of `ENDS` and what it said."""
    folder = tmp_path_factory.mktemp("ended")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    command = [sys.executable, "-c", FORKS, *(work for work, _, _ in ENDS.values())]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    said = [(folder / f"stderr-{number}").read_text() for number in range(len(ENDS))]
    return dict(zip(ENDS, zip(map(int, done.stdout.split()), said, strict=True), strict=True))


@pytest.mark.parametrize("event", ENDS)
def test_a_flow_ends_without_a_traceback_when(event: str, ended: dict[str, tuple[int, str]]) -> None:
    _, status, said = ENDS[event]
    assert ended[event] == (status, said)


def test_a_flow_whose_store_is_full_ends_with_one_line(tmp_path: Path) -> None:
    code = """
import sqlite3
from flows.command import run_command

def work():
    store = sqlite3.connect("mlflow.db")
    store.execute("create table runs (id text)")
    store.execute("pragma max_page_count = 3")
    try:
        store.execute("insert into runs values (?)", ["x" * 100_000])
    except sqlite3.OperationalError as error:
        raise RuntimeError("as MLflow and SQLAlchemy do") from error

run_command(work)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    said = "resplit: a store of MLflow or Prefect: database or disk is full; make room there, and start again\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_flow_ends_although_its_end_takes_too_long(number: int, tmp_path: Path) -> None:
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
from flows import command

def work():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        time.sleep(60)

command._STOP_WITHIN_S = 0.1
command.run_command(work)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as flow:
        assert flow.stdout is not None
        assert flow.stdout.readline() == b"begun\n"
        flow.send_signal(number)
        try:
            assert flow.wait(timeout=30) == 130
        finally:
            flow.kill()


def test_a_flow_that_is_killed_leaves_no_server_of_prefect(tmp_path: Path) -> None:
    code = """
import os, subprocess, sys, time
from flows.command import run_command

def work():
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    server = subprocess.Popen(sleep, env={**os.environ, "PREFECT__SERVER_EPHEMERAL": "1"})
    other = subprocess.Popen(sleep)
    print(server.pid, other.pid, flush=True)
    time.sleep(60)

run_command(work)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as flow:
        assert flow.stdout is not None
        server, other = (psutil.Process(int(pid)) for pid in flow.stdout.readline().split())
        try:
            flow.kill()
            assert eventually(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
            assert other.is_running()
        finally:
            other.kill()


def test_ctrl_c_ends_a_flow_at_once_although_its_server_is_of_the_same_terminal(tmp_path: Path) -> None:
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
from flows.environment import prepare
prepare()
from prefect import flow, task
from flows.command import run_command

@task
def wait():
    print("waits", flush=True)
    time.sleep(60)

@flow
def waiting():
    wait()

run_command(waiting)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"waits\n"
        server = next(child for child in psutil.Process(running.pid).children() if "uvicorn" in child.cmdline())
        os.killpg(running.pid, signal.SIGINT)
        try:
            assert running.wait(20) == 130
        finally:
            running.kill()
        assert eventually(lambda: not server.is_running())
