"""Reactions to changes, and false alarms, from the record of a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from resplit.decide import Decision, DecisionOutcome
from resplit.epochs import RECOVER
from resplit.reaction import CHANGE, LOSS, RETURN, SURGE, event_reactions, false_alarms, phase_label, reactions
from resplit.records import RunRecord
from tests.support.run_tables import epoch, record

TOKENS = [1.0, 5.0, 10.2, 10.4, 12.0, 30.1]


def event(time_s: float, kind: str, label: str) -> dict[str, object]:
    return {"time_s": time_s, "kind": kind, "label": label}


def run(
    *decisions: Decision, subjects: tuple[str, ...] = ("b",), what: str = CHANGE, foreseen: bool = True
) -> RunRecord:
    events = [event(10.0, "phase", phase_label(what, subjects)), event(30.0, "phase", phase_label(CHANGE, ("d",)))]
    events += [event(10.0, "foreseen", "clairvoyant")] if foreseen else []
    epochs = [epoch(1, 0.0, "initial", placement="a,b,c"), epoch(2, 11.5, "re-split", placement="a,a,c")]
    made = record([], TOKENS, events=events, epochs=epochs)
    return replace(made, policy="resplit", decisions=decisions, source="x")


SEEN = Decision(10.5, "re-split", seen=("b became 4 times slower",), outcome=DecisionOutcome(deployed=2, plan_s=0.25))


def test_time_counts_from_the_first_token_over_the_changed_node() -> None:
    (reaction,) = reactions(run(SEEN))
    assert (reaction.subjects, reaction.from_s) == (("b",), 10.2)
    assert reaction.noticed_s == pytest.approx(0.3)
    assert reaction.decided_s == pytest.approx(0.55)
    assert reaction.live_s == pytest.approx(1.3)


def test_a_route_that_was_chosen_because_of_the_change_is_not_touched_by_it() -> None:
    moved = run(SEEN, subjects=("d",))
    moved = replace(moved, epochs=moved.epochs.assign(placement=["a,b,c", "a,d,c"]))
    (reaction,) = reactions(replace(moved, decisions=(replace(SEEN, seen=("d became 4 times faster",)),)))
    assert reaction.from_s == 10.0
    assert reaction.noticed_s == pytest.approx(0.5)


@pytest.mark.parametrize(("subjects", "from_s"), [(("x",), 10.0), (("b/c",), 10.2), (("a/x",), 10.2), (("b/x",), 10.0)])
def test_a_change_that_no_pass_meets_counts_from_itself(subjects: tuple[str, ...], from_s: float) -> None:
    assert reactions(run(SEEN, subjects=subjects))[0].from_s == from_s


def test_keeping_for_another_reason_is_not_noticing() -> None:
    other = Decision(10.3, "keep", seen=("a became 4 times slower",))
    tick = Decision(10.4, "keep")
    (reaction,) = reactions(run(other, tick, SEEN))
    assert reaction.noticed_s == pytest.approx(0.3)
    (kept,) = reactions(run(other, tick))
    assert all(map(math.isnan, (kept.noticed_s, kept.decided_s, kept.live_s)))


def test_what_is_noticed_before_the_first_token_is_noticed_at_once() -> None:
    (reaction,) = reactions(run(replace(SEEN, at_s=10.0)))
    assert reaction.noticed_s == 0.0


def test_only_changes_at_which_a_policy_that_knows_the_scenario_moves_are_counted() -> None:
    assert reactions(run(SEEN, foreseen=False)) == []
    assert reactions(run(SEEN, what=LOSS)) == []


def test_an_alarm_is_false_if_no_change_of_its_subject_explains_it() -> None:
    late = Decision(21.0, "keep", seen=("b became 1.3 times slower", "a became 2 times faster"))
    early = Decision(9.0, "keep", seen=("b became 1.3 times slower",))
    assert false_alarms(run(early, SEEN, late)) == (3.0, 60.0)
    assert false_alarms(run(SEEN)) == (0.0, 60.0)
    assert false_alarms(run(SEEN, what=LOSS, subjects=("x",)))[0] == 0.0


def test_a_link_is_meant_if_both_its_ends_are_named() -> None:
    link = replace(SEEN, seen=("the link from c to b became 3 times slower",))
    assert false_alarms(run(link, subjects=("b/c",)))[0] == 0.0
    assert false_alarms(run(link, subjects=("b/x",)))[0] == 1.0


def test_a_policy_that_is_not_asked_at_changes_has_no_alarms() -> None:
    assert all(map(math.isnan, false_alarms(replace(run(SEEN), policy="static"))))


def test_losses_returns_and_surges_have_rows_of_their_own_that_count_from_the_event() -> None:
    recovery = Decision(10.6, RECOVER, outcome=DecisionOutcome(deployed=2, plan_s=0.1))
    lost = run(recovery, what=LOSS)
    lost = replace(lost, epochs=lost.epochs.assign(action=["initial", RECOVER]))
    (reaction,) = event_reactions(lost)
    assert (reaction.what, reaction.subjects, reaction.from_s) == (LOSS, ("b",), 10.0)
    times_s = (reaction.noticed_s, reaction.decided_s, reaction.live_s)
    assert times_s == pytest.approx((0.6, 0.7, 1.5))
    (back,) = event_reactions(run(Decision(10.2, "keep"), SEEN, what=RETURN))
    assert (back.what, back.noticed_s) == (RETURN, pytest.approx(0.5))
    assert event_reactions(run(SEEN)) == []


def test_a_surge_without_a_move_was_not_noticed() -> None:
    surge = run(Decision(10.2, "keep"), what=SURGE, subjects=())
    (reaction,) = event_reactions(replace(surge, epochs=surge.epochs[:1]))
    assert all(map(math.isnan, (reaction.noticed_s, reaction.decided_s, reaction.live_s)))
