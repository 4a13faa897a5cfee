"""Log probabilities in the forms of the two endpoints."""

from __future__ import annotations

from collections.abc import Sequence

from resplit.gateway.openai.bodies import ChatLogprobs, ChosenLogprob, CompletionLogprobs, TokenLogprob
from resplit.gateway.openai.text import Text
from resplit.types import Logprobs

# A token, and its log probabilities; None for the first token of a prompt, which has none.
Scored = tuple[int, Logprobs | None]


def chat_logprobs(text: Text, scored: Sequence[Scored]) -> ChatLogprobs:
    """The `logprobs` of a chat's choice."""
    return {"content": [_with_top(text, token, found) for token, found in scored if found], "refusal": None}


def completion_logprobs(text: Text, scored: Sequence[Scored]) -> CompletionLogprobs:
    """The `logprobs` of a completion's choice."""
    names = [text.token(token) for token, _ in scored]
    offsets = [0]
    for name in names[:-1]:
        offsets.append(offsets[-1] + len(name))
    return {
        "tokens": names,
        "token_logprobs": [found.chosen if found else None for _, found in scored],
        "top_logprobs": [_top(text, token, found) if found else None for token, found in scored],
        "text_offset": offsets[: len(names)],
    }


def _top(text: Text, token: int, found: Logprobs) -> dict[str, float]:
    """The most likely tokens and the chosen one. Of several with the same text, the likeliest counts."""
    top: dict[str, float] = {}
    for other, value in (*found.top, (token, found.chosen)):
        top.setdefault(text.token(other), value)
    return top


def _with_top(text: Text, token: int, found: Logprobs) -> ChosenLogprob:
    top = [_entry(text, other, value) for other, value in found.top]
    return {**_entry(text, token, found.chosen), "top_logprobs": top}


def _entry(text: Text, token: int, value: float) -> TokenLogprob:
    return {"token": text.token(token), "logprob": value, "bytes": list(text.token_bytes(token))}
