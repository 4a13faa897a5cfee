"""A host and a TCP port as text, in cluster files and on the command line."""

from __future__ import annotations

import re

_HOST_PORT = re.compile(r"(?:\[([^\[\]\s]+)\]|([^\[\]:\s]+)):(\d{1,5})", re.ASCII)


def split_host_port(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or, for IPv6, `[host]:port`; ValueError for any other text."""
    found = _HOST_PORT.fullmatch(text)
    if found is None or not 0 < int(found[3]) < 65536:
        raise ValueError("is not host:port, with an IPv6 address in brackets ([::1]:7001) and a port from 1 to 65535")
    return found[1] or found[2], int(found[3])


def checked_host_port(text: str) -> str:
    """`text`, if it is a host and a port; else ValueError."""
    try:
        split_host_port(text)
    except ValueError as error:
        raise ValueError(f"{text!r:.100} {error}") from None
    return text
