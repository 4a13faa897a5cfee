"""The live page in a real browser, above a cluster in this process: it shows what happens, to everybody."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from resplit.cluster.local import free_ports
from resplit.cluster.server import _app, _http_server, _mount_page
from resplit.control.api import create_control_api
from resplit.control.controller import Controller
from resplit.control.monitor import Monitor
from resplit.decide import Decision
from resplit.model.source import StoredModel
from resplit.node.agent import Agent
from resplit.node.server import NodeService
from resplit.security.signing import CommandVerifier
from resplit.wire.addresses import Address
from resplit.wire.emulated_link import Shape
from resplit.wire.listener import Listener
from tests.support.controllers import FIRST, SECOND, operator_of
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import A, B, C, three_node_config

playwright = pytest.importorskip("playwright.async_api", reason="the package playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH; install one, such as Debian's `chromium`"),
]
SOON_MS = 1000  # what happens is on the page within this time
TOKEN = "the-control-token"


@dataclass
class Shown:
    """A page that shows a cluster, and what its console said."""

    nodes: InProcessCluster
    controller: Controller
    tab: playwright.Page
    complaints: list[str]

    async def press(self, group: str, button: str) -> None:
        """Press a button in a group of the controls, and wait until the page says that it is done."""
        await self.tab.click(f"#controls fieldset:has(legend:text-is('{group}')) button:text-is('{button}')")
        await self.tab.wait_for_selector(f"#done:text-is('{button}: done')")

    async def comes_true(self, expression: str) -> None:
        """Wait until an expression is true in the page. The page's security policy stops the browser's own polling."""
        await until(lambda: self.tab.evaluate(expression), 30)

    async def blocks(self) -> dict[str, int]:
        """How many cells each node has on the map."""
        cells = await self.tab.eval_on_selector_all("#map .cell", "cells => cells.map(cell => cell.dataset.node)")
        return {name: cells.count(name) for name in (A, B, C)}


@pytest.fixture
async def browser() -> AsyncIterator[playwright.Browser]:
    async with playwright.async_playwright() as started:
        browser = await started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        await browser.close()


@pytest.fixture
async def shown(browser: playwright.Browser, stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[Shown]:
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes, _shown(browser, nodes) as page:
        yield page


@pytest.fixture
def agents() -> dict[str, Agent]:
    """The emulated nodes, by name."""
    return {}


@pytest.fixture
async def emulated(
    browser: playwright.Browser, stored_model: StoredModel, tmp_path: Path, agents: dict[str, Agent]
) -> AsyncIterator[Shown]:
    def service(agent: Agent, verifier: CommandVerifier) -> NodeService:
        agents[agent.hosting.name] = agent
        return NodeService(agent, verifier)

    times = {"embed": "0.2 ms", "layer": "0.4 ms", "head": "0.2 ms"}
    emulate = {"decode_per_token": times, "prefill_per_token": dict.fromkeys(times, "0 ms")}
    links = {"default": {"latency": "1 ms", "bandwidth": "1 Gbit/s"}}
    emulated = [{"name": name, "memory": "8 MiB", "emulate": emulate} for name in (A, B, C)]
    config, services = three_node_config(nodes=emulated, links=links), dict.fromkeys((A, B, C), service)
    async with (
        in_process(config, stored_model, tmp_path, services) as nodes,
        _shown(browser, nodes, emulate=emulate, links=links) as page,
    ):
        yield page


@contextlib.asynccontextmanager
async def _shown(browser: playwright.Browser, nodes: InProcessCluster, **hardware: Any) -> AsyncIterator[Shown]:
    """The page above running nodes. `hardware` is what the cluster file says of emulated ones."""
    controller = nodes.controller()
    await controller.start()
    await deploy(controller, FIRST)
    async with _served(nodes, controller, hardware) as url:
        tab, complaints = await browser.new_page(), list[str]()
        tab.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        await tab.goto(url)
        await tab.wait_for_selector("#connection.good")
        await tab.wait_for_selector("#map .cell")
        yield Shown(nodes, controller, tab, complaints)


@contextlib.asynccontextmanager
async def _served(nodes: InProcessCluster, controller: Controller, hardware: Mapping[str, Any]) -> AsyncIterator[str]:
    """The gateway's HTTP server with its page; the address of the page."""
    address = Address("127.0.0.1", free_ports(1)[0])
    monitor = Monitor(nodes.router.peers, len(FIRST))
    app = _app(nodes.config, nodes.model, nodes.sessions, nodes.config.classes_by_key())
    app.mount("/control", create_control_api(controller, operator_of(nodes, controller, **hardware), monitor, TOKEN))
    page = _mount_page(app, controller, monitor, nodes.sessions, TOKEN)
    server = _http_server(app, listening := Listener(address, 64))
    tasks = [asyncio.create_task(monitor.run()), asyncio.create_task(server.serve(sockets=[listening]))]
    yield f"http://{address}/"
    page.close()
    server.should_exit = True
    tasks[0].cancel()
    await asyncio.wait(tasks)
    listening.close()


