"""Whoever starts a cluster sees what it does until it is ready."""

from __future__ import annotations

from pathlib import Path

from resplit.cluster.log_lines import LogLines


def test_each_event_is_given_once_when_its_line_is_whole_and_progress_bars_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "controller.log"
    lines = LogLines(file)
    assert lines.new() == []
    file.write_text(
        "15:54:21 [info     ] fetching and packaging the model model=tiny\n"
        "Loading weights:   0%|          | 0/272\rLoading weights: 100%|█| 272/272\n"
        "15:54:29 [warning  ] a node is l"
    )
    assert lines.new() == [("info", "fetching and packaging the model model=tiny")]
    assert lines.new() == []
    with file.open("a") as log:
        log.write("ost             node=hub\n")
    assert lines.new() == [("warning", "a node is lost             node=hub")]
