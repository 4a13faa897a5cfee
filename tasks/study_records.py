"""The records of a study's runs, in a folder for each run, so that what is done is not done again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from resplit.comparison import run_label
from resplit.records import RunRecord

__all__ = ["StudyRecords", "digest_of"]


def digest_of(files: Iterable[Path], *values: str) -> str:
    """A short name for the content of files and for other inputs. OSError if a file cannot be read."""
    digest = hashlib.sha256()
    for part in (*(path.read_bytes() for path in files), *(value.encode() for value in values)):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:12]


class StudyRecords:
    """The records below `folder`, which belongs to one scenario and to one state of its inputs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, label: str, seed: int) -> bool:
        """Whether this run is done."""
        return self._path(label, seed).exists()

    def save(self, record: RunRecord) -> None:
        """Keep the record of a run. It is there as a whole or, after a crash, not at all."""
        path = self._path(run_label(record), record.seed)
        unfinished = path.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        record.save(unfinished)
        unfinished.replace(path)

    def load(self) -> list[RunRecord]:
        """All records, by policy and seed."""
        paths = sorted(path for path in self._folder.glob("*") if path.suffix != ".unfinished")
        return [RunRecord.load(path) for path in paths]

    def _path(self, label: str, seed: int) -> Path:
        return self._folder / f"{label}-{seed}"
