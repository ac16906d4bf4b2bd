"""The peer for asyncio: the same calls, awaited. A batch makes progress on a C thread, whatever the event
loop does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from .batches import as_keys
from .buffers import Slices

if TYPE_CHECKING:
    from .peer import Peer

T = TypeVar("T")
Statuses = npt.NDArray[np.uint8]


class AsyncPeer:
    """``peer.aio``: coroutines that mean what their namesakes of :class:`memkv.Peer` mean.

    Cancelling one does not cancel the batch: its slices are in use until its deadline at most.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def _on_control(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(asyncio.wrap_future(self._peer._control.start(coroutine)))

    async def get_into(
        self,
        keys: Any,
        slices: Slices,
        *,
        timeout: float | None = None,
        checksum: bool | None = None,
        stream: Any = None,
    ) -> Statuses:
        verify = self._peer.checksum if checksum is None else checksum
        seconds = self._peer._seconds(timeout)
        return await self._on_control(self._peer._get_async(as_keys(keys), slices, seconds, verify, stream))

    async def put_from(
        self,
        keys: Any,
        slices: Slices,
        *,
        timeout: float | None = None,
        durability: str = "memory",
        checksums: npt.NDArray[np.uint64] | None = None,
        stream: Any = None,
    ) -> Statuses:
        seconds = self._peer._seconds(timeout)
        return await self._on_control(
            self._peer._put_async(as_keys(keys), slices, seconds, durability, checksums, stream)
        )

    async def match(self, keys: Any, *, timeout: float | None = None) -> int:
        return await asyncio.to_thread(self._peer.match, keys, timeout=timeout)

    async def exists(self, keys: Any, *, timeout: float | None = None) -> Statuses:
        return await asyncio.to_thread(self._peer.exists, keys, timeout=timeout)

    async def stage(self, keys: Any, *, timeout: float | None = None) -> Statuses:
        return await self._on_control(self._peer._requests.stage(as_keys(keys), self._peer._seconds(timeout)))

    async def touch(self, keys: Any) -> None:
        await self._on_control(self._peer._requests.touch(as_keys(keys)))

    async def pin(self, keys: Any, ttl: float, *, timeout: float | None = None) -> Statuses:
        return await asyncio.to_thread(self._peer.pin, keys, ttl, timeout=timeout)

    async def unpin(self, keys: Any, *, timeout: float | None = None) -> Statuses:
        return await asyncio.to_thread(self._peer.unpin, keys, timeout=timeout)

    async def delete(self, keys: Any, *, timeout: float | None = None) -> Statuses:
        return await asyncio.to_thread(self._peer.delete, keys, timeout=timeout)
