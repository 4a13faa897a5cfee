"""A detected change, as a value and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Change"]


@dataclass(frozen=True)
class Change:
    """A jump that was detected at `at_s`: `subject` went from `before` to `after`, with a standard deviation.

    For "time", these are factors on the times of the cost model; for "background", shares of a node.
    """

    at_s: float
    subject: str
    what: Literal["time", "background"]
    before: float
    after: float
    deviation: float

    @property
    def is_slower(self) -> bool:
        """Whether the subject became slower, or others use more of it."""
        return self.after > self.before

    def __str__(self) -> str:
        if self.what == "background":
            return f"others use {self.after:.0%} of {self.subject} (before: {self.before:.0%})"
        ratio = self.after / self.before
        word = f"{ratio:.2g} times slower" if ratio > 1 else f"{1 / ratio:.2g} times faster"
        return f"{self.subject} became {word}"
