"""`resplit up` starts again what dies, and takes its processes with it, even when it is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from resplit.cluster.client import ControlClient
from resplit.security.identity import CONTROLLER
from tests.support.cluster import share_packaged_model
from tests.support.processes import answering, poll_until, ready, run_resplit

pytestmark = pytest.mark.processes

CLUSTER = """\
name: test
source: alpha
trusted: [alpha, beta]
nodes:
  - {name: alpha, memory: 4 MiB, max_utilization: 0.999}
  - {name: beta, memory: 4 MiB, max_utilization: 0.999}
classes:
  - {name: chat, rate_rps: 0.5, prompt_tokens: 12, new_tokens: 40}
kv_tokens: 256
"""
GONE_WITHIN_S = 30.0


@pytest.fixture(scope="module")
def up(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A running `resplit up`, and its folder."""
    folder = tmp_path_factory.mktemp("up")
    (folder / "cluster.yaml").write_text(CLUSTER)
    share_packaged_model(folder / "state", model_folder)
    command = [sys.executable, "-m", "resplit.cli", "up", str(folder / "cluster.yaml"), "--port", "0"]
    command += ["--model", str(model_folder), "--state", str(folder / "state")]
    with (folder / "terminal").open("w") as terminal:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True)
    yield process, folder
    process.terminate()
    process.communicate(timeout=60)


def test_what_dies_is_started_again_and_nothing_is_left_when_up_is_killed(
    up: tuple[subprocess.Popen[str], Path],
) -> None:
    process, folder = up
    said = process.stdout.readline()
    url = re.search(r"http://\S+", said).group()
    with ControlClient.from_state(url, folder / "state") as client:
        body = {"model": "tiny-llama", "prompt": "a", "max_tokens": 4}
        for name in ("beta", CONTROLLER):
            old = process_of(process, name)
            os.kill(old, signal.SIGKILL)
            wait_until(lambda name=name, old=old: process_of(process, name) not in (None, old))
            wait_until(lambda: ready(client) and answering(client, "alpha", "beta"))
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=90).status_code == 200
    terminal = (folder / "terminal").read_text()
    assert re.search(r"a process ended .*how=.killed by SIGKILL. .*process=beta restart_after_s=1", terminal)
    assert re.search(r"a process is started again .*process=beta restarts=1", terminal)

    shown = run_resplit("status", "--url", url, "--state", str(folder / "state")).stdout
    assert re.search(r"^  beta +restarted once, last end: killed by SIGKILL$", shown, flags=re.MULTILINE)
    shown = run_resplit("status", "--json", "--url", url, "--state", str(folder / "state")).stdout
    assert json.loads(shown)["restarts"][CONTROLLER] == {"count": 1, "ended": "killed by SIGKILL", "wait_s": None}

    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 3
    process.kill()
    _, alive = psutil.wait_procs(children, GONE_WITHIN_S)
    assert alive == []


def wait_until(condition: Callable[[], bool]) -> None:
    asyncio.run(poll_until(condition))


def process_of(up: subprocess.Popen[str], name: str) -> int | None:
    """The running process of a node, or of gateway and controller, below `resplit up`."""
    for child in psutil.Process(up.pid).children():
        try:
            line = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "serve" in line if name == CONTROLLER else name in line:
            return child.pid
    return None
