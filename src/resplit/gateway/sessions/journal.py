"""The gateway's journal: the latest arrivals and session records, in memory, and the demand computed from them."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable

from resplit.config import ClassConfig, ClusterConfig
from resplit.estimate import ArrivalRate, Forecast
from resplit.session_records import RecoveredSessions, RequestArrival, SessionMove, SessionRecord
from resplit.types import RequestClass

# The declared demand counts as much as this many seconds of observation: a short quiet period proves little.
_PRIOR_S = 10.0


class Journal:
    """Arrivals and records of one gateway. `clock` gives the time, in seconds since 1970 or since a start."""

    def __init__(self, cluster: ClusterConfig, clock: Callable[[], float] = time.time) -> None:
        self._cluster = cluster
        self._clock = clock
        self._rates: dict[str, ArrivalRate] = {}
        self._begin_rates()
        self._arrivals: deque[RequestArrival] = deque(maxlen=10_000)
        self._records: deque[SessionRecord] = deque(maxlen=20_000)
        self._recoveries: deque[SessionMove] = deque(maxlen=10_000)

    def reconfigure(self, cluster: ClusterConfig) -> None:
        """Use the demand that a changed cluster file declares."""
        before, self._cluster = self._cluster, cluster
        kept = [declared.name for declared in cluster.classes if declared in before.classes]
        self._rates = {name: rate for name, rate in self._rates.items() if name in kept}
        self._begin_rates()

    def arrived(self, arrival: RequestArrival) -> None:
        """Add a request on its arrival."""
        self._arrivals.append(arrival)
        if arrival.request_class in self._rates:
            self._rates[arrival.request_class].arrived(arrival.time_s)

    def ended(self, record: SessionRecord) -> None:
        """Add the record of a request that ended."""
        self._records.append(record)

    def recovered(self, move: SessionMove) -> None:
        """Add the move of a session that recovered from a loss."""
        self._recoveries.append(move)

    def recoveries(self, epoch: int | None) -> RecoveredSessions | None:
        """How sessions recovered into `epoch`: the longest of each time, and the sums of positions and bytes.

        None if none did.
        """
        moves = [move for move in self._recoveries if move.epoch == epoch]
        each = [move.recovery for move in moves if move.recovery]
        if not each:
            return None
        return RecoveredSessions(
            sessions=len(each),
            noticed_s=max(one.noticed_s for one in each),
            waited_s=max(one.waited_s for one in each),
            restore_s=max(one.restore_s for one in each),
            replay_s=max(one.replay_s for one in each),
            restored_positions=sum(one.restored_positions for one in each),
            replayed_positions=sum(one.replayed_positions for one in each),
            cache_bytes=sum(move.cache_bytes for move in moves),
        )

    def records(self, skip: int) -> list[SessionRecord]:
        """The records of all requests that ended, without the first `skip`."""
        return list(itertools.islice(self._records, skip, None))

    def demand(self, window_s: float) -> list[RequestClass]:
        """The demand of each class: arrivals of the last `window_s` seconds, blended with the declared demand."""
        since_s = self._clock() - window_s
        recent = [arrival for arrival in self._arrivals if arrival.time_s >= since_s]
        return [
            self._blended(c, [arrival for arrival in recent if arrival.request_class == c.name], window_s)
            for c in self._cluster.classes
        ]

    def rates(self) -> dict[str, Forecast]:
        """The requests per second that are expected of each class."""
        now_s = self._clock()
        return {name: rate.forecast(now_s) for name, rate in self._rates.items()}

    def _begin_rates(self) -> None:
        now_s = self._clock()
        for declared in self._cluster.classes:
            self._rates.setdefault(declared.name, ArrivalRate(declared.rate_rps, now_s))

    def _blended(self, declared: ClassConfig, arrivals: list[RequestArrival], window_s: float) -> RequestClass:
        prior = declared.rate_rps * _PRIOR_S
        weight = len(arrivals) + prior
        prompt = sum(arrival.prompt_tokens for arrival in arrivals) + prior * declared.prompt_tokens
        new = sum(arrival.new_tokens for arrival in arrivals) + prior * declared.new_tokens
        return RequestClass(
            name=declared.name,
            source=self._cluster.source,
            rate_rps=weight / (window_s + _PRIOR_S),
            prompt_tokens=prompt / weight,
            new_tokens=new / weight,
            slo_s=declared.slo,
        )
