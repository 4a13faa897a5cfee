"""The desired state: commands and files applied one after another, and the state after a restart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
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


def test_commands_accumulate_and_their_changes_are_listed() -> None:
    first = DesiredState(FILE)
    then = first.with_drained("gamma").with_trust("beta", False).with_trust("gamma", True)
    assert then.cluster.trusted == ("alpha", "gamma")
    assert then.drained == {"gamma"}
    assert changes(first, then) == ["beta is not trusted any more", "gamma is trusted", "gamma is drained"]
    assert changes(then, then.with_joined("gamma")) == ["gamma is used again"]
    assert changes(first, first.with_drained("gamma").with_joined("gamma")) == []


def test_a_file_does_not_undo_a_drain_or_removed_trust() -> None:
    now = DesiredState(FILE).with_drained("gamma").with_trust("beta", False)
    after = now.with_file(with_nodes(*FILE["nodes"], DELTA))
    assert after.cluster.trusted == ("alpha",)
    assert after.drained == {"gamma"}
    assert changes(now, after) == ["delta is added"]


def test_a_file_ends_trust_given_by_command() -> None:
    now = DesiredState(FILE).with_trust("gamma", True)
    assert now.with_file(FILE).cluster.trusted == ("alpha", "beta")


def test_a_node_without_an_address_in_the_file_keeps_its_current_one() -> None:
    bare = [{key: value for key, value in node.items() if key != "address"} for node in FILE["nodes"]]
    assert changes(DesiredState(FILE), DesiredState(FILE).with_file(with_nodes(*bare))) == []


def test_commands_about_a_removed_node_are_forgotten() -> None:
    now = DesiredState(FILE).with_drained("gamma").with_trust("gamma", True)
    gone = now.with_file(with_nodes(*FILE["nodes"][:2]))
    back = gone.with_file(FILE)
    assert (back.drained, back.cluster.trusted) == (frozenset(), ("alpha", "beta"))


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("weights", {**FILE, "weights": "bfloat16"}),
        ("kv_tokens", {**FILE, "kv_tokens": 128}),
        ("limits", {**FILE, "limits": {"sessions": 3}}),
        ("source", {**FILE, "source": "beta"}),
        ("links: alpha - beta", {**FILE, "links": {"default": {"latency": "1 ms", "bandwidth": "1 Gbit/s"}}}),
        ("classes: api_keys", {**FILE, "classes": [{**FILE["classes"][0], "api_keys": ["a-long-one"]}]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_key_that_cannot_change_on_a_running_cluster_is_refused_by_name(key: str, content: dict[str, Any]) -> None:
    now = DesiredState(FILE)
    with pytest.raises(ConfigError, match=f"^{key}: cannot change on a running cluster; restart"):
        changes(now, now.with_file(content))


def test_changes_that_a_running_cluster_can_follow_are_listed() -> None:
    now = DesiredState(FILE)
    nodes = [{**FILE["nodes"][0], "memory": "5 MiB"}, {**FILE["nodes"][1], "max_utilization": 0.5}]
    classes = [{**FILE["classes"][0], "slo": "3 s"}]
    content = {**with_nodes(*nodes), "classes": classes, "private_layers": 2, "objective": {"latency": 2}}
    assert changes(now, now.with_file(content)) == [
        "gamma is removed",
        "alpha: memory changed; restart the node with the file to apply it",
        "beta: max_utilization is 0.5",
        "private_layers is 2",
        "classes are changed",
        "the objective is changed",
    ]


def test_a_changed_power_is_listed() -> None:
    powered = with_nodes({**FILE["nodes"][0], "compute_w": "15 W"}, *FILE["nodes"][1:])
    assert changes(DesiredState(FILE), DesiredState(powered)) == ["alpha: compute_w is 15 W"]
    assert changes(DesiredState(powered), DesiredState(FILE)) == ["alpha: compute_w is not known any more"]


def test_an_unknown_node_and_an_invalid_cluster_file_are_refused() -> None:
    with pytest.raises(ConfigError, match="'attic': not in this cluster; it has alpha, beta, gamma"):
        DesiredState(FILE).with_drained("attic")
    with pytest.raises(ConfigError, match="cluster file: kv_token: unknown key"):
        DesiredState(FILE).with_file({**FILE, "kv_token": 3})


def test_a_restart_with_the_same_file_keeps_the_desired_state(tmp_path: Path) -> None:
    path = tmp_path / "desired_state.json"
    assert load_desired_state(path, FILE) == DesiredState(FILE)
    applied = (
        DesiredState(FILE).with_file(with_nodes(*FILE["nodes"], DELTA)).with_drained("beta").with_trust("gamma", True)
    )
    save_desired_state(applied, FILE, path)
    assert path.stat().st_mode & 0o777 == 0o600  # it has the digests of API keys
    assert load_desired_state(path, FILE) == applied  # `resplit up` always starts with the file of the first start
    assert load_desired_state(path, applied.content) == applied


def test_a_restart_with_another_file_applies_it_but_does_not_undo_removed_trust(tmp_path: Path) -> None:
    path = tmp_path / "desired_state.json"
    save_desired_state(DesiredState(FILE).with_trust("beta", False).with_trust("gamma", True), FILE, path)
    restarted = load_desired_state(path, {**FILE, "weights": "bfloat16"})
    assert restarted.cluster.weights == "bfloat16"
    assert restarted.cluster.trusted == ("alpha",)


def test_a_desired_state_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "desired_state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"desired_state\.json: cannot be read"):
        load_desired_state(tmp_path / "desired_state.json", FILE)


def test_a_state_that_a_full_disk_refuses_is_named_and_the_saved_one_stays(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    path, saved = tmp_path / "desired_state.json", DesiredState(FILE)
    save_desired_state(saved, FILE, path)
    refusal = r"desired_state\.json: cannot be written \(.+\); nothing was changed; check the room"
    with full_disk(10), pytest.raises(ConfigError, match=refusal):
        save_desired_state(saved.with_trust("beta", False), FILE, path)
    assert load_desired_state(path, FILE) == saved
