"""The text of an address: a name or IPv4, and IPv6 in brackets."""

from __future__ import annotations

import pytest

from resplit.errors import ConfigError
from resplit.wire.addresses import Address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("hub.local:7001", "hub.local", 7001), ("10.0.0.7:1", "10.0.0.7", 1), ("[::1]:65535", "::1", 65535)],
)
def test_an_address_is_parsed_and_written_as_it_was(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize("text", ["::1:7001", "hub", "hub:", ":7001", "hub:0", "hub:65536", "[::1]", "[]:7", "a:7:7"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"is not host:port, with an IPv6 address in brackets \(\[::1\]:7001\) and a port from 1"
    ):
        Address.parse(text)
