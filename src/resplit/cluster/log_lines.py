"""Reads what a process of the cluster logs, while it logs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_EVENT = re.compile(r"\d\d:\d\d:\d\d \[(\w+) *\] (.+)")


@dataclass
class LogLines:
    """The events in a log file, each given once. Other lines, such as progress bars of libraries, are left out."""

    file: Path
    _read_bytes: int = 0

    def new(self) -> list[tuple[str, str]]:
        """Level and text of the events since the last call; none if there is no file yet."""
        if not self.file.exists():
            return []
        with self.file.open("rb") as log:
            log.seek(self._read_bytes)
            content = log.read()
        whole = content[: content.rfind(b"\n") + 1]  # the rest is a line that is being written
        self._read_bytes += len(whole)
        found = (_EVENT.fullmatch(line.rstrip()) for line in whole.decode(errors="replace").splitlines())
        return [(match[1], match[2]) for match in found if match]
