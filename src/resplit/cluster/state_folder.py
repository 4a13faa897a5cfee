"""The state folder of a cluster: for its owner only, in use by one process at a time, of one layout and one model."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from resplit.errors import ConfigError
from resplit.files import open_to_others, write_atomically

_log = structlog.get_logger(__name__)
_ORPHANS_END_WITHIN_S = 5.0  # the children of an `up` that was killed end by themselves
_LOCK_POLL_S = 0.05
_LAYOUT = 1  # of the files in the folder; raise it when a release cannot read those of the one before
_STAMP = "state.json"
_SECRETS = ("control.token", "keyring.json", "desired_state.json", "latest_problem.json", "cluster.yaml", "epochs.db*")
# Their drains and lost trust would be forgotten without a word.
_EARLIER_LAYOUT = ("intent.json", "picture.json")


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[int]:
    """Make the state folder private and hold its lock until the end of the block; yields the lock's descriptor.

    A process that inherits the descriptor holds the lock too. ConfigError if another process holds it, if the folder
    cannot be made private, or if another release wrote it.
    """
    make_private(folder)
    lock = _locked(folder)
    try:
        _check_layout(folder)
        _mend_files(folder)
        yield lock
    finally:
        os.close(lock)


def make_private(folder: Path) -> None:
    """Create a folder that only its owner may access, or make it so. ConfigError if that is impossible."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
        if mode & stat.S_ISVTX:
            raise ConfigError(str(folder), "is a folder for all users, as its sticky bit says; choose another --state")
        if open_to_others(mode):
            folder.chmod(0o700)
            _log.warning(
                "other users of this machine could access the state folder; now they cannot", folder=str(folder)
            )
    except OSError as error:
        raise ConfigError(str(folder), f"cannot be used as the state folder ({error.strerror})") from None


def _locked(folder: Path) -> int:
    """The descriptor of the folder's lock file, locked for this process. Waits for the children of a dead holder."""
    path = folder / "lock"
    until_s = time.monotonic() + _ORPHANS_END_WITHIN_S
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be opened ({error.strerror})") from None
    try:
        while not _try_lock(descriptor):
            pid, _, command = os.pread(descriptor, 1000, 0).decode(errors="replace").partition(" ")
            if _runs(pid):
                rule = f"is in use by process {pid} ({command}); stop that, or choose another --state"
                raise ConfigError(str(folder), rule)
            if time.monotonic() > until_s:
                rule = f"is in use by processes that process {pid} ({command}) left behind; stop them"
                raise ConfigError(str(folder), rule)
            time.sleep(_LOCK_POLL_S)  # another process's lock has no event
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {' '.join(sys.argv)}".encode(), 0)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(str(path), f"cannot be locked ({error.strerror})") from None
    except ConfigError:
        os.close(descriptor)
        raise
    return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _runs(pid: str) -> bool:
    """Whether a process with this id runs. Not so for an empty id: the holder has not written its own yet."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _check_layout(folder: Path) -> None:
    """ConfigError if another release wrote files that this one does not read."""
    if found := [name for name in _EARLIER_LAYOUT if (folder / name).exists()]:
        raise ConfigError(
            str(folder),
            f"was written by an earlier release: {' and '.join(found)} can hold drains and trust set by command, which "
            "this release does not read; move them away, and repeat these commands once the cluster runs",
        )
    layout = _stamp(folder).get("layout", _LAYOUT)
    if layout != _LAYOUT:
        rule = (
            f"has layout {layout}, and this release reads {_LAYOUT}; use the release that wrote it, or another --state"
        )
        raise ConfigError(str(folder), rule)


def _mend_files(folder: Path) -> None:
    files = [file for pattern in _SECRETS for file in folder.glob(pattern)]
    mended = [file for file in files if open_to_others(file.stat().st_mode)]
    for file in mended:
        file.chmod(0o600)
    if mended:
        names = ", ".join(file.name for file in mended)
        _log.warning("other users of this machine could read files; make those with secrets again", files=names)


def claim_for_model(folder: Path, name: str, identity: str, has_epochs: bool) -> None:
    """Note that the state is that of the model `name`; `identity` differs for other weights.

    ConfigError if it is that of another model and `has_epochs`: these are placements of the other model's blocks.
    """
    known = _stamp(folder).get("model", {"name": "of an earlier release", "identity": None})
    if known["identity"] != identity and has_epochs:
        raise ConfigError(
            str(folder),
            f"holds the epochs of another model or other weights ({known['name']}), not of this one ({name}); choose "
            "another --state, or stop all nodes and delete epochs.db and latest_problem.json there",
        )
    stamp = {"layout": _LAYOUT, "model": {"name": name, "identity": identity}}
    write_atomically(folder / _STAMP, json.dumps(stamp, indent=1), 0o600)


def _stamp(folder: Path) -> dict[str, Any]:
    path = folder / _STAMP
    if not path.exists():
        return {}
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        int(stamp["layout"]), str(stamp["model"]["name"]), str(stamp["model"]["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error!r}); it says whose state this is") from None
    return dict(stamp)
