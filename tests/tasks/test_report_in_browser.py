"""The page of a report in a real browser, from a file: it needs no network, and reads well at phone width."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from resplit.decide import DecisionOutcome
from tasks.report import Extras, write_report
from tasks.simulated_results import simulated_results
from tests.support.runs import synthetic_run

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH; install one, such as Debian's `chromium`"),
]
POLICIES = {"static": (5.4, 30.0), "resplit": (1.2, 75.0), "resplit-without-kv-transfer": (1.3, 74.0)}
SECTIONS = {"latency", "placement", "regret", "ablation", "energy", "prediction", "reality", "moves-adaptive"}
SECTIONS |= {"decisions-adaptive"}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all sections."""
    folder = tmp_path_factory.mktemp("reports")
    metrics = folder / "metrics.json"
    found = {
        name: {
            "latency_mean_s": latency_s,
            "energy_j_per_request": energy_j,
            "regret": latency_s,
            "regret_ci95": 0.2,
            "latency_over_resplit": latency_s / 1.2,
            "latency_over_resplit_ci95": 0.1,
        }
        for name, (latency_s, energy_j) in POLICIES.items()
    }
    metrics.write_text(json.dumps({"a-day-at-home": found, "b": found, "c": found}))
    static, adaptive = synthetic_run("static"), synthetic_run("resplit")
    epochs = iter(adaptive.epochs.epoch.tolist()[1:])
    decisions = tuple(
        each if each.action == "keep" else replace(each, outcome=DecisionOutcome(deployed=next(epochs), prepare_s=0.4))
        for each in adaptive.decisions
    )
    runs = [static, replace(adaptive, decisions=decisions)]
    extras = Extras(model="a-model", simulated=simulated_results(metrics), replays={"static": static})
    return write_report(runs, folder, extras)


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_all_sections_and_the_console_is_quiet(
    browser: playwright.Browser, page_file: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme)
    tab, complaints = context.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("requestfailed", lambda request: complaints.append(request.url))
    tab.goto(page_file.as_uri())
    assert set(tab.eval_on_selector_all("section", "all => all.map(one => one.id)")) >= SECTIONS
    # Wide tables and figures scroll by themselves, the page does not.
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    heights = tab.eval_on_selector_all(".log tr", "all => all.map(one => one.getBoundingClientRect().height)")
    assert max(heights) < 500  # no column is so narrow that its text becomes a tower
    assert complaints == []
    context.close()
