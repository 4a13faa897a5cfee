"""Ticks plan when there is news, and only then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.decide import History, LastPlan, Measured, PastMove, decide, has_news
from resplit.types import Problem
from tests.support.decisions import FAST, SETTINGS, SLOW, halves, problem

BEST = halves(FAST, SLOW, 6)
POSED = problem(BEST)
NO_MOVES = History()
LAST = LastPlan(1000.0, POSED, decide(POSED, now_s=1000.0, settings=SETTINGS, history=NO_MOVES))


def news(now: Problem, now_s: float = 1010.0, history: History = NO_MOVES, measured: Measured | None = None) -> bool:
    return has_news(LAST, now, now_s, SETTINGS, history, measured)


def test_noise_is_no_news() -> None:
    assert LAST.is_final
    noisy = replace(
        POSED, decode_s_per_token=POSED.decode_s_per_token * 1.01, link_latency_s=POSED.link_latency_s * 1.1
    )
    assert not news(POSED)
    assert not news(noisy)


def test_the_noise_of_a_great_many_links_is_no_news() -> None:
    rng, many = np.random.default_rng(7), 150
    slow = np.full((POSED.prefill_s_per_token.shape[0], many), 4e-3)
    posed = replace(
        POSED,
        nodes=(*POSED.nodes, *(replace(POSED.nodes[-1], name=f"far-{i}") for i in range(many))),
        prefill_s_per_token=np.hstack([POSED.prefill_s_per_token, slow]),
        decode_s_per_token=np.hstack([POSED.decode_s_per_token, slow]),
        link_latency_s=np.full((many + 3, many + 3), 2e-3),
        link_bandwidth_bytes_per_s=np.full((many + 3, many + 3), 4e7),
    )
    last = LastPlan(1000.0, posed, LAST.decision)
    noise = rng.standard_normal((2, many + 3, many + 3))
    seen = replace(
        posed,
        link_latency_s=posed.link_latency_s * np.exp(0.05 * noise[0]),
        link_bandwidth_bytes_per_s=posed.link_bandwidth_bytes_per_s * np.exp(0.2 * noise[1]),
    )
    assert not has_news(last, seen, 1010.0, SETTINGS, NO_MOVES, None)


@pytest.mark.parametrize(
    "now",
    [
        problem(BEST, decode_s=(1e-3, 2e-3, 1e-3)),
        problem(BEST, rate_rps=5.0),
        problem(halves(FAST, SLOW, 5)),
        replace(POSED, nodes=tuple(replace(node, background_utilization=0.5) for node in POSED.nodes)),
        replace(POSED, link_bandwidth_bytes_per_s=POSED.link_bandwidth_bytes_per_s / 4),
    ],
    ids=["a node is faster", "more requests", "another placement", "others use the nodes", "narrower links"],
)
def test_what_could_change_the_plan_is_news(now: Problem) -> None:
    assert news(now)


def test_a_missed_objective_a_trial_and_the_end_of_the_horizon_are_news() -> None:
    move = PastMove(1000.0, "re-split", halves(FAST, SLOW), BEST, None, 1.0)
    assert news(POSED, measured=Measured(1.0, 10, ("chat",)))
    assert news(POSED, history=History(move))
    assert news(POSED, now_s=1000.0 + SETTINGS.horizon_s)


def test_a_plan_that_the_cooldown_held_back_is_asked_for_again() -> None:
    worse = problem(halves(FAST, SLOW, 2))
    move = PastMove(1000.0, "re-split", BEST, halves(FAST, SLOW, 2), None, 1.0)
    held_back = decide(worse, now_s=1001.0, settings=SETTINGS, history=History(move))
    assert held_back.action == "keep"
    assert not LastPlan(1001.0, worse, held_back).is_final