@pytest.mark.alone
async def test_a_move_and_a_lost_node_are_shown_within_a_second(shown: Shown) -> None:
    assert await shown.blocks() == {name: FIRST.count(name) for name in (A, B, C)}

    await deploy(shown.controller, SECOND)
    moved = "#news li:has-text('epoch 2 (re-split): 2 blocks moved')"
    await shown.tab.wait_for_selector(moved, timeout=SOON_MS)
    assert await shown.blocks() == {name: SECOND.count(name) for name in (A, B, C)}

    shown.nodes.proxies[C].close()
    shown.nodes.break_connections(C)
    await shown.tab.wait_for_selector(f"#map .node.lost[data-node={C}]", timeout=SOON_MS)
    await shown.tab.wait_for_selector(f"#news li:has-text('{C} is lost')", timeout=SOON_MS)
    assert await shown.tab.locator("#map .cell.dead").count() == SECOND.count(C)
    assert shown.complaints == []


async def test_a_model_that_runs_on_the_gateways_node_alone_has_a_route(shown: Shown) -> None:
    await deploy(shown.controller, (A,) * len(FIRST))
    await shown.tab.wait_for_selector(f"#route:text-matches('Route: {A}, ')", timeout=SOON_MS)


async def test_it_fits_a_phone_and_a_wide_screen(shown: Shown) -> None:
    for scheme, width in itertools.product(("light", "dark"), (320, 390, 768, 1280, 1920)):
        await shown.tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        await shown.tab.set_viewport_size({"width": width, "height": 800})
        await shown.comes_true(f"innerWidth === {width}")
        overflow = await shown.tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, (scheme, width)
        assert await shown.tab.evaluate("document.getAnimations().length") == 0
    assert shown.complaints == []


async def test_the_name_of_a_card_begins_with_the_text_that_it_shows(shown: Shown) -> None:
    names = "cards => cards.map(card => [card.textContent.trim().replace(/\\s+/g, ' '), card.ariaLabel])"
    cards = await shown.tab.eval_on_selector_all("#map .node", names)
    assert len(cards) == 3
    for text, name in cards:
        assert name.startswith(f"{text}: runs "), (text, name)


async def test_no_card_of_the_map_covers_another_one(shown: Shown) -> None:
    covered = """async (width) => {
      const { arranged } = await import("/live/map.js"), found = [];
      for (let count = 1; count <= 40; count += 1) {
        const { card, cardHeight, height, corners } = arranged(count, width, 32);
        const outside = corners.some(([x, y]) => x < 0 || y < 0 || x + card > width + 1 || y + cardHeight > height + 1);
        const covers = corners.some(([x, y], i) => corners.slice(0, i).some(([u, v]) =>
          Math.abs(x - u) < card && Math.abs(y - v) < cardHeight));
        if (outside || covers) found.push(count);
      }
      return found;
    }"""
    for width in (260, 340, 680, 960):
        assert await shown.tab.evaluate(covered, width) == [], width


async def test_a_question_is_answered_and_shows_in_the_figures(shown: Shown) -> None:
    await shown.tab.fill("#question", "the quick brown fox")
    await shown.tab.click("#chat button")
    await shown.tab.wait_for_selector("#answers .note:has-text('first token after')")
    await shown.comes_true("document.querySelector('#tiles b').textContent !== '–'")
    assert shown.complaints == []


