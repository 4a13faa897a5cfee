"""Requests wait while lost nodes are replaced, and fail at once when no replacement is possible."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from resplit.cancellation import until_stopped
from resplit.errors import NodeLostError
from resplit.gateway.sessions.manager import Sessions
from resplit.model.source import StoredModel
from resplit.wire.node_pb2 import Token
from tests.support.in_process import deploy, in_process, until
from tests.support.three_nodes import SPREAD, C, generation_request, three_node_config


async def first_token(sessions: Sessions) -> int:
    tokens = sessions.generate(generation_request())
    async for token in tokens:
        return token.token_id
    raise AssertionError("no token")


async def test_a_waiting_request_fails_at_once_when_no_placement_is_possible(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await deploy(controller, SPREAD)
        nodes.sessions.on_lost = lambda node: None  # no new plan is made, so the request waits
        await nodes.stop(C)

        async def noticed() -> bool:
            return C not in nodes.router.listening

        await until(noticed)
        waiting = asyncio.create_task(first_token(nodes.sessions))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        begun_s = time.monotonic()
        nodes.sessions.set_unavailable("no placement is left")
        with pytest.raises(NodeLostError, match="no placement is left"):
            await waiting
        assert time.monotonic() - begun_s < 5
        await controller.stop()


async def test_a_connection_that_breaks_for_a_moment_does_not_fail_a_request(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await deploy(controller, SPREAD)
        tokens = []
        async for token in nodes.sessions.generate(generation_request()):
            tokens.append(token.token_id)
            if len(tokens) == 2:
                nodes.break_connections(C)  # the controller has no problem yet, so it cannot plan
        assert len(tokens) == generation_request().max_new_tokens
        await controller.stop()


async def test_a_defect_while_tokens_are_received_is_a_failure_of_the_process(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await deploy(controller, SPREAD)

        def defect(token: Token) -> None:
            raise KeyError(token.session)

        nodes.router.on_token = defect
        request = asyncio.create_task(first_token(nodes.sessions))

        with pytest.raises(KeyError):
            await asyncio.wait_for(until_stopped(asyncio.Event(), nodes.router.tasks), 5)
        request.cancel()
        await controller.stop()
