"""A TLS server that answers one line, to see which members can connect to which."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from resplit.security.identity import Member, peer_name


@asynccontextmanager
async def echo_server(member: Member, callers: list[str]) -> AsyncIterator[int]:
    """A TLS server that records each caller's name and returns one line; yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(peer_name(writer.get_extra_info("ssl_object")))
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=member.server_context())
    async with server:
        yield server.sockets[0].getsockname()[1]


async def say(port: int, context: ssl.SSLContext, to: str) -> bytes:
    """Send one line and read it back; a refused client gets an ssl.SSLError or a closed connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=to)
    try:
        writer.write(b"hello\n")
        await writer.drain()
        answer = await reader.read()
    finally:
        writer.close()
    if not answer:
        raise ConnectionResetError("closed without an answer")
    return answer
