"""What happens to a cluster on this machine, as lines in the log of `resplit up`: losses, returns, new epochs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.errors import ResplitError
from resplit.status import ClusterStatus

_log = structlog.get_logger(__name__)
_LOOK_EVERY_S = 0.5
_ANSWER_WITHIN_S = 5.0  # Ctrl-C waits for an answer


@dataclass
class News:
    """Compares each status of a cluster with the one before it."""

    _answers: dict[str, bool] = field(default_factory=dict)
    _epoch: int | None = None

    def look(self, status: ClusterStatus) -> None:
        """Log what changed since the last status; of the first one, which nodes do not answer."""
        for node in status.nodes:
            before = self._answers.get(node.node, True)
            if before and not node.answers:
                _log.warning("a node is lost", node=node.node, **({"fault": node.fault} if node.fault else {}))
            if node.answers and not before:
                _log.info("a node answers again", node=node.node)
            self._answers[node.node] = node.answers
        if self._epoch is not None and status.epoch != self._epoch:
            _log.info("an epoch is live", epoch=status.epoch, action=status.action)
        self._epoch = status.epoch


@contextlib.contextmanager
def news_told(cluster: Cluster) -> Iterator[None]:
    """Tell the news of a running cluster, in a thread, until the end of the block."""
    stop = threading.Event()
    client = ControlClient(cluster.url, cluster.token, _ANSWER_WITHIN_S)
    with client, ThreadPoolExecutor(1, "news") as thread:
        told = thread.submit(tell, client.status, stop, _LOOK_EVERY_S)
        try:
            yield
        finally:
            stop.set()
            told.result()


def tell(status: Callable[[], ClusterStatus], stop: threading.Event, every_s: float) -> None:
    """Tell the news until `stop` is set; a controller that does not answer has none."""
    news = News()
    while not stop.wait(every_s):
        with contextlib.suppress(ResplitError):  # the gateway starts again, and the supervisor tells that
            news.look(status())
