"""A TCP proxy before a node that can break, refuse or stall its connections."""

from __future__ import annotations

import asyncio
import contextlib

from resplit.wire.addresses import Address


class TcpProxy:
    """Relays connections from the address `outside` to the address `inside`."""

    def __init__(self, outside: Address, inside: Address) -> None:
        self.outside, self.inside = outside, inside
        self._ends: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def open(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._relay, self.outside.host, self.outside.port)

    def close(self) -> None:
        """Break all connections and accept no more, as when a process is killed."""
        self._server.close()
        self.break_connections()

    def break_connections(self) -> None:
        """Break all connections. New ones can be made at once."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    def stall(self) -> None:
        """Hold all data while the connections stay open, as when a radio link is out of reach."""
        self._flowing.clear()

    def resume(self) -> None:
        """Relay again, the held data first."""
        self._flowing.set()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            inside_reader, inside_writer = await asyncio.open_connection(self.inside.host, self.inside.port)
            self._ends.add(inside_writer)
            await asyncio.gather(self._pump(reader, inside_writer), self._pump(inside_reader, writer))
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
