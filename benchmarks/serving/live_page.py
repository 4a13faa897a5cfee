"""What an open live page costs: processor time of the gateway, and tokens a second."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator

import httpx

from benchmarks.serving.clusters import Cost
from benchmarks.serving.load import decode_rate
from resplit.cluster.local import Cluster

_WATCHED_S = 10.0


def live_page_figures(cluster: Cluster, repeats: int) -> dict[str, float]:
    """The share of a core that one open page takes, and the share of tokens/s that it costs 8 streams.

    Measurements with and without the page alternate.
    """
    cores: dict[bool, list[float]] = {True: [], False: []}
    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for is_open in (False, True):
            with _page(cluster.url) if is_open else contextlib.nullcontext():
                cores[is_open].append(_gateway_share(cluster))
                rates[is_open].append(decode_rate(cluster.url, 8))
    share = {is_open: statistics.median(found) for is_open, found in cores.items()}
    rate = {is_open: statistics.median(found) for is_open, found in rates.items()}
    return {"live_page_core_share": share[True] - share[False], "live_page_rate_cost": 1 - rate[True] / rate[False]}


def _gateway_share(cluster: Cluster) -> float:
    """Processor seconds of the gateway in a second, while no request runs."""
    before, begun_s = Cost.of(cluster), time.monotonic()
    time.sleep(_WATCHED_S)
    return (Cost.of(cluster).gateway_s - before.gateway_s) / (time.monotonic() - begun_s)


@contextlib.contextmanager
def _page(url: str) -> Iterator[None]:
    """An open page: a reader of its stream of events."""
    stop, opened = threading.Event(), threading.Event()

    def read() -> None:
        with httpx.stream("GET", f"{url}/live/events", timeout=None) as answer:
            for _ in answer.iter_bytes():
                opened.set()
                if stop.is_set():
                    return

    reader = threading.Thread(target=read)
    reader.start()
    opened.wait()
    yield
    stop.set()
    reader.join()
