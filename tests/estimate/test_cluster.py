"""The estimate of a cluster: what passes and reports show of nodes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from resplit.cost.features import design
from resplit.estimate import ClusterEstimate, Estimates, Forecast, LinkEstimate, NodeEstimate, ahead, under_estimates
from resplit.pass_times import PassTime
from resplit.problem import problem_to_json
from resplit.types import Problem
from tests.support.near_and_far import FEATURES, FIXED, LAYER_S, a_pass, model
from tests.support.problems import tiny_problem


@pytest.fixture
def estimate() -> ClusterEstimate:
    known = ClusterEstimate(FEATURES, "near")
    known.set_model(model())
    for index in range(20):
        assert known.observe(a_pass(index * 0.1)) == []
    return known


def seen(estimate: ClusterEstimate, **factors: float) -> list[str]:
    """What is detected when passes take the model's times times these factors, until something is."""
    for index in range(10):
        if changes := estimate.observe(a_pass(2.0 + index * 0.1, factors)):
            return [str(change) for change in changes]
    return []


def test_a_design_of_constant_passes_takes_one_unit() -> None:
    assert (design(FEATURES[0], 3, 5, 2) @ list(FIXED)).tolist() == [1.0]


def test_a_node_that_becomes_slower_is_named_and_no_other(estimate: ClusterEstimate) -> None:
    assert seen(estimate, far=5.0) == ["far became 5 times slower"]
    nodes = estimate.estimates(3.0).nodes
    assert nodes["far"].factor == pytest.approx(5.0, rel=0.05)
    assert nodes["near"].factor == pytest.approx(1.0, rel=0.05)


def test_a_node_that_recovers_is_noticed_too(estimate: ClusterEstimate) -> None:
    seen(estimate, far=5.0)
    assert seen(estimate, far=1.0) == ["far became 5 times faster"]


@pytest.mark.parametrize("prompt_half", [1, 2])
def test_a_prompt_that_runs_through_one_half_of_the_blocks_is_expected_there_only(
    estimate: ClusterEstimate, prompt_half: int
) -> None:
    """A decode step and a prompt take as long as both one after the other; without a prompt, a half takes one step."""

    def halved(at_s: float, factor: float, first_half_s: float | None = None) -> PassTime:
        done = a_pass(at_s)
        segments = []
        for segment in done.segments:
            halves_s = [factor * LAYER_S[segment.node] * (2 if half == prompt_half else 1) for half in (1, 2)]
            known_s = halves_s[0] if first_half_s is None else first_half_s
            mixed = replace(segment, computed_s=sum(halves_s), prefill_tokens=8, prompt_half=prompt_half)
            segments.append(replace(mixed, first_half_s=known_s))
        return replace(done, segments=tuple(segments))

    assert [estimate.observe(halved(2.0 + index * 0.1, 1.0)) for index in range(10)] == [[]] * 10
    assert [estimate.observe(halved(3.0 + index * 0.1, 9.0, 0.0)) for index in range(10)] == [[]] * 10  # not known
    found = [change for index in range(5) for change in estimate.observe(halved(4.0 + index * 0.1, 5.0))]
    assert {change.subject for change in found} == {"near", "far"}


def test_other_load_is_no_change_of_speed(estimate: ClusterEstimate) -> None:
    first, second = (estimate.observe(a_pass(at_s, background=0.75)) for at_s in (2.0, 2.1))
    assert first == []
    assert {str(change) for change in second} == {f"others use 75% of {node} (before: 0%)" for node in LAYER_S}
    assert estimate.estimates(2.2).nodes["near"] == NodeEstimate(
        pytest.approx(1.0, rel=0.02),
        pytest.approx(0.0, abs=0.1),
        pytest.approx(0.75, abs=0.01),
        age_s=pytest.approx(0.1),
        background_ahead=Forecast(pytest.approx(0.75, abs=0.01), 0.0),
    )


def test_a_new_model_that_knows_of_the_change_leaves_nothing_to_correct(estimate: ClusterEstimate) -> None:
    seen(estimate, far=5.0)
    estimate.set_model(model({"far": 5.0}))
    assert estimate.estimates(3.0).nodes["far"].factor == pytest.approx(1.0, rel=0.05)
    estimate.set_model(model())
    assert estimate.estimates(3.0).nodes["far"].factor == pytest.approx(5.0, rel=0.05)


