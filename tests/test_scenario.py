"""Scenario files: valid ones are read, and errors name the file, line, key and rule. The JSON Schema agrees."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from resplit.config import load_cluster
from resplit.errors import ConfigError
from resplit.scenario import cluster_of, load_scenario, scenario_schema
from tests.support.cluster_file import cluster

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "docs" / "scenario.schema.json").read_text(encoding="utf-8"))
SHIPPED = sorted((ROOT / "data" / "scenarios").glob("*.yaml"))
SCENARIO = """\
name: day
duration: 1 min
nodes:
  - { at: 5 s, node: hub, slowdown: 4, label: throttles }
links:
  - { at: 6 s, between: [hub, far], latency: 50 ms, bandwidth: 1 Mbit/s, label: degrades }
load:
  - { at: 7 s, request_class: chat, rate_rps: 3, label: surge }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "day.yaml"
    path.write_text(text)
    return path


def test_a_scenario_is_read_and_matches_its_cluster(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, SCENARIO))
    assert (scenario.duration, scenario.nodes[0].at, scenario.links[0].latency) == (60.0, 5.0, 0.05)
    scenario.check_against(cluster(tmp_path), "day.yaml")


def test_a_scenario_knows_the_files_that_it_names() -> None:
    files = {name: load_scenario(Path(f"data/scenarios/{name}.yaml")).files for name in ("calm", "metropolis")}
    assert files["calm"] == []
    assert files["metropolis"] == ["../traces/topo_eua_melbourne_cbd.csv", "../traces/rtt_planetlab_pairs.csv.gz"]
    assert load_scenario(Path("data/scenarios/llama-7b.yaml")).files == ["../models/Llama-2-7B-q40.yaml"]
    assert "../traces/llm_azure2023_conv.csv" in load_scenario(Path("data/scenarios/chat-hours.yaml")).files


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("node: hub", "node: attic", "nodes: 'attic' is not in this cluster; it has hub, far"),
        ("node: hub", "node: far", "nodes: 'far' is real hardware"),
        ("[hub, far]", "[hub, attic]", "links: 'attic' is not in this cluster"),
        ("request_class: chat", "request_class: batch", "load: 'batch' is not in this cluster; it has chat"),
    ],
)
def test_a_scenario_with_an_unknown_name_is_refused(tmp_path: Path, old: str, new: str, rule: str) -> None:
    scenario = load_scenario(written(tmp_path, SCENARIO.replace(old, new)))
    with pytest.raises(ConfigError) as error:
        scenario.check_against(cluster(tmp_path), "day.yaml")
    assert str(error.value).startswith(f"day.yaml: {rule}")


def test_an_error_in_a_scenario_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r":4: nodes.0.slow: unknown key; do you mean slowdown"):
        load_scenario(written(tmp_path, SCENARIO.replace("slowdown", "slow")))
    with pytest.raises(ConfigError, match=r":8: load.0.at: .* needs a number"):
        load_scenario(written(tmp_path, SCENARIO.replace("at: 7 s", "at: 7")))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_bundled_scenario_fits_its_cluster(path: Path) -> None:
    scenario = load_scenario(path)
    scenario.check_against(load_cluster(cluster_of(path)), str(path))
    assert scenario.name == path.stem
    changes = [*scenario.nodes, *scenario.links, *scenario.load]
    assert max((change.at for change in changes), default=0.0) < scenario.duration


def test_a_scenario_that_names_no_cluster_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no cluster; add `cluster:"):
        cluster_of(written(tmp_path, SCENARIO))


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("duration: 1 min", "duration: 1 min\nsimulated_only: true", "is only for the simulator"),
        ("latency: 50 ms", "loss: 0.1", "links: 'degrades' sets loss, which only `resplit simulate` plays"),
        ("latency: 50 ms", "up: false", "links: 'degrades' sets up, which only"),
    ],
)
def test_a_cluster_refuses_what_only_the_simulator_plays(tmp_path: Path, old: str, new: str, rule: str) -> None:
    load_scenario(written(tmp_path, SCENARIO)).check_live("day.yaml")
    with pytest.raises(ConfigError) as error:
        load_scenario(written(tmp_path, SCENARIO.replace(old, new))).check_live("day.yaml")
    assert str(error.value).startswith(f"day.yaml: {rule}")


def test_the_schema_is_that_of_the_code() -> None:
    assert scenario_schema() == SCHEMA, "write it again: python -m resplit.scenario > docs/scenario.schema.json"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_bundled_scenario_keeps_the_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), SCHEMA)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("at: 7 s", "at: 7"),
        ("at: 7 s", "at: 7 parsecs"),
        ("slowdown: 4", "slowdown: 0"),
        ("slowdown: 4", "slow: 4"),
        ("rate_rps: 3", "rate_rps: -1"),
        ("name: day", "name: A day"),
        ("duration: 1 min", "duration: 1 min\ntraces: [{kind: tides, file: a.csv}]"),
    ],
)
def test_code_and_schema_refuse_the_same(tmp_path: Path, old: str, new: str) -> None:
    text = SCENARIO.replace(old, new)
    with pytest.raises(ConfigError):
        load_scenario(written(tmp_path, text))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), SCHEMA)
