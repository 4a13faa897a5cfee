"""A cluster as on separate machines: members start one by one, each on its own address, and share only the registry."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from resplit.cluster.client import ControlClient
from resplit.cluster.first_plan import first_plan
from resplit.cluster.local import Cluster, free_ports
from resplit.config import load_cluster
from resplit.epochs import Proposal
from resplit.security.identity import CONTROLLER
from resplit.wire.addresses import Address
from tests.support.processes import poll_until
from tests.support.streams import PROMPTS, all_answers, expected_tokens

pytestmark = pytest.mark.processes

NODES = {"alpha": "127.0.0.2", "beta": "127.0.0.3", "gamma": "::1"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SOON_MS = 1000  # what happens is on the page within this time
NEW_TOKENS = 64
SPREAD = ("alpha", "beta", "gamma", "beta", "gamma", "gamma", "alpha", "beta")
CLUSTER = """
name: apart
source: alpha
trusted: [alpha, beta]
nodes:
{nodes}
classes:
  - {{name: chat, slo: 30 s, rate_rps: 0.001, prompt_tokens: 12, new_tokens: 40}}
limits: {{context_tokens: 256, sessions: 16, queue: 8, deadline: 60 s}}
kv_tokens: 2048
"""


@dataclass
class Machines:
    """A folder for each member instead of a machine, and the processes that run there."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def install(self) -> None:
        """Create keys as an operator does, and give each member the cluster file and its own keys."""
        ports = dict(zip(NODES, free_ports(len(NODES)), strict=True))
        nodes = [
            f"  - {{name: {n}, address: '{Address(host, ports[n])}', memory: 4 MiB, max_utilization: 0.999}}"
            for n, host in NODES.items()
        ]
        home = self.folder / "home"
        home.mkdir()
        (home / "cluster.yaml").write_text(CLUSTER.format(nodes="\n".join(nodes)))
        subprocess.run([*_RESPLIT, "keys", "cluster.yaml", "--state", "."], cwd=home, check=True)
        for member in (*NODES, CONTROLLER):
            shutil.copytree(home / "keys" / member, self.folder / member / "keys" / member)
            shutil.copy(home / "cluster.yaml", self.folder / member)

    def start(self, member: str, *arguments: str) -> None:
        """Start a member in its own folder."""
        registry = f"file://{self.folder / 'registry'}"
        with (self.folder / member / "log").open("wb") as log:
            self.processes[member] = subprocess.Popen(
                [*_RESPLIT, *arguments, "--state", ".", "--registry", registry],
                cwd=self.folder / member,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def start_node(self, name: str) -> None:
        self.start(name, "node", "cluster.yaml", "--name", name)

    def stop(self) -> None:
        """End all processes."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


_RESPLIT = [sys.executable, "-m", "resplit.cli"]


@pytest.fixture(scope="module")
def apart(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machines, Cluster]]:
    """Three nodes, a gateway and a controller, with a first plan."""
    folder = tmp_path_factory.mktemp("apart")
    machines = Machines(folder)
    machines.install()
    port = free_ports(1)[0]
    try:
        late = "gamma"
        for name in set(NODES) - {late}:
            machines.start_node(name)
        machines.start(CONTROLLER, "serve", "cluster.yaml", "--port", str(port), "--model", str(model_folder))
        state, url = folder / CONTROLLER, f"http://127.0.0.1:{port}"
        _wait_for(lambda: _waits_for(url, late), machines)
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(f"{url}/control/status").status_code == 503, "the controller has not started"
        machines.start_node(late)
        _wait_for(lambda: (state / "ready").exists(), machines)
        config = load_cluster(state / "cluster.yaml")
        cluster = Cluster(url, state, config, str(model_folder), machines.processes)
        first_plan(cluster)
        yield machines, cluster
    finally:
        machines.stop()


def _waits_for(url: str, *nodes: str) -> bool:
    """Whether the gateway says that it waits for these nodes only."""
    try:
        answer = httpx.get(f"{url}/readyz")
    except httpx.TransportError:
        return False
    return (answer.status_code, answer.json().get("reason")) == (503, f"waiting for nodes: {', '.join(nodes)}")


def _wait_for(condition: Callable[[], bool], machines: Machines, within_s: float = 120.0) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        ended = [name for name, process in machines.processes.items() if process.poll() is not None]
        assert not ended, (machines.folder / ended[0] / "log").read_text()
        assert time.monotonic() < end_s
        time.sleep(0.1)


async def test_separate_machines_serve_resplit_and_recover_while_they_share_only_the_registry(
    apart: tuple[Machines, Cluster], unsplit_model: torch.nn.Module
) -> None:
    machines, cluster = apart
    expected = expected_tokens(unsplit_model, NEW_TOKENS)
    for name, host in NODES.items():
        assert [path.name for path in (machines.folder / name / "keys").iterdir()] == [name]
        listening = psutil.Process(machines.processes[name].pid).net_connections("tcp")
        assert {c.laddr.ip for c in listening if c.status == psutil.CONN_LISTEN} == {host}

    with ControlClient(cluster.url, cluster.token) as client:

        async def with_streams_running(work: Callable[[], None]) -> None:
            serving = asyncio.create_task(all_answers(cluster, NEW_TOKENS))
            await poll_until(lambda: client.status().sessions == len(PROMPTS))
            await asyncio.to_thread(work)
            assert await serving == expected

        def resplit() -> None:
            client.propose(Proposal(SPREAD, "re-split", client.model().epoch))

        def kill() -> None:
            machines.processes["gamma"].kill()
            machines.processes["gamma"].wait()

        assert await all_answers(cluster, NEW_TOKENS) == expected
        await with_streams_running(resplit)
        await with_streams_running(kill)
        assert "gamma" not in client.model().placement
        assert [decision.action for decision in client.decisions()] == ["recover"]
        statuses = {record.status for record in client.records()}
    assert statuses == {200}
    for name in NODES:  # a member writes nothing but its log
        assert {path.name for path in (machines.folder / name).iterdir()} == {"cluster.yaml", "keys", "log"}


@pytest.mark.alone
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH; install one, such as Debian's `chromium`")
async def test_a_move_and_a_killed_process_are_on_the_page_within_a_second(apart: tuple[Machines, Cluster]) -> None:
    playwright = pytest.importorskip("playwright.async_api", reason="the package playwright is not installed")
    machines, cluster = apart
    complaints: list[str] = []
    with ControlClient(cluster.url, cluster.token) as client:
        if machines.processes["gamma"].poll() is not None:  # killed by the test before
            machines.start_node("gamma")
        await poll_until(lambda: "gamma" not in client.model().lost)
        async with playwright.async_playwright() as started:
            browser = await started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            tab = await browser.new_page()
            tab.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            await tab.goto(cluster.url)
            await tab.wait_for_selector("#map .cell")

            live = await asyncio.to_thread(client.propose, Proposal(SPREAD, "re-split", client.model().epoch))
            await tab.wait_for_selector(f"#news li:has-text('epoch {live.epoch} (re-split)')", timeout=SOON_MS)
            cells = await tab.eval_on_selector_all("#map .cell", "cells => cells.map(cell => cell.dataset.node)")
            assert {name: cells.count(name) for name in NODES} == {name: SPREAD.count(name) for name in NODES}

            machines.processes["gamma"].send_signal(signal.SIGKILL)
            await tab.wait_for_selector("#map .node.lost[data-node=gamma]", timeout=SOON_MS)
            assert complaints == []
