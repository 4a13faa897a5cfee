"""Drafts follow the latest occurrence of the last two tokens, and the rates of hits are those that were seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resplit.gateway.sessions.prompt_lookup import PromptLookup

texts = st.lists(st.integers(0, 3), max_size=60)


def test_drafts_are_what_followed_the_last_two_tokens() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 9, 1, 2])
    assert lookup.drafts(3) == (3, 4, 9)
    assert PromptLookup([1, 2, 3, 1, 2, 7, 1, 2]).drafts(2) == (7, 1)
    assert PromptLookup([1, 2, 3, 4]).drafts(3) == ()
    assert PromptLookup([]).drafts(3) == ()


def test_a_repetition_goes_on_beyond_the_tokens_that_are_known() -> None:
    assert PromptLookup([8, 1, 2, 3, 1, 2, 3]).drafts(7) == (1, 2, 3, 1, 2, 3, 1)
    assert PromptLookup([5, 5, 5]).drafts(4) == (5, 5, 5, 5)


def test_after_a_miss_it_looks_again() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 1, 2])
    lookup.add([5])
    assert lookup.drafts(3) == ()
    lookup.add([6])
    assert lookup.drafts(2) == (7, 1)


@given(texts, texts)
def test_the_way_in_which_tokens_come_does_not_matter(prompt: list[int], new: list[int]) -> None:
    lookup, at_once = PromptLookup(prompt), PromptLookup([*prompt, *new])
    for token in new:
        lookup.add([token])
    assert lookup.drafts(9) == at_once.drafts(9)
    assert len(lookup.hit_rates(9)) == len(lookup.drafts(9))
    assert all(0 < rate < 1 for rate in lookup.hit_rates(9))


@given(texts)
def test_a_draft_was_seen_after_the_last_two_tokens(tokens: list[int]) -> None:
    drafts = PromptLookup(tokens).drafts(1)
    seen = {tokens[at + 2] for at in range(len(tokens) - 2) if tokens[at : at + 2] == tokens[-2:]}
    assert set(drafts) <= seen
    assert bool(drafts) or not seen


def test_the_rate_of_hits_is_learned_without_sending_a_draft() -> None:
    right, wrong = PromptLookup([1, 2, 3] * 3), PromptLookup([1, 2, 3] * 3)
    before = right.hit_rates(1)[0]
    right.add([1, 2, 3] * 10)
    assert before < right.hit_rates(1)[0] > 0.95
    for token in range(100, 130):
        wrong.add([1, 2, token])  # what follows 1, 2 is never what followed it before
    wrong.add([1, 2])
    assert wrong.hit_rates(1)[0] < 0.05
