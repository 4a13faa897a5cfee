"""Files that survive crashes, and files that only their owner may access.

A reader of a file written here sees the whole old content or the whole new content, never a part.
"""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path

from resplit.errors import ConfigError

_OTHERS = 0o077  # what group and others may do


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
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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