def test_an_unused_node_is_known_by_its_reports(estimate: ClusterEstimate) -> None:
    fast_s, slow_s = LAYER_S["far"], 3 * LAYER_S["far"]
    reports = [estimate.observe_report("far", fast_s, 0.0, 10.0 + index) for index in range(3)]
    reports += [estimate.observe_report("far", slow_s, 0.0, 20.0 + index) for index in range(2)]
    assert [list(map(str, changes)) for changes in reports] == [[], [], [], [], ["far became 3 times slower"]]


def test_a_new_model_does_not_bring_back_what_the_reports_of_an_unused_node_have_overtaken(
    estimate: ClusterEstimate,
) -> None:
    seen(estimate, far=5.0)
    reports = [estimate.observe_report("far", LAYER_S["far"], 0.0, 20.0 + index) for index in range(2)]
    assert [list(map(str, changes)) for changes in reports] == [[], ["far became 5 times faster"]]
    estimate.set_model(model())
    assert estimate.estimates(22.0).nodes["far"].factor == pytest.approx(1.0, rel=0.05)
    assert estimate.observe_report("far", LAYER_S["far"], 0.0, 23.0) == []


def test_a_report_of_a_node_that_computes_says_nothing_new(estimate: ClusterEstimate) -> None:
    assert estimate.observe_report("far", 100.0, 0.9, 2.0) == []
    assert estimate.observe_report("far", 100.0, 0.9, 2.1) == []


def mixed_pass(at_s: float, factor: float, parts: float = 1.0) -> PassTime:
    """A pass in batches of a decode step and a prompt, which take `parts` times one of them; "far" times a factor."""
    done = a_pass(at_s, {"far": parts * factor, "near": parts})
    return replace(done, segments=tuple(replace(each, prefill_tokens=8) for each in done.segments))


@pytest.mark.parametrize("parts", [1.0, 1.5, 2.0])
def test_a_batch_that_mixes_decode_steps_and_a_prompt_takes_as_long_as_one_or_as_both(
    estimate: ClusterEstimate, parts: float
) -> None:
    assert [estimate.observe(mixed_pass(2.0 + index * 0.1, 1.0, parts)) for index in range(20)] == [[]] * 20
    assert estimate.estimates(4.0).nodes["far"].factor == pytest.approx(1.0, abs=0.02)


def test_a_node_that_slows_down_is_noticed_although_all_its_batches_mix_decode_steps_and_prompts(
    estimate: ClusterEstimate,
) -> None:
    assert estimate.observe(mixed_pass(2.0, 6.0)) == []
    (change,) = estimate.observe(mixed_pass(2.2, 6.0))
    assert (change.subject, change.what) == ("far", "time")
    assert 3.0 <= change.after <= 6.0
    assert [estimate.observe(mixed_pass(2.4 + index * 0.2, 6.0)) for index in range(5)] == [[]] * 5
    steps = [estimate.observe(a_pass(4.0 + index * 0.2, {"far": 6.0})) for index in range(8)]
    assert estimate.estimates(6.0).nodes["far"].factor == pytest.approx(6.0, rel=0.05)
    assert len([each for found in steps for each in found]) <= 1  # what it is exactly is not known before


def test_without_a_model_nothing_is_detected_and_passes_are_kept_for_one() -> None:
    estimate = ClusterEstimate(FEATURES, "near")
    assert [estimate.observe(a_pass(index * 0.1, {"far": 2.0})) for index in range(10)] == [[]] * 10
    estimate.set_model(model())
    assert estimate.estimates(2.0).nodes["far"].factor == pytest.approx(2.0, rel=0.05)


def test_estimates_scale_the_times_of_a_problem_and_set_its_background() -> None:
    problem: Problem = tiny_problem(1)
    name = problem.nodes[1].name
    changed = under_estimates(problem, Estimates({name: NodeEstimate(3.0, 0.1, 0.4)}))
    assert changed.nodes[1].background_utilization == 0.4
    assert changed.nodes[0] == problem.nodes[0]
    assert (changed.decode_s_per_token[:, 1] == 3 * problem.decode_s_per_token[:, 1]).all()
    assert (changed.prefill_s_per_token[:, 0] == problem.prefill_s_per_token[:, 0]).all()
    assert under_estimates(problem, Estimates()).nodes == problem.nodes


