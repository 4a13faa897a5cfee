"""Files are whole whenever a process ends, and its scratch folders do not stay."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resplit.files import delete_abandoned, scratch_folder, write_atomically

FullDisk = Callable[[int], AbstractContextManager[None]]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(versions=st.lists(st.binary(max_size=2000), min_size=1, max_size=4))
def test_the_file_holds_the_last_content_written_and_nothing_else_remains(
    tmp_path: Path, versions: list[bytes]
) -> None:
    path = tmp_path / "state.json"
    for content in versions:
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    write_atomically(tmp_path / "note", "fünf\n")
    assert (tmp_path / "note").read_bytes() == b"f\xc3\xbcnf\n"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_a_given_mode_is_set_regardless_of_the_umask_and_the_old_file(tmp_path: Path, umask: int) -> None:
    (tmp_path / "secret").write_text("old")
    (tmp_path / "secret").chmod(0o644)
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "secret", "new", 0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_without_a_mode_the_umask_decides(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_old_content_and_no_partial_file(tmp_path: Path, full_disk: FullDisk) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with full_disk(4096), pytest.raises(OSError, match=r"File too large: '.*/state\.json'"):
        write_atomically(path, bytes(100_000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_at_any_step_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no")

    for step in ("fsync", "fchmod", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(Path if step == "replace" else os, step, fail)
            with pytest.raises(OSError, match="no"):
                write_atomically(path, b"new", 0o600)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_content_and_rename_are_both_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    path = tmp_path / "state.json"

    def record(descriptor: int) -> None:
        target = os.fstat(descriptor)
        synced.append("folder" if stat.S_ISDIR(target.st_mode) else f"file of {target.st_size} bytes")
        assert path.exists() is stat.S_ISDIR(target.st_mode)  # content before the rename, folder after it

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(path, b"12345")
    assert synced == ["file of 5 bytes", "folder"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "state.json", b"content")


def test_the_scratch_folder_of_a_killed_process_is_deleted_and_one_in_use_is_not(tmp_path: Path) -> None:
    holds = "import sys, pathlib, resplit.files as f\nwith f.scratch_folder(pathlib.Path(sys.argv[1])) as scratch:\n"
    holds += "    (scratch / 'weights').write_text('half'); print(scratch, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        abandoned = Path(process.stdout.readline().strip())
        with scratch_folder(tmp_path) as own:
            delete_abandoned(tmp_path)
            assert sorted(tmp_path.iterdir()) == sorted([abandoned, own])
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert (abandoned / "weights").exists()
            delete_abandoned(tmp_path)
            assert list(tmp_path.iterdir()) == [own]
    assert list(tmp_path.iterdir()) == []
    delete_abandoned(tmp_path / "absent")
