"""The errors that resplit raises on purpose, and how each is named on the wire and over HTTP.

Each message names the place, the value, the rule and, where possible, the remedy. Any other exception is a defect.
"""

from __future__ import annotations

from dataclasses import dataclass

CLIENT_GONE_STATUS = 499  # web servers log it for a client that left before its answer was complete; it is never sent


class ResplitError(Exception):
    """Base of every error that resplit raises on purpose."""


class ConfigError(ResplitError):
    """A cluster, scenario or parameter file, or an option, has a value that breaks a rule."""

    def __init__(self, place: str, rule: str) -> None:
        super().__init__(f"{place}: {rule}")
        self.place = place
        self.rule = rule


class SlowMachineError(ConfigError):
    """This machine needs `factor` times as long as the cluster file declares, or as many cores as it has."""

    def __init__(self, place: str, rule: str, factor: float) -> None:
        super().__init__(place, rule)
        self.factor = factor


class ProblemFormatError(ResplitError):
    """A placement problem breaks the format: the key, its value, and the rule that it breaks."""

    def __init__(self, key: str, value: object, rule: str) -> None:
        shown = repr(value)  # a path may be long, too
        super().__init__(f"{key} = {shown if len(shown) <= 300 else shown[:297] + '...'}: {rule}")
        self.key = key
        self.value = value
        self.rule = rule


class DataError(ResplitError):
    """Telemetry, measurements or messages that cannot be used: too few, malformed or contradictory."""


class InfeasibleError(ResplitError):
    """No placement satisfies every constraint."""


class ModelError(ResplitError):
    """A model that cannot be fetched, read or split into blocks."""


class ShardError(ResplitError):
    """A shard that is missing, corrupt, or encrypted for another node."""


class CommandRefusedError(ResplitError):
    """A control command that a node refuses; `reason` is a fixed word, under which the node counts refusals."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"command refused ({reason}): {detail}")
        self.reason = reason
        self.detail = detail


class ProposalRefusedError(ResplitError):
    """A placement that the controller does not deploy: it is stale, breaks a rule, or could not be prepared.

    `refused_by` are the nodes that did not prepare it.
    """

    def __init__(self, message: str, refused_by: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.refused_by = refused_by


class NodeLostError(ResplitError):
    """A node, or the controller, does not answer."""


class PeerFaultError(NodeLostError):
    """A member said what no member says: its answer cannot be read, or contradicts itself. It counts as lost."""


class CapacityError(ResplitError):
    """A node or the gateway has no room now; trying again in `retry_after_s` seconds may succeed."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeoutError(TimeoutError):
    """A request had no room before its deadline; trying again in `retry_after_s` seconds may succeed."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the request waited for room until its deadline")
        self.retry_after_s = retry_after_s


class RequestError(ResplitError):
    """A request that cannot be served as it is: too long, an unknown model, a wrong value."""


@dataclass(frozen=True)
class ErrorKind:
    """One kind of error: its word on the wire, its exception, and its HTTP status."""

    word: str
    error: type[Exception]
    http_status: int


# The first kind whose exception matches is used. A refused command is not listed, because its word is its reason.
KINDS = (
    ErrorKind("request", RequestError, 400),
    ErrorKind("capacity", CapacityError, 429),
    ErrorKind("lost", NodeLostError, 503),
    ErrorKind("timeout", TimeoutError, 504),
    ErrorKind("shard", ShardError, 500),
    ErrorKind("data", DataError, 500),
    ErrorKind("failed", Exception, 500),
)


def kind_of(error: Exception) -> ErrorKind:
    """The first of `KINDS` that matches `error`."""
    return next(kind for kind in KINDS if isinstance(error, kind.error))


RECALLED = "recalled"  # the reason of a refusal: the pass had not begun, and may take another route


def wire_word(error: Exception) -> str:
    """The word that a reply carries for `error`."""
    return error.reason if isinstance(error, CommandRefusedError) else kind_of(error).word


def wire_message(error: Exception) -> str:
    """What a reply says beside that word."""
    return error.detail if isinstance(error, CommandRefusedError) else str(error)


def error_from_wire(word: str, message: str) -> ResplitError:
    """The error that a reply with this word stands for; a word that is not in the table is the reason of a refusal."""
    kind = next((kind for kind in KINDS if kind.word == word), None)
    if kind is None:
        return CommandRefusedError(word, message)
    return kind.error(message) if issubclass(kind.error, ResplitError) else ResplitError(message)


def http_status(error: Exception) -> int:
    """The HTTP status that answers a request which ended with `error`."""
    return kind_of(error).http_status
