"""The address at which a node or the gateway listens."""

from __future__ import annotations

from dataclasses import dataclass

from resplit.errors import ConfigError
from resplit.host_port import split_host_port


@dataclass(frozen=True)
class Address:
    """A host and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse `host:port` or, for IPv6, `[host]:port`; ConfigError for any other text."""
        try:
            return cls(*split_host_port(text))
        except ValueError as error:
            raise ConfigError(f"{text!r:.100}", str(error)) from None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
