"""What a move brought, measured some time after it and added to its entry in the decision log."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from resplit.control.gateway import Gateway
from resplit.control.log import EpochLog
from resplit.decide import Brought, measured_since
from resplit.epochs import LiveEpoch
from resplit.errors import CapacityError
from resplit.session_records import SessionRecord

_log = structlog.get_logger(__name__)
AFTER_S = 20.0  # from the move until it is judged
_BEFORE_S = 20.0


def brought(records: Sequence[SessionRecord], epoch: LiveEpoch) -> Brought | None:
    """The mean latency of the requests that arrived in the 20 s before `epoch` went live, and since then.

    None if none that arrived since then has completed.
    """
    moved_s = epoch.committed_s
    after = measured_since(records, {}, moved_s)
    if after is None:
        return None
    before = measured_since([each for each in records if each.arrival_s < moved_s], {}, moved_s - _BEFORE_S)
    return Brought(after.latency_s, after.requests, before.latency_s if before else None)


class Outcomes:
    """Judges the moves of one cluster, whichever loop made them."""

    def __init__(self, gateway: Gateway, log: EpochLog) -> None:
        self._gateway = gateway
        self._log = log

    async def judge(self, epoch: LiveEpoch, after_s: float = AFTER_S) -> None:
        """Add what an epoch brought to its decision, `after_s` from now. Requests after the next move count too."""
        await asyncio.sleep(after_s)
        found = brought(self._gateway.records(0), epoch)
        if found is None:
            return
        try:
            self._log.add_brought(epoch.epoch, found)
        except CapacityError as error:
            _log.warning("what a move brought is not in the log", epoch=epoch.epoch, error=str(error))
