"""Streams through the gateway, timed at the client token by token."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.serving.clusters import MODEL


@dataclass(frozen=True)
class Timed:
    """One stream: when it was asked for, and when each of its tokens came, on the monotonic clock."""

    begun_s: float
    times_s: list[float]

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.times_s[0] - self.begun_s

    @property
    def gaps_s(self) -> list[float]:
        """The times between tokens."""
        return [after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)]


async def stream(
    client: httpx.AsyncClient, prompt: list[int] | str, new_tokens: int, more: Mapping[str, float] | None = None
) -> Timed:
    """Stream one request to its end. `more` are further fields of its body."""
    begun_s = time.monotonic()
    return Timed(begun_s, [at_s async for at_s in token_times_s(client, prompt, new_tokens, more)])


class Running:
    """A stream that runs beside what is measured."""

    def __init__(self, client: httpx.AsyncClient, prompt: list[int], new_tokens: int) -> None:
        self._timed = Timed(time.monotonic(), [])
        self._came = asyncio.Condition()
        self._task = asyncio.create_task(self._run(token_times_s(client, prompt, new_tokens)))

    async def until(self, tokens: int) -> None:
        """Wait until so many of its tokens have come."""
        async with self._came:
            await self._came.wait_for(lambda: len(self._timed.times_s) >= tokens or self._task.done())
        assert not self._task.done(), "it ended before anything could be measured beside it"

    async def end(self) -> Timed:
        """All its tokens."""
        await self._task
        return self._timed

    def assert_runs(self) -> None:
        """What was measured, was measured beside it."""
        assert not self._task.done(), "it ended while something was measured beside it"

    async def _run(self, times_s: AsyncIterator[float]) -> None:
        async for at_s in times_s:
            self._timed.times_s.append(at_s)
            async with self._came:
                self._came.notify_all()


async def token_times_s(
    client: httpx.AsyncClient, prompt: list[int] | str, new_tokens: int, more: Mapping[str, float] | None = None
) -> AsyncIterator[float]:
    """The moment of each token of one streamed request, on the monotonic clock. `more` are fields of its body."""
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    body |= {"return_token_ids": True, **(more or {})}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for _ in event["choices"][0].get("token_ids") or []:
                    yield time.monotonic()


# Prompt and new tokens of streams that are measured: one alone, and several. Of several the first ones decode for long
# before the last one does, so they have more tokens to come and shorter prompts. While all decode, their caches have
# about as many positions as that of one alone.
_ALONE, _TOGETHER = (128, 64), (64, 192)


def decode_rate(url: str, streams: int, prompt_tokens: int | None = None, new_tokens: int | None = None) -> float:
    """Tokens a second of all streams together, while all of them decode."""
    usual = _ALONE if streams == 1 else _TOGETHER
    prompt_tokens, new_tokens = prompt_tokens or usual[0], new_tokens or usual[1]

    async def run() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            timed = await asyncio.gather(
                *(stream(client, _prompt(number, prompt_tokens), new_tokens) for number in range(streams))
            )
        first_s, last_s = max(each.times_s[0] for each in timed), min(each.times_s[-1] for each in timed)
        assert first_s < last_s, "no moment at which all streams decoded"
        return sum(first_s < moment <= last_s for each in timed for moment in each.times_s) / (last_s - first_s)

    return asyncio.run(run())


def prefill_rate(url: str, prompt_tokens: int = 64) -> float:
    """Prompt tokens a second of one request alone, from the request to the first token."""

    async def run() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            return prompt_tokens / (await stream(client, _prompt(99, prompt_tokens), 1)).first_token_s

    return asyncio.run(run())


def first_token_s(url: str, streams: int, prompt_tokens: int = 64) -> float:
    """Time to first token of a request while so many streams decode."""

    async def run() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            others = [Running(client, _prompt(n, 32), 150) for n in range(streams)]
            await asyncio.gather(*(other.until(20) for other in others))  # all of them decode
            measured = await stream(client, _prompt(50, prompt_tokens), 1)
            for other in others:
                other.assert_runs()
            await asyncio.gather(*(other.end() for other in others))
            return measured.first_token_s

    return asyncio.run(run())


def longest_gap_ratio(url: str, prompt_tokens: int = 1000) -> float:
    """The longest gap of one stream beside a long prompt, in units of its usual gap."""

    async def run() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            streaming = Running(client, _prompt(1, 64), 400)
            await streaming.until(60)
            asked_s = time.monotonic()
            await stream(client, _prompt(2, prompt_tokens), 1)
            answered_s = time.monotonic()
            streaming.assert_runs()
            timed = await streaming.end()
        usual = statistics.median(gap for gap, at in zip(timed.gaps_s, timed.times_s[1:], strict=True) if at < asked_s)
        beside = [g for g, at in zip(timed.gaps_s, timed.times_s[1:], strict=True) if asked_s < at < answered_s]
        return max(beside) / usual

    return asyncio.run(run())


def _prompt(seed: int, tokens: int) -> list[int]:
    return [(1000 + 7919 * seed + 31 * position) % 40_000 + 100 for position in range(tokens)]
