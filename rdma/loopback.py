"""A channel from this process to itself, over whatever the fabric has in between: for probes, self-tests."""

from __future__ import annotations

import contextlib
from typing import Any

from .fabric import Domain, Region, RemoteTable


def to_self(
    serve: Domain, read: Domain, offered: Region, host: str, seconds: float, stack: contextlib.ExitStack
) -> Any:
    """A channel over which ``read`` can READ what ``serve`` offers.

    :param host: where the fabric's data connections are taken (tcp). :param seconds: for connecting.
    :param stack: closes both ends.
    :returns: the ``struct mkv_channel *`` of the reading end.
    :raises MemKVError: it cannot be connected.
    """
    remote = RemoteTable()
    remote.add(offered.desc)
    here = serve.endpoint("serve")
    stack.callback(here.close)
    there = read.endpoint("read", remote, dial=True)
    stack.callback(there.close)
    there.connect(here.offer, host, seconds)
    here.connect(there.offer, "", seconds)
    return there.channel
