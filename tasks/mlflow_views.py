"""The saved MLflow views that compare policies.

A view is JSON in a tag of the experiment; the page `/#/experiments/<id>/runs?viewStateShareKey=<key>` opens it. MLflow
does not document this format: it is that of the pages of MLflow 3.17.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

TAG_PREFIX = "mlflow.sharedViewState."
POLICIES, CONFIGURATIONS = "policies", "configurations"
# The page shows these names above the charts, so they include their units.
OVER_TIME = ("over_time/latency_s", "over_time/qos_met", "over_time/utilization")
AT_A_GLANCE = ("latency_mean_s", "latency_p95_s", "qos_met")
SIMULATED = ("latency_mean_s", "latency_p95_s", "qos_met", "energy_j_per_request")
MORE = ("first_token_mean_s", "downtime_incidents", "utilization")
PREDICTED = ("predicted_latency_s", "measured_latency_s", "pause_s")


def saved_views(study_run_id: str, metrics: Collection[str], saved_ms: int) -> dict[str, str]:
    """The experiment tags with both views of a study: its policies, and the configurations that were live.

    `metrics` are the names of all metrics of its runs: MLflow adds a chart for each that has no card.
    """
    policies = _state(study_run_id, "policy", AT_A_GLANCE, MORE, metrics)
    live = _state(study_run_id, "configuration", PREDICTED, (), metrics)
    return {
        TAG_PREFIX + POLICIES: _envelope("Static against adaptive", policies, saved_ms),
        TAG_PREFIX + CONFIGURATIONS: _envelope("Configurations that were live", live, saved_ms),
    }


def simulated_view(study_run_id: str, metrics: Collection[str], saved_ms: int) -> dict[str, str]:
    """The experiment tag with the view of a simulated study: means over the seeds, by scenario and policy."""
    state = _state(study_run_id, "simulated", SIMULATED, MORE, metrics, by=("scenario", "policy"))
    return {TAG_PREFIX + POLICIES: _envelope("Simulated policies by scenario", state, saved_ms)}


def view_path(experiment_id: str, key: str) -> str:
    """The part of a view's address after the server's."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={key}&compareRunsMode=CHART"


def _envelope(name: str, state: dict[str, object], saved_ms: int) -> str:
    return json.dumps({"name": name, "createdAt": saved_ms, "updatedAt": saved_ms, "state": json.dumps(state)})


def _state(
    study_run_id: str,
    kind: str,
    bars: tuple[str, ...],
    more: tuple[str, ...],
    metrics: Collection[str],
    by: Sequence[str] = (),
) -> dict[str, object]:
    """What the page shows of the runs of a kind. Those with the same parameters `by` are shown as their mean."""
    keys = [{"mode": "param", "groupByData": name} for name in by]
    cards = [_card("BAR", metric, "bars") for metric in bars]
    cards += [_card("LINE", metric, "lines") for metric in OVER_TIME]
    cards += [_card("BAR", metric, "more") for metric in more]
    unwanted = [metric for metric in metrics if metric not in (*bars, *OVER_TIME, *more)]
    cards += [_card("BAR", metric, "more", deleted=True) for metric in unwanted]
    sections = {"bars": "At a glance", "lines": "Over time (step = second of the run)"} | (
        {"more": "More"} if more else {}
    )
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{study_run_id}' and params.kind = '{kind}'",
        # In order of creation, which is the default, the page folds children under their parent.
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [f"metrics.`{metric}`" for metric in (*bars, *more)],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": cards,
        "compareRunSections": [_section(uuid, name) for uuid, name in sections.items()],
        "isAccordionReordered": True,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": keys} if keys else None,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "viewMaximized": False,
        "runListHidden": False,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _card(kind: str, metric: str, section: str, deleted: bool = False) -> dict[str, object]:
    card: dict[str, object] = {
        "uuid": f"{section}-{metric}",
        "type": kind,
        "runsCountToCompare": 20,
        "metricSectionId": section,
        "deleted": deleted,
        "isGenerated": False,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
    }
    if kind == "LINE":
        card |= {
            "lineSmoothness": 0,
            "scaleType": "linear",
            "xAxisScaleType": "linear",
            "range": {},
            "xAxisKey": "step",
            "selectedXAxisMetricKey": "",
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "ignoreOutliers": False,
            "displayPoints": False,
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
        }
    return card


def _section(uuid: str, name: str) -> dict[str, object]:
    return {"uuid": uuid, "name": name, "display": True, "isReordered": False, "deleted": False, "isGenerated": False}
