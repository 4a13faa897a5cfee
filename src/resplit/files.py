"""Files that survive crashes, files that only their owner may access, and scratch folders that no crash leaves behind.

A reader of a file written here sees the whole old content or the whole new content, never a part.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from resplit.errors import ConfigError

_OTHERS = 0o077  # what group and others may do
_SCRATCH = "fetch-"
NOTHING_WRITTEN = "nothing was changed; check the room and the permissions there"  # for errors that name the file


def write_atomically(path: Path, data: bytes | str, mode: int | None = None) -> None:
    """Replace the file at `path` with `data` (text is written as UTF-8) in one step that survives a power failure.

    The file gets exactly the permissions `mode`, or those that the umask leaves. Raises OSError where the file
    cannot be written, for example on a full disk; the old file is then untouched and no partial file remains.
    """
    content = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)  # the umask may have taken bits away
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write that fails names no file
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, which is deleted at the end. Its process holds a lock on it until then."""
    with locked(parent):  # nobody may take the folder for abandoned before it is locked
        scratch = Path(tempfile.mkdtemp(dir=parent, prefix=_SCRATCH))
        holding = contextlib.ExitStack()
        holding.enter_context(locked(scratch))
    with holding:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def delete_abandoned(parent: Path) -> None:
    """Delete the scratch folders in `parent` of processes that were killed; those in use remain."""
    if not any(parent.glob(f"{_SCRATCH}*")):
        return
    with locked(parent):
        for scratch in parent.glob(f"{_SCRATCH}*"):
            with contextlib.suppress(OSError), locked(scratch, wait=False):  # BlockingIOError: it is in use
                shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder, which ends with the process. Without `wait`: BlockingIOError if another has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def open_to_others(mode: int) -> bool:
    """Whether a file's or folder's mode lets others than its owner do anything."""
    return bool(mode & _OTHERS)


def read_secret(path: Path) -> bytes:
    """Content of a file that only its owner may access; ConfigError if others may. OSError if it cannot be read."""
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if open_to_others(mode):
            raise ConfigError(
                str(path),
                f"other users of this machine may access it (mode {mode:04o}), and it holds a secret; run "
                f"`chmod go= {path}`, and replace the secret if somebody may have read it",
            )
        return file.read()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable: until then a power failure may bring the old file back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
