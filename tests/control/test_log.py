"""The epoch log accepts exactly the legal steps, and loses none of them in a crash."""

from __future__ import annotations

import itertools
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from resplit.control.log import Aborted, EpochLog, Epochs, EpochStep, after
from resplit.decide import Decision
from resplit.epochs import Proposal
from resplit.errors import CapacityError, ConfigError, DataError, ProposalRefusedError
from tests.support.properties import examples

STEPS: tuple[EpochStep, ...] = ("proposed", "prepared", "committed", "aborted", "released")
LETTER = {"proposed": "P", "prepared": "R", "committed": "C", "aborted": "A", "released": "L"}


def is_legal(history: list[tuple[int, EpochStep]]) -> bool:
    """The rules stated for a whole history. The code states them for one step, so the two can be compared."""
    return all(_last_step_is_legal(history[: end + 1]) for end in range(len(history)))


def _last_step_is_legal(history: list[tuple[int, EpochStep]]) -> bool:
    words: dict[int, str] = {}
    for number, step in history:
        words[number] = words.get(number, "") + LETTER[step]
    committed = [number for number, step in history if step == "committed"]
    return (
        all(re.fullmatch("P|PR|PRC|PRCL|PA|PRA", word) for word in words.values())
        and list(words) == sorted(words)
        and min(words) > 0
        and sum(word in ("P", "PR") for word in words.values()) <= 1
        and not (committed and words[committed[-1]].endswith("L"))
    )


def replay(history: list[tuple[int, EpochStep]]) -> Epochs | None:
    """The state after a history; None if the code refuses one of its steps."""
    epochs = Epochs()
    try:
        for number, step in history:
            epochs = after(epochs, number, step)
    except ProposalRefusedError:
        return None
    return epochs


def test_exactly_the_legal_histories_are_accepted() -> None:
    legal: list[list[tuple[int, EpochStep]]] = [[]]
    checked = 0
    for _ in range(7):
        longer = [[*history, entry] for history in legal for entry in itertools.product((1, 2, 3), STEPS)]
        for history in longer:
            assert (replay(history) is not None) == is_legal(history), history
        legal = [history for history in longer if is_legal(history)]
        checked += len(longer)
    assert checked > 1000


class LogMachine(RuleBasedStateMachine):
    """Any steps in any order, with crashes, restarts and a second writer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.restarts = 0
        self.log = EpochLog(self.folder / "0.db")
        self.history: list[tuple[int, EpochStep]] = []
        self.decided: list[float] = []

    def teardown(self) -> None:
        self.log.close()
        shutil.rmtree(self.folder)

    def _append(self, log: EpochLog, epoch: int, step: EpochStep) -> None:
        wanted = [*self.history, (epoch, step)]
        if is_legal(wanted):
            log.append(epoch, step, Aborted(f"step {len(wanted)}"))
            self.history = wanted
        else:
            with pytest.raises(ProposalRefusedError):
                log.append(epoch, step)

    @rule(epoch=st.integers(0, 8), step=st.sampled_from(STEPS))
    def any_step(self, epoch: int, step: EpochStep) -> None:
        self._append(self.log, epoch, step)

    @rule(last=st.sampled_from(["prepared", "committed", "aborted"]))
    def a_new_epoch(self, last: EpochStep) -> None:
        epoch = self.log.next_epoch()
        for step in ("proposed", "prepared", "committed", "aborted"):
            self._append(self.log, epoch, step)
            if step == last:
                break

    @rule()
    def release_all(self) -> None:
        for epoch in self.log.unreleased():
            self._append(self.log, epoch, "released")
        assert self.log.unreleased() == []

    @rule(epoch=st.integers(1, 8), step=st.sampled_from(STEPS))
    def a_step_by_a_second_process(self, epoch: int, step: EpochStep) -> None:
        other = EpochLog(self._path())
        self._append(other, epoch, step)
        other.close()

    @rule()
    def a_decision(self) -> None:
        self.log.append_decision(Decision(float(len(self.decided)), "keep"))
        self.decided.append(float(len(self.decided)))

    @rule()
    def restart(self) -> None:
        self.log.close()
        self.log = EpochLog(self._path())

    @rule(in_the_middle_of_a_step=st.booleans())
    def crash(self, in_the_middle_of_a_step: bool) -> None:
        """Continue from a copy of the files at this moment, as after a kill."""
        if in_the_middle_of_a_step:
            self.log._database.execute("begin immediate")
            self.log._database.execute("insert into steps (epoch, step, detail) values (99, 'proposed', '{}')")
        before, self.restarts = self._path(), self.restarts + 1
        for suffix in ("", "-wal"):
            if Path(f"{before}{suffix}").exists():
                shutil.copy(f"{before}{suffix}", f"{self._path()}{suffix}")
        self.log.close()
        self.log = EpochLog(self._path())

    def _path(self) -> Path:
        return self.folder / f"{self.restarts}.db"

    @invariant()
    def the_log_has_exactly_the_steps_and_decisions_that_were_appended(self) -> None:
        for epoch in range(10):
            expected = [
                (step, Aborted(f"step {count}"))
                for count, (number, step) in enumerate(self.history, 1)
                if number == epoch
            ]
            assert self.log.steps(epoch) == expected
        assert [decision.at_s for decision in self.log.decisions()] == self.decided

    @invariant()
    def exactly_one_committed_epoch_is_live(self) -> None:
        committed = [epoch for epoch, step in self.history if step == "committed"]
        assert self.log.epochs.live == (committed[-1] if committed else None)
        released = {epoch for epoch, step in self.history if step == "released"}
        assert self.log.unreleased() == sorted(set(committed[:-1]) - released)

    @invariant()
    def at_most_one_epoch_is_unfinished(self) -> None:
        settled = {epoch for epoch, step in self.history if step in ("committed", "aborted")}
        assert self.log.unfinished() == [e for e in dict(self.history) if e not in settled]
        assert len(self.log.unfinished()) <= 1
        assert self.log.next_epoch() == max([0, *dict(self.history)]) + 1


LogMachine.TestCase.settings = examples(40, stateful_step_count=25)
TestLogMachine = LogMachine.TestCase

WRITER = """
import sys
from pathlib import Path
from resplit.control.log import EpochLog
from tests.support.properties import examples
log = EpochLog(Path(sys.argv[1]))
while True:
    epoch = log.next_epoch()
    for step in ("proposed", "prepared", "committed"):
        log.append(epoch, step)
        print(epoch, step, flush=True)
