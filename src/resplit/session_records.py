"""Sessions as values: a request that arrived, and the record of how it was served.

The gateway writes these records; the control API, the run record and the decision log read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator


def _nan_for_null(value: object) -> object:
    return float("nan") if value is None else value


Moment = Annotated[float, BeforeValidator(_nan_for_null)]  # JSON has null for an event that did not happen


@dataclass(frozen=True)
class RequestArrival:
    """A request that arrived at `time_s` (seconds since 1970)."""

    request_class: str
    time_s: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class SessionRecovery:
    """How one session resumed after a loss.

    `noticed_s` is the time from the start of the pass that failed until the failure was known, `waited_s` the time
    until all nodes of the live placement answered (with planning and loading where needed), `restore_s` the time
    until the caches were where they are needed, and `replay_s` the time to repeat the passes after
    `restored_positions`.
    """

    noticed_s: float
    waited_s: float
    restore_s: float
    replay_s: float
    restored_positions: int
    replayed_positions: int


@dataclass(frozen=True)
class RecoveredSessions:
    """How `sessions` sessions resumed after a loss: the longest times, and the sums of positions and bytes."""

    sessions: int
    noticed_s: float
    waited_s: float
    restore_s: float
    replay_s: float
    restored_positions: int
    replayed_positions: int
    cache_bytes: int


@dataclass(frozen=True)
class SessionMove:
    """One session's move into another epoch: its pause, and the bytes of its caches that were transferred.

    `replayed`: the move followed a loss; `recovery` has the details.
    """

    epoch: int
    pause_s: float
    cache_bytes: int
    replayed: bool = False
    recovery: SessionRecovery | None = None


@dataclass(frozen=True)
class SessionRecord:
    """The outcome of one request. Times are in seconds since 1970, and NaN for events that did not happen.

    `status` is the HTTP status, `private_ok` whether all its private blocks ran on trusted nodes.
    """

    request_class: str
    arrival_s: float
    first_token_s: Moment
    end_s: Moment
    prompt_tokens: int
    new_tokens: int
    status: int
    epochs: tuple[int, ...]
    moves: tuple[SessionMove, ...]
    private_ok: bool
    token_times_s: tuple[float, ...]
    copied_bytes: int = 0  # of its caches, sent to stand-by nodes as KV replicas
    copy_lag: int = 0  # the most positions that were added while a replica was made
    drafted: int = 0  # tokens that were guessed and verified
    accepted: int = 0  # of these, the right ones
    recalls: int = 0  # passes that were given back by a node before they began, and took the new route
    waited_s: float = 0.0  # of all its passes: in the queues of nodes
    computed_s: float = 0.0  # in batches of nodes
    hops_s: float = 0.0  # between nodes, and between them and the gateway
