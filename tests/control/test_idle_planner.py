"""Planning in a process of its own: its lines, its start and its end."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace

import pytest

from resplit.control import idle_planner
from resplit.control.idle_planner import IdlePlanner, answer
from resplit.control.ready_plans import plan_ahead
from resplit.problem import problem_to_json
from resplit.types import Problem
from tests.support.decisions import FAST, SLOW, halves, problem


@pytest.fixture
def posed() -> Problem:
    return problem(halves(SLOW, FAST, 2))


def line(posed: Problem) -> str:
    return json.dumps(problem_to_json(posed)) + "\n"


def too_large(posed: Problem) -> Problem:
    """The same problem on nodes that have no memory."""
    return replace(posed, nodes=tuple(replace(node, memory_bytes=1.0) for node in posed.nodes))


def test_an_answer_has_the_plan_and_the_seconds_of_processor_time(posed: Problem) -> None:
    found = json.loads(answer(line(posed)))
    assert found["placement"] == list(plan_ahead(posed, 0.3) or ())
    assert 0.0 <= found["processor_s"] < 60.0
    assert json.loads(answer(line(too_large(posed))))["placement"] is None


def test_the_process_answers_line_by_line_at_low_priority_and_ends_with_its_input(
    posed: Problem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    priorities: list[int] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO(line(posed) + line(too_large(posed))))
    monkeypatch.setattr(os, "nice", priorities.append)
    monkeypatch.setattr(idle_planner, "log_to_stderr", lambda: None)
    idle_planner.main()
    answers = [json.loads(each) for each in capsys.readouterr().out.splitlines()]
    assert [bool(each["placement"]) for each in answers] == [True, False]
    assert priorities == [5]


def test_a_machine_that_allows_no_lower_priority_plans_all_the_same(
    posed: Problem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(by: int) -> int:
        raise PermissionError

    monkeypatch.setattr(sys, "stdin", io.StringIO(line(posed)))
    monkeypatch.setattr(os, "nice", refuse)
    monkeypatch.setattr(idle_planner, "log_to_stderr", lambda: None)
    idle_planner.main()
    assert json.loads(capsys.readouterr().out)["placement"]


async def test_a_process_that_does_not_answer_in_time_is_ended(posed: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_planner, "_ANSWER_WITHIN_S", 0.01)
    idle = IdlePlanner()
    assert await idle.plan(posed) is None
    assert idle._process is None
    assert idle.processor_s == 0.0


async def test_one_process_makes_all_plans_and_none_where_none_is_possible(posed: Problem) -> None:
    idle = IdlePlanner()
    try:
        assert await idle.plan(too_large(posed)) is None
        process, spent_s = idle._process, idle.processor_s
        assert process is not None
        assert await idle.plan(posed) == plan_ahead(posed, 0.3)
        assert idle._process is process
        for _ in range(50):  # the system counts a process's time in ticks of 10 ms, and a plan may take less
            await idle.plan(posed)
        assert idle.processor_s > spent_s
    finally:
        await idle.stop()
    assert process.returncode is not None
