"""Starting the processes of a cluster on this machine, and waiting until they are ready."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from structlog.testing import capture_logs

from resplit.cluster.local import Cluster, await_ready, start_process
from resplit.config import parse_cluster
from resplit.errors import ResplitError
from resplit.security.identity import CONTROLLER
from tests.support.cluster import CLUSTER

LIVES = ["sleep", "60"]
LOGS = "print('15:54:21 [warning  ] the model is large'); "


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "log").mkdir()
    config = parse_cluster(yaml.safe_load(CLUSTER), "test.yaml")
    made = Cluster("http://127.0.0.1:1", tmp_path, config, "tiny-llama")
    yield made
    made.stop()


def test_a_process_does_not_inherit_that_its_starter_yields_to_others_and_shares_the_session(cluster: Cluster) -> None:
    """A node that is started again during a study would compute at low priority; in a session, no niceness counts."""

    def start_later() -> None:
        os.nice(3)  # niceness belongs to a thread
        start_process(cluster, "later", LIVES)

    start_process(cluster, "first", LIVES)
    later = threading.Thread(target=start_later)
    later.start()
    later.join()
    processes = [psutil.Process(process.pid) for process in cluster.processes.values()]
    assert [process.nice() for process in processes] == [os.nice(0)] * 2
    assert [os.getsid(process.pid) for process in processes] == [os.getsid(0)] * 2
    assert os.getpgid(processes[0].pid) != os.getpgid(0), "Ctrl-C is for the process that ends the others"


def test_what_the_controller_logs_is_passed_on_until_it_is_ready(cluster: Cluster) -> None:
    ready = cluster.state / "ready"
    code = f"{LOGS}import sys, time; sys.stdout.flush(); time.sleep(0.5); open({str(ready)!r}, 'w'); time.sleep(60)"
    start_process(cluster, CONTROLLER, [sys.executable, "-S", "-c", code])
    with capture_logs() as logged:
        await_ready(cluster)
    assert logged == [{"event": "the model is large", "log_level": "warning"}]


def test_a_process_that_ends_before_the_cluster_is_ready_is_an_error_with_its_last_line(cluster: Cluster) -> None:
    start_process(cluster, CONTROLLER, LIVES)
    start_process(cluster, "alpha", [sys.executable, "-S", "-c", "import sys; sys.exit('resplit: no keys here')"])
    with pytest.raises(ResplitError, match="alpha ended before the cluster was ready: no keys here"):
        await_ready(cluster)


def test_a_process_that_could_not_write_its_log_ended_because_the_disk_is_full(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_process(cluster, CONTROLLER, [sys.executable, "-c", "pass"])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    with pytest.raises(
        ResplitError, match="controller ended before the cluster was ready: the disk is full, and no log"
    ):
        await_ready(cluster)
