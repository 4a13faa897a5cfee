"""Operations on a running cluster: restart it, drain and join nodes, change trust and the cluster file."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, free_ports, start_process
from resplit.epochs import Proposal
from resplit.errors import ProposalRefusedError
from resplit.security.authority import keys_command
from resplit.security.identity import CONTROLLER
from resplit.status import NodeStatus
from tests.support.cluster import CLUSTER, started
from tests.support.latest_problem import problem_of
from tests.support.processes import poll_until, ready, run_resplit
from tests.support.streams import PROMPTS, all_answers, expected_tokens

pytestmark = pytest.mark.processes

NEW_TOKENS = 64
PRIVATE = {0, 1, 7}
FIRST = ("alpha", "alpha", "beta", "gamma", "gamma", "delta", "beta", "alpha")


@pytest.fixture(scope="module")
def cluster(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes, a gateway and a controller. Its latest problem has idle nodes, so that plans do not vary."""
    small = re.sub("(gamma|delta), memory: 4 MiB", r"\1, memory: 1.5 MiB", CLUSTER)  # room for two layers
    with started(tmp_path_factory.mktemp("cluster"), model_folder, small, plan=False) as running:
        with ControlClient(running.url, running.token) as client:
            client.set_problem(problem_of(running.config, client.model().features, FIRST))
            place(client, *FIRST)
        yield running


@pytest.fixture(scope="module")
def expected(unsplit_model: torch.nn.Module) -> list[list[int]]:
    return expected_tokens(unsplit_model, NEW_TOKENS)


def place(client: ControlClient, *placement: str) -> None:
    """Deploy a placement once all its nodes answer. On a busy machine one may be listed as lost for a moment."""
    until_s = time.monotonic() + 30
    while set(placement) & set(client.model().lost) and time.monotonic() < until_s:
        time.sleep(0.1)
    client.propose(Proposal(placement, "re-split", client.model().epoch))


async def under_streams(cluster: Cluster, client: ControlClient, act: Callable[[], object]) -> list[list[int]]:
    """The answers of eight streams, in the middle of which `act` is called."""

    async def midway() -> None:
        await poll_until(lambda: client.status().sessions == len(PROMPTS))
        await asyncio.to_thread(act)

    answers, _ = await asyncio.gather(all_answers(cluster, NEW_TOKENS), midway())
    return answers


def completion(cluster: Cluster) -> httpx.Response:
    body = {"model": "tiny-llama", "prompt": "a", "max_tokens": 2}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=90)


def restart_controller(cluster: Cluster, *also_kill: str) -> None:
    for name in (CONTROLLER, *also_kill):
        cluster.processes[name].send_signal(signal.SIGKILL)
        cluster.processes[name].wait()
    start_process(cluster, CONTROLLER)


async def test_a_controller_that_restarts_uses_neither_a_dead_node_nor_a_drained_one(
    cluster: Cluster, expected: list[list[int]]
) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        place(client, *FIRST)
        client.drain("delta")
        restart_controller(cluster, "gamma")
        await poll_until(lambda: ready(client), 60.0)  # takes seconds, mostly to import torch
        assert set(client.model().placement) <= {"alpha", "beta"}
        assert await all_answers(cluster, NEW_TOKENS) == expected
        assert client.join("delta") == ["delta is used again"]
        start_process(cluster, "gamma")
        await poll_until(lambda: "gamma" not in client.model().lost)


async def test_a_drained_node_holds_no_block_and_no_stream_is_disturbed(
    cluster: Cluster, expected: list[list[int]]
) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        place(client, *FIRST)
        printed: list[str] = []

        def drain() -> None:
            printed.extend(client.drain("gamma"))
            assert "gamma" not in client.model().placement
            assert blocks_of(client, "gamma") == set()

        assert await under_streams(cluster, client, drain) == expected
        assert printed == ["gamma is drained"]
        with pytest.raises(ProposalRefusedError, match="gamma is drained"):
            place(client, *FIRST)
        assert client.drain("gamma") == []
        assert client.join("gamma") == ["gamma is used again"]
        place(client, *FIRST)


def test_commands_print_what_they_did_or_why_they_were_refused(cluster: Cluster) -> None:
    where = ("--url", cluster.url, "--state", str(cluster.state))
    assert run_resplit("drain", "delta", *where).stdout == "delta is drained\n"
    assert "trusted drained" not in (shown := run_resplit("status", *where).stdout)
    assert shown.count(" drained") == 1
    assert run_resplit("join", "delta", *where).stdout == "delta is used again\n"
    assert run_resplit("trust", "gamma", "off", *where).stdout == "nothing changes\n"
    refused = run_resplit("drain", "attic", *where)
    assert refused.returncode == 1
    assert refused.stderr.startswith("resplit: 'attic': not in this cluster; it has alpha, beta, gamma, delta.")


