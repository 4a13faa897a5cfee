"""The history of moves, on which the next decision depends, in a file: a restart does not lose it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from resplit.decide.state import History
from resplit.errors import ConfigError
from resplit.files import write_atomically

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
        """Replace the history; OSError if the file cannot be written."""
        write_atomically(self._file, json.dumps(_HISTORY.dump_python(history)))
        self.history = history