def test_what_is_expected_replaces_rates_by_cautious_ones_and_background_loads_and_bandwidths() -> None:
    problem: Problem = tiny_problem(1)
    one, other = problem.nodes[0].name, problem.nodes[1].name
    nodes = {one: NodeEstimate(background_ahead=Forecast(0.5, 0.1)), "?": NodeEstimate()}
    links = (LinkEstimate(one, other, log_transfer_ahead=Forecast(math.log(2.0), 0.1)), LinkEstimate("?", one))
    rates = {problem.classes[0].name: Forecast(7.0, 1.0), "?": Forecast(1.0, 0.0)}
    expected = ahead(problem, Estimates(nodes, links, rates))
    assert [node.background_utilization for node in expected.nodes[:2]] == [
        0.5,
        problem.nodes[1].background_utilization,
    ]
    assert [each.rate_rps for each in expected.classes] == [8.0, *(each.rate_rps for each in problem.classes[1:])]
    was, now = problem.link_bandwidth_bytes_per_s, expected.link_bandwidth_bytes_per_s
    assert (now[0, 1], now[1, 0]) == pytest.approx((was[0, 1] / 2, was[1, 0]))
    assert problem_to_json(ahead(problem, Estimates())) == problem_to_json(problem)


def test_what_is_bad_now_is_not_expected_to_become_better() -> None:
    problem: Problem = tiny_problem(1)
    one, other = problem.nodes[0].name, problem.nodes[1].name
    busy = replace(problem, nodes=(replace(problem.nodes[0], background_utilization=0.8), *problem.nodes[1:]))
    nodes = {one: NodeEstimate(background_ahead=Forecast(0.37, 0.1))}
    links = (LinkEstimate(one, other, log_transfer_ahead=Forecast(math.log(0.5), 0.1)),)
    expected = ahead(busy, Estimates(nodes, links))
    assert expected.nodes[0].background_utilization == 0.8
    assert (expected.link_bandwidth_bytes_per_s == busy.link_bandwidth_bytes_per_s).all()


def test_where_no_request_is_expected_at_all_the_problem_keeps_its_rates() -> None:
    problem: Problem = tiny_problem(1)
    nobody = {each.name: Forecast(0.0, 0.0) for each in problem.classes}
    assert ahead(problem, Estimates(rates_rps=nobody)).classes == problem.classes


def test_a_node_that_others_use_in_turns_is_expected_to_be_used_as_usual(estimate: ClusterEstimate) -> None:
    for index, at_s in enumerate(np.arange(0.0, 3600.0, 2.0).tolist()):
        estimate.observe_report("far", LAYER_S["far"], 0.8 if index // 10 % 4 == 0 else 0.0, at_s)
    found = estimate.estimates(3600.0).nodes["far"].background_ahead
    assert found is not None
    assert found.mean == pytest.approx(0.2, abs=0.1)
    assert found.deviation > 0.2


NO_TIMES = [float("nan"), float("inf"), -1.0, 0.0, 1e308, 5e-324]


@pytest.mark.parametrize("lie", NO_TIMES)
def test_whatever_a_node_says_of_itself_the_problem_stays_one(estimate: ClusterEstimate, lie: float) -> None:
    for index in range(4):
        estimate.observe_report("far", lie, lie, 20.0 + index)
        estimate.links.observe("far", "near", 64, lie, 20.0 + index)
        estimate.links.observe("far", "near", 32768, lie, 20.0 + index)
        estimate.observe(a_pass(30.0 + index, {"far": lie if 0 < lie < 1e300 else 1.0}))
    found = estimate.estimates(40.0)
    for node in found.nodes.values():
        assert 1e-3 <= node.factor <= 1e3 * (1 + 1e-9)
        assert 0 <= (node.background_utilization or 0.0) < 1
    problem = tiny_problem(1)
    names = dict(zip(("near", "far"), (node.name for node in problem.nodes), strict=False))
    posed = under_estimates(problem, Estimates({names[name]: node for name, node in found.nodes.items()}))
    assert np.isfinite(posed.decode_s_per_token).all() or not np.isfinite(problem.decode_s_per_token).all()


def test_a_share_of_a_node_that_is_none_is_passed_over(estimate: ClusterEstimate) -> None:
    for share in (float("nan"), -0.5, 1.5, float("inf")):
        estimate.observe_report("far", LAYER_S["far"], share, 20.0)
        estimate.observe_report("far", LAYER_S["far"], share, 21.0)
    assert estimate.estimates(22.0).nodes["far"].background_utilization == pytest.approx(0.0, abs=0.01)


def test_a_node_of_which_only_reports_came_before_the_first_model_has_an_estimate() -> None:
    estimate = ClusterEstimate(FEATURES, "near")
    estimate.observe_report("far", LAYER_S["far"], 0.0, 5.0)
    estimate.set_model(model())
    far = estimate.estimates(6.0).nodes["far"]
    assert far.factor == pytest.approx(1.0)
    assert 0 < far.deviation < 0.1
