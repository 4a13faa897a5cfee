"""A relay for the connections to a node, that can be pulled out, severed or made to stand still."""

from __future__ import annotations

import asyncio
import contextlib

from resplit.wire.peers import Address


class TcpProxy:
    """Relays what comes to `outside` to `inside`. Pulled out, all connections break, as when a process is killed."""

    def __init__(self, outside: Address, inside: Address) -> None:
        self._outside, self._inside = outside, inside
        self._ends: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def open(self) -> None:
        """Let connections be made."""
        self._server = await asyncio.start_server(self._relay, self._outside.host, self._outside.port)

    def close(self) -> None:
        """Break all connections and let none be made."""
        self._server.close()
        self.break_connections()

    def break_connections(self) -> None:
        """Break all connections; new ones can be made at once."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    def stall(self) -> None:
        """Let nothing through, though the connections stand: as a radio link that is out of reach."""
        self._flowing.clear()

    def resume(self) -> None:
        """Let through again, and first what had to wait."""
        self._flowing.set()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            inside_reader, inside_writer = await asyncio.open_connection(self._inside.host, self._inside.port)
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
