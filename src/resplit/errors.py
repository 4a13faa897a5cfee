"""The errors that resplit raises on purpose.

Each message names the place, the value, the rule and, where there is one, the way out. Anything that is
not a `ResplitError` is a defect.
"""

from __future__ import annotations


class ResplitError(Exception):
    """Base of every error that resplit raises on purpose."""


class ConfigError(ResplitError):
    """A cluster, scenario or parameter file says something that cannot be."""

    def __init__(self, place: str, rule: str) -> None:
        super().__init__(f"{place}: {rule}")
        self.place = place
        self.rule = rule


class ProblemFormatError(ResplitError):
    """A placement problem breaks the format: which key, what it holds, which rule it breaks."""

    def __init__(self, key: str, value: object, rule: str) -> None:
        shown = repr(value)
        super().__init__(f"{key} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {rule}")
        self.key = key
        self.value = value
        self.rule = rule


class DataError(ResplitError):
    """Telemetry or measurements that cannot be used: too few, malformed, contradictory."""


class InfeasibleError(ResplitError):
    """No placement satisfies every constraint."""


class ModelError(ResplitError):
    """A model that cannot be fetched, read or split into blocks."""


class ShardError(ResplitError):
    """A shard that is missing, corrupt, or not ours to open."""


class CommandRefusedError(ResplitError):
    """A control command that a node does not honour; `reason` is a short fixed word for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"command refused ({reason}): {detail}")
        self.reason = reason


class ProposalRefusedError(ResplitError):
    """A placement that the controller does not deploy: stale, illegal, or it could not be prepared."""


class NodeLostError(ResplitError):
    """A node does not answer."""


class CapacityError(ResplitError):
    """A node or the gateway has no room now; trying again in `retry_after_s` seconds may succeed."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestError(ResplitError):
    """A request that can never be served as it stands (too long, unknown model, wrong value)."""
