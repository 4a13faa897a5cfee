from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from resplit.comparison import compare, comparison_text, summaries
from resplit.cost import CostModel, PassModel, PredictionError
from resplit.errors import DataError
from resplit.records import RunRecord, table
from resplit.telemetry import Telemetry
from resplit.types import BlockFeatures
from tasks.report import Extras, block_timings, prediction_error, write_report
from tasks.validate import RowFault, Rule, ValidTelemetry
from tests.support.runs import LAYER_S, synthetic_run

RUNS = [synthetic_run("static"), synthetic_run("resplit"), synthetic_run("static", disturbed=False)]
TIMINGS = pd.DataFrame(
    [
        {"node": node, "phase": "decode", "predicted_s": time_s, "measured_s": 1.1 * time_s}
        for node, time_s in LAYER_S.items()
    ]
)


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, and the page's text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " " if tag == "td" else ""

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    write_report(RUNS, folder, Extras(model="a-model", dequantised=True, timings=TIMINGS))
    return folder


def test_the_page_fetches_nothing(folder: Path) -> None:
    page = Elements(folder / "index.html")
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    targets = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href")
    ]
    assert all(str(target).startswith("#") for target in targets)
    assert all(match == "#" for match in re.findall(r"url\((.)", (folder / "index.html").read_text()))


def test_ids_are_unique_in_the_page_and_references_lead_to_them(folder: Path) -> None:
    page = Elements(folder / "index.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", (folder / "index.html").read_text())) <= set(ids)


def test_the_page_shows_what_the_terminal_shows(folder: Path) -> None:
    shown = re.sub(r"\s+", " ", Elements(folder / "index.html").text)
    for line in comparison_text(compare(summaries(RUNS))).splitlines()[2:]:
        label, *cells = re.split(r"\s{2,}", line.strip())
        values = [cell for cell in cells if re.fullmatch(r"[-\d.]+", cell)]
        assert re.search(re.escape(label) + r"[ a-zA-Z/%0-9]*? " + " ".join(map(re.escape, values)), shown), line


def test_the_page_says_what_was_emulated_and_what_the_weights_are(folder: Path) -> None:
    text = Elements(folder / "index.html").text
    assert "Emulated hardware: cloud, desk, hub, phone, tv" in text
    assert "Emulation error: 1.20 %" in text
    assert "dequantised 4-bit copy" in text


def test_every_figure_of_the_page_has_a_name_for_those_who_cannot_see_it(folder: Path) -> None:
    figures = [attributes for tag, attributes in Elements(folder / "index.html").tags if tag == "svg"]
    assert [figure["aria-label"] for figure in figures] == [
        "Latency over time",
        "Which block ran where",
        "Quality of service over time",
        "Utilisation by node",
        "Predicted against measured",
    ]


def test_timings_stand_beside_what_the_cost_model_says_of_them() -> None:
    layer = BlockFeatures("layer.0", "layer", 100, 200.0, 0.0, 400.0, 8.0, 16.0, False, 0.5)
    fitted = PassModel("hub", "decode", "layer", (0.002, 0.0, 0.0, 0.0, 0.0), (0.0,) * 5, 1, 0.0)
    unknown = PredictionError(None, None, 0)
    model = CostModel(0.0, {"hub": 0.002}, (fitted,), (), PredictionError(0.03, 0.07, 9), unknown)
    row = {"time_s": 0.0, "node": "hub", "block": "layer.0", "kind": "layer", "phase": "decode", "tokens": 1}
    rows = [row | {"context_tokens": 8, "seconds": seconds, "emulated": True} for seconds in (0.002, 0.003, 0.004)]
    elsewhere = [rows[0] | {"node": "a-node-that-the-model-does-not-know"}]
    timings = block_timings(model, Telemetry.from_rows({"blocks": rows + elsewhere}), [layer])
    assert timings.to_dict("records") == [
        {"node": "hub", "phase": "decode", "kind": "layer", "predicted_s": 0.002, "measured_s": 0.003}
    ]
    assert prediction_error(model) == {"longer contexts, median": 0.03, "longer contexts, p90": 0.07}


