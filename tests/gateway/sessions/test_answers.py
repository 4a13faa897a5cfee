"""The answers to a session's passes: those of the pass under way count, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resplit.errors import CapacityError, NodeLostError
from resplit.gateway.sessions.answers import Awaited, PassAnswers
from resplit.wire.node_pb2 import Logprobs, Token
from resplit.wire.routes import Route

ROUTE = Route(4, ("hub", "hub", "attic"), {})
PASS = Awaited(ROUTE, attempt=2, start=5, end=8, tokens=1, logprobs=False, scored=False)
PROMPT = replace(PASS, start=0, end=8, logprobs=True, scored=True)


def answer(position: int = 8, epoch: int = 4, attempt: int = 2, tokens: int = 1, scores: int = 0) -> Token:
    logprobs = [Logprobs(chosen=-float(position - scores + 1 + place)) for place in range(scores)]
    return Token(
        session="s", position=position, epoch=epoch, attempt=attempt, token_ids=[7] * tokens, logprobs=logprobs
    )


def failed(position: int, kind: str = "capacity") -> Token:
    return Token(session="s", position=position, epoch=4, attempt=2, error="no room", error_kind=kind)


@pytest.mark.parametrize(
    ("node", "given", "accepted"),
    [
        ("attic", answer(), True),
        ("hub", answer(), False),
        ("attic", answer(epoch=3), False),
        ("attic", answer(attempt=1), False),
        ("attic", answer(position=7), False),
        ("attic", answer(tokens=2), False),
        ("attic", answer(scores=1), False),
        ("hub", failed(5), True),
        ("hub", failed(8), True),
        ("hub", failed(4), False),
        ("hub", failed(9), False),
        ("cellar", failed(6), False),
    ],
)
def test_tokens_come_from_the_head_and_errors_from_any_node_of_the_route(
    node: str, given: Token, accepted: bool
) -> None:
    answers = PassAnswers(prompt_tokens=8)
    assert not answers.accept(node, given)
    answers.expect(PASS)
    assert answers.accept(node, given) is accepted
    if accepted:
        assert not answers.accept("attic", answer())


async def test_the_parts_of_a_scored_prompt_are_kept_by_position() -> None:
    answers = PassAnswers(prompt_tokens=9)
    answers.expect(PROMPT)
    assert answers.accept("attic", answer(position=4, tokens=0, scores=4))
    assert not answers.accept("attic", answer(position=8, tokens=0, scores=4))
    assert not answers.accept("attic", answer(position=4, tokens=0, scores=5))
    assert answers.accept("attic", answer(scores=5))
    last = await answers.last()
    assert (list(last.token_ids), [each.chosen for each in last.logprobs]) == ([7], [-8.0])
    assert {place: found.chosen for place, found in answers.scores.items()} == {i: -float(i) for i in range(1, 9)}


@pytest.mark.parametrize(
    ("kind", "error"), [("capacity", CapacityError), ("lost", NodeLostError), ("stale", NodeLostError)]
)
async def test_a_pass_ends_with_the_error_that_a_node_answered(kind: str, error: type[Exception]) -> None:
    answers = PassAnswers(prompt_tokens=8)
    answers.expect(PASS)
    assert answers.accept("hub", failed(6, kind))
    with pytest.raises(error, match="no room"):
        await answers.last()


async def test_a_loss_between_two_passes_ends_the_next_one_and_is_forgotten_with_its_attempt() -> None:
    answers = PassAnswers(prompt_tokens=8)
    answers.lose(failed(0, "lost"))
    answers.expect(PASS)
    with pytest.raises(NodeLostError):
        await answers.last()
    answers.lose(failed(0, "lost"))
    answers.forget()
    answers.expect(PASS)
    assert answers.accept("attic", answer())
    assert list((await answers.last()).token_ids) == [7]