async def test_a_resplit_without_room_beside_the_old_placement_is_staged_and_no_token_changes(
    cluster: Cluster, expected: list[list[int]]
) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        place(client, *FIRST)

        def switch_twice() -> None:
            place(client, "alpha", "alpha", "gamma", "delta", "beta", "gamma", "delta", "alpha")
            place(client, "beta", "alpha", "delta", "gamma", "gamma", "delta", "alpha", "beta")

        begun = len(client.epochs())
        assert await under_streams(cluster, client, switch_twice) == expected
        assert [epoch.staged for epoch in client.epochs()[begun:]] == [True, True]
        moved = [move for record in client.records()[-len(PROMPTS) :] for move in record.moves]
        assert len(moved) == 2 * len(PROMPTS)
        assert not any(move.replayed for move in moved)


async def test_a_node_that_loses_trust_holds_no_private_block_once_the_command_returns(
    cluster: Cluster, expected: list[list[int]]
) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        place(client, "beta", "beta", "beta", "gamma", "gamma", "delta", "alpha", "beta")
        epoch = client.model().epoch

        def distrust() -> None:
            assert client.trust("beta", False) == ["beta is not trusted any more"]
            assert not PRIVATE & blocks_of(client, "beta")
            placement = client.model().placement
            assert {placement[block] for block in PRIVATE} == {"alpha"}

        assert await under_streams(cluster, client, distrust) == expected
        moved = [move for record in client.records() for move in record.moves if move.epoch > epoch]
        assert len(moved) == len(PROMPTS)
        assert not any(move.replayed for move in moved)
        assert all(record.private_ok for record in client.records())
        with pytest.raises(ProposalRefusedError, match="beta is not trusted"):
            place(client, "beta", *client.model().placement[1:])
        with pytest.raises(ProposalRefusedError, match="alpha is the last trusted node"):
            client.drain("alpha")
        assert client.trust("beta", True) == ["beta is trusted"]


def test_without_a_trusted_node_requests_get_503_and_no_node_holds_a_private_block(cluster: Cluster) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        client.trust("beta", False)
        client.trust("alpha", False)
        assert not any(PRIVATE & set(node.blocks) for node in reported_after(client))
        refused = completion(cluster)
        assert refused.status_code == 503
        assert "no placement" in refused.json()["error"]["message"]
        client.trust("alpha", True)
        assert client.status().ready == "yes"
        assert completion(cluster).status_code == 200
        client.trust("beta", True)


async def test_a_changed_cluster_file_adds_a_node_and_removes_another(
    cluster: Cluster, expected: list[list[int]]
) -> None:
    content = yaml.safe_load((cluster.state / "cluster.yaml").read_text())
    added = {"name": "epsilon", "memory": "4 MiB", "address": f"127.0.0.1:{free_ports(1)[0]}"}
    changed = {**content, "nodes": [*content["nodes"], added]}
    (cluster.state / "cluster.yaml").write_text(yaml.safe_dump(changed))
    with ControlClient(cluster.url, cluster.token) as client:
        with pytest.raises(
            ProposalRefusedError, match=r"wrap-epsilon\.pub: cannot be read .*`resplit keys` creates it"
        ):
            client.apply(changed)
        keys_command(cluster.state / "keys", cluster.state / "cluster.yaml")
        start_process(cluster, "epsilon")
        place(client, *FIRST)
        assert client.apply(changed) == ["epsilon is added"]
        await poll_until(lambda: "epsilon" not in client.model().lost)
        without = {**changed, "nodes": [node for node in changed["nodes"] if node["name"] != "gamma"]}

        def replace_node() -> None:
            place(client, "alpha", "alpha", "beta", "epsilon", "gamma", "delta", "beta", "alpha")
            assert client.apply(without) == ["gamma is removed"]

        assert await under_streams(cluster, client, replace_node) == expected
        assert "gamma" not in client.model().placement
        assert [node.node for node in client.status().nodes] == ["alpha", "beta", "delta", "epsilon"]
        with pytest.raises(ProposalRefusedError, match="weights: cannot change on a running cluster; restart"):
            client.apply({**without, "weights": "int8"})
        with pytest.raises(ProposalRefusedError, match="'gamma': not in this cluster"):
            client.drain("gamma")
        assert await all_answers(cluster, NEW_TOKENS) == expected


def blocks_of(client: ControlClient, name: str) -> set[int]:
    """The blocks that a node reports after this call."""
    return next(set(node.blocks) for node in reported_after(client) if node.node == name)


def reported_after(client: ControlClient) -> tuple[NodeStatus, ...]:
    """The states of all nodes as they report them after this call."""
    called_s = time.monotonic()
    while time.monotonic() < called_s + 1.2:  # the controller polls them every second
        time.sleep(0.05)
    return client.status().nodes
