"""Making memory known to the fabric and to the nodes, in host memory and on GPUs, and taking it back."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import numpy as np

from .buffers import HOST, READ_ONLY, Buffer, Rung
from .control import Control
from .gpu import Gpu
from .gpudirect import driver
from .gpudirect.arrays import of_pointer
from .gpudirect.buffers import Memory, resolve
from .gpudirect.staging import Way
from .rdma.errors import LocalError
from .rdma.fabric import Domain, Region
from .session import Session
from .store import messages as m

if TYPE_CHECKING:
    from .peer import Peer

Tell = Callable[[Callable[[Session], Coroutine[Any, Any, Any]], bool], Coroutine[Any, Any, None]]


class Registry:
    """The buffers of a peer; its methods may be called from any thread but the control thread.

    :param tell: coroutine function (action, fatal): does ``action(session)`` with every session that is up.
    :param quiesce: coroutine function: waits for all batches that are under way.
    """

    def __init__(
        self,
        peer: Peer,
        control: Control,
        gpu: Gpu,
        tell: Tell,
        quiesce: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._peer = peer
        self._control = control
        self._gpu = gpu
        self._tell = tell
        self._quiesce = quiesce
        self.buffers: dict[int, Buffer] = {}
        self._get_domain: Domain
        self._put_domain: Domain

    def open(self, get_domain: Domain, put_domain: Domain) -> None:
        """The domains that gets land in, and that nodes pull from."""
        self._get_domain, self._put_domain = get_domain, put_domain

    @property
    def offered(self) -> list[Buffer]:
        """Those that nodes have to know of."""
        return [b for b in list(self.buffers.values()) if b.desc is not None]

    def register(self, buffer: Any) -> Buffer:
        """See :meth:`memkv.Peer.register`."""
        if self._control.closed:
            raise LocalError("the peer is closed")
        memory, device = _locate(buffer)
        return self._register_host(memory) if device == "cpu" else self._register_device(memory, device)

    def _register_host(self, memory: Memory) -> Buffer:
        into = None
        if memory.writable:
            into = self._get_domain.register(memory.address, memory.nbytes, owner=memory.owner)
        id = into.id if into else self._get_domain.reserve_id()
        try:
            out = self._put_domain.register(
                memory.address, memory.nbytes, remote_read=True, owner=memory.owner, region_id=id
            )
        except BaseException:
            if into:
                into.close()
            raise
        get_rung = HOST if memory.writable else READ_ONLY
        return self._enter(Buffer(self._peer, id, memory, into, out, get_rung=get_rung))

    def _enter(self, handle: Buffer) -> Buffer:
        self.buffers[handle.id] = handle
        if handle.desc is not None:
            self._control.call(self._tell(lambda s: s.offer([handle.desc]), False), self._peer.timeout + 1)
        return handle

    def _register_device(self, memory: Memory, device: str) -> Buffer:
        self._gpu.check_blocks()
        get_rung = put_rung = Rung("staged", memory.reason or "the fabric does not reach GPU memory here")
        if memory.writable:
            self._gpu.stage(device, True, self._register_slots_into)
        else:
            get_rung = READ_ONLY
        self._gpu.stage(device, False, self._register_slots_out)
        id = self._get_domain.reserve_id()
        handle = Buffer(
            self._peer, id, memory, None, None, device=device, get_rung=get_rung, put_rung=put_rung
        )
        self._gpu.buffers[id] = handle
        return self._enter(handle)

    def _register_slots_into(self, way: Way) -> Region:
        return self._get_domain.register(way.address, way.memory.nbytes, owner=way.memory)

    def _register_slots_out(self, way: Way) -> Region:
        memory = Memory(way.address, way.memory.nbytes, False, way.memory)
        id = self._get_domain.reserve_id()
        region = self._put_domain.register(
            memory.address, memory.nbytes, remote_read=True, owner=way.memory, region_id=id
        )
        self._enter(Buffer(self._peer, id, memory, None, region, get_rung=READ_ONLY))
        return region

    def unregister(self, handle: Buffer) -> None:
        """Withdraws a buffer; once it has been, this does nothing."""
        self._gpu.buffers.pop(handle.id, None)
        if self.buffers.pop(handle.id, None) is None:
            return
        if not self._control.closed:
            self._control.call(self._let_go(handle), None)
        handle._release()

    async def _let_go(self, handle: Buffer) -> None:
        """Ends when neither a node nor a batch of ours uses the memory: batches have deadlines, and so have
        nodes. A batch may go on although its session is over, so the sessions that are up are not enough.
        """
        if handle.desc is not None:
            ids = np.array([handle.id], "<u4").tobytes()
            await self._tell(lambda s: s.ask(lambda r: m.WithdrawRegions(r, ids)), True)
        await self._gpu.settle()
        await self._quiesce()

    def close(self) -> None:
        """Withdraws everything; the control thread has ended."""
        for handle in list(self.buffers.values()):
            self.unregister(handle)


def _locate(buffer: Any) -> tuple[Memory, str]:
    """The memory behind what an application hands over, and the device that it is on."""
    if not isinstance(buffer, tuple) or len(buffer) != 3:
        memory = resolve(buffer)
        return memory, "cpu" if memory.device is None else f"cuda:{memory.device}"
    address, nbytes, device = buffer
    if not all(isinstance(x, int) and x > 0 for x in (address, nbytes)) or not isinstance(device, str):
        raise LocalError('raw GPU memory is (pointer, size in bytes, "cuda:0"), both positive')
    memory = (
        of_pointer(address, nbytes, True, None) if driver.in_use() else Memory(address, nbytes, True, None)
    )
    if memory.device is not None and device != f"cuda:{memory.device}":
        raise LocalError(f"{address:#x} is memory of cuda:{memory.device}, not {device}")
    return memory, device
