"""Decisions in words."""

from __future__ import annotations

from dataclasses import replace

from resplit.decide import Brought, DecisionOutcome, History, Measured, Settings, decide, in_words
from resplit.decide.decision import Decision
from tests.support.decisions import FAST, SETTINGS, SLOW, halves, problem


def decided(current: tuple[str, ...], settings: Settings = SETTINGS) -> Decision:
    return decide(problem(current), now_s=0.0, settings=settings, history=History(), uncertainty=0.02)


def test_a_move_says_what_was_seen_how_sure_it_is_what_staying_costs_and_what_it_promises() -> None:
    decision = replace(decided(halves(FAST, SLOW, 2)), seen=("fast became 2 times faster",), deviations=(0.03,))
    keep, chosen = decision.alternatives[0], decision.chosen
    assert chosen is not None
    assert in_words(decision) == [
        "It saw that fast became 2 times faster (± 6%).",
        f"If it stayed, a request would take {keep.latency_s:.2f} s.",
        f"The move (re-split) costs {(chosen.weight_bytes + chosen.cache_bytes) / 1e6:.0f} MB and a pause of "
        f"{chosen.pause_s * 1e3:.0f} ms, promises {chosen.latency_s:.2f} s and saves {chosen.net_gain:.1f} over the "
        "horizon.",
    ]
    brought = replace(decision, outcome=DecisionOutcome(deployed=2, brought=Brought(0.31, 12, 0.94)))
    assert in_words(brought)[-1] == (
        f"It brought 0.31 s over 12 requests instead of 0.94 s before it; {chosen.latency_s:.2f} s were promised."
    )
    refused = replace(decision, outcome=DecisionOutcome(refused="epoch 3 is live"))
    assert in_words(refused)[-1] == "It was refused: epoch 3 is live."


def test_a_tick_that_keeps_says_so() -> None:
    measured = Measured(0.31, 12, slo_missed=("chat",), error_s=0.02)
    decision = replace(decided(halves(FAST, SLOW, 6)), measured=measured)
    first, second, _, stays = in_words(decision)
    assert first == "It looked at a tick: 12 requests took 0.31 s (± 0.04 s); chat missed the objective."
    assert second == "The cost model is off by 2%."
    assert stays == "It stays: no alternative gains more than its move costs."


def test_a_decision_to_keep_says_what_the_best_alternative_would_have_cost() -> None:
    decision = decided(halves(FAST, SLOW, 3), replace(SETTINGS, threshold=0.9))
    best = max(decision.alternatives[1:], key=lambda plan: plan.net_gain)
    assert decision.action == "keep"
    assert in_words(decision)[-1].startswith(f"The best alternative ({best.action}) costs ")
    assert in_words(decision)[-1].endswith(f"{best.latency_s:.2f} s and saves {best.net_gain:.1f} over the horizon.")


def test_what_cannot_serve_is_said() -> None:
    decision = decided(("gone",) * 8)
    assert "If it stayed, requests could not be served." in in_words(decision)
    assert "saves" not in " ".join(in_words(decision))


def test_an_entry_without_alternatives_has_no_words() -> None:
    assert in_words(Decision(0.0, "recover", "beta lost")) == []
