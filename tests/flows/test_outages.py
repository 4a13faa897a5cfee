"""The control loop outlives that the controller is away, or that a disk is full."""

from __future__ import annotations

import errno
import math
from contextlib import nullcontext
from pathlib import Path

import pytest

from flows import adapt as adapt_module
from resplit.errors import NodeLostError, ProposalRefusedError

FULL, FORBIDDEN = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EACCES, "Permission denied")
REFUSED = ProposalRefusedError("epochs.db: cannot be written (database or disk is full)")
AWAY = NodeLostError("the controller does not answer")


class Ticks:
    """Ticks of which each raises its error, if it has one; the loop is interrupted after the last one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> None:
        self.left = list(errors)
        monkeypatch.setattr(adapt_module, "_tick", self._tick)
        monkeypatch.setattr(adapt_module, "save_fast_configurations", lambda *given: 0)
        monkeypatch.setattr(adapt_module.ControlClient, "from_state", lambda *given: nullcontext())

    def _tick(self, *given: object) -> bool:
        if not self.left:
            raise KeyboardInterrupt
        if error := self.left.pop(0):
            raise error
        return False

    def loop(self, folder: Path, loop_for_s: float = math.inf) -> None:
        adapt_module.adapt.fn(state=folder, period_s=0.0, loop_for_s=loop_for_s)


def test_a_loop_without_end_goes_on_after_an_outage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ticks = Ticks(monkeypatch, None, AWAY, AWAY, FULL, REFUSED, None)
    with pytest.raises(KeyboardInterrupt):
        ticks.loop(tmp_path)
    assert ticks.left == []


@pytest.mark.parametrize(
    ("errors", "loop_for_s"), [([AWAY], math.inf), ([None, FORBIDDEN], math.inf), ([None, AWAY], 60)]
)
def test_other_errors_end_the_loop(
    errors: list[Exception | None], loop_for_s: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(type(errors[-1])):  # type: ignore[arg-type]
        Ticks(monkeypatch, *errors, None).loop(tmp_path, loop_for_s)
