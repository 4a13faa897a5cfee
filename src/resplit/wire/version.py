"""Which messages a member exchanges, told at first contact: members of different versions do not understand each other.

Raise `WIRE_VERSION` in the release in which the messages or commands change (a test notices).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import metadata

from resplit.wire import node_pb2

WIRE_VERSION = 1
_RELEASE = re.compile(r"[0-9A-Za-z.+-]{1,40}")


@dataclass(frozen=True)
class Version:
    """The number of the messages that a member exchanges, and its release of resplit. 0: it says none."""

    wire: int
    release: str

    @classmethod
    def said(cls, message: node_pb2.Version) -> Version:
        """What the other member says of itself."""
        return cls(message.wire, message.release if _RELEASE.fullmatch(message.release) else "")

    def message(self) -> node_pb2.Version:
        """What this member says of itself."""
        return node_pb2.Version(wire=self.wire, release=self.release)

    def __str__(self) -> str:
        if not self.wire:
            return "a resplit that says no version"
        return f"resplit {self.release or 'of an unknown release'} (wire version {self.wire})"


NO_VERSION = Version(0, "")


@functools.cache
def own_version() -> Version:
    """The version of this process."""
    return Version(WIRE_VERSION, metadata.version("resplit"))


def mismatch(other: str, theirs: Version, here: str) -> str:
    """Why the members `other` and `here` cannot work together, with what to do; "" if they can."""
    ours = own_version()
    if theirs.wire == ours.wire:
        return ""
    older = other if theirs.wire < ours.wire else here
    return f"{other} runs {theirs}, and {here} runs {ours}: upgrade resplit on {older}"
