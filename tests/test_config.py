"""Cluster files: valid ones are read, and errors name the file, line, key and rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from resplit.config import load_cluster
from resplit.errors import ConfigError
from resplit.types import Weights
from tests.support.cluster_file import CLUSTER, cluster, written
from tests.support.three_nodes import three_node_config

DATA = Path(__file__).parents[1] / "data"


def test_a_cluster_file_is_read_in_its_units(tmp_path: Path) -> None:
    config = cluster(tmp_path)
    assert config.node_names == ["hub", "far"]
    assert config.node("hub").memory == 64 * 2**20
    assert config.classes[0].slo == 2.0
    emulation = config.node("hub").emulate
    assert emulation is not None
    assert emulation.decode_per_token.layer == 0.002
    assert (config.limits.context_tokens, config.objective.latency, config.private_layers) == (512, 1.0, 1)


def test_a_named_link_overrides_the_default_in_both_directions(tmp_path: Path) -> None:
    config = cluster(tmp_path, "- name: far", "- {name: third, memory: 1 MiB}\n  - name: far")
    for one, other in [("hub", "far"), ("far", "hub")]:
        shape = config.link(one, other)
        assert shape is not None
        assert (shape.latency, shape.bandwidth) == (pytest.approx(0.009), 1e6)
    default = config.link("hub", "third")
    assert default is not None
    assert (default.latency, default.bandwidth) == (0.001, 12.5e6)
    assert config.link("hub", "hub") is None


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "rule"),
    [
        ("kv_tokens", "kv_token", 18, "kv_token", "unknown key; do you mean kv_tokens?"),
        ("slo: 2 s", "slo_s: 2 s", 17, "classes.0.slo_s", "unknown key; do you mean slo?"),
        ("latency: 1 ms,", "latency: 1 ms, jitter: 1 ms,", 13, "links.default.jitter", "unknown key"),
        ("memory: 64 MiB", "memory: 64 Mbit/s", 6, "nodes.0.memory", "one of the units B, kB"),
        ("embed: 1 ms", "embed: 1 MiB", 8, "nodes.0.emulate.decode_per_token.embed", "one of the units us, ms"),
        ("bandwidth: 8 Mbit/s", "bandwidth: 8", 15, "links.pairs.0.bandwidth", "one of the units bit/s"),
        ("bandwidth: 8 Mbit/s", "bandwidth: 0 Mbit/s", 15, "links.pairs.0.bandwidth", "greater than 0"),
        ("    memory: 64 MiB\n", "", 5, "nodes.0.memory", "this key is missing"),
        ("source: hub", "source: attic", 2, "source", "'attic' is not in this cluster; it has hub, far"),
        ("trusted: [hub]", "trusted: [hub, attic]", 3, "trusted", "'attic' is not in this cluster"),
        ("between: [hub, far]", "between: [hub, attic]", 14, "links.pairs.between", "'attic' is not in this"),
        ("name: far", "name: hub", 4, "nodes", "the name 'hub' appears twice"),
        ("name: far", "name: Far_1", 10, "nodes.1.name", "'Far_1' should match pattern"),
        ("new_tokens: 8", "new_tokens: 0", 17, "classes.0.new_tokens", "0 should be greater than or equal to 1"),
        ("rate_rps: 1", "rate_rps: soon", 17, "classes.0.rate_rps", "'soon' should be a valid number"),
        (
            "kv_tokens: 64",
            "kv_tokens: 64\nobjective: {latency: -1}",
            19,
            "objective.latency",
            "greater than or equal to 0",
        ),
        (
            "kv_tokens: 64",
            "kv_tokens: 64\nobjective: {energy: -1}",
            19,
            "objective.energy",
            "greater than or equal to 0",
        ),
        ("kv_tokens: 64", "kv_tokens: 64\nobjective: {energy: 1}", 19, "objective.energy", "'hub' has none"),
        ("memory: 64 MiB", "memory: 64 MiB\n    compute_w: 15", 7, "nodes.0.compute_w", "one of the units mW, W, kW"),
        ("memory: 64 MiB", "memory: 64 MiB\n    compute_w: -1 W", 7, "nodes.0.compute_w", "needs a number"),
        ("kv_tokens: 64", "", 1, "kv_tokens", "this key is missing"),
    ],
)
def test_an_error_names_file_line_key_and_rule(
    tmp_path: Path, old: str, new: str, line: int, key: str, rule: str
) -> None:
    with pytest.raises(ConfigError) as error:
        cluster(tmp_path, old, new)
    assert str(error.value).startswith(f"{tmp_path / 'cluster.yaml'}:{line}: {key}: ")
    assert rule in error.value.rule
    assert "\n" not in str(error.value)


def test_power_and_the_weight_of_energy_are_read(tmp_path: Path) -> None:
    text = CLUSTER.replace("memory: 64 MiB", "memory: 64 MiB\n    compute_w: 1500 mW") + "objective: {energy: 0.5}\n"
    config = load_cluster(written(tmp_path, text))
    assert [node.compute_w for node in config.nodes] == [1.5, 1.5]
    assert config.objective.values() == Weights(latency=1.0, energy=0.5)


def test_classes_have_unique_names(tmp_path: Path) -> None:
    text = CLUSTER.replace("classes:\n", "classes:\n  - {name: chat, rate_rps: 1, prompt_tokens: 1, new_tokens: 1}\n")
    with pytest.raises(ConfigError, match=r":16: classes: the name 'chat' appears twice"):
        load_cluster(written(tmp_path, text))


def test_emulated_nodes_need_emulated_links(tmp_path: Path) -> None:
    text = CLUSTER[: CLUSTER.index("links:")] + CLUSTER[CLUSTER.index("classes:") :]
    with pytest.raises(ConfigError, match=r"links: emulated nodes need emulated links; add `links"):
        load_cluster(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: [hub\nname: x", ":2: is not YAML: expected ',' or ']'"),
        ("name: 'open", ": is not YAML: found unexpected end of stream"),
        ("a: b: c", ":1: is not YAML: mapping values are not allowed here"),
        ("\x00", ": is not YAML: "),
        ("- a list", ":1: needs keys with values, as in `name: home`, and is a list"),
        ("", ":1: needs keys with values, as in `name: home`, and is nothing"),
    ],
)
def test_a_file_that_is_no_cluster_gives_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_cluster(written(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreadable_file_is_named_in_the_error(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match=r"cluster.yaml: is not YAML"):
        load_cluster(path)
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read: No such file"):
        load_cluster(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_cluster(tmp_path)


@pytest.mark.parametrize("path", sorted((DATA / "clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_bundled_clusters_are_valid(path: Path) -> None:
    config = load_cluster(path)
    assert set(config.trusted) <= set(config.node_names)


def test_shed_late_needs_an_slo(tmp_path: Path) -> None:
    assert cluster(tmp_path, "slo: 2 s", "slo: 2 s, shed_late: true").request_class("chat").shed_late
    with pytest.raises(ConfigError, match="shed_late needs an slo"):
        cluster(tmp_path, "slo: 2 s", "shed_late: true")


def test_a_class_without_an_objective_counts_like_the_one_with_the_longest() -> None:
    plain = {"rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}
    classes = [{"name": "a", "slo": "1 s"}, {"name": "b", "slo": "3 s"}, {"name": "c"}]
    config = three_node_config(classes=[each | plain for each in classes])
    assert [config.objective_s(name) for name in "abc"] == [1.0, 3.0, 3.0]
    assert three_node_config(classes=[{"name": "c"} | plain]).objective_s("c") == 0.0
