"""How many drafts a pass verifies: as many as give the most tokens a second, by measured hits and measured times.

A pass of one token takes `pass_s`, and each draft in it `draft_s` more, for this stream and for all that run beside it.
Over far links `pass_s` is mostly waiting, and drafts cost little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from resplit.gateway.sessions.prompt_lookup import PromptLookup

_LEAST_GAIN = 1.1  # a smaller expected gain is lost in the error of the measurements
_SMOOTHING = 0.2  # weight of the newest time
# While no draft is sent because drafts are slow, their time is taken to be less and less, until one is tried again.
_FADING = 0.998
# After so many tokens without drafts, the next ones are not expected to pay either.
_REST_TOKENS = 16


class PassTimes:
    """The times of decode passes along one route, in seconds; all sessions on it measure them together."""

    def __init__(self, draft_s: float = math.inf) -> None:
        self.pass_s = 0.0  # 0: not measured yet
        self.draft_s = draft_s
        self._verified = 0  # passes with drafts so far

    def prompt(self, tokens: int, seconds: float) -> None:
        """Note the time of a prompt. Until drafts are measured, one is taken to cost as much as a prompt token."""
        if not self._verified:
            self.draft_s = min(self.draft_s, seconds / tokens)

    def decoded(self, drafts: int, seconds: float) -> None:
        """Note the time of a decode pass with so many drafts (normalised least mean squares)."""
        self.pass_s = self.pass_s or seconds / (1 + drafts)
        self._verified += drafts > 0
        weight = max(_SMOOTHING, 1 / (1 + self._verified)) if drafts else _SMOOTHING
        expected_s = self.pass_s + (drafts * self.draft_s if drafts else 0.0)
        change_s = weight * (seconds - expected_s) / (1 + drafts**2)
        self.pass_s += change_s
        self.draft_s = max(0.0, self.draft_s + drafts * change_s) if drafts else self.draft_s

    def choose_window(self, hit_rates: Sequence[float], streams: int) -> int:
        """How many drafts to verify while `streams` streams run. `hit_rates` as of `PromptLookup.hit_rates`."""
        if not self.pass_s:
            return 0
        best, window = _LEAST_GAIN, 0
        tokens, likely = 1.0, 1.0  # expected tokens of the pass; chance that all drafts so far are right
        for drafts, rate in enumerate(hit_rates, 1):
            likely *= rate
            tokens += likely
            gain = tokens / (1 + streams * drafts * self.draft_s / self.pass_s)
            if gain > best:
                best, window = gain, drafts
            if not self._verified:
                break  # the first time, one draft shows what drafts cost
        if not window and tokens > _LEAST_GAIN:
            self.draft_s *= _FADING
        return window


class RouteTimes:
    """The pass times of the routes in use, by epoch."""

    def __init__(self) -> None:
        self._times: dict[int, PassTimes] = {}

    def of(self, epoch: int) -> PassTimes:
        """The times of an epoch's route. A new one begins with the cost of a draft on the route before."""
        if epoch not in self._times:
            last = list(self._times.items())[-1:]
            self._times = {**dict(last), epoch: PassTimes(*(times.draft_s for _, times in last))}
        return self._times[epoch]


class Speculation:
    """The drafts of one session: `drafted` and `accepted` count them. At most `most` are verified in a pass."""

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        self._lookup = PromptLookup(prompt) if most else None
        self._most = most
        self._since_drafts = _REST_TOKENS  # tokens
        self.drafted = 0
        self.accepted = 0

    @property
    def resting(self) -> bool:
        """Whether the last tokens came without drafts."""
        return self._since_drafts >= _REST_TOKENS

    def drafts(self, times: PassTimes, streams: int, room: int) -> tuple[int, ...]:
        """The drafts that the next pass shall verify, `room` at most, while `streams` streams run."""
        if self._lookup is None:
            return ()
        rates = self._lookup.hit_rates(min(self._most, room))
        return self._lookup.drafts(times.choose_window(rates, streams))

    def accept(self, drafts: Sequence[int], answers: Sequence[int]) -> tuple[int, ...]:
        """The session's new tokens: the first of `answers`, and one more for each draft that is right.

        `answers` are the token after the position before the drafts, and the tokens after each draft.
        """
        right = next((number for number, draft in enumerate(drafts) if draft != answers[number]), len(drafts))
        new = tuple(answers[: right + 1])
        self.drafted += len(drafts)
        self.accepted += right
        self._since_drafts = 0 if drafts else self._since_drafts + len(new)
        if self._lookup is not None:
            self._lookup.add(new)
        return new
