"""The files in deploy/ name metrics, options and members that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from resplit.cli import app
from resplit.config import load_cluster
from resplit.gateway.openai.prometheus import RequestMetrics, Stopwatch

DEPLOY = Path(__file__).parents[1] / "deploy"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
OPTIONS = {
    (each.name or each.callback.__name__): set(each.callback.__annotations__)
    for each in app.registered_commands
    if each.callback
}


async def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    metrics = RequestMetrics()
    watch = Stopwatch(metrics)
    watch.admit("chat", prompt_tokens=1)
    watch.token()
    watch.token()
    watch.status = 200
    watch.end()
    samples = [
        sample for family in text_string_to_metric_families(metrics.expose().decode()) for sample in family.samples
    ]
    labels = {sample.name: set(sample.labels) for sample in samples}

    dashboard = json.loads((DEPLOY / "grafana/resplit.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]

    named = {name for text in asked for name in re.findall(r"resplit_\w+", text)}
    assert named <= labels.keys()
    for text in asked:
        wanted = {name for group in re.findall(r"by \((.*?)\)", text) for name in group.split(", ")}
        assert wanted <= set.union(*(labels[name] for name in re.findall(r"resplit_\w+", text)))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gives_options_that_its_command_has(name: str) -> None:
    command = "serve" if name == "gateway" else "node"
    given = {each.removeprefix("--") for each in SERVICES[name]["command"] if each.startswith("--")}
    assert given <= OPTIONS[command]


def test_the_services_are_the_nodes_of_the_cluster_file_and_the_gateway() -> None:
    cluster = load_cluster(DEPLOY / "cluster.yaml")
    assert {*cluster.node_names, "gateway"} == set(SERVICES)
    for node in cluster.nodes:
        assert node.address == f"{node.name}:7001"
        assert node.name in SERVICES[node.name]["command"]


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_mounts_something_inside_a_volume(name: str) -> None:
    """Docker and podman create the folders above such a mount as root, and the process could not write there."""
    targets = [each.split(":")[1] for each in SERVICES[name]["volumes"]]
    inside = [(a, b) for a in targets for b in targets if b.startswith(f"{a}/")]
    assert not inside
