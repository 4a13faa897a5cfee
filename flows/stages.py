"""The stages of `dvc.yaml`, one at a time: `python -m flows.stages model|profile|fit|plan|study|report`.

Each stage reads the files that the previous one wrote below `data/generated`, and uses the same tasks as the study.
"""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import structlog
from prefect import flow

from flows import STATE
from flows.command import run_command
from flows.params import Params, load_params
from flows.serving import Serving, supervised_cluster
from flows.study import REPORTS, inputs, publish, serve_policies
from resplit.cluster.client import ControlClient
from resplit.cluster.first_plan import plan_or_fail
from resplit.cost import block_timings, fit_cost_model, node_readings, prediction_error, problem_from
from resplit.problem import plan_to_json, problem_from_json, problem_to_json
from resplit.records import RunRecord
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures, RequestClass
from tasks.fit import last_good_model
from tasks.observe import profile as time_blocks
from tasks.package import obtain_model, package
from tasks.report import Extras
from tasks.validate import Need, validate_telemetry
from tasks.validation_page import render_html

GENERATED = Path("data/generated")
_log = structlog.get_logger(__name__)


def model(params: Params) -> None:
    """Obtain the model and seal its blocks; writes the features of the blocks."""
    cluster, _ = inputs(params)
    stored = obtain_model.fn(params.model, STATE, cluster)
    package.fn(stored, STATE)
    about = {"name": stored.name, "note": stored.note}
    blocks = [asdict(block) for block in stored.features(cluster.private_layers)]
    _write("model.json", about | {"features": blocks})


def profile(params: Params) -> None:
    """Start the cluster and time its blocks and links; writes the telemetry."""
    with supervised_cluster(params, STATE) as cluster, ControlClient(cluster.url, cluster.token) as client:
        time_blocks.fn(client).save(GENERATED / "telemetry")


def fit(params: Params) -> None:
    """Validate the telemetry and fit the cost model; writes the model, its errors and the result of the validation."""
    cluster, _ = inputs(params)
    telemetry, features = Telemetry.load(GENERATED / "telemetry"), _features()
    now_s = float(telemetry.nodes.time_s.max())
    need = Need(reports=1, messages=1)
    valid = validate_telemetry(telemetry, cluster.node_names, features, now_s, STATE / "quarantine", need=need)
    cost = fit_cost_model(valid.telemetry, features)
    (GENERATED / "cost.json").write_text(cost.to_json(), encoding="utf-8")
    (GENERATED / "validation.html").write_text(render_html(valid), encoding="utf-8")
    _write("prediction.json", prediction_error(cost))


def plan(params: Params) -> None:
    """Plan for the declared demand; writes the problem and the plan."""
    cluster, _ = inputs(params)
    telemetry, cost = Telemetry.load(GENERATED / "telemetry"), last_good_model(GENERATED / "cost.json")
    classes = [
        RequestClass(c.name, cluster.source, c.rate_rps, c.prompt_tokens, c.new_tokens, c.slo) for c in cluster.classes
    ]
    posed = problem_from(cost, _features(), cluster, node_readings(telemetry.nodes), classes)
    _write("problem.json", problem_to_json(posed))
    _write("plan.json", plan_to_json(plan_or_fail(posed).plan))


def study(params: Params) -> None:
    """Serve the workload under each policy; writes the record of each run."""
    _, scenario = inputs(params)
    cost = last_good_model(GENERATED / "cost.json")
    posed = problem_from_json(json.loads((GENERATED / "problem.json").read_text(encoding="utf-8")))
    first = plan_or_fail(posed)

    @flow(name="serve policies")
    def serve() -> list[RunRecord]:
        started = supervised_cluster(params, STATE)
        with started as cluster, ControlClient(cluster.url, cluster.token) as client:
            client.profile()
            return serve_policies(Serving(cluster, client, params, cost, posed, first), scenario)

    for name, record in zip(("undisturbed", "static", "adaptive"), serve(), strict=True):
        record.save(GENERATED / "runs" / name)


def report(params: Params) -> None:
    """Write the report and track the runs."""
    cluster, _ = inputs(params)
    records = [RunRecord.load(folder) for folder in sorted((GENERATED / "runs").iterdir())]
    about = json.loads((GENERATED / "model.json").read_text(encoding="utf-8"))
    cost = last_good_model(GENERATED / "cost.json")
    extras = Extras(
        model=about["name"],
        dequantised="dequantised" in about["note"],
        timings=block_timings(cost, Telemetry.load(GENERATED / "telemetry"), _features()),
        prediction_error=prediction_error(cost),
    )

    @flow(name="report")
    def write() -> str:
        return publish(records, params, cluster, STATE, REPORTS, extras)

    sys.stdout.write(f"{write()}\n")


STAGES: dict[str, Callable[[Params], None]] = {
    stage.__name__: stage for stage in (model, profile, fit, plan, study, report)
}


def _features() -> list[BlockFeatures]:
    about = json.loads((GENERATED / "model.json").read_text(encoding="utf-8"))
    return [BlockFeatures(**block) for block in about["features"]]


def _write(name: str, content: object) -> None:
    GENERATED.mkdir(parents=True, exist_ok=True)
    (GENERATED / name).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")


def main() -> None:
    """Run the stage that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python -m flows.stages {'|'.join(STAGES)}")
    run_command(lambda: STAGES[sys.argv[1]](load_params()))


if __name__ == "__main__":
    main()
