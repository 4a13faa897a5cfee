"""A whole cluster on this machine: one process for each node, and one for gateway and controller.

The processes run `resplit node` and `resplit serve`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import yaml

from resplit.cluster.log_lines import LogLines
from resplit.cluster.state_folder import in_use
from resplit.config import ClusterConfig, load_cluster, read_cluster
from resplit.errors import ConfigError, ResplitError
from resplit.files import write_atomically
from resplit.security.authority import keys_command
from resplit.security.identity import CONTROLLER

_log = structlog.get_logger(__name__)
_STOP_WITHIN_S = 5.0
_LOGS_NEED_BYTES = 2**20  # with less, a process may end without a word


@dataclass
class Cluster:
    """A cluster that runs on this machine."""

    url: str
    state: Path
    config: ClusterConfig
    model: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    lock: int | None = None  # descriptor of the state folder's lock: the processes inherit it
    held_down: set[str] = field(default_factory=set)  # processes that supervision does not start again
    # A process inherits the niceness of the thread that starts it. This thread keeps that of the start, while others
    # may yield to the nodes since then.
    starter: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "start processes"))

    @property
    def token(self) -> str:
        """The control API's token."""
        return (self.state / "control.token").read_text(encoding="utf-8").strip()

    def pids(self) -> list[int]:
        """This process and those of the cluster."""
        return [os.getpid(), *(process.pid for process in self.processes.values())]

    def dead(self) -> list[str]:
        """Names of the processes that have ended."""
        return [name for name, process in self.processes.items() if process.poll() is not None]

    def hold_down(self, name: str) -> None:
        """Kill a process as a loss of power would, until `start_again`."""
        self.held_down.add(name)
        self.processes[name].kill()
        self.processes[name].wait()

    def start_again(self, name: str) -> None:
        """Start a process that `hold_down` killed. OSError if the system has no room for it."""
        start_process(self, name)
        self.held_down.discard(name)

    def stop(self) -> None:
        """End every process: SIGTERM first, SIGKILL after some seconds."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        until_s = time.monotonic() + _STOP_WITHIN_S
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, until_s - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
            _let_go(process)
        self.starter.shutdown()


@contextlib.contextmanager
def running(cluster_file: Path, state: Path, model: str, port: int = 0) -> Iterator[Cluster]:
    """Run the cluster of `cluster_file` until the end of the block, then stop every process.

    The processes end with this one, also if it is killed. One that ends by itself stays dead: see `supervision`.
    `port` 0 takes a free one. ConfigError if the port or the state folder is in use; ResplitError, with the last line
    of its log, if a process ends before the cluster is ready.
    """
    config = load_cluster(cluster_file)
    with in_use(state) as lock:
        port = port or free_ports(1)[0]
        _ensure_free(port)
        _prepare_state(cluster_file, config, state)
        cluster = Cluster(f"http://127.0.0.1:{port}", state, load_cluster(state / "cluster.yaml"), model, lock=lock)
        try:
            for name in [*cluster.config.node_names, CONTROLLER]:
                start_process(cluster, name)
            await_ready(cluster)
            yield cluster
        finally:
            cluster.stop()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which no process listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _ensure_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"--port {port}", f"cannot listen there: {reason}; choose another port") from None


def _prepare_state(cluster_file: Path, config: ClusterConfig, state: Path) -> None:
    """Create keys, and the cluster file with the addresses of the nodes on this machine; remove old state."""
    (state / "log").mkdir(parents=True, exist_ok=True)
    keys_command(state / "keys", config.node_names)
    content = read_cluster(cluster_file)
    for node, port in zip(content["nodes"], free_ports(len(config.nodes)), strict=True):
        node["address"] = f"127.0.0.1:{port}"
    write_atomically(state / "cluster.yaml", yaml.safe_dump(content, sort_keys=False), 0o600)
    # A fresh cluster has no epochs and no changes by operators, and is not ready yet.
    if (state / "desired_state.json").exists():
        _log.warning("drains, trust and files that operators set by command are forgotten: `up` starts afresh")
    for stale in [
        state / "ready",
        state / "latest_problem.json",
        state / "history.json",
        state / "desired_state.json",
        state / "restarts.json",
        *state.glob("epochs.db*"),
        *(state / "log").glob("*.log"),
    ]:
        stale.unlink(missing_ok=True)


def start_process(cluster: Cluster, name: str, command: Sequence[str] | None = None) -> None:
    """Start or restart the process of a node, or of gateway and controller; `command` replaces the usual command.

    Its log goes on where that of its previous life ended. OSError if the system has no room for a process.
    """
    # The nodes share this machine's cores: more threads would only slow down the others.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if name in cluster.processes:
        _let_go(cluster.processes[name])
    with (cluster.state / "log" / f"{name}.log").open("ab") as log, _signals_deferred():
        cluster.processes[name] = cluster.starter.submit(
            subprocess.Popen,
            command or _command(cluster, name),
            stdin=subprocess.PIPE,  # closes when this process ends: see `parent`
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=() if cluster.lock is None else (cluster.lock,),
            process_group=0,  # Ctrl-C is for this process, which ends the others. A session would disable niceness.
        ).result()


def _command(cluster: Cluster, name: str) -> list[str]:
    file, port = str(cluster.state / "cluster.yaml"), cluster.url.rpartition(":")[2]
    if name == CONTROLLER:
        arguments = ["serve", file, "--port", port, "--model", cluster.model]
    else:
        arguments = ["node", file, "--name", name]
    return [sys.executable, "-m", "resplit.cli", *arguments, "--state", str(cluster.state), "--end-with-parent"]


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Close this side of the pipe to a process that has ended."""
    if process.stdin is not None:
        process.stdin.close()


def await_ready(cluster: Cluster) -> None:
    """Wait until `resplit serve` is ready, and log what it logs; ResplitError if a process ends before that.

    There is no limit here, because a large model may take hours to fetch: the processes limit their own waits.
    """
    lines = LogLines(cluster.state / "log" / f"{CONTROLLER}.log")
    while not (cluster.state / "ready").exists():
        for level, text in lines.new():
            _log.log(logging.getLevelNamesMapping().get(level.upper(), logging.INFO), text)
        if dead := cluster.dead():
            raise ResplitError(f"{dead[0]} ended before the cluster was ready: {last_error(cluster.state, dead[0])}")
        time.sleep(0.1)


def last_error(state: Path, name: str) -> str:
    """The error with which a process of `running` ended, or the place of its log."""
    log = state / "log" / f"{name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    prefix = "resplit: "
    if lines and lines[-1].startswith(prefix):
        return lines[-1].removeprefix(prefix)
    if shutil.disk_usage(state).free < _LOGS_NEED_BYTES:
        return f"the disk is full, and no log could be written; make room in {state}, or choose another --state"
    return f"see {log}"


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM to the end of the block. A process that starts in it could otherwise be left running."""
    if threading.current_thread() is not threading.main_thread():  # signals arrive in the main thread only
        yield
        return
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda seen, _: arrived.append(seen)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for seen in arrived:
            signal.raise_signal(seen)
