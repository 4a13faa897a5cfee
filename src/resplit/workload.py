"""A workload: all requests of a run with their times and prompts, fixed by a seed before the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from resplit.config import ClassConfig, ClusterConfig
from resplit.scenario import ScenarioConfig
from resplit.traces import TracedRequest

__all__ = ["Arrival", "ScheduledRequest", "schedule_arrivals", "schedule_requests"]

_TOKENS_PER_WORD = 1.35  # of plain English in common vocabularies; only the mean prompt length depends on it


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request without its text, due `at_s` seconds after the start of the run. `prompt_tokens` are about right."""

    at_s: float
    request_class: str
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class ScheduledRequest:
    """One request of a workload, due `at_s` seconds after the start of the run."""

    at_s: float
    request_class: str
    prompt: str
    new_tokens: int


def schedule_requests(
    cluster: ClusterConfig,
    scenario: ScenarioConfig,
    seed: int,
    words: Sequence[str],
    traced: Mapping[str, Sequence[TracedRequest]] | None = None,
) -> list[ScheduledRequest]:
    """All requests of a run, in order of time. The same arguments give the same requests.

    The requests of each class arrive as a Poisson process at the rate of the moment. Prompts are runs of `words`.
    Prompt lengths vary by up to half of their mean, answer lengths by up to a quarter. A class in `traced` has the
    requests of its trace instead.
    """
    requests = []
    for index, (name, drawn) in enumerate(_by_class(cluster, scenario, seed, traced)):
        texts = np.random.default_rng((seed, index, 1))
        for request in drawn:
            prompt_words = max(1, int(request.prompt_tokens / _TOKENS_PER_WORD))
            first = int(texts.integers(0, max(1, len(words) - prompt_words)))
            prompt = " ".join(words[first : first + prompt_words])
            requests.append(ScheduledRequest(request.at_s, name, prompt, request.new_tokens))
    return sorted(requests, key=lambda request: request.at_s)


def schedule_arrivals(
    cluster: ClusterConfig,
    scenario: ScenarioConfig,
    seed: int,
    traced: Mapping[str, Sequence[TracedRequest]] | None = None,
) -> list[Arrival]:
    """The requests of `schedule_requests`, with the same times, classes and lengths, but without texts."""
    arrivals = [
        Arrival(request.at_s, name, max(1, round(request.prompt_tokens)), request.new_tokens)
        for name, drawn in _by_class(cluster, scenario, seed, traced)
        for request in drawn
    ]
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _by_class(
    cluster: ClusterConfig,
    scenario: ScenarioConfig,
    seed: int,
    traced: Mapping[str, Sequence[TracedRequest]] | None,
) -> Iterator[tuple[str, Iterable[TracedRequest]]]:
    """Each class with its requests, in order of time."""
    for index, declared in enumerate(cluster.classes):
        if traced and declared.name in traced:
            yield declared.name, traced[declared.name]
        else:
            yield declared.name, _drawn(declared, scenario, np.random.default_rng((seed, index)))


def _drawn(declared: ClassConfig, scenario: ScenarioConfig, rng: np.random.Generator) -> Iterator[TracedRequest]:
    rates = _rates(declared.name, declared.rate_rps, scenario)
    for at_s in _poisson_s(rates, scenario.duration, rng):
        prompt_tokens = declared.prompt_tokens * rng.uniform(0.5, 1.5)
        new_tokens = max(1, round(declared.new_tokens * rng.uniform(0.75, 1.25)))
        yield TracedRequest(at_s, prompt_tokens, new_tokens)


def _rates(name: str, rate_rps: float, scenario: ScenarioConfig) -> list[tuple[float, float]]:
    """The rates of a class as (start in seconds, requests per second), in order."""
    changes = sorted((change.at, change.rate_rps) for change in scenario.load if change.request_class == name)
    return [(0.0, rate_rps), *changes]


def _poisson_s(rates: list[tuple[float, float]], duration_s: float, rng: np.random.Generator) -> Iterator[float]:
    """Times of a Poisson process with a piecewise constant rate: a process of rate 1 with its time stretched."""
    ends = [start_s for start_s, _ in rates[1:]] + [duration_s]
    due = rng.exponential()
    for (start_s, rate_rps), end_s in zip(rates, ends, strict=True):
        at_s = start_s
        while rate_rps > 0 and at_s + due / rate_rps < end_s:
            at_s += due / rate_rps
            yield at_s
            due = rng.exponential()
        due -= max(0.0, end_s - at_s) * rate_rps
