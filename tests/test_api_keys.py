"""API keys: named in a cluster file in four ways, and in clear in no file that resplit writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from resplit.api_keys import digest
from resplit.cluster.local import _prepare_state
from resplit.config import ClusterConfig, load_cluster, parse_cluster, read_cluster
from resplit.control.desired_state import DesiredState, changes, load_desired_state, save_desired_state
from resplit.errors import ConfigError
from tests.support.cluster import CLUSTER

KEY, OTHER = "a-long-and-secret-one", "another-secret"


def content(*entries: Any) -> dict[str, Any]:
    """A cluster file's content whose only class has these API keys."""
    parsed = yaml.safe_load(CLUSTER)
    parsed["classes"][0]["api_keys"] = list(entries)
    return parsed


def written(folder: Path, *entries: Any) -> Path:
    """Such a cluster file."""
    (folder / "test.yaml").write_text(yaml.safe_dump(content(*entries)))
    return folder / "test.yaml"


def classes_by_key(*entries: Any) -> dict[bytes, str]:
    """The classes of the keys of such a cluster."""
    return parse_cluster(content(*entries), "test.yaml").classes_by_key()


def test_a_key_may_stand_in_the_file_as_its_hash_in_the_environment_or_in_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n{OTHER}\n")
    (tmp_path / "keys").chmod(0o600)
    monkeypatch.setenv("CHAT_KEY", KEY)
    one = {digest(KEY): "chat"}
    assert classes_by_key(KEY) == one
    assert classes_by_key({"sha256": digest(KEY).hex()}) == one
    assert classes_by_key({"env": "CHAT_KEY"}) == one
    assert classes_by_key({"file": str(tmp_path / "keys")}) == one | {digest(OTHER): "chat"}


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ({}, "give a key, or one of"),
        ({"env": "A", "file": "b"}, "give a key, or one of"),
        ({"sha256": KEY}, "should match pattern"),
        ({"environment": "A"}, "unknown key"),
    ],
)
def test_an_entry_that_names_no_single_source_is_refused(entry: dict[str, str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"classes\.0\.api_keys\.0.*{rule}") as refusal:
        parse_cluster(content(entry), "test.yaml")
    assert KEY not in str(refusal.value)


def test_a_section_in_the_wrong_place_does_not_show_its_keys() -> None:
    with pytest.raises(ConfigError, match="classes: a section should be a valid") as refusal:
        parse_cluster({**content(KEY), "classes": content(KEY)["classes"][0]}, "test.yaml")
    assert KEY not in str(refusal.value)


def test_a_source_without_a_key_is_refused_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHAT_KEY", raising=False)
    (tmp_path / "empty").touch(mode=0o600)
    for entry, rule in [
        ({"env": "CHAT_KEY"}, "classes: chat: api_keys: the environment variable CHAT_KEY holds no key"),
        ({"file": str(tmp_path / "empty")}, "empty holds no key"),
        ({"file": str(tmp_path / "missing")}, "missing: cannot be read as a file of API keys"),
    ]:
        with pytest.raises(ConfigError, match=rule):
            classes_by_key(entry)


def test_a_file_of_keys_that_others_may_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    (tmp_path / "keys").chmod(0o640)
    with pytest.raises(ConfigError, match=r"keys: other users .* \(mode 0640\).*chmod go= ") as refusal:
        classes_by_key({"file": str(tmp_path / "keys")})
    assert KEY not in str(refusal.value)


def assert_no_key_in(folder: Path) -> None:
    """No file below `folder` contains the key."""
    assert [file for file in folder.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()] == []


def test_no_state_file_and_no_configuration_holds_a_key_in_clear(tmp_path: Path) -> None:
    file, state = written(tmp_path, KEY), tmp_path / "state"
    config = load_cluster(file)
    assert KEY not in repr(config)
    _prepare_state(file, config, state)
    started_with = read_cluster(state / "cluster.yaml")
    desired = DesiredState(started_with).with_file(content(KEY) | {"private_layers": 2})
    save_desired_state(desired, started_with, state / "desired_state.json")
    assert_no_key_in(state)
    assert ClusterConfig.model_validate(desired.effective).classes_by_key() == {digest(KEY): "chat"}


def test_the_hash_of_a_key_is_no_change_of_the_key() -> None:
    clear, hashed = DesiredState(content(KEY)), DesiredState(content({"sha256": digest(KEY).hex()}))
    assert changes(clear, hashed) == []
    with pytest.raises(ConfigError, match="api_keys"):
        changes(clear, DesiredState(content(OTHER)))


def test_keys_in_clear_of_an_earlier_desired_state_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "desired_state.json"
    save_desired_state(DesiredState(content(KEY)), content(KEY), path)
    assert KEY in path.read_text()
    loaded = load_desired_state(path, read_cluster(written(tmp_path, KEY)))
    assert KEY not in repr(loaded)
    assert loaded.cluster.classes_by_key() == {digest(KEY): "chat"}
