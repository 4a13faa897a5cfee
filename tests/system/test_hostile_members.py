"""One member that lies harms nobody else: each test repeats an attack with a member's own credentials."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from google.protobuf.message import DecodeError

from resplit.control.controller import Controller
from resplit.errors import ResplitError
from resplit.model.source import StoredModel
from resplit.wire.node_pb2 import EchoReply, EchoRequest
from tests.support.cluster import reference
from tests.support.hostile import HostileClient, HostileNode, answers, exchange, without_certificate
from tests.support.in_process import InProcessCluster, deploy, in_process
from tests.support.three_nodes import PROMPT, A, B, C, generate, generation_request, three_node_config

TRUSTED_ONLY = [A, A, B, B, B, B, B, A]


@pytest.fixture
async def hostile() -> HostileNode:
    """The node gamma, which is honest until the test gives it lies."""
    return HostileNode()


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path, hostile: HostileNode) -> AsyncIterator[InProcessCluster]:
    async with in_process(three_node_config(), stored_model, tmp_path, {C: hostile.service}) as running:
        yield running


@pytest.fixture
async def controller(nodes: InProcessCluster) -> AsyncIterator[Controller]:
    """A controller whose live epoch uses alpha and beta only: gamma hosts nothing."""
    controller = nodes.controller()
    await controller.membership.introduce()
    await deploy(controller, TRUSTED_ONLY)
    yield controller
    await controller.stop()


@pytest.fixture
async def client(nodes: InProcessCluster) -> AsyncIterator[HostileClient]:
    """A client with gamma's credentials."""
    client = HostileClient(nodes.addresses, nodes.folder / "keys" / C)
    yield client
    await client.disconnect()


async def test_a_node_that_says_nonsense_is_heard_word_for_word(nodes: InProcessCluster, hostile: HostileNode) -> None:
    hostile.lies["Echo"] = answers(b"\xff" * 9)
    with pytest.raises((ResplitError, DecodeError)):
        await nodes.peer(C).echo_s(0)
    hostile.lies["Echo"] = answers(EchoReply())
    assert await nodes.peer(C).echo_s(0) > 0
    assert hostile.heard[-1] == ("Echo", "controller")


async def test_a_stranger_gets_no_answer_on_a_nodes_port(nodes: InProcessCluster) -> None:
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        assert await exchange(nodes.addresses[B], hello, 2, without_certificate(), B) == b""
    assert b"HTTP" not in await exchange(nodes.addresses[B], b"GET / HTTP/1.1\r\n\r\n", 2)


async def test_requests_get_the_unsplit_models_tokens_while_a_node_that_hosts_nothing_talks_nonsense(
    nodes: InProcessCluster, controller: Controller, hostile: HostileNode, unsplit_model: torch.nn.Module
) -> None:
    hostile.talk_nonsense()
    for _ in range(3):
        tokens = await generate(nodes.sessions, generation_request())
        assert tokens == reference(unsplit_model, list(PROMPT), 12)


async def test_a_member_may_echo(client: HostileClient, controller: Controller) -> None:
    assert await client.call(B, "Echo", EchoRequest(payload=bytes(10))) == EchoReply()
