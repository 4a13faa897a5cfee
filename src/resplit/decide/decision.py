"""A decision as a value: the state that was seen, the alternatives with their prices, the choice and its outcome.

The decision log, the run record and the report hold decisions as JSON. `to_json` and `from_json` are the only code
that knows that form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from resplit.decide.price import Alternative
from resplit.decide.state import Measured, PastMove, Placement
from resplit.epochs import Proposal
from resplit.errors import DataError
from resplit.session_records import RecoveredSessions

__all__ = ["Brought", "Decision", "DecisionOutcome", "NodeConditions", "RecoveredSessions"]


@dataclass(frozen=True)
class NodeConditions:
    """The conditions of a node that a decision was based on. `usable`: some block can run on it."""

    name: str
    usable: bool
    memory_bytes: float
    background_utilization: float
    trusted: bool


@dataclass(frozen=True)
class Brought:
    """What was measured after a move: the mean latency of `requests` requests, and of those shortly before it."""

    latency_s: float
    requests: int
    latency_before_s: float | None = None


@dataclass(frozen=True)
class DecisionOutcome:
    """The result of a decision: the epoch that was deployed, or the reason why the controller refused it.

    After a recovery, `plan_s` and `prepare_s` are the times to plan and to prepare its epoch, and `sessions` says how
    sessions resumed. `brought` was measured some time after a move.
    """

    deployed: int | None = None
    refused: str | None = None
    plan_s: float | None = None
    prepare_s: float | None = None
    # Records of earlier runs have {} where no session had resumed.
    sessions: Annotated[RecoveredSessions | None, BeforeValidator(lambda value: value or None)] = None
    brought: Brought | None = None


@dataclass(frozen=True)
class Decision:
    """One decision at `at_s` (seconds since 1970 in the log).

    `action` is that of an `Alternative`, or "initial" (a first placement) or "recover" (after a loss). Only a decision
    among alternatives has `chosen`, which is one of `alternatives`. `note` says which ceilings it does not keep.
    `urgent` says why the cooldown was waived, "" where it was not. `threshold` is the least gain per request that was
    required, relative to the current objective. `seen` are the detected changes that caused it, in words, `deviations`
    the standard deviations of what was seen, as shares. `id` is the number in the decision log.
    """

    at_s: float
    action: str
    reason: str = ""
    note: str = ""
    chosen: Alternative | None = None
    urgent: str = ""
    threshold: float = 0.0
    uncertainty: float = 0.0
    alternatives: tuple[Alternative, ...] = ()
    nodes: tuple[NodeConditions, ...] = ()
    rates_rps: dict[str, float] = field(default_factory=dict)
    current: Placement = ()
    measured: Measured | None = None
    outcome: DecisionOutcome | None = None
    seen: tuple[str, ...] = ()
    deviations: tuple[float, ...] = ()
    id: int | None = None

    @property
    def placement(self) -> Placement:
        """The placement to be live from now on; the current one for keep."""
        assert self.chosen is not None
        assert self.chosen.placement is not None
        return self.chosen.placement

    def proposal(self, based_on: int) -> Proposal:
        """The chosen placement as a proposal to the controller. `based_on` is the epoch that was live."""
        assert self.chosen is not None
        chosen = self.chosen
        return Proposal(self.placement, self.action, based_on, chosen.latency_s, chosen.lower_bound, self.note)

    def move(self, at_s: float) -> PastMove:
        """This decision as a move that was deployed at `at_s`, for `History.moved`."""
        keep = self.alternatives[0]
        measured = self.measured if math.isfinite(keep.horizon_cost) else None
        return PastMove(
            at_s,
            self.action,
            self.current,
            self.placement,
            latency_before_s=measured.latency_s if measured else None,
            predicted_before_s=keep.latency_s,
            error_before_s=measured.error_s if measured else 0.0,
        )

    def to_json(self) -> dict[str, Any]:
        """The decision as a JSON object. Infinite and unknown numbers are null."""
        plain: dict[str, Any] = json.loads(_DECISION.dump_json(self))
        return plain

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Decision:
        """Read an entry of the decision log. Keys that are absent get their defaults, unknown keys are ignored.

        DataError, with the key, if the entry is not a decision.
        """
        try:
            return _DECISION.validate_python(dict(entry))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "entry"
            raise DataError(f"not a decision: {place}: {first['msg']}") from None


_DECISION = TypeAdapter(Decision)
