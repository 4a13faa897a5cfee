"""`resplit doctor`: each fault is found, with what to do."""

from __future__ import annotations

import math
from pathlib import Path

import httpx
import pytest

from resplit.cluster.client import ControlClient
from resplit.cluster.doctor import Diagnosis, _from_controller, _network, fit, keys, links, nodes
from resplit.cluster.sizing import Sizing
from resplit.config import ClusterConfig
from resplit.errors import ResplitError
from resplit.model.source import StoredModel
from resplit.security.authority import keys_command
from resplit.security.identity import CONTROLLER
from resplit.status import ClusterStatus, NodeStatus
from resplit.telemetry.rows import LinkRow
from resplit.wire.node_pb2 import Hello, Token
from tests.support.hostile import HostileNode, answers
from tests.support.in_process import in_process
from tests.support.three_nodes import A, B, C, three_node_config

SIZING = Sizing("tiny", 8, 1e6, 1e3, 256, (), 0.1, {"chat": 2.0}, False, "", None)
NODE = {"address": "10.0.0.1:7001", "answers": True, "drained": False}


def problems(findings: list[Diagnosis]) -> dict[str, str]:
    """What is not in order, by what it is about."""
    return {each.about: f"{each.level}: {each.says}" for each in findings if each.level != "ok"}


def test_missing_and_mixed_up_keys_are_found(tmp_path: Path) -> None:
    config = three_node_config()
    assert "run `resplit keys" in problems(list(keys(config, tmp_path)))["keys of controller"]
    keys_command(tmp_path, config.node_names)
    assert problems(list(keys(config, tmp_path))) == {}

    (tmp_path / A).rename(tmp_path / "other")
    (tmp_path / B).rename(tmp_path / A)
    (tmp_path / CONTROLLER / f"wrap-{C}.pub").unlink()

    found = problems(list(keys(config, tmp_path)))
    assert f"has the keys of '{B}', not of '{A}'" in found[f"keys of {A}"]
    assert "no key to seal blocks for it" in found[f"keys of {C}"]


def test_a_model_that_does_not_fit_and_a_pace_that_is_too_slow_are_found() -> None:
    slow = three_node_config(
        classes=[{"name": "chat", "slo": "1 s", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
        limits={"context_tokens": 256, "deadline": "20 s"},
    )
    found = problems(list(fit(slow, SIZING)))
    assert found["deadline"].startswith("warning: 256 tokens take 26 s, and the deadline is 20 s; raise")
    assert found["class chat"].startswith("warning: requests take 2.00 s, and the slo is 1 s")
    nowhere = Sizing(**{**vars(SIZING), "reason": "memory short by 5 bytes"})
    assert "memory short by 5 bytes; add memory" in problems(list(fit(slow, nowhere)))["memory"]


def test_a_running_controller_tells_of_lost_nodes_and_wrong_clocks() -> None:
    known = (
        NodeStatus("fine", 1, **NODE),
        NodeStatus("late", 1, **NODE, clock_ahead_s=-6),
        NodeStatus("gone", 1, **NODE | {"answers": False}),
        NodeStatus("liar", 1, **NODE | {"answers": False}, fault="its report cannot be read"),
    )
    status = ClusterStatus("home", "tiny", "", (), 1, None, None, None, known, 0, 0, "yes")
    found = problems(list(nodes(status)))
    assert found["node late"] == "error: its clock is 6.0 s behind the controller's: set it (NTP)"
    assert "start `resplit node --name gone` there" in found["node gone"]
    assert "its report cannot be read" in found["node liar"]
    assert "node fine" not in found


def test_links_that_were_not_measured_or_are_slow_are_found() -> None:
    def rows(node: str, peer: str, latency_s: float, bytes_per_s: float) -> list[LinkRow]:
        sizes = (1000, 100_000)
        return [LinkRow(1, node, peer, n, latency_s + n / bytes_per_s, "active", False) for n in sizes]

    fast = [row for a in (A, B, C) for b in (A, B, C) if a != b and (a, b) != (C, A) for row in rows(a, b, 0.002, 1e7)]
    found = links(three_node_config(), [row for row in fast if (row.node, row.peer) != (A, B)] + rows(A, B, 0.2, 1e4))
    assert {about: text.split(":")[0] for about, text in problems(list(found)).items()} == {
        f"link {A} to {B}": "warning",
        f"link {C} to {A}": "error",
    }


def test_a_link_that_is_faster_than_can_be_timed_is_not_given_a_speed_out_of_the_air() -> None:
    rows = [LinkRow(1, A, B, size, seconds, "active", False) for size, seconds in ((1e3, 8e-4), (4e6, 8e-4))]
    found = next(each for each in links(three_node_config(), rows) if each.about == f"link {A} to {B}")
    assert (found.level, found.says) == ("ok", "0.8 ms, at least 40000 Mbit/s")


def test_a_controller_that_is_not_ready_is_found_and_no_node_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "control.token").write_text("secret")

    def not_ready(self: ControlClient) -> ClusterStatus:
        raise ResplitError("the controller refused GET /status: 503 waiting for nodes: shed")

    monkeypatch.setattr(ControlClient, "status", not_ready)
    found = problems(_from_controller(three_node_config(), tmp_path, "http://127.0.0.1:1"))
    assert found["controller"].startswith("error: the controller refused GET /status: 503 waiting for nodes: shed")


def test_links_are_read_beside_rows_with_unknown_values() -> None:
    row = {
        "time_s": 1.0,
        "node": A,
        "peer": B,
        "payload_bytes": 9.0,
        "seconds": 0.1,
        "source": "active",
        "emulated": False,
    }
    rows = {"nodes": [{"gpu_utilization": None}], "links": [row], "blocks": []}
    with ControlClient("http://gateway", "secret") as client:
        client._http = httpx.Client(
            base_url="http://gateway/control",
            transport=httpx.MockTransport(lambda request: httpx.Response(200, json=rows)),
        )
        assert [each.peer for each in client.links()] == [B]


async def test_without_a_controller_the_nodes_are_asked_from_here(stored_model: StoredModel, tmp_path: Path) -> None:
    beta = HostileNode()
    async with in_process(three_node_config(), stored_model, tmp_path, {B: beta.service}) as running:
        await running.router.disconnect()
        await running.stop(C)
        config = ClusterConfig.model_validate(
            three_node_config().model_dump(include={"name", "source", "trusted", "kv_tokens"})
            | {
                "nodes": [{"name": n, "memory": "8 MiB", "address": str(running.addresses[n])} for n in (A, B, C)],
                "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            }
        )

        findings = await _network(config, tmp_path / "keys" / CONTROLLER)

        assert set(problems(findings)) == {
            f"node {C}",
            *(f"link {a} to {b}" for a, b in ((A, C), (B, C), (C, A), (C, B))),
        }
        measured = {each.about: each.says for each in findings}[f"link {A} to {B}"]
        assert math.isfinite(float(measured.split(" ms")[0]))

        beta.lies["Tokens"] = answers(Token(hello=Hello(nonce="5" * 32, clock_s=9)))
        older = problems(await _network(config, tmp_path / "keys" / CONTROLLER))[f"node {B}"]
        assert older.endswith(f"upgrade resplit on {B}"), older
