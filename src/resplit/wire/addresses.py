"""The address at which a node or the gateway listens."""

from __future__ import annotations

from dataclasses import dataclass

from resplit.errors import ConfigError


@dataclass(frozen=True)
class Address:
    """A host and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse `host:port`; ConfigError for any other text."""
        host, separator, port = text.rpartition(":")
        if not (separator and host and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(repr(text), "is not host:port")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"
