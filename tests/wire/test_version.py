"""Members of different versions say so, and the number changes with what they exchange."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import get_args

import pytest

from resplit.model.spec import ModelSpec
from resplit.status import NodeReport, ReportedState, StandbyState
from resplit.telemetry.rows import BlockRow, LinkRow, NodeRow, TelemetryRows
from resplit.wire import commands, node_pb2
from resplit.wire.routes import Route
from resplit.wire.version import NO_VERSION, WIRE_VERSION, Version, mismatch, own_version

# The exchanged messages of each wire version. A version that was released is never changed.
DIGESTS = {1: "eddfd486311709a0"}


def exchanged() -> str:
    """A digest of the messages, and of the fields of what travels in them as JSON."""
    sent = [*get_args(commands.NodeCommand), commands.WrappedShard, Route, ModelSpec]
    described = [*sent, NodeReport, ReportedState, StandbyState, TelemetryRows, NodeRow, LinkRow, BlockRow]
    fields = [(each.__name__, [(f.name, str(f.type)) for f in dataclasses.fields(each)]) for each in described]
    return hashlib.sha256(node_pb2.DESCRIPTOR.serialized_pb + repr(fields).encode()).hexdigest()[:16]


def test_the_number_stands_for_what_is_exchanged() -> None:
    assert exchanged() == DIGESTS[WIRE_VERSION], (
        "what members exchange has changed: if WIRE_VERSION was released, raise it; put the digest here"
    )


def test_the_older_end_is_told_to_upgrade() -> None:
    ours = own_version()
    assert mismatch("garage", Version(WIRE_VERSION, "0.0.9"), "controller") == ""
    older = mismatch("garage", Version(WIRE_VERSION - 1, "0.0.9") if WIRE_VERSION > 1 else NO_VERSION, "controller")
    assert older.endswith(f"controller runs {ours}: upgrade resplit on garage")
    newer = mismatch("garage", Version(WIRE_VERSION + 1, "9.1"), "controller")
    assert newer == (
        f"garage runs resplit 9.1 (wire version {WIRE_VERSION + 1}), and controller runs {ours}: "
        "upgrade resplit on controller"
    )


@pytest.mark.parametrize("release", ["", "x" * 41, "1\n2", "1 <b>"])
def test_a_release_that_is_none_is_not_repeated(release: str) -> None:
    said = Version.said(node_pb2.Version(wire=7, release=release))
    assert str(said) == "resplit of an unknown release (wire version 7)"
