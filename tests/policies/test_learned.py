"""The learned policy: it takes the arm that its models value more, and its shipped models fit its code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resplit.decide import History, PastMove
from resplit.policies import Situation, learned
from resplit.policies.learned import ARMS, FEATURES, Bandit, Learned, Pull, rewards_of
from tests.support.decisions import FAST, SETTINGS, SLOW, halves, problem
from tests.support.runs import synthetic_run

WORSE = halves(FAST, SLOW, 2)
SITUATION = Situation(1000.0, problem(WORSE), SETTINGS)
NO_WEIGHTS = ((0.0,) * len(FEATURES),) * 2
KEEPS, MOVES = Bandit(NO_WEIGHTS, (1.0, 0.0)), Bandit(NO_WEIGHTS, (0.0, 1.0))


def action(policy: Learned, situation: Situation = SITUATION, seed: int = 0) -> str:
    return policy.decide(situation, np.random.default_rng(seed)).action


def test_it_takes_the_arm_with_the_higher_value() -> None:
    assert action(Learned(KEEPS)) == "keep"
    assert action(Learned(MOVES)) != "keep"


def test_the_gain_of_the_best_plan_can_decide() -> None:
    gain = FEATURES.index("log gain")
    weights = tuple(float(feature == gain) for feature in range(len(FEATURES)))
    greedy = Bandit((NO_WEIGHTS[0], weights), (0.01, 0.0))
    assert action(Learned(greedy)) != "keep"
    best = Learned(MOVES).decide(SITUATION, np.random.default_rng(0)).placement
    assert action(Learned(greedy), replace(SITUATION, problem=problem(best))) == "keep"


def test_it_explores_only_if_told_to_and_notes_what_it_tried() -> None:
    policy = Learned(KEEPS, explore=1.0)
    assert len({action(policy, seed=seed) for seed in range(20)}) > 1
    assert {pull.arm for pull in policy.pulls} == {0, 1}
    assert {action(Learned(KEEPS), seed=seed) for seed in range(20)} == {"keep"}


def test_it_keeps_in_the_cooldown_without_a_choice() -> None:
    policy, move = Learned(MOVES), PastMove(999.0, "re-split", WORSE, WORSE, None, 1.0)
    assert action(policy, replace(SITUATION, history=History(move))) == "keep"
    assert policy.pulls == []


def test_models_are_kept_as_they_are(tmp_path: Path) -> None:
    MOVES.save(tmp_path / "bandit.json")
    assert Bandit.load(tmp_path / "bandit.json") == MOVES


def test_the_shipped_models_are_for_these_arms_and_features() -> None:
    shipped = json.loads(Path(learned.__file__).with_name("learned.json").read_text())
    assert (tuple(shipped["arms"]), tuple(shipped["features"])) == (ARMS, FEATURES)
    assert np.array(shipped["weights"]).shape == (len(ARMS), len(FEATURES))


def test_the_reward_is_the_latency_of_the_requests_that_arrive_next() -> None:
    record = synthetic_run("static", duration_s=40.0)
    done = record.requests[record.requests.status == 200]
    after = done[done.arrival_s.between(5.0, 17.0)]
    [only] = rewards_of(record, [Pull(5.0, (), 1), Pull(1e6, (), 0)])
    assert only.reward == pytest.approx(-np.log((after.end_s - after.arrival_s).mean()))
