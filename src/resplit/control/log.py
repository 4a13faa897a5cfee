"""What the controller did and decided, on disk before it acts: the steps of each epoch, and the decisions.

Knows in which order steps may come and how to keep them; knows nothing of nodes or placements.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from resplit.errors import CapacityError, ConfigError, ProposalRefusedError

EpochStep = Literal["proposed", "prepared", "committed", "aborted", "released"]

_SCHEMA = """
create table if not exists steps (
    id integer primary key, epoch integer not null, step text not null, detail text not null
);
create table if not exists decisions (id integer primary key autoincrement, body text not null);
"""
_BUSY_S = 5.0


class Entry(NamedTuple):
    """One step of an epoch, and what was said of it."""

    step: EpochStep
    detail: dict[str, Any]


@dataclass(frozen=True)
class Epochs:
    """Where all epochs stand: one value, changed by `after` alone.

    `live` is the committed epoch that serves. `pending` was proposed or prepared and has no outcome yet; there is
    at most one. `superseded` were live before and are not released yet. `highest` is the highest number in use.
    """

    live: int | None = None
    pending: int | None = None
    pending_step: EpochStep | None = None
    superseded: frozenset[int] = frozenset()
    highest: int = 0


def after(epochs: Epochs, epoch: int, step: EpochStep) -> Epochs:
    """Where epochs stand once `step` of `epoch` has happened; ProposalRefusedError if it may not happen now.

    proposed -> prepared -> committed -> (a later one is committed) -> released
    proposed or prepared -> aborted
    """
    if step == "proposed":
        if epochs.pending is not None:
            raise _refused(epoch, step, f"epoch {epochs.pending} is {epochs.pending_step}: commit or abort it first")
        if epoch <= epochs.highest:
            raise _refused(epoch, step, f"numbers rise, and {epochs.highest} is used")
        return replace(epochs, pending=epoch, pending_step=step, highest=epoch)
    if step == "released":
        if epoch not in epochs.superseded:
            raise _refused(epoch, step, "only an epoch that was live, and is no longer, is released, and once")
        return replace(epochs, superseded=epochs.superseded - {epoch})
    if epoch != epochs.pending:
        raise _refused(epoch, step, f"the pending epoch is {epochs.pending}")
    needed = {"prepared": ("proposed",), "committed": ("prepared",), "aborted": ("proposed", "prepared")}[step]
    if epochs.pending_step not in needed:
        raise _refused(epoch, step, f"it is {epochs.pending_step}")
    if step == "prepared":
        return replace(epochs, pending_step=step)
    settled = replace(epochs, pending=None, pending_step=None)
    if step == "aborted":
        return settled
    overtaken = {epochs.live} if epochs.live is not None else set()
    return replace(settled, live=epoch, superseded=epochs.superseded | overtaken)


class EpochLog:
    """The durable log in one SQLite file. What `append` returned from survives a crash; what it did not, may not.

    May be used from several threads; a second process that writes is seen, and held to the same rules.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._epochs = Epochs()
        self._read_up_to = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = full")
            self._database.executescript(_SCHEMA)
            self._catch_up()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(str(path), f"is not an epoch log that can be used ({error})") from None

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._database.close()

    @property
    def epochs(self) -> Epochs:
        """Where all epochs stand now."""
        with self._lock:
            self._catch_up()
            return self._epochs

    def append(self, epoch: int, step: EpochStep, detail: Mapping[str, Any]) -> None:
        """Write one step before it is acted on; `detail` is JSON.

        ProposalRefusedError if the step may not come now (`after`), CapacityError if it cannot be written; then
        nothing was.
        """
        content = json.dumps(dict(detail), allow_nan=False)
        with self._transaction():
            self._catch_up()
            after(self._epochs, epoch, step)
            self._database.execute("insert into steps (epoch, step, detail) values (?, ?, ?)", (epoch, step, content))

    def steps(self, epoch: int) -> list[Entry]:
        """The steps of `epoch`, in order."""
        rows = self._rows("select step, detail from steps where epoch = ? order by id", epoch)
        return [Entry(step, json.loads(detail)) for step, detail in rows]

    def last_committed(self) -> tuple[int, dict[str, Any]] | None:
        """The live epoch and what was said when it was committed; None before the first."""
        rows = self._rows("select epoch, detail from steps where step = 'committed' order by id desc limit 1")
        return (rows[0][0], json.loads(rows[0][1])) if rows else None

    def unfinished(self) -> list[int]:
        """Epochs that were proposed or prepared and neither committed nor aborted: one at most."""
        pending = self.epochs.pending
        return [] if pending is None else [pending]

    def unreleased(self) -> list[int]:
        """Epochs that were live once and are still to be released, the oldest first."""
        return sorted(self.epochs.superseded)

    def next_epoch(self) -> int:
        """A number that no epoch had, from 1."""
        return self.epochs.highest + 1

    def append_decision(self, decision: Mapping[str, Any]) -> None:
        """Add a decision (JSON) to the decision log; CapacityError if it cannot be written."""
        content = json.dumps(dict(decision), allow_nan=False)
        with self._transaction():
            self._database.execute("insert into decisions (body) values (?)", (content,))

    def decisions(self, since_id: int = 0) -> list[tuple[int, dict[str, Any]]]:
        """The decisions after the one numbered `since_id`, with their numbers, in order."""
        rows = self._rows("select id, body from decisions where id > ? order by id", since_id)
        return [(number, json.loads(body)) for number, body in rows]

    def _catch_up(self) -> None:
        """Read the steps written since the last look, by this process or by another."""
        query = "select id, epoch, step from steps where id > ? order by id"
        for number, epoch, step in self._database.execute(query, (self._read_up_to,)):
            self._epochs = after(self._epochs, epoch, step)
            self._read_up_to = number

    def _rows(self, query: str, *values: int) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._database.execute("begin immediate")
                yield
                self._database.execute("commit")
            except sqlite3.Error as error:
                raise CapacityError(f"{self._path}: cannot be written ({error}); nothing was changed") from error
            finally:
                if self._database.in_transaction:
                    self._database.execute("rollback")


def _refused(epoch: int, step: EpochStep, why: str) -> ProposalRefusedError:
    return ProposalRefusedError(f"epoch {epoch} cannot be {step}: {why}")
