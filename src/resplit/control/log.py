"""The durable log of the controller: the steps of each epoch, written before it acts on them, and its decisions.

`after` is the state machine of epochs as a pure function; `EpochLog` keeps its steps in SQLite.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from resplit.decide import Brought, Decision
from resplit.epochs import Proposal
from resplit.errors import CapacityError, ConfigError, DataError, ProposalRefusedError
from resplit.files import NOTHING_WRITTEN

EpochStep = Literal["proposed", "prepared", "committed", "aborted", "released"]

_SCHEMA = """
create table if not exists steps (
    id integer primary key, epoch integer not null, step text not null, detail text not null
);
create table if not exists decisions (id integer primary key autoincrement, body text not null);
"""
_PROPOSAL = TypeAdapter(Proposal)
_BUSY_TIMEOUT_S = 5.0  # how long a write waits for a lock of another process


@dataclass(frozen=True)
class Aborted:
    """Why an epoch was aborted."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    reason: str


Detail = Proposal | Aborted
_DETAIL: TypeAdapter[Detail] = TypeAdapter(Detail)


class Entry(NamedTuple):
    """One step of an epoch; with its proposal if it is proposed or committed, with the reason if it is aborted."""

    step: EpochStep
    detail: Detail | None = None


@dataclass(frozen=True)
class Epochs:
    """The state of all epochs; only `after` makes a new one.

    `live` is the committed epoch that serves. `pending` is the one epoch, if any, that is proposed or prepared and
    neither committed nor aborted. `superseded` epochs were live before and are not released yet. `highest` is the
    highest number of any epoch.
    """

    live: int | None = None
    pending: int | None = None
    pending_step: EpochStep | None = None
    superseded: frozenset[int] = frozenset()
    highest: int = 0


def after(epochs: Epochs, epoch: int, step: EpochStep) -> Epochs:
    """The state of all epochs after `step` of `epoch`; ProposalRefusedError if the step may not happen now.

    proposed -> prepared -> committed -> (a later one is committed) -> released
    proposed or prepared -> aborted
    """
    if step == "proposed":
        if epochs.pending is not None:
            raise _refused(epoch, step, f"epoch {epochs.pending} is {epochs.pending_step}: commit or abort that first")
        if epoch <= epochs.highest:
            raise _refused(epoch, step, f"its number must be above {epochs.highest}")
        return replace(epochs, pending=epoch, pending_step=step, highest=epoch)
    if step == "released":
        if epoch not in epochs.superseded:
            raise _refused(epoch, step, "only an epoch that was live and was superseded can be released, and only once")
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
    previous = {epochs.live} if epochs.live is not None else set()
    return replace(settled, live=epoch, superseded=epochs.superseded | previous)


class EpochLog:
    """The log in one SQLite file. A step survives a crash once `append` has returned.

    Several threads may use it. Steps that a second process writes to the file are read too, under the same rules.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._epochs = Epochs()
        self._read_up_to = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # SQLite's other files get the mode of this one
            self._database = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = full")
            self._database.executescript(_SCHEMA)
            self._catch_up()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(str(path), f"cannot be used as an epoch log ({error})") from None

    def close(self) -> None:
        """Close the file. Nothing is lost if this is not called."""
        self._database.close()

    @property
    def epochs(self) -> Epochs:
        """The state of all epochs now."""
        with self._lock:
            self._catch_up()
            return self._epochs

    def append(self, epoch: int, step: EpochStep, detail: Detail | None = None) -> None:
        """Write one step, before the controller acts on it; `detail` as in `Entry`.

        ProposalRefusedError if the step may not happen now (`after`), CapacityError if it cannot be written. In both
        cases the log is unchanged.
        """
        content = json.dumps(asdict(detail) if detail else {}, allow_nan=False)
        with self._transaction():
            self._catch_up()
            after(self._epochs, epoch, step)
            self._database.execute("insert into steps (epoch, step, detail) values (?, ?, ?)", (epoch, step, content))

    def steps(self, epoch: int) -> list[Entry]:
        """The steps of `epoch`, in order."""
        rows = self._rows("select step, detail from steps where epoch = ? order by id", epoch)
        return [Entry(step, _DETAIL.validate_json(detail) if detail != "{}" else None) for step, detail in rows]

    def last_committed(self) -> Proposal | None:
        """The proposal that was committed last; None before the first. DataError if it cannot be read."""
        rows = self._rows("select epoch, detail from steps where step = 'committed' order by id desc limit 1")
        if not rows:
            return None
        epoch, detail = rows[0]
        try:
            return _PROPOSAL.validate_json(detail)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(f"{self._path}: committed epoch {epoch} is no proposal: {place}: {first['msg']}") from None

    def unfinished(self) -> list[int]:
        """The epoch that is proposed or prepared and neither committed nor aborted, if any: a list of at most one."""
        pending = self.epochs.pending
        return [] if pending is None else [pending]

    def unreleased(self) -> list[int]:
        """Epochs that were live before and are not released yet, the oldest first."""
        return sorted(self.epochs.superseded)

    def next_epoch(self) -> int:
        """The number for a new epoch; the first is 1."""
        return self.epochs.highest + 1

    def append_decision(self, decision: Decision) -> None:
        """Add a decision to the decision log; CapacityError if it cannot be written."""
        content = json.dumps(decision.to_json(), allow_nan=False)
        with self._transaction():
            self._database.execute("insert into decisions (body) values (?)", (content,))

    def add_brought(self, epoch: int, brought: Brought) -> None:
        """Add what a move brought to the decision that deployed `epoch`; CapacityError if it cannot be written.

        Does nothing if no decision did, as after an operator's command.
        """
        deployed = "json_extract(body, '$.outcome.deployed') = ?"
        rows = self._rows(f"select id, body from decisions where {deployed} order by id desc limit 1", epoch)
        for number, body in rows:
            decision = Decision.from_json(json.loads(body))
            assert decision.outcome is not None
            known = replace(decision, outcome=replace(decision.outcome, brought=brought))
            content = json.dumps(known.to_json(), allow_nan=False)
            with self._transaction():
                self._database.execute("update decisions set body = ? where id = ?", (content, number))

    def decisions(self, since_id: int = 0) -> list[Decision]:
        """The decisions numbered above `since_id`, with their numbers as `id`, in order."""
        rows = self._rows("select id, body from decisions where id > ? order by id", since_id)
        return [Decision.from_json(json.loads(body) | {"id": number}) for number, body in rows]

    def last_decision(self) -> int:
        """The number of the last decision; 0 if there is none."""
        return int(self._rows("select coalesce(max(id), 0) from decisions")[0][0])

    def _catch_up(self) -> None:
        """Apply the steps that were written since the last call, by this process or another one."""
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
                raise CapacityError(f"{self._path}: cannot be written ({error}); {NOTHING_WRITTEN}") from error
            finally:
                if self._database.in_transaction:
                    self._database.execute("rollback")


def _refused(epoch: int, step: EpochStep, why: str) -> ProposalRefusedError:
    return ProposalRefusedError(f"epoch {epoch} cannot be {step}: {why}")
