"""Changes of logits and log probabilities are exact in any split, with drafts, and after moves and losses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from resplit.control.controller import Controller
from resplit.gateway.engine import GenerationRequest
from resplit.gateway.sessions.speculation import PassTimes
from resplit.model.activation import token_ids
from resplit.model.engines import open_engine
from resplit.model.sampling import sample
from resplit.model.source import StoredModel
from resplit.types import LogitChange, Sampling
from tests.support.engines import run_rows
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import PROMPT, SPREAD, TURNED, A, B, generate, generation_request, three_node_config

NEW_TOKENS = 60


class Odd:
    """Allows only tokens that are odd at even places, and makes each token less likely that was there before."""

    def changes(self, made: Sequence[int], drafts: Sequence[int]) -> tuple[LogitChange, ...]:
        return tuple(self._after([*made, *drafts[:count]]) for count in range(len(drafts) + 1))

    def _after(self, made: Sequence[int]) -> LogitChange:
        allowed = b"\xaa" * 32 if len(made) % 2 == 0 else b""
        return LogitChange(allowed, {token: -0.02 * made.count(token) for token in made})


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    limits = {"context_tokens": 256, "sessions": 8, "queue": 16, "deadline": "60 s", "copy_every": 4}
    async with in_process(three_node_config(limits=limits, kv_tokens=1024), stored_model, tmp_path) as running:
        yield running


@pytest.fixture
async def controller(nodes: InProcessCluster) -> AsyncIterator[Controller]:
    """A controller that does not plan: the tests deploy each placement themselves."""
    controller = nodes.controller()
    await controller.membership.introduce()
    await deploy(controller, SPREAD)
    nodes.sessions.on_lost = lambda node: None
    yield controller
    await controller.stop()


def unsplit(model: StoredModel, sampling: Sampling) -> list[int]:
    """The tokens that the unsplit model gives with these changes of its logits."""
    engine, step, tokens, position = open_engine(model.spec), list(PROMPT), list[int](), 0
    for index, block in enumerate(engine.features):
        engine.load(index, model.content(block.name))
    while len(tokens) < NEW_TOKENS:
        logits = run_rows(engine, "s", (0, len(engine.kinds) - 1), position, token_ids(step), 1024)
        position += len(step)
        step = list(sample(logits, sampling, position - 1, Odd().changes(tokens, ())))
        tokens += step
    return tokens


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 0.95, 11, top_k=40, min_p=0.01)])
async def test_changed_logits_give_the_tokens_of_the_unsplit_model(
    nodes: InProcessCluster, controller: Controller, stored_model: StoredModel, sampling: Sampling
) -> None:
    request = generation_request(NEW_TOKENS, sampling=sampling, steering=Odd())
    running = asyncio.create_task(generate(nodes.sessions, request))

    def at(position: int) -> bool:
        return running.done() or any(each.position > position for each in nodes.sessions._live.values())

    async def begun() -> bool:
        return at(len(PROMPT) + 10)

    async def further() -> bool:
        return at(len(PROMPT) + 35)

    await until(begun, 30)
    await deploy(controller, TURNED)
    await until(further, 30)
    nodes.break_connections(B)
    assert await running == unsplit(stored_model, sampling)
    assert nodes.sessions.records(0)[-1].moves


async def test_drafts_are_verified_under_the_same_changes(
    nodes: InProcessCluster, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if drafts always paid: on a busy machine their measured times may say otherwise.
    monkeypatch.setattr(PassTimes, "choose_window", lambda self, hit_rates, streams: len(hit_rates))

    class Two:
        """Allows two tokens in turn, so that drafts are soon right."""

        def changes(self, made: Sequence[int], drafts: Sequence[int]) -> tuple[LogitChange, ...]:
            return tuple(LogitChange(bytes([1 << (len(made) + more) % 2])) for more in range(len(drafts) + 1))

    tokens = await generate(nodes.sessions, generation_request(NEW_TOKENS, steering=Two()))
    assert tokens == [0, 1] * (NEW_TOKENS // 2)
    assert nodes.sessions.records(0)[-1].accepted > 0


async def scored(nodes: InProcessCluster, request: GenerationRequest) -> tuple[list[int], np.ndarray, list[float]]:
    """The tokens of a request, the log probabilities of its prompt, and those of the new tokens."""
    found = [token async for token in nodes.sessions.generate(request)]
    prompt = np.array([each.chosen for each in found[0].prompt_logprobs])
    return [each.token_id for each in found], prompt, [each.logprobs.chosen for each in found if each.logprobs]


@pytest.mark.parametrize("length", [2, 7, 200])
async def test_log_probabilities_of_prompt_and_answer_are_those_of_transformers(
    nodes: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module, length: int
) -> None:
    prompt = tuple((7 * place) % 250 + 3 for place in range(length))
    request = replace(generation_request(6, prompt), logprobs=2, score_prompt=True)
    tokens, prompt_logprobs, new_logprobs = await scored(nodes, request)
    ids = torch.tensor([[*prompt, *tokens]])
    expected = unsplit_model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].detach().numpy()
    np.testing.assert_allclose(prompt_logprobs, expected[: length - 1], atol=1e-3)
    np.testing.assert_allclose(new_logprobs, expected[length - 1 :], atol=1e-3)


async def test_a_request_that_asks_for_nothing_gets_the_same_tokens_beside_one_that_does(
    nodes: InProcessCluster, controller: Controller
) -> None:
    plain = generation_request(20)
    alone = await generate(nodes.sessions, plain)
    (tokens, _, _), beside = await asyncio.gather(
        scored(nodes, replace(plain, logprobs=1, score_prompt=True)), generate(nodes.sessions, plain)
    )
    assert beside == alone == tokens
    found = [token async for token in nodes.sessions.generate(plain)]
    assert all(each.logprobs is None and each.prompt_logprobs == () for each in found)


async def test_a_loss_during_a_scored_prompt_leaves_no_gap(nodes: InProcessCluster, controller: Controller) -> None:
    request = replace(generation_request(4, tuple(range(3, 203))), logprobs=0, score_prompt=True)
    _, expected, _ = await scored(nodes, request)
    running = asyncio.create_task(scored(nodes, request))

    async def begun() -> bool:
        return bool(nodes.sessions._live)

    await until(begun, 10)
    nodes.break_connections(A)
    _, again, _ = await running
    np.testing.assert_allclose(again, expected, atol=1e-5)
