"""The history of moves, on which the next decision depends, in a file: a restart does not lose it."""

from __future__ import annotations

from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from resplit.decide.state import History, PastMove, Settings
from resplit.errors import CapacityError, ConfigError
from resplit.files import write_atomically

_log = structlog.get_logger(__name__)
_HISTORY = TypeAdapter(History)


class Moves:
    """The history of one cluster, in `file`. ConfigError if the file is damaged."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.history = History()
        if file.exists():
            try:
                self.history = _HISTORY.validate_json(file.read_bytes())
            except ValidationError as error:
                raise ConfigError(str(file), f"is not a history of moves: {error.errors()[0]['msg']}") from None

    def set(self, history: History) -> None:
        """Replace the history. CapacityError if the file cannot be written; it is then lost with this process."""
        self.history = history
        try:
            write_atomically(self._file, _HISTORY.dump_json(history).decode())
        except OSError as error:
            raise CapacityError(f"{self._file}: cannot be written ({error.strerror})") from error

    def moved(self, move: PastMove, settings: Settings) -> None:
        """Add a move that was deployed, whether or not the file can be written."""
        try:
            self.set(self.history.moved(move, settings))
        except CapacityError as error:
            _log.warning("a restart would forget the last move", error=str(error))
