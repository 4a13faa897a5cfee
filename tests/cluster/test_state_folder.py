"""The state folder: private, used by one process at a time, and never read as that of another release or model."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from resplit.cluster.local import _prepare_state as prepare_state
from resplit.cluster.state_folder import claim_for_model, in_use, make_private
from resplit.config import load_cluster
from resplit.control.log import EpochLog
from resplit.errors import ConfigError
from tests.support.cluster import CLUSTER
from tests.support.processes import run_resplit


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_state_folder_is_its_owners_only_without_a_warning(state: Path) -> None:
    with capture_logs() as logs, in_use(state):
        assert mode(state) == 0o700
        assert mode(state / "lock") == 0o600
    assert logs == []


def test_an_open_folder_and_files_with_secrets_are_mended_with_a_warning(state: Path) -> None:
    state.mkdir(mode=0o755)
    for name in ("control.token", "epochs.db", "epochs.db-wal", "cost.json"):
        (state / name).touch(mode=0o644)
    with capture_logs() as logs, in_use(state):
        assert mode(state) == 0o700
        assert {mode(state / name) for name in ("control.token", "epochs.db", "epochs.db-wal")} == {0o600}
    assert [(entry["log_level"], entry.get("files")) for entry in logs] == [
        ("warning", None),
        ("warning", "control.token, epochs.db, epochs.db-wal"),
    ]


def test_a_folder_for_all_users_is_refused_as_it_is(state: Path) -> None:
    state.mkdir()
    state.chmod(0o1777)
    with pytest.raises(ConfigError, match="is a folder for all users"):
        make_private(state)
    assert mode(state) == 0o1777


def test_a_folder_that_cannot_be_made_is_an_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="file/state: cannot be used as the state folder"),
        in_use(tmp_path / "file" / "state"),
    ):
        pass


def test_a_second_user_of_the_folder_is_refused_with_the_holder(state: Path) -> None:
    with in_use(state):
        holder = rf"{state}: is in use by process {os.getpid()} \(.+\); stop that, or choose another --state"
        with pytest.raises(ConfigError, match=holder), in_use(state):
            pass
    with in_use(state):
        pass


def test_the_lock_holds_until_the_last_process_that_inherited_it_ends(state: Path) -> None:
    with in_use(state) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(ConfigError, match="is in use by process"), in_use(state):
        pass
    child.communicate(b"\n")
    with in_use(state):
        pass


def test_after_a_crash_the_lock_is_free_once_the_children_of_the_dead_process_have_ended(state: Path) -> None:
    child = orphan_with_the_lock_of(state, ends_after_s=0.5)
    with in_use(state):
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_children_that_outlive_a_dead_process_are_named_as_its_own(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resplit.cluster.state_folder._ORPHANS_END_WITHIN_S", 0.1)
    child = orphan_with_the_lock_of(state, ends_after_s=60)
    try:
        with (
            pytest.raises(ConfigError, match=r"in use by processes that process \d+ \(.*\) left behind"),
            in_use(state),
        ):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def orphan_with_the_lock_of(state: Path, ends_after_s: float) -> int:
    """A process whose parent took the lock of a state folder and was killed."""
    program = f"""
import os, pathlib, signal, subprocess, sys
from resplit.cluster.local import _prepare_state as prepare_state
from resplit.cluster.state_folder import in_use
with in_use(pathlib.Path({str(state)!r})) as lock:
    quiet = {{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}}
    child = subprocess.Popen(["sleep", "{ends_after_s}"], pass_fds=(lock,), **quiet)
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).stdout)


@pytest.mark.parametrize("name", ["intent.json", "picture.json"])
def test_the_state_of_an_earlier_release_is_refused_and_left_as_it_is(state: Path, name: str) -> None:
    state.mkdir(mode=0o700)
    (state / name).write_text('{"trust": {"n1": false}}')
    with pytest.raises(ConfigError, match=f"earlier release: {name} can hold drains and trust"), in_use(state):
        pass
    assert (state / name).exists()


def test_the_state_of_a_later_release_is_refused(state: Path) -> None:
    state.mkdir(mode=0o700)
    claim_for_model(state, "tiny", "a1", has_epochs=False)
    (state / "state.json").write_text((state / "state.json").read_text().replace('"layout": 1', '"layout": 2'))
    with pytest.raises(ConfigError, match="has layout 2, and this release reads 1"), in_use(state):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"layout": 1, "model": 3}'])
def test_a_stamp_that_cannot_be_read_is_an_error_with_its_place(state: Path, content: str) -> None:
    state.mkdir(mode=0o700)
    (state / "state.json").write_text(content)
    with pytest.raises(ConfigError, match=r"state\.json: cannot be read"), in_use(state):
        pass


def test_the_epochs_of_another_model_are_refused(state: Path) -> None:
    state.mkdir()
    claim_for_model(state, "tiny", "a1", has_epochs=False)
    claim_for_model(state, "tiny", "a1", has_epochs=True)
    with pytest.raises(ConfigError, match=r"another model or other weights \(tiny\), not of this one \(fine-tuned\)"):
        claim_for_model(state, "fine-tuned", "b2", has_epochs=True)
    claim_for_model(state, "fine-tuned", "b2", has_epochs=False)
    claim_for_model(state, "fine-tuned", "b2", has_epochs=True)


def test_epochs_without_a_note_of_their_model_are_refused(state: Path) -> None:
    state.mkdir()
    with pytest.raises(ConfigError, match=r"another model or other weights \(of an earlier release\)"):
        claim_for_model(state, "tiny", "a1", has_epochs=True)


def test_only_its_owner_can_read_an_epoch_log(tmp_path: Path) -> None:
    log = EpochLog(tmp_path / "epochs.db")
    log.append(1, "proposed")
    files = list(tmp_path.glob("epochs.db*"))
    assert len(files) == 3
    assert {mode(file) for file in files} == {0o600}


def test_serve_on_a_state_folder_in_use_names_the_holder(state: Path, tmp_path: Path) -> None:
    (tmp_path / "test.yaml").write_text(CLUSTER)
    with in_use(state):
        for command in ("serve", "up"):
            done = run_resplit(command, str(tmp_path / "test.yaml"), "--state", str(state), "--port", "0")
            assert done.returncode == 1
            assert f"is in use by process {os.getpid()} (" in done.stderr


def test_a_fresh_start_forgets_the_epochs_problem_changes_and_moves_of_the_cluster_before(state: Path) -> None:
    forgotten = ("epochs.db", "epochs.db-wal", "latest_problem.json", "desired_state.json", "history.json", "ready")
    with in_use(state):
        cluster_file = state / "given.yaml"
        cluster_file.write_text(CLUSTER)
        for name in (*forgotten, "cost.json"):
            (state / name).touch(0o600)
        prepare_state(cluster_file, load_cluster(cluster_file), state)
        assert [name for name in forgotten if (state / name).exists()] == []
        assert (state / "cost.json").exists()
