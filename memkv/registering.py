"""Making memory known to the fabric and to the nodes, in host memory and on GPUs, and taking it back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import numpy as np

from .buffers import HOST, READ_ONLY, Buffer
from .control import Control
from .gpu import Gpu
from .gpudirect import driver
from .gpudirect.arrays import of_pointer
from .gpudirect.buffers import Memory, resolve
from .gpudirect.copier import Device, Mark, Window
from .gpudirect.ladder import Direction, Rung
from .gpudirect.staging import Way
from .rdma.errors import DeadlineError, LocalError, NotRegistered
from .rdma.fabric import Domain, Region
from .session import Session
from .store import messages as m

if TYPE_CHECKING:
    from .peer import Peer

log = logging.getLogger("memkv.peer")

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

    def _register_device(self, memory: Memory, name: str) -> Buffer:
        self._gpu.check_blocks()
        device = self._gpu.device(name)
        if memory.stream is not None:  # the array says that its memory is in use until then
            self._wait(device.mark(memory.stream))
        id = self._get_domain.reserve_id()
        into, get_rung = self._take_rung(device, memory, "get", id) if memory.writable else (None, READ_ONLY)
        try:
            out, put_rung = self._take_rung(device, memory, "put", id)
        except BaseException:
            if into:
                into.close()
            raise
        handle = Buffer(self._peer, id, memory, into, out, device=name, get_rung=get_rung, put_rung=put_rung)
        self._gpu.buffers[id] = handle
        return self._enter(handle)

    def _take_rung(
        self, device: Device, memory: Memory, direction: Direction, id: int
    ) -> tuple[Window | None, Rung]:
        """The highest rung that can be had: a window of the fabric's, or slots."""
        assert self._peer.fabric is not None
        domain = self._get_domain if direction == "get" else self._put_domain
        rung = device.decide(self._peer.fabric, memory).of(direction)
        if direction == "get" and self._peer.checksum and (why := device.unverifiable()):
            rung = Rung("staged", f"checksums are to be verified, and not by the GPU: {why}")
        while rung.name != "staged":
            try:
                return device.acquire(domain, memory, direction == "put", rung.name, id), rung
            except NotRegistered as exc:
                log.warning("%s of %s: %s", rung.name, device.name, exc)
                rung = device.failed(rung.name, direction, str(exc)).of(direction)
        into = direction == "get"
        self._gpu.stage(device.name, into, self._register_slots_into if into else self._register_slots_out)
        return None, rung

    def _wait(self, mark: Mark) -> None:
        until = time.monotonic() + self._peer.timeout
        while not mark.reached():
            if time.monotonic() > until:
                raise DeadlineError("the array's own stream does not come to its end", "a longer timeout")
            time.sleep(1e-4)
        mark.close()

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
    if not driver.in_use():  # so nobody can say what it is
        return Memory(address, nbytes, True, None), device
    memory = of_pointer(address, nbytes, True, None)
    if device != (found := "cpu" if memory.device is None else f"cuda:{memory.device}"):
        raise LocalError(f"{address:#x} is memory of {found}, not {device}")
    return memory, device
