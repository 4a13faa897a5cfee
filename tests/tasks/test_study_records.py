"""Records of a study are found again, and a run that was not finished is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from resplit.records import RunRecord
from tasks.study_records import StudyRecords, digest_of
from tests.support.runs import synthetic_run


def test_a_run_that_is_done_is_found_by_its_label_and_seed(tmp_path: Path) -> None:
    records, adaptive = StudyRecords(tmp_path), replace(synthetic_run("resplit"), seed=7)
    assert not records.has("adaptive", 7)
    records.save(adaptive)
    assert records.has("adaptive", 7)
    assert not records.has("adaptive", 8)
    (found,) = records.load()
    assert (found.policy, found.seed) == ("resplit", 7)
    assert found.requests.equals(adaptive.requests)


def test_a_run_whose_record_was_not_written_to_the_end_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, run = StudyRecords(tmp_path), replace(synthetic_run("static"), seed=1)
    whole = RunRecord.save

    def cut(self: RunRecord, folder: Path) -> None:
        whole(self, folder)
        (folder / "run.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(RunRecord, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        records.save(run)
    monkeypatch.undo()
    assert not records.has("static", 1)
    assert records.load() == []
    records.save(run)
    assert len(records.load()) == 1


def test_other_inputs_have_another_digest(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("ab")
    other.write_text("c")
    digest = digest_of([one, other], "model")
    assert digest == digest_of([one, other], "model")
    one.write_text("a")
    other.write_text("bc")
    assert digest != digest_of([one, other], "model")
    assert digest_of([one], "model") != digest_of([one], "other")
