"""Every error has one word on the wire and one HTTP status."""

import pytest

from resplit.errors import (
    KINDS,
    CapacityError,
    CommandRefusedError,
    DataError,
    NodeLostError,
    RequestError,
    ResplitError,
    ShardError,
    error_from_wire,
    http_status,
    wire_message,
    wire_word,
)


def test_no_word_stands_for_two_kinds() -> None:
    words = [kind.word for kind in KINDS]
    assert sorted(set(words)) == sorted(words)


@pytest.mark.parametrize("kind", [CapacityError, NodeLostError, ShardError, DataError, RequestError])
def test_an_error_that_crosses_the_wire_keeps_its_kind_and_message(kind: type[ResplitError]) -> None:
    arrived = error_from_wire(wire_word(kind("no room for block 3")), "no room for block 3")
    assert type(arrived) is kind
    assert str(arrived) == "no room for block 3"


def test_a_refused_command_crosses_the_wire_with_its_reason() -> None:
    error = CommandRefusedError("stale", "epoch 3 was aborted")
    arrived = error_from_wire(wire_word(error), wire_message(error))
    assert isinstance(arrived, CommandRefusedError)
    assert arrived.reason == "stale"
    assert str(arrived) == str(error) == "command refused (stale): epoch 3 was aborted"


@pytest.mark.parametrize("error", [ValueError("a defect"), TimeoutError()])
def test_any_other_exception_arrives_as_an_error_of_resplit(error: Exception) -> None:
    assert type(error_from_wire(wire_word(error), "it failed")) is ResplitError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("too long"), 400),
        (CapacityError("full"), 429),
        (NodeLostError("gone"), 503),
        (TimeoutError(), 504),
        (DataError("malformed"), 500),
        (CommandRefusedError("stale", "old"), 500),
        (ValueError("a defect"), 500),
    ],
)
def test_each_kind_of_error_has_its_http_status(error: Exception, status: int) -> None:
    assert http_status(error) == status
