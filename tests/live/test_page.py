"""The live page in a real browser, above a cluster in this process: it shows what happens, to everybody."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from resplit.cluster.local import free_ports
from resplit.cluster.server import _app, _http_server, _mount_page
from resplit.control.api import create_control_api
from resplit.control.controller import Controller
from resplit.control.monitor import Monitor
from resplit.model.source import StoredModel
from resplit.wire.addresses import Address
from resplit.wire.listener import Listener
from tests.support.controllers import FIRST, SECOND, operator_of
from tests.support.in_process import InProcessCluster, deploy, in_process
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
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.start()
        await deploy(controller, FIRST)
        async with _served(nodes, controller) as url:
            tab, complaints = await browser.new_page(), list[str]()
            tab.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            await tab.goto(url)
            await tab.wait_for_selector("#connection.good")
            await tab.wait_for_selector("#map .cell")
            yield Shown(nodes, controller, tab, complaints)


@contextlib.asynccontextmanager
async def _served(nodes: InProcessCluster, controller: Controller) -> AsyncIterator[str]:
    """The gateway's HTTP server with its page; the address of the page."""
    address = Address("127.0.0.1", free_ports(1)[0])
    monitor = Monitor(nodes.router.peers, len(FIRST))
    app = _app(nodes.config, nodes.model, nodes.sessions, nodes.config.classes_by_key())
    app.mount("/control", create_control_api(controller, operator_of(nodes, controller), monitor, TOKEN))
    page = _mount_page(app, controller, monitor, nodes.sessions, TOKEN)
    server = _http_server(app, listening := Listener(address, 64))
    tasks = [asyncio.create_task(monitor.run()), asyncio.create_task(server.serve(sockets=[listening]))]
    yield f"http://{address}/"
    page.close()
    server.should_exit = True
    tasks[0].cancel()
    await asyncio.wait(tasks)
    listening.close()


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_a_phone_and_a_wide_screen(shown: Shown, scheme: str) -> None:
    await shown.tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for width in (320, 390, 768, 1280, 1920):
        await shown.tab.set_viewport_size({"width": width, "height": 800})
        await shown.tab.wait_for_function(f"innerWidth === {width}")
        overflow = await shown.tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, width
    assert await shown.tab.evaluate("document.getAnimations().length") == 0
    assert shown.complaints == []


async def test_a_question_is_answered_and_shows_in_the_figures(shown: Shown) -> None:
    await shown.tab.fill("#question", "the quick brown fox")
    await shown.tab.click("#chat button")
    await shown.tab.wait_for_selector("#answers .note:has-text('first token after')")
    await shown.tab.wait_for_function("document.querySelector('#tiles b').textContent !== '–'")
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


async def test_text_of_a_node_is_never_markup(shown: Shown) -> None:
    shown.controller.log.append_decision({"at_s": 1.0, "action": "<img src=x>", "reason": "<script>fail()</script>"})
    await shown.tab.wait_for_selector("#decisions summary:has-text('<script>')")
    assert await shown.tab.locator("#decisions img").count() == 0
    assert shown.complaints == []