def test_rules_that_rows_broke_are_shown(tmp_path: Path) -> None:
    rules = [Rule(reason, "ExpectColumnValuesToBeBetween", "seconds") for reason in ("too slow", "too fast")]
    findings = tuple(RowFault("links", rule, 40, failed) for rule, failed in zip(rules, (3, 0), strict=True))
    valid = ValidTelemetry(Telemetry.from_rows({}), findings, ())
    text = Elements(write_report([RUNS[0]], tmp_path, Extras(validation=valid))).text
    assert "3 failures in all" in text
    assert "too slow" in text
    assert "too fast" not in text


def test_moves_are_shown_with_what_else_could_have_been_done(folder: Path) -> None:
    text = Elements(folder / "index.html").text
    assert "Decisions (adaptive)" in text
    assert "redistribute: 3100 ms, net gain 9.4, moves 42 MB, pause 30 ms" in text
    assert "chat misses its objective; re-split gains 0.81 per request" in text


def test_the_same_runs_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_report(RUNS, tmp_path, Extras(model="a-model", dequantised=True, timings=TIMINGS))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert [path for path in files if (folder / path).read_bytes() != (tmp_path / path).read_bytes()] == []


def test_the_metrics_are_sorted_and_what_is_unknown_is_null(folder: Path) -> None:
    text = (folder / "metrics.json").read_text()
    metrics = json.loads(text)
    assert text == json.dumps(metrics, indent=1, sort_keys=True) + "\n"
    assert metrics["static"]["pause_max_s"] is None
    assert metrics["adaptive"]["latency_mean_s"] == pytest.approx(summaries(RUNS)["adaptive"].latency_mean_s, abs=1e-6)


def test_the_series_for_dvc_share_their_columns(folder: Path) -> None:
    for label in ("static", "adaptive", "undisturbed"):
        assert list(pd.read_csv(folder / "plots" / f"{label}.csv")) == ["time_s", "latency_s", "qos_met", "utilization"]
    assert pd.read_csv(folder / "plots" / "epochs.csv").run.tolist() == ["static"] + ["adaptive"] * 4 + ["undisturbed"]


def test_what_a_loss_took_stands_in_the_report(tmp_path: Path) -> None:
    sessions = {"sessions": 8, "noticed_s": 0.1, "waited_s": 2.5, "restore_s": 0.05, "replay_s": 1.2}
    sessions |= {"restored_positions": 480, "replayed_positions": 24, "cache_bytes": 2_900_000}
    outcome = {"deployed": 3, "plan_s": 2.0, "prepare_s": 0.5, "sessions": sessions}
    decisions = [{"action": "recover", "at_s": 3.0, "reason": "lost gamma", "outcome": outcome}, {"action": "keep"}]
    page = write_report([replace(RUNS[1], decisions=decisions)], tmp_path).read_text(encoding="utf-8")
    section = page[page.index("Recoveries") :]
    section = section[: section.index("</section>")]
    for said in ("lost gamma", "2000 ms", "500 ms", "50 ms", "1200 ms", "480", "24", "2.9"):
        assert f"<td>{said}</td>" in section
    assert "Recoveries" not in write_report([RUNS[1]], tmp_path).read_text(encoding="utf-8")


def test_text_from_outside_cannot_become_markup(tmp_path: Path) -> None:
    events = table("events", [{"time_s": 1.0, "kind": "change", "label": "<script>alert(1)</script>"}])
    decisions = [{"action": "re-split", "reason": "<img src=x>"}]
    write_report([replace(RUNS[1], scenario="<b>", events=events, decisions=decisions)], tmp_path)
    page = Elements(tmp_path / "index.html")
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize("emptied", ["requests", "tokens", "use", "events"])
def test_a_run_without_some_of_its_tables_is_reported_all_the_same(emptied: str, tmp_path: Path) -> None:
    run: RunRecord = replace(RUNS[1], decisions=[], emulated_nodes=(), **{emptied: table(emptied, [])})
    text = Elements(write_report([run], tmp_path)).text
    assert "Which block ran where" in text
    assert "Emulated hardware" not in text


def test_a_study_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run"):
        write_report([], tmp_path)
