"""The report of a study."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from resplit.comparison import compare, comparison_text, summaries
from resplit.decide import Decision, DecisionOutcome, RecoveredSessions
from resplit.errors import DataError
from resplit.records import RunRecord, table
from resplit.telemetry.tables import Telemetry
from tasks.report import Extras, write_report
from tasks.simulated_results import SimulatedResults, simulated_results
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


def test_the_page_loads_nothing_from_elsewhere(folder: Path) -> None:
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


def test_ids_are_unique_and_every_reference_has_a_target(folder: Path) -> None:
    page = Elements(folder / "index.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", (folder / "index.html").read_text())) <= set(ids)


def test_the_page_has_the_errors_of_the_estimate_at_the_end_of_each_run(folder: Path) -> None:
    shown = re.sub(r"\s+", " ", Elements(folder / "index.html").text)
    assert "Speed of nodes 2.1 % 2.1 % 2.1 %" in shown
    assert "Latency of links, software included - - -" in shown
    assert "The software's time for a message 2.4 ms 2.4 ms 2.4 ms" in shown


def test_the_page_shows_the_same_figures_as_the_terminal(folder: Path) -> None:
    shown = re.sub(r"\s+", " ", Elements(folder / "index.html").text)
    for line in comparison_text(compare(summaries(RUNS))).splitlines()[2:]:
        label, *cells = re.split(r"\s{2,}", line.strip())
        values = [cell for cell in cells if re.fullmatch(r"[-\d.]+", cell)]
        assert re.search(re.escape(label) + r"[ a-zA-Z/%0-9]*? " + " ".join(map(re.escape, values)), shown), line


def test_the_page_names_emulated_nodes_and_dequantised_weights(folder: Path) -> None:
    text = Elements(folder / "index.html").text
    assert "Emulated hardware: cloud, desk, hub, phone, tv" in text
    assert "Emulation error: 1.20 %" in text
    assert "dequantised 4-bit copy" in text


def test_every_figure_has_a_name_for_screen_readers(folder: Path) -> None:
    figures = [attributes for tag, attributes in Elements(folder / "index.html").tags if tag == "svg"]
    assert [figure["aria-label"] for figure in figures] == [
        "Latency over time",
        "Which block ran where",
        "Quality of service over time",
        "Utilisation by node",
        "Predicted against measured",
    ]


def test_only_rules_with_failed_rows_are_shown(tmp_path: Path) -> None:
    rules = [Rule(reason, "ExpectColumnValuesToBeBetween", "seconds") for reason in ("too slow", "too fast")]
    faults = tuple(RowFault("links", rule, 40, failed) for rule, failed in zip(rules, (3, 0), strict=True))
    valid = ValidTelemetry(Telemetry.from_rows({}), faults, ())
    text = Elements(write_report([RUNS[0]], tmp_path, Extras(validation=valid))).text
    assert "3 failures in all" in text
    assert "too slow" in text
    assert "too fast" not in text


def test_moves_are_shown_with_their_alternatives(folder: Path) -> None:
    text = Elements(folder / "index.html").text
    assert "Decisions (adaptive)" in text
    assert "redistribute: 3100 ms, net gain 9.4, moves 42 MB, pause 30 ms" in text
    assert "If it stayed, a request would take 1.50 s. It stays: " in text


def test_the_same_runs_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_report(RUNS, tmp_path, Extras(model="a-model", dequantised=True, timings=TIMINGS))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert [path for path in files if (folder / path).read_bytes() != (tmp_path / path).read_bytes()] == []


def test_metrics_are_sorted_and_unknown_values_are_null(folder: Path) -> None:
    text = (folder / "metrics.json").read_text()
    metrics = json.loads(text)
    assert text == json.dumps(metrics, indent=1, sort_keys=True) + "\n"
    assert metrics["static"]["pause_max_s"] is None
    assert metrics["adaptive"]["latency_mean_s"] == pytest.approx(summaries(RUNS)["adaptive"].latency_mean_s, abs=1e-6)


def test_the_series_for_dvc_share_their_columns(folder: Path) -> None:
    for label in ("static", "adaptive", "undisturbed"):
        assert list(pd.read_csv(folder / "plots" / f"{label}.csv")) == ["time_s", "latency_s", "qos_met", "utilization"]
    assert pd.read_csv(folder / "plots" / "epochs.csv").run.tolist() == ["static"] + ["adaptive"] * 4 + ["undisturbed"]


def test_the_parts_of_a_recovery_are_shown(tmp_path: Path) -> None:
    sessions = RecoveredSessions(8, 0.1, 2.5, 0.05, 1.2, 480, 24, 2_900_000)
    outcome = DecisionOutcome(deployed=3, plan_s=2.0, prepare_s=0.5, sessions=sessions)
    decisions = (Decision(3.0, "recover", "lost gamma", outcome=outcome), Decision(4.0, "keep"))
    page = write_report([replace(RUNS[1], decisions=decisions)], tmp_path).read_text(encoding="utf-8")
    section = page[page.index("Recoveries") :]
    section = section[: section.index("</section>")]
    for cell in ("lost gamma", "2000 ms", "500 ms", "50 ms", "1200 ms", "480", "24", "2.9"):
        assert f"<td>{cell}</td>" in section


def test_text_of_scenario_and_decisions_is_escaped(tmp_path: Path) -> None:
    events = table("events", [{"time_s": 1.0, "kind": "change", "label": "<script>alert(1)</script>"}])
    decisions = (Decision(1.0, "re-split", "<img src=x>"),)
    write_report([replace(RUNS[1], scenario="<b>", events=events, decisions=decisions)], tmp_path)
    page = Elements(tmp_path / "index.html")
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize("emptied", ["requests", "tokens", "use", "events"])
def test_a_run_with_an_empty_table_is_still_reported(emptied: str, tmp_path: Path) -> None:
    run: RunRecord = replace(RUNS[1], decisions=(), emulated_nodes=(), **{emptied: table(emptied, [])})
    text = Elements(write_report([run], tmp_path)).text
    assert "Which block ran where" in text
    assert "Emulated hardware" not in text


def test_a_study_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run to report"):
        write_report([], tmp_path)


SIMULATED: dict[str, dict[str, dict[str, float | None]]] = {
    "a-day-at-home": {
        "static": {
            "latency_mean_s": 5.4,
            "regret": 4.9,
            "regret_ci95": 0.2,
            "qos_met": 0.48,
            "waited_mean_s": None,
            "energy_j_per_request": 30.0,
        },
        "resplit": {
            "latency_mean_s": 1.23,
            "regret": 1.1,
            "regret_ci95": None,
            "qos_met": 0.76,
            "energy_j_per_request": 75.0,
        },
        "resplit-without-fast-loop": {
            "latency_mean_s": 1.35,
            "regret": 1.2,
            "latency_over_resplit": 1.1,
            "latency_over_resplit_ci95": 0.04,
        },
        "threshold": {"latency_mean_s": 6.0, "energy_j_per_request": 40.0},
        "swarm": {"latency_mean_s": 5.5, "energy_j_per_request": 30.5},
        "memory": {"latency_mean_s": 7.0, "energy_j_per_request": None},
        "oracle": {"latency_mean_s": 1.1, "regret": 1.0, "regret_ci95": 0.0, "energy_j_per_request": 71.0},
    },
    "another": {"static": {"latency_mean_s": 3.0, "regret": 3.0}, "oracle": {"latency_mean_s": 1.0, "regret": 1.0}},
}


def test_the_page_has_what_was_simulated_beside_what_was_measured_and_what_each_part_is_worth(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    assert simulated_results(path) == {}
    path.write_text(json.dumps(SIMULATED))
    results = simulated_results(path)
    assert list(results["a-day-at-home"].regrets) == ["resplit", "static"]
    page = write_report(RUNS, tmp_path / "reports", Extras(simulated=results))
    shown = re.sub(r"\s+", " ", Elements(page).text)
    assert "simulatedstatic → adaptive" in shown
    assert "5400 → 1230" in shown
    assert "Simulated: how far from the best" in shown
    regret = (tmp_path / "reports/plots/regret.svg").read_text()
    assert all(
        text in regret for text in ("a-day-at-home", "another", "static  4.90 ± 0.20", "resplit  1.10", "static  3.00")
    )
    assert "without" not in regret
    assert "Simulated: latency against energy" in shown
    energy = (tmp_path / "reports/plots/energy.svg").read_text()
    assert all(policy in energy for policy in ("static", "resplit", "threshold"))
    assert "memory" not in energy
    assert "static, swarm" in energy  # two labels would overlap
    assert "Simulated: what the parts of resplit are worth" in shown
    ablation = (tmp_path / "reports/plots/ablation.svg").read_text()
    assert "without fast loop  1.10 ± 0.04" in ablation
    assert "another" not in ablation  # nobody simulated resplit without a part there


def test_what_was_not_simulated_and_what_was_not_estimated_has_no_place(tmp_path: Path) -> None:
    results = {"another": SimulatedResults(SIMULATED["another"])}
    runs = [replace(run, estimate_errors={}) for run in RUNS]
    text = Elements(write_report(runs, tmp_path, Extras(simulated=results))).text
    assert "The estimate at the end" not in text
    assert "simulatedstatic" not in text
    assert "Simulated: how far from the best" in text
    assert "Simulated: latency against energy" not in text


def test_the_front_has_the_policies_that_none_beats_in_both_latency_and_energy() -> None:
    assert SimulatedResults(SIMULATED["a-day-at-home"]).front == ["resplit", "static"]


def test_each_move_has_what_was_predicted_beside_what_was_measured(tmp_path: Path) -> None:
    run = RUNS[1]
    decisions = list(run.decisions)
    index = next(place for place, each in enumerate(decisions) if each.action != "keep")
    outcome = DecisionOutcome(deployed=2, prepare_s=0.4)
    decisions[index] = replace(decisions[index], outcome=outcome)
    page = write_report([replace(run, decisions=tuple(decisions))], tmp_path).read_text(encoding="utf-8")
    section = page[page.index("Cost and gain of each move") :]
    section = section[: section.index("</section>")]
    assert section.count("<tr>") == 2  # the head and one move: the others did not go live by a decision
    moved = run.epochs.set_index("epoch").loc[2]
    done = run.requests[run.requests.status == 200]
    before = done[(done.arrival_s >= moved.time_s - 20) & (done.arrival_s < moved.time_s)]
    assert f"<td>4.80 s → {(before.end_s - before.arrival_s).mean():.2f} s</td>" in section
    assert f"<td>28 MB → {moved.moved_bytes / 1e6:.0f} MB</td>" in section
    assert "<td>0.00 s → 0.40 s</td>" in section
    assert f"<td>0.03 s → {moved.pause_s:.2f} s</td>" in section


def test_each_run_that_was_simulated_is_beside_its_simulation(tmp_path: Path) -> None:
    slower = RUNS[0].requests.assign(end_s=lambda table: table.arrival_s + 1.1 * (table.end_s - table.arrival_s))
    page = write_report(RUNS, tmp_path, Extras(replays={"static": replace(RUNS[0], requests=slower)}))
    text = page.read_text(encoding="utf-8")
    section = text[text.index("Simulator against reality") :]
    section = section[: section.index("</section>")]
    assert "(+10 %)" in section
    assert section.count("<td>static</td>") == 1
    assert "adaptive" not in section


def test_without_a_simulated_study_and_without_a_recovery_the_page_says_nothing_of_them(folder: Path) -> None:
    text = Elements(folder / "index.html").text
    assert "imulat" not in text
    assert "Recoveries" not in text
