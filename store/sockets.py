"""Control sockets of the node: their names, noticing dead peers, and hanging up politely."""

from __future__ import annotations

import asyncio
import contextlib
import socket

GOODBYE_SECONDS = 1.0  # for the last bytes to leave
SWALLOW = 256 << 10


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Closes a connection so that the last words still arrive.

    Closing a socket that holds unread bytes resets it, and what was sent may be lost. So this ends our
    direction first and swallows what comes until the other side closes, for a second at most.
    """
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(GOODBYE_SECONDS):
            await writer.drain()
            writer.write_eof()
            while await reader.read(SWALLOW):
                pass
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def name_of(writer: asyncio.StreamWriter) -> str:
    """The peer's address, for the log."""
    name = writer.get_extra_info("peername")
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "?"


def watch(writer: asyncio.StreamWriter) -> None:
    """Lets the kernel notice a peer that has vanished: within about a minute."""
    sock = writer.get_extra_info("socket")
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    ):
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)
