"""The commands' JSON: what a controller writes, a node reads, and what a node refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from resplit.errors import CommandRefusedError
from resplit.model.spec import ModelSpec
from resplit.wire.addresses import Address
from resplit.wire.commands import (
    Abort,
    Clear,
    Commit,
    Connect,
    Emulate,
    NodeCommand,
    Prepare,
    Profile,
    Release,
    Trust,
    WrappedShard,
    parse_command,
    to_body,
)
from resplit.wire.emulated_link import Shape
from resplit.wire.routes import Route
from tests.support.telemetry import block_features

ROUTE = Route(3, ("alpha", "beta"), {"alpha": Address("alpha", 7001), "beta": Address("::1", 7002)})
ROUTE_JSON = {"epoch": 3, "placement": ["alpha", "beta"], "addresses": {"alpha": "alpha:7001", "beta": "[::1]:7002"}}
MODEL = ModelSpec(
    "onnx", "int4", "layer", {"model_type": "llama", "hidden_size": 8}, block_features(), 97, 32, 4, 2, 16
)
MODEL_JSON = json.loads(json.dumps(asdict(MODEL)))
SHARDS = {1: WrappedShard("a1b2", 3, b"\x00\xff")}
SHARDS_JSON = {"1": {"name": "a1b2", "sealed_bytes": 3, "key": "00ff"}}
PREPARE = Prepare(ROUTE, True, MODEL, frozenset({0, 1}), 64, SHARDS, 9.5)
PREPARE_JSON = {
    "route": ROUTE_JSON,
    "replace_current": True,
    "model": MODEL_JSON,
    "private": [0, 1],
    "kv_tokens": 64,
    "shards": SHARDS_JSON,
    "within_s": 9.5,
}
LINK_JSON = {"latency_s": 0.01, "bandwidth_bytes_per_s": 1e6}
CONNECT = Connect(True, frozenset({0}), ROUTE.addresses, {"beta": Shape(0.01, 1e6)})
CONNECT_JSON = {
    "trusted": True,
    "private": [0],
    "addresses": ROUTE_JSON["addresses"],
    "links": {"beta": LINK_JSON},
}
COMMANDS: list[tuple[NodeCommand, dict[str, Any]]] = [
    (PREPARE, PREPARE_JSON),
    (Clear(ROUTE), {"route": ROUTE_JSON}),
    (Commit(3), {"epoch": 3}),
    (Abort(3), {"epoch": 3}),
    (Release(3), {"epoch": 3}),
    (Trust(False, frozenset({0})), {"trusted": False, "private": [0]}),
    (CONNECT, CONNECT_JSON),
    (
        Profile((1,), MODEL, frozenset({0}), SHARDS, 9.5),
        {"blocks": [1], "model": MODEL_JSON, "private": [0], "shards": SHARDS_JSON, "within_s": 9.5},
    ),
    (
        Emulate(2.0, None, {"beta": Shape(0.01, 1e6)}),
        {"slowdown": 2.0, "background_utilization": None, "links": {"beta": LINK_JSON}, "kill": False},
    ),
]


@pytest.mark.parametrize(("command", "body"), COMMANDS, ids=lambda value: getattr(value, "kind", ""))
def test_a_command_is_written_as_json_and_read_back(command: NodeCommand, body: dict[str, Any]) -> None:
    assert to_body(command) == body
    assert parse_command(command.kind, json.loads(json.dumps(body))) == command


def test_a_change_of_an_emulated_node_may_name_one_value_alone() -> None:
    assert parse_command("emulate", {"slowdown": 2}) == Emulate(slowdown=2.0)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CommandRefusedError, match="'explode' is not a command for nodes") as refusal:
        parse_command("explode", {})
    assert refusal.value.reason == "kind"


@pytest.mark.parametrize(
    ("kind", "body", "place"),
    [
        ("commit", {}, "epoch: Field required"),
        ("prepare", PREPARE_JSON | {"shards": {"one": SHARDS_JSON["1"]}}, "shards.one"),
        ("prepare", PREPARE_JSON | {"shards": {"1": SHARDS_JSON["1"] | {"key": "no hex"}}}, "shards.1.key"),
        ("connect", CONNECT_JSON | {"addresses": {"alpha": "alpha"}}, "'alpha': is not host:port"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_with_the_place(kind: str, body: dict[str, Any], place: str) -> None:
    with pytest.raises(CommandRefusedError, match=place) as refusal:
        parse_command(kind, body)
    assert refusal.value.reason == "malformed"
