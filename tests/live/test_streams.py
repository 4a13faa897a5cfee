"""The stream of the live page: first everything, then what changed, for a bounded number of readers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resplit.control.controller import Controller
from resplit.control.monitor import Monitor
from resplit.decide import Decision, DecisionOutcome
from resplit.errors import CapacityError
from resplit.gateway.openai.prometheus import RequestMetrics
from resplit.live import streams as streams_module
from resplit.live.observer import Observer
from resplit.live.streams import MOST_STREAMS, PageStreams
from resplit.model.source import StoredModel
from resplit.session_records import RecoveredSessions, SessionRecord
from tests.support.controllers import FIRST, SECOND, served
from tests.support.in_process import InProcessCluster, deploy, in_process
from tests.support.three_nodes import A, C, three_node_config

RECORD = SessionRecord("chat", 10.0, 10.5, 12.0, 4, 8, 200, (1,), (), True, (), waited_s=0.25)


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    async with in_process(three_node_config(), stored_model, tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def controller(nodes: InProcessCluster) -> Controller:
    controller = nodes.controller()
    await controller.start()
    await deploy(controller, FIRST)
    return controller


@pytest.fixture
def page(nodes: InProcessCluster, controller: Controller) -> PageStreams:
    page = PageStreams(Observer(controller, Monitor(nodes.router.peers, len(FIRST)), RequestMetrics()))
    nodes.sessions.on_pass, nodes.sessions.on_ended = page.passed, page.ended
    return page


def parsed(event: bytes) -> tuple[str, dict[str, Any]]:
    name, data = event.decode().strip().split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def until_changed(events: AsyncIterator[bytes], part: str) -> Any:
    """That part of the first event that has it."""
    async with asyncio.timeout(5):
        async for event in events:
            _, data = parsed(event)
            if part in data:
                return data[part]
    raise AssertionError("the stream ended")


async def test_a_stream_begins_with_everything_there_is_to_see(page: PageStreams, nodes: InProcessCluster) -> None:
    page.ended(RECORD)
    events = page.events()

    name, state = parsed(await anext(events))

    assert name == "state"
    assert [node["name"] for node in state["nodes"]] == nodes.config.node_names
    assert {node["name"]: node["trusted"] for node in state["nodes"]}[C] is False
    assert state["epochs"][-1]["placement"] == FIRST
    assert state["model"]["private"] == [0, 1, 7]
    assert state["service"]["ready"] == "yes"
    assert state["requests"][0] | {"waited_s": 0.25, "number": 1} == state["requests"][0]
    await events.aclose()


async def test_moves_losses_requests_and_decisions_are_sent_when_they_happen(
    page: PageStreams, nodes: InProcessCluster, controller: Controller
) -> None:
    events = page.events()
    await anext(events)
    await until_changed(events, "nodes")

    await deploy(controller, SECOND)
    assert (await until_changed(events, "epochs"))[-1]["placement"] == SECOND
    await served(nodes)
    assert (await until_changed(events, "requests"))[0]["new_tokens"] == 8
    controller.log.append_decision(Decision(1.0, "keep"))
    assert (await until_changed(events, "decisions"))[-1]["action"] == "keep"
    nodes.proxies[C].close()
    nodes.break_connections(C)
    lost = await until_changed(events, "nodes")
    assert [node["name"] for node in lost if not node["answers"]] == [C]
    await events.aclose()


async def test_passes_are_summed_while_somebody_watches_only(page: PageStreams, nodes: InProcessCluster) -> None:
    await served(nodes)
    events = page.events()
    _, before = parsed(await anext(events))
    assert before["flow"]["passes"] == 0
    await until_changed(events, "flow")

    await served(nodes)

    flow = await until_changed(events, "flow")
    assert flow["passes"] > 0
    assert flow["computed_s"] > 0
    assert set(flow["nodes"]) == set(FIRST)
    await events.aclose()


async def test_a_recovery_is_sent_again_when_its_sessions_have_resumed(
    page: PageStreams, controller: Controller
) -> None:
    resumed: list[RecoveredSessions] = []
    controller.view.gateway.recoveries = lambda epoch: resumed[0] if resumed else None  # type: ignore[method-assign]
    controller.log.append_decision(Decision(1.0, "recover", outcome=DecisionOutcome(deployed=2)))
    events = page.events()
    _, state = parsed(await anext(events))
    assert state["decisions"][0]["outcome"]["sessions"] is None
    await until_changed(events, "decisions")

    resumed.append(RecoveredSessions(3, 0.1, 0.2, 0.3, 0.4, 5, 6, 7))

    assert (await until_changed(events, "decisions"))[0]["outcome"]["sessions"]["sessions"] == 3
    await events.aclose()


async def test_one_page_too_many_is_refused_until_another_one_closes(page: PageStreams) -> None:
    readers = [page.events() for _ in range(MOST_STREAMS)]
    for reader in readers:
        await anext(reader)
    with pytest.raises(CapacityError, match="pages are open"):
        page.check_room()
    await readers[0].aclose()
    page.check_room()
    for reader in readers:
        await reader.aclose()


async def test_a_reader_that_was_too_slow_gets_everything_again(
    page: PageStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "PERIOD_S", 0.0)
    fast, slow = page.events(), page.events()
    await anext(fast)
    await anext(slow)
    for number in range(30):
        page.ended(replace(RECORD, arrival_s=float(number)))
        await until_changed(fast, "requests")

    names = [parsed(await anext(slow))[0] for _ in range(8)]

    assert names[-1] == "state"
    await fast.aclose()
    await slow.aclose()


async def test_closing_ends_all_streams_and_the_watching(page: PageStreams) -> None:
    events = page.events()
    await anext(events)

    page.close()

    async with asyncio.timeout(5):
        async for _ in events:
            pass
    assert "live page" not in {task.get_name() for task in asyncio.all_tasks() if not task.cancelling()}


async def test_a_defect_ends_the_streams_and_not_the_service(
    page: PageStreams, nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = page.events()
    await anext(events)
    monkeypatch.setattr(Observer, "sections", lambda self: 1 / 0)
    async with asyncio.timeout(5):
        async for _ in events:
            pass
    monkeypatch.undo()
    assert parsed(await anext(page.events()))[0] == "state"
    assert len(await served(nodes)) == 8
    assert nodes.router.listening >= {A}