"""


@pytest.mark.parametrize("seen", [1, 2, 3, 40])
@pytest.mark.processes
def test_a_killed_writer_loses_no_step_once_append_has_returned(tmp_path: Path, seen: int) -> None:
    path = tmp_path / "log.db"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    printed = [writer.stdout.readline() for _ in range(seen)]
    writer.send_signal(signal.SIGKILL)
    printed += writer.stdout.readlines()
    writer.wait()
    log = EpochLog(path)
    written = [f"{epoch} {entry.step}\n" for epoch in range(1, log.next_epoch()) for entry in log.steps(epoch)]
    whole = [line for line in printed if line.endswith("\n")]
    assert len(whole) >= seen
    assert written[: len(whole)] == whole
    assert len(written) <= len(whole) + 1


@pytest.fixture
def log(tmp_path: Path) -> EpochLog:
    return EpochLog(tmp_path / "state" / "log.db")


def test_the_last_committed_epoch_comes_with_its_details(log: EpochLog) -> None:
    assert log.last_committed() is None
    proposals = [Proposal(("a", host), "re-split", epoch, 1.5, note="a note") for epoch, host in enumerate("abc")]
    for epoch, proposal in enumerate(proposals, 1):
        log.append(epoch, "proposed", proposal)
        if epoch < 3:
            log.append(epoch, "prepared")
            log.append(epoch, "committed", proposal)
    assert log.last_committed() == proposals[1]
    assert log.steps(1) == [("proposed", proposals[0]), ("prepared", None), ("committed", proposals[0])]


def test_a_committed_step_that_is_no_proposal_is_a_clear_error(log: EpochLog) -> None:
    for step in ("proposed", "prepared", "committed"):
        log.append(1, step, Proposal(("a",), "re-split", 0))  # type: ignore[arg-type]
    log._database.execute("update steps set detail = json_set(detail, '$.placement', 'everywhere')")
    with pytest.raises(DataError, match=r"log\.db: committed epoch 1 is no proposal: placement: "):
        log.last_committed()


def test_decisions_can_be_read_after_a_given_number(log: EpochLog) -> None:
    assert log.last_decision() == 0
    for action in ("keep", "re-split", "keep"):
        log.append_decision(Decision(1.0, action))
    assert log.last_decision() == 3
    _, *rest = log.decisions()
    assert [decision.action for decision in rest] == ["re-split", "keep"]
    assert [decision.id for decision in rest] == [2, 3]
    assert log.decisions(since_id=1) == rest
    assert log.decisions(since_id=3) == []


def test_every_write_is_synchronous(log: EpochLog) -> None:
    settings_ = [log._database.execute(f"pragma {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings_ == ["wal", 2]  # 2: full


def test_several_threads_may_append(log: EpochLog) -> None:
    threads = [
        threading.Thread(target=lambda: [log.append_decision(Decision(float(n), "keep")) for n in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.decisions()) == 80


def test_a_step_that_a_full_disk_refuses_changes_nothing(
    log: EpochLog, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    log.append(1, "proposed")
    with (
        full_disk(100_000),
        pytest.raises(CapacityError, match=r"cannot be written .* nothing was changed; check the room"),
    ):
        log.append(1, "prepared", Aborted("x" * 500_000))
    assert [entry.step for entry in log.steps(1)] == ["proposed"]
    log.append(1, "prepared")


def test_a_log_locked_by_another_process_is_a_capacity_error(log: EpochLog, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "state" / "log.db", isolation_level=None)
    other.execute("begin immediate")
    log._database.execute("pragma busy_timeout = 10")
    with pytest.raises(CapacityError, match="locked"):
        log.append(1, "proposed")
    other.execute("rollback")
    log.append(1, "proposed")


def test_a_file_that_is_not_a_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_bytes(b"this is no database " * 100)
    with pytest.raises(ConfigError, match=r"log\.db"):
        EpochLog(tmp_path / "log.db")


def test_the_log_makes_the_folders_that_are_missing_and_files_that_only_their_owner_can_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "epochs.db"
    log = EpochLog(path)
    log.append(1, "proposed")
    assert log.unfinished() == [1]
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_a_number_that_json_lacks_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    log = EpochLog(tmp_path / "epochs.db")
    with pytest.raises(ValueError, match="JSON"):
        log.append(1, "proposed", Proposal(("a",), "re-split", 0, predicted_latency_s=float("nan")))
    assert log.steps(1) == []
