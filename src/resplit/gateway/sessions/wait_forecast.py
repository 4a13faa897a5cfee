"""Forecast of the wait and the service time of a request, from the queue before it and the recent pace of service.

The functions are pure: the caller passes in the time.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW_S = 30.0  # older times do not count


@dataclass(frozen=True)
class Work:
    """The rest of one request: seconds of service, and the cached tokens that it holds meanwhile."""

    seconds: float
    tokens: int


def wait_s(running: Sequence[Work], queue: Sequence[Work], sessions: int, tokens: int) -> float:
    """Seconds until the last request in `queue` is served: first come, first served, each for its own time.

    At most `sessions` requests run at once and hold at most `tokens` cached tokens in all. No request may need more
    than `tokens`.
    """
    leaving = [(work.seconds, work.tokens) for work in running]
    heapq.heapify(leaving)
    free_sessions = sessions - len(running)
    free_tokens = tokens - sum(work.tokens for work in running)
    now_s = 0.0
    for work in queue:
        while free_sessions < 1 or free_tokens < work.tokens:
            now_s, freed = heapq.heappop(leaving)
            free_sessions += 1
            free_tokens += freed
        heapq.heappush(leaving, (now_s + work.seconds, work.tokens))
        free_sessions -= 1
        free_tokens -= work.tokens
    return now_s


class Pace:
    """The recent pace: seconds per prompt token and per new token, and the share of requested tokens that were made."""

    def __init__(self, window_s: float = _WINDOW_S) -> None:
        self._prompts = _RecentMean(window_s)
        self._tokens = _RecentMean(window_s)
        self._shares = _RecentMean(window_s)

    def first_token(self, now_s: float, prompt_tokens: int, took_s: float) -> None:
        """Record that a first token came `took_s` after its request was admitted."""
        self._prompts.add(now_s, prompt_tokens, took_s)

    def next_token(self, now_s: float, took_s: float) -> None:
        """Record the time that a further token took."""
        self._tokens.add(now_s, 1, took_s)

    def ended(self, now_s: float, wanted: int, made: int) -> None:
        """Record that a request for `wanted` tokens ended after `made`."""
        self._shares.add(now_s, wanted, made)

    def service_s(self, now_s: float, prompt_tokens: int, new_tokens: int, made: int = 0) -> float | None:
        """Seconds of service that a request still needs after `made` tokens; None if nothing was recorded recently.

        The request is expected to end as early as others did, but to need at least one more token.
        """
        token_s, prompt_s = self._tokens.mean(now_s), self._prompts.mean(now_s)
        share = self._shares.mean(now_s)
        left = max(1.0, new_tokens * (1.0 if share is None else share) - made)
        if made:
            return None if token_s is None else left * token_s
        if prompt_s is None:
            return None
        # Prompts differ in length, so their time is per token; but no pass is shorter than that of one token.
        return max(prompt_tokens * prompt_s, token_s or 0.0) + (left - 1.0) * (token_s or 0.0)

    def tokens_within(self, now_s: float, prompt_tokens: int, seconds: float) -> float:
        """How many new tokens come within `seconds`, the prompt's time included; infinite if no pace is known."""
        token_s, prompt_s = self._tokens.mean(now_s), self._prompts.mean(now_s)
        if not token_s:
            return math.inf
        return 1 + (seconds - prompt_tokens * (prompt_s or 0.0)) / token_s


class _RecentMean:
    """The mean over the last `window_s` seconds: the sum of values over the sum of amounts."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, float, float]] = deque()
        self._amount = self._value = 0.0

    def add(self, now_s: float, amount: float, value: float) -> None:
        self._forget(now_s)
        self._seen.append((now_s, amount, value))
        self._amount += amount
        self._value += value

    def mean(self, now_s: float) -> float | None:
        self._forget(now_s)
        return self._value / self._amount if self._seen else None

    def _forget(self, now_s: float) -> None:
        while self._seen and self._seen[0][0] < now_s - self._window_s:
            _, amount, value = self._seen.popleft()
            self._amount -= amount
            self._value -= value
        if not self._seen:  # remove rounding errors from the sums
            self._amount = self._value = 0.0
