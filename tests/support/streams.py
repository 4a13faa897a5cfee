"""Streamed requests, several at once and one after another, compared with the unsplit model's tokens."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
import torch

from resplit.cluster.local import Cluster
from tests.support.cluster import MODEL, reference
from tests.support.processes import poll_until

PROMPTS = [[(7 * k + 3 * i) % 250 + 5 for i in range(5 + k)] for k in range(8)]
_WITHIN_S = 120.0


class StreamFailedError(Exception):
    """A request was not served to its end."""


async def stream(
    client: httpx.AsyncClient, prompt: list[int], new_tokens: int, times_s: list[float] | None = None
) -> list[int]:
    """The tokens of one request. Appends the time of each (monotonic clock) to `times_s`.

    StreamFailedError if the request is refused or its stream ends with an error.
    """
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise StreamFailedError(f"{response.status_code} {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise StreamFailedError(str(event["error"]))
                new = event["choices"][0].get("token_ids") or []
                tokens += new
                if times_s is not None:
                    times_s += [time.monotonic()] * len(new)
    return tokens


@dataclass
class Streams:
    """The outcomes of all streams of one run. Each prompt has a lane, in which one request follows another.

    `lanes` holds, for each lane and each of its requests, the moments of its tokens (monotonic clock).
    """

    lanes: list[list[list[float]]]
    right: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)

    def first_after(self, moment_s: float) -> list[float]:
        """The moment of each lane's first token after `moment_s`, without the lanes that had none."""
        later = [[t for request in lane[-3:] for t in request if t > moment_s] for lane in self.lanes]
        return [times[0] for times in later if times]

    def all_since(self, moment_s: float) -> bool:
        """Whether every lane had a token after `moment_s`."""
        return len(self.first_after(moment_s)) == len(self.lanes)

    def gaps_around(self, moment_s: float, window_s: float) -> list[tuple[float, float]]:
        """The longest gaps in the windows before and after `moment_s`, for each stream that runs through both.

        A gap that spans the moment belongs to the second window.
        """
        first_s, last_s = moment_s - window_s, moment_s + window_s
        through = [r for lane in self.lanes for r in lane if r and r[0] <= first_s and r[-1] >= last_s]
        return [(_longest_gap_s(r, first_s, moment_s), _longest_gap_s(r, moment_s, last_s)) for r in through]


def _longest_gap_s(times_s: list[float], first_s: float, last_s: float) -> float:
    """The longest gap that ends within the window, or 0 if no token came in it."""
    begin, end = bisect.bisect_right(times_s, first_s), bisect.bisect_right(times_s, last_s)
    return max((times_s[i] - times_s[i - 1] for i in range(begin, end)), default=0.0)


async def all_answers(cluster: Cluster, new_tokens: int) -> list[list[int]]:
    """The tokens of every prompt, all requested at once."""
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        return await asyncio.gather(*(stream(client, prompt, new_tokens) for prompt in PROMPTS))


def expected_tokens(model: torch.nn.Module, new_tokens: int, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """The tokens of the unsplit model for each prompt."""
    return [reference(model, prompt, new_tokens) for prompt in prompts]


def request_completion(cluster: Cluster, new_tokens: int) -> httpx.Response:
    """One request with the first prompt, not streamed."""
    body = {
        "model": MODEL,
        "prompt": PROMPTS[0],
        "max_tokens": new_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)


@contextlib.asynccontextmanager
async def streaming(
    cluster: Cluster, expected: list[list[int]], prompts: list[list[int]] = PROMPTS
) -> AsyncIterator[Streams]:
    """Keep one stream per prompt running until the end of the `with` block, then let the last ones finish.

    The block begins once every stream has had a token.
    """
    seen, stop = Streams([[] for _ in prompts]), asyncio.Event()

    async def keep_on(client: httpx.AsyncClient, lane: int) -> None:
        while not stop.is_set():
            await _one(client, prompts[lane], expected[lane], seen, lane)

    async with httpx.AsyncClient(base_url=cluster.url, timeout=_WITHIN_S) as client, asyncio.TaskGroup() as tasks:
        for lane in range(len(prompts)):
            tasks.create_task(keep_on(client, lane))
        try:
            await poll_until(lambda: seen.all_since(0.0))
            yield seen
        finally:
            stop.set()


async def _one(client: httpx.AsyncClient, prompt: list[int], expected: list[int], seen: Streams, lane: int) -> None:
    times_s: list[float] = []
    seen.lanes[lane].append(times_s)
    try:
        tokens = await stream(client, prompt, len(expected), times_s)
    except (StreamFailedError, httpx.HTTPError) as error:
        seen.failed.append(f"{type(error).__name__}: {error}")
        await asyncio.sleep(0.2)
        return
    if tokens == expected:
        seen.right += 1
    else:
        seen.wrong += 1
