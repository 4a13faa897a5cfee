"""One cluster of processes for many test modules, since starting one takes many seconds."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from pathlib import Path

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from resplit.errors import ResplitError
from tests.support.cluster import NODES, started
from tests.support.processes import answering, poll_until, ready, settled


class SharedCluster:
    """Each module gets the cluster with every process running, whatever the module before did."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self._model = folder, model
        self._stack = contextlib.ExitStack()
        self._cluster: Cluster | None = None

    def restored(self) -> Cluster:
        """The cluster, able to serve and without sessions; a new one if it cannot be restored."""
        if self._cluster is not None:
            try:
                _restore(self._cluster)
            except (TimeoutError, ResplitError):
                self.stop()
        if self._cluster is None:
            folder = self._folder / str(time.monotonic_ns())
            folder.mkdir()
            self._cluster = self._stack.enter_context(started(folder, self._model))
        return self._cluster

    def stop(self) -> None:
        """Stop every process."""
        self._cluster = None
        self._stack.close()


def _restore(cluster: Cluster) -> None:
    """Start what has ended, resume what was stopped, and wait; TimeoutError if the cluster does not recover."""
    for name, process in cluster.processes.items():
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
        else:
            start_process(cluster, name)
    with ControlClient(cluster.url, cluster.token) as client:
        asyncio.run(poll_until(lambda: ready(client) and answering(client, *NODES) and settled(client)))