async def test_an_operator_works_by_keyboard_with_the_token_only(shown: Shown) -> None:
    assert await shown.tab.is_hidden("#controls")
    await shown.tab.fill("#token", "guessed")
    await shown.tab.press("#token", "Enter")
    await shown.tab.wait_for_selector("#done:has-text('not the control token')")
    assert [re.sub(r" .*", "", each) for each in shown.complaints] == ["error:"]  # the browser logs the 401
    await shown.tab.fill("#token", TOKEN)
    await shown.tab.press("#token", "Enter")
    await shown.tab.wait_for_selector("#controls fieldset")

    await shown.tab.press(f"#map .node[data-node={C}]", "Enter")
    assert await shown.tab.input_value("#controls select[name=node]") == C
    await shown.tab.keyboard.press("Tab")
    assert await shown.tab.evaluate("document.activeElement.textContent") == "Drain"


async def test_whoever_opens_the_page_with_the_control_token_is_asked_for_a_key_to_the_model(
    browser: playwright.Browser, stored_model: StoredModel, tmp_path: Path
) -> None:
    demand = {"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8, "api_keys": ["the-api-key"]}
    async with in_process(three_node_config(classes=[demand]), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.start()
        await deploy(controller, FIRST)
        async with _served(nodes, controller, {}) as url:
            tab = await browser.new_page()
            await tab.goto(f"{url}#token={TOKEN}")
            await tab.wait_for_selector("#map .cell")
            assert await tab.is_hidden("#key-form")

            await tab.click("#chat button")
            await tab.wait_for_selector("#answers .note:has-text('a valid API key is required')")
            await tab.fill("#key", "the-api-key")
            await tab.press("#key", "Enter")
            assert await tab.is_hidden("#key-form")
            await tab.click("#chat button")
            await tab.wait_for_selector("#answers .note:has-text('first token after')")


async def test_text_of_a_node_is_never_markup(shown: Shown) -> None:
    shown.controller.log.append_decision(Decision(1.0, "<img src=x>", "<script>fail()</script>"))
    await shown.tab.wait_for_selector("#decisions summary:has-text('<script>')")
    assert await shown.tab.locator("#decisions img").count() == 0
    assert shown.complaints == []


async def test_emulated_hardware_is_changed_from_the_page(
    emulated: Shown, agents: dict[str, Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosting, links = agents[C].hosting, agents[C].connections.links
    await emulated.tab.fill("#token", TOKEN)
    await emulated.tab.press("#token", "Enter")
    await emulated.tab.select_option("#controls select[name=node]", C)
    await emulated.press("A node", "5 times slower")
    await emulated.press("A node", "Others use 80 %")
    assert (hosting.hardware.slowdown, hosting.hardware.background_utilization) == (5, 0.8)
    await emulated.press("A node", "As declared")
    assert (hosting.hardware.slowdown, hosting.hardware.background_utilization) == (1, 0)

    await emulated.tab.select_option("#controls select[name=one]", B)
    await emulated.tab.select_option("#controls select[name=other]", C)
    await emulated.press("A link", "Slow (120 ms, 10 Mbit/s)")
    assert links[B].shape == agents[B].connections.links[C].shape == Shape(0.12, 1.25e6)
    await emulated.press("A link", "Cut (10 s)")
    assert links[B].shape == Shape(10.0, 1e3)
    await emulated.press("A link", "As declared")
    assert links[B].shape == Shape(0.001, 1.25e8)

    def crash(pid: int, sent: signal.Signals) -> None:
        assert (pid, sent) == (os.getpid(), signal.SIGKILL)  # here all nodes share the test's process
        emulated.nodes.proxies[C].close()
        emulated.nodes.break_connections(C)

    monkeypatch.setattr("resplit.node.agent.os.kill", crash)
    await emulated.press("A node", "Kill its process")
    await emulated.tab.wait_for_selector(f"#map .node.lost[data-node={C}]")
    assert emulated.complaints == []
