"""When a request would be done: the line before it, and the pace of service that was seen lately.

Computes only: whoever asks says what time it is. Knows neither requests nor nodes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_LATELY_S = 30.0  # what is older says nothing about now


@dataclass(frozen=True)
class Work:
    """What is left of one request: seconds of service, and the cached tokens that it holds meanwhile."""

    seconds: float
    tokens: int


def wait_s(inside: Sequence[Work], line: Sequence[Work], sessions: int, tokens: int) -> float:
    """Seconds until the last one in `line` has its turn: first come, first served, each in its time.

    `sessions` may run at once and hold `tokens` together; those `inside` do already. Nobody wants more than `tokens`.
    """
    leaving = [(work.seconds, work.tokens) for work in inside]
    heapq.heapify(leaving)
    free_sessions = sessions - len(inside)
    free_tokens = tokens - sum(work.tokens for work in inside)
    now_s = 0.0
    for work in line:
        while free_sessions < 1 or free_tokens < work.tokens:
            now_s, freed = heapq.heappop(leaving)
            free_sessions += 1
            free_tokens += freed
        heapq.heappush(leaving, (now_s + work.seconds, work.tokens))
        free_sessions -= 1
        free_tokens -= work.tokens
    return now_s


class Pace:
    """How long service took lately, and how much of what was asked for was then generated."""

    def __init__(self, lately_s: float = _LATELY_S) -> None:
        self._prompts = _Lately(lately_s)
        self._tokens = _Lately(lately_s)
        self._shares = _Lately(lately_s)

    def first_token(self, now_s: float, prompt_tokens: int, took_s: float) -> None:
        """A first token came `took_s` after its request had its turn."""
        self._prompts.note(now_s, prompt_tokens, took_s)

    def next_token(self, now_s: float, took_s: float) -> None:
        """A further token took so long."""
        self._tokens.note(now_s, 1, took_s)

    def ended(self, now_s: float, wanted: int, made: int) -> None:
        """A request that asked for `wanted` tokens ended after `made`."""
        self._shares.note(now_s, wanted, made)

    def service_s(self, now_s: float, prompt_tokens: int, new_tokens: int, made: int = 0) -> float | None:
        """Seconds that a request is still to be served, `made` of its tokens being there; None where nothing was seen.

        It is expected to end as early as others did, and to have one token to go at least.
        """
        token_s, prompt_s = self._tokens.mean(now_s), self._prompts.mean(now_s)
        share = self._shares.mean(now_s)
        left = max(1.0, new_tokens * (1.0 if share is None else share) - made)
        if made:
            return None if token_s is None else left * token_s
        if prompt_s is None:
            return None
        # Prompts of many lengths are seen, so time goes by their tokens; but no pass is shorter than a token's.
        return max(prompt_tokens * prompt_s, token_s or 0.0) + (left - 1.0) * (token_s or 0.0)


class _Lately:
    """The mean of what was noted in the last seconds: the sum of values over the sum of amounts."""

    def __init__(self, lately_s: float) -> None:
        self._lately_s = lately_s
        self._seen: deque[tuple[float, float, float]] = deque()
        self._amount = self._value = 0.0

    def note(self, now_s: float, amount: float, value: float) -> None:
        self._forget(now_s)
        self._seen.append((now_s, amount, value))
        self._amount += amount
        self._value += value

    def mean(self, now_s: float) -> float | None:
        self._forget(now_s)
        return self._value / self._amount if self._seen else None

    def _forget(self, now_s: float) -> None:
        while self._seen and self._seen[0][0] < now_s - self._lately_s:
            _, amount, value = self._seen.popleft()
            self._amount -= amount
            self._value -= value
        if not self._seen:  # what rounding left of the sums goes, too
            self._amount = self._value = 0.0
