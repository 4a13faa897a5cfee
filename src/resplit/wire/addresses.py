"""The address at which a node or the gateway listens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from resplit.errors import ConfigError

_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):(\d{1,5})")


@dataclass(frozen=True)
class Address:
    """A host and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse `host:port` or, for IPv6, `[host]:port`; ConfigError for any other text."""
        found = _ADDRESS.fullmatch(text)
        if found is None or not 0 < int(found[3]) < 65536:
            raise ConfigError(repr(text), "is not host:port, with an IPv6 address in brackets: [::1]:7001")
        return cls(found[1] or found[2], int(found[3]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
