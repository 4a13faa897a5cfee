"""What the cluster is to be: commands and files, one after the other, and what survives a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resplit.control.desired_state import DesiredState, changes, load_desired_state, save_desired_state
from resplit.errors import ConfigError

FILE: dict[str, Any] = {
    "name": "test",
    "source": "alpha",
    "trusted": ["alpha", "beta"],
    "nodes": [{"name": name, "memory": "4 MiB", "address": f"{name}:7001"} for name in ("alpha", "beta", "gamma")],
    "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
    "kv_tokens": 64,
}
DELTA = {"name": "delta", "memory": "4 MiB", "address": "delta:7001"}


def with_nodes(*nodes: dict[str, Any]) -> dict[str, Any]:
    return {**FILE, "nodes": list(nodes)}


def test_commands_add_up_and_say_what_they_change() -> None:
    first = DesiredState(FILE)
    then = first.with_drained("gamma").with_trust("beta", False).with_trust("gamma", True)
    assert then.cluster.trusted == ("alpha", "gamma")
    assert then.drained == {"gamma"}
    assert changes(first, then) == ["beta is not trusted any more", "gamma is trusted", "gamma is drained"]
    assert changes(then, then.with_joined("gamma")) == ["gamma is used again"]
    assert changes(first, first.with_drained("gamma").with_joined("gamma")) == []


def test_a_file_gives_back_nothing_that_a_command_took() -> None:
    now = DesiredState(FILE).with_drained("gamma").with_trust("beta", False)
    after = now.with_file(with_nodes(*FILE["nodes"], DELTA))
    assert after.cluster.trusted == ("alpha",)
    assert after.drained == {"gamma"}
    assert changes(now, after) == ["delta is added"]


def test_a_file_takes_back_trust_that_a_command_gave() -> None:
    now = DesiredState(FILE).with_trust("gamma", True)
    assert now.with_file(FILE).cluster.trusted == ("alpha", "beta")


def test_a_node_without_an_address_keeps_its_own() -> None:
    bare = [{key: value for key, value in node.items() if key != "address"} for node in FILE["nodes"]]
    assert changes(DesiredState(FILE), DesiredState(FILE).with_file(with_nodes(*bare))) == []


def test_what_was_commanded_of_a_removed_node_is_forgotten() -> None:
    now = DesiredState(FILE).with_drained("gamma").with_trust("gamma", True)
    gone = now.with_file(with_nodes(*FILE["nodes"][:2]))
    back = gone.with_file(FILE)
    assert (back.drained, back.cluster.trusted) == (frozenset(), ("alpha", "beta"))


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("dtype", {**FILE, "dtype": "bfloat16"}),
        ("kv_tokens", {**FILE, "kv_tokens": 128}),
        ("limits", {**FILE, "limits": {"sessions": 3}}),
        ("source", {**FILE, "source": "beta"}),
        ("links: alpha - beta", {**FILE, "links": {"default": {"latency": "1 ms", "bandwidth": "1 Gbit/s"}}}),
        ("classes: api_keys", {**FILE, "classes": [{**FILE["classes"][0], "api_keys": ["a-long-one"]}]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_running_cluster_cannot_change_is_refused_by_its_key(key: str, content: dict[str, Any]) -> None:
    now = DesiredState(FILE)
    with pytest.raises(ConfigError, match=f"^{key}: cannot change on a running cluster; restart"):
        changes(now, now.with_file(content))


def test_what_it_can_change_is_said() -> None:
    now = DesiredState(FILE)
    nodes = [{**FILE["nodes"][0], "memory": "5 MiB"}, {**FILE["nodes"][1], "max_utilization": 0.5}]
    classes = [{**FILE["classes"][0], "slo": "3 s"}]
    content = {**with_nodes(*nodes), "classes": classes, "private_layers": 2, "weights": {"latency": 2}}
    assert changes(now, now.with_file(content)) == [
        "gamma is removed",
        "alpha: memory or emulate differ, which it obeys when it is restarted with the file",
        "beta: max_utilization is 0.5",
        "private_layers is 2",
        "classes are changed",
        "weights are changed",
    ]


def test_an_unknown_node_and_a_content_that_is_no_cluster_are_refused() -> None:
    with pytest.raises(ConfigError, match="'attic': not in this cluster; it has alpha, beta, gamma"):
        DesiredState(FILE).with_drained("attic")
    with pytest.raises(ConfigError, match="cluster file: kv_token: Extra inputs"):
        DesiredState(FILE).with_file({**FILE, "kv_token": 3})


def test_a_restart_with_the_same_file_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "desired_state.json"
    assert load_desired_state(path, FILE) == DesiredState(FILE)
    applied = (
        DesiredState(FILE).with_file(with_nodes(*FILE["nodes"], DELTA)).with_drained("beta").with_trust("gamma", True)
    )
    save_desired_state(applied, FILE, path)
    assert load_desired_state(path, FILE) == applied  # `resplit up` always starts with the file of the first start
    assert load_desired_state(path, applied.content) == applied


def test_a_restart_with_another_file_follows_it_but_gives_back_nothing_that_a_command_took(tmp_path: Path) -> None:
    path = tmp_path / "desired_state.json"
    save_desired_state(DesiredState(FILE).with_trust("beta", False).with_trust("gamma", True), FILE, path)
    restarted = load_desired_state(path, {**FILE, "dtype": "bfloat16"})
    assert restarted.cluster.dtype == "bfloat16"
    assert restarted.cluster.trusted == ("alpha",)


def test_a_file_of_commands_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "desired_state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"desired_state\.json: cannot be read"):
        load_desired_state(tmp_path / "desired_state.json", FILE)
