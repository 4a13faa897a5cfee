"""With any drafts and follow-ups, in any split, through moves and losses: sessions get the unsplit model's tokens."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from resplit.errors import ProposalRefusedError
from resplit.gateway.engine import GenerationRequest
from resplit.gateway.sessions import session as session_module
from resplit.gateway.sessions.manager import Sessions
from resplit.gateway.sessions.speculation import PassTimes, Speculation
from resplit.model.source import StoredModel, obtain
from resplit.pass_times import PassTime
from resplit.types import Sampling
from tests.support.cluster import make_model, reference
from tests.support.engines import tokens_of_one_engine
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import PROMPT, SPREAD, A, B, C, generate, generation_request, three_node_config

NEW_TOKENS = 48
PROMPTS = [tuple((7 * lane + 3 * at) % 250 + 5 for at in range(3 + 4 * lane)) for lane in range(5)]
SAMPLINGS = [Sampling(), Sampling(1.0, 0.9, 7), Sampling(), Sampling(0.7, 1.0, 3), Sampling()]


@pytest.fixture(scope="module", params=["float32", "int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    """Its weights are large: a change of the last bits soon becomes another token."""
    folder = tmp_path_factory.mktemp("model")
    return obtain(str(make_model(folder, initializer_range=0.5)), folder / "models", request.param)


@pytest.fixture(scope="module")
def expected(model: StoredModel) -> list[list[int]]:
    pairs = zip(PROMPTS, SAMPLINGS, strict=True)
    return [tokens_of_one_engine(model, prompt, NEW_TOKENS, sampling) for prompt, sampling in pairs]


class AnyDrafts(Speculation):
    """Often no drafts, or drafts of random number, of which a random number are right."""

    rng = random.Random(0)
    truth: dict[tuple[int, ...], list[int]] = {}  # noqa: RUF012 - the tests fill it

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        super().__init__(prompt, most)
        self._left = list(self.truth[tuple(prompt)])

    def drafts(self, times: PassTimes, streams: int, room: int) -> tuple[int, ...]:
        window = self.rng.choice((0, 0, self.rng.randint(0, min(room, 15))))
        right = self.rng.choice((0, window, self.rng.randint(0, window)))
        wrong = [self.rng.randrange(250) for _ in range(window - right)]
        return (*self._left[:right], *wrong)

    resting = True  # follow-ups are asked for beside drafts

    def accept(self, drafts: Sequence[int], answers: Sequence[int]) -> tuple[int, ...]:
        new = super().accept(drafts, answers)
        del self._left[: len(new)]
        return new


def random_placement(rng: random.Random) -> list[str]:
    """Alpha and beta are trusted. Passes follow one another where one node has the first and the last block."""
    first, last = rng.choice([(A, A), (B, B), (A, A), (B, B), (A, B), (B, A)])
    return [first, rng.choice((A, B)), *(rng.choice((A, B, C)) for _ in range(5)), last]


def request(lane: int, **more: Any) -> GenerationRequest:
    return generation_request(NEW_TOKENS, PROMPTS[lane], sampling=SAMPLINGS[lane], **more)


async def some_tokens(sessions: Sessions, lane: int, count: int) -> list[int]:
    """The first tokens of a request whose client leaves."""
    tokens: list[int] = []
    stream = sessions.generate(request(lane))
    async for token in stream:
        tokens.append(token.token_id)
        if len(tokens) == count:
            break
    await stream.aclose()
    return tokens


async def disturb(nodes: InProcessCluster, controller: Any, rng: random.Random, lanes: asyncio.Task[Any]) -> None:
    """Deploy random placements, break connections, and lose caches, until all lanes are done."""

    async def after_some_tokens() -> bool:
        now = sum(each.position for each in nodes.sessions._live.values())
        return lanes.done() or abs(now - before) > 20

    while not lanes.done():
        before = sum(each.position for each in nodes.sessions._live.values())
        await until(after_some_tokens, 60)
        if lanes.done():
            return
        what = rng.randrange(4)
        if what == 0:
            nodes.break_connections(rng.choice((A, B, C)))
        elif what == 1:
            for each in list(nodes.sessions._live.values()):
                each.lose("lost by the test")
        else:
            with contextlib.suppress(ProposalRefusedError):  # while a broken connection is made again
                await deploy(controller, random_placement(rng))


async def test_any_drafts_in_any_split_give_the_tokens_of_the_unsplit_model(
    model: StoredModel, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    monkeypatch.setattr(AnyDrafts, "rng", random.Random(1))
    monkeypatch.setattr(AnyDrafts, "truth", dict(zip(PROMPTS, expected, strict=True)))
    monkeypatch.setattr(session_module, "Speculation", AnyDrafts)
    monkeypatch.setattr(session_module, "most_follow_ups", lambda pass_s: AnyDrafts.rng.randint(1, 6))
    limits = {"context_tokens": 256, "sessions": 8, "queue": 16, "deadline": "300 s", "copy_every": rng.choice((0, 4))}
    async with in_process(three_node_config(limits=limits, kv_tokens=1024), model, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.membership.introduce()
        await deploy(controller, random_placement(rng))
        nodes.sessions.on_lost = lambda node: None
        passes: list[PassTime] = []
        nodes.sessions.on_pass = passes.append

        async def lane(number: int) -> None:
            for _ in range(2):
                count = rng.randint(1, NEW_TOKENS)
                assert await some_tokens(nodes.sessions, number, count) == expected[number][:count]
                assert await generate(nodes.sessions, request(number)) == expected[number]

        lanes = asyncio.gather(*(lane(number) for number in range(len(PROMPTS))))
        await asyncio.gather(lanes, disturb(nodes, controller, rng, lanes))  # type: ignore[arg-type]
        records = nodes.sessions.records(0)
        assert sum(record.accepted for record in records) > 100
        assert sum(record.drafted - record.accepted for record in records) > 100
        assert any(record.moves for record in records)
        assert any(done.followed for done in passes)
        await controller.stop()


async def test_drafts_beyond_a_stop_token_are_not_given(
    model: StoredModel, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnyDrafts, "truth", dict(zip(PROMPTS, expected, strict=True)))
    monkeypatch.setattr(session_module, "Speculation", AnyDrafts)
    async with in_process(three_node_config(), model, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.membership.introduce()
        await deploy(controller, SPREAD)
        for lane, tokens in enumerate(expected):
            stop = tokens[NEW_TOKENS // 2]
            until_stop = tokens[: tokens.index(stop) + 1]
            found = [token async for token in nodes.sessions.generate(request(lane, stop_ids=frozenset({stop})))]
            assert [token.token_id for token in found] == until_stop
            assert [token.index for token in found] == list(range(len(until_stop)))
            assert [token.finish for token in found[-2:]] == [None, "stop"][-len(found) :]
        await controller.stop()


async def test_over_far_links_a_stream_that_repeats_itself_takes_half_as_many_passes(
    stored_model: StoredModel, unsplit_model: torch.nn.Module, tmp_path: Path
) -> None:
    far = {"default": {"latency": "10 ms", "bandwidth": "1 Gbit/s"}}
    async with in_process(three_node_config(links=far), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.membership.introduce()
        await deploy(controller, SPREAD)
        answer = await generate(nodes.sessions, generation_request(100))
        assert answer == reference(unsplit_model, list(PROMPT), 100)  # it repeats a few tokens again and again
        (record,) = nodes.sessions.records(0)
        assert 50 < record.accepted <= record.drafted
        assert len(record.token_times_s) == record.new_tokens == 100
        await controller.stop()
