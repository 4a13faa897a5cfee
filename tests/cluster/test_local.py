"""Starting the processes of a cluster on this machine."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import yaml

from resplit.cluster.local import Cluster, start_process
from resplit.config import parse_cluster
from tests.support.cluster import CLUSTER


def test_a_process_does_not_inherit_that_its_starter_yields_to_others_and_shares_the_session(tmp_path: Path) -> None:
    """A node that is started again during a study would compute at low priority; in a session, no niceness counts."""
    (tmp_path / "log").mkdir()
    config = parse_cluster(yaml.safe_load(CLUSTER), "test.yaml")
    cluster = Cluster("http://127.0.0.1:1", tmp_path, config, "tiny-llama")

    def start(name: str) -> None:
        start_process(cluster, name, ["sleep", "60"])

    def start_later() -> None:
        os.nice(3)
        start("later")

    try:
        start("first")
        later = threading.Thread(target=start_later)  # niceness belongs to a thread
        later.start()
        later.join()
        processes = [psutil.Process(process.pid) for process in cluster.processes.values()]
        assert [process.nice() for process in processes] == [os.nice(0)] * 2
        assert [os.getsid(process.pid) for process in processes] == [os.getsid(0)] * 2
        assert os.getpgid(processes[0].pid) != os.getpgid(0), "Ctrl-C is for the process that ends the others"
    finally:
        cluster.stop()
