"""Take a screenshot of the MLflow page that compares the policies of the latest study, for the README.

It needs Chromium and `pip install playwright`, in any environment. Usage:
    python scripts/mlflow_screenshot.py .resplit/mlflow/mlflow.db docs/images/mlflow.png
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

MLFLOW = Path(__file__).parents[1] / ".venv" / "bin" / "mlflow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the SQLite file of the tracking store")
    parser.add_argument("screenshot", type=Path, help="the PNG file to write")
    parser.add_argument("--experiment", default="resplit")
    parser.add_argument("--view", default="policies", choices=["policies", "configurations"])
    parser.add_argument("--port", type=int, default=5055)
    parser.add_argument("--chromium", default=shutil.which("chromium") or "/usr/bin/chromium")
    options = parser.parse_args()
    with closing(sqlite3.connect(options.store)) as store:
        query = "select experiment_id from experiments where name = ?"
        (experiment_id,) = store.execute(query, [options.experiment]).fetchone() or sys.exit("no such experiment")
    address = f"http://127.0.0.1:{options.port}"
    page = f"/#/experiments/{experiment_id}/runs?viewStateShareKey={options.view}&compareRunsMode=CHART"
    with serving(options.store.resolve(), address, options.port):
        take_screenshot(address + page, options.screenshot, options.chromium)


@contextmanager
def serving(store: Path, address: str, port: int) -> Iterator[None]:
    """The MLflow server, which runs until the block ends."""
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    artifacts = ["--no-serve-artifacts", "--default-artifact-root", (store.parent / "artifacts").as_uri()]
    command = [str(MLFLOW), "server", "--backend-store-uri", f"sqlite:///{store}", *artifacts, *where]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # In a process group of its own, so that the workers of the server can be stopped with it.
    process = subprocess.Popen(command, env=os.environ | quiet, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(address + "/health", timeout_s=60)
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=20)


def wait_for(url: str, timeout_s: float) -> None:
    """Wait until `url` answers; exit after `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            if time.monotonic() > end:
                sys.exit(f"{url} did not answer within {timeout_s:g} s")
            time.sleep(0.3)


def take_screenshot(url: str, path: Path, chromium: str) -> None:
    """Open `url`, wait until its charts are drawn, and save a screenshot of the window."""
    from playwright.sync_api import sync_playwright

    path.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1500, "height": 1240})
        page.goto(url)
        page.wait_for_selector(".js-plotly-plot", timeout=60_000)
        if close := page.query_selector("[data-component-id='mlflow.assistant.chat_panel.close']"):
            close.click()
        # Each chart is drawn when it comes into view, and again after the panel is closed.
        page.wait_for_timeout(5_000)
        page.screenshot(path=str(path))
        browser.close()


if __name__ == "__main__":
    main()
