"""Asking a machine what :mod:`.ladder` decides by: what driver, kernel and NIC say, and READs of our own,
timed.

The READs go from this process to itself, through the NIC and back, over channels and protection domains that
are made for it and closed again. One that does not end has a deadline like any other, and nothing of it is
freed before its queue pair is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rdma import dmabuf, jobs
from ..rdma.errors import MemKVError, NotRegistered
from ..rdma.fabric import Domain, Fabric, Region
from ..rdma.loopback import to_self
from . import arrays, driver
from .buffers import Memory
from .ladder import Answers, Nic, Read, Step, Tried
from .order import After
from .registry import Registry, Way

NBYTES = 16 << 20  # more than caches between NIC and memory hold
PIECE = 1 << 20  # bytes of one READ
ROUNDS, SECONDS = 4, 0.5  # timed rounds, and when to stop before they are done
TIMEOUT = 5.0  # seconds for one round
PEERMEM = ("nvidia_peermem", "nv_peer_mem")  # the older one came with MLNX_OFED

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Side:
    """Memory at one end of a READ: how it becomes a region, and how bytes get there and back."""

    nbytes: int
    register: Callable[[Domain, bool], Region]  # (domain, whether others may READ it)
    write: Callable[[Bytes], None]
    read: Callable[[], Bytes]


def host_side(nbytes: int = NBYTES) -> Side:
    """Host memory."""
    array = np.zeros(nbytes, np.uint8)

    def register(domain: Domain, remote_read: bool) -> Region:
        return domain.register(array.ctypes.data, nbytes, remote_read=remote_read, owner=array)

    def write(data: Bytes) -> None:
        array[:] = data

    return Side(nbytes, register, write, lambda: array)


def timed_read(fabric: Fabric, source: Side, sink: Side, host: str = "127.0.0.1") -> Read:
    """READs all of ``source`` into ``sink``, several times; the best time counts, every byte is compared.

    :param host: where the fabric's data connections are taken (tcp).
    """
    data = np.random.default_rng().integers(0, 256, source.nbytes, np.uint8)
    try:
        source.write(data)
        sink.write(np.zeros(sink.nbytes, np.uint8))
        with contextlib.ExitStack() as stack:
            serve, read = fabric.domain(), fabric.domain()
            stack.callback(serve.close)
            stack.callback(read.close)
            channel, reads = _connect(serve, read, source, sink, host, stack)
            best = _best(channel, reads)
        wrong = np.flatnonzero(sink.read() != data)
    except (MemKVError, OSError) as exc:
        return Read(text=str(exc))
    if wrong.size:
        return Read(text=f"{wrong.size} of {data.size} bytes differ, from byte {int(wrong[0])} on")
    return Read(True, data.size / best / 1e9, "every byte as it should be")


def _connect(
    serve: Domain, read: Domain, source: Side, sink: Side, host: str, stack: contextlib.ExitStack
) -> tuple[Any, npt.NDArray[np.void]]:
    """A channel, and READs of everything."""
    offered, into = source.register(serve, True), sink.register(read, False)
    stack.callback(into.close)
    stack.callback(offered.close)
    channel = to_self(serve, read, offered, host, TIMEOUT, stack)
    starts = np.arange(0, source.nbytes, PIECE, dtype=np.uint64)
    reads = np.zeros(len(starts), jobs.READ)
    reads["offset"], reads["region"], reads["nseg"] = starts, offered.id, 1
    reads["seg"]["offset"][:, 0], reads["seg"]["region"][:, 0] = starts, into.id
    reads["seg"]["length"][:, 0] = np.minimum(np.uint64(PIECE), np.uint64(source.nbytes) - starts)
    return channel, reads


def _best(channel: Any, reads: npt.NDArray[np.void]) -> float:
    """Seconds of the fastest round; the first one warms up. :raises OSError: a READ failed."""
    took: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(took) <= ROUNDS and (len(took) < 2 or time.perf_counter() < until):
        start = time.perf_counter()
        outcome = jobs.read_batch(channel, reads, TIMEOUT)
        took.append(time.perf_counter() - start)
        bad = outcome[outcome["status"] != 0]
        if len(bad):
            code = -int(bad[0]["status"])
            raise OSError(code, f"{os.strerror(code)}, vendor error {int(bad[0]['vendor']):#x}")
    return min(took[1:])


# --- a GPU ---


def ask(fabric: Fabric | None, device: int, host: str = "127.0.0.1", nbytes: int = NBYTES) -> Answers:
    """Everything about one GPU and a fabric. Where a direct way may be had, ``nbytes`` are allocated on it
    for a few seconds, to try it; what is absent is an answer, never an error.
    """
    answers = Answers(
        fabric=fabric.name if fabric else "",
        kernel=platform.release(),
        peermem=peermem(),
        nics=_nics(fabric),
    )
    try:
        cuda = driver.load()
        facts = cuda.facts(device)
    except MemKVError as exc:
        return replace(answers, cuda_missing=str(exc))
    answers = replace(
        answers,
        cuda=f"{cuda.version // 1000}.{cuda.version % 1000 // 10}",
        gpu=f"{facts.name} (cuda:{device})",
        gpu_dma_buf=facts.dma_buf,
        gpu_direct=facts.gpu_direct,
        ordering=facts.ordering,
        flush_options=facts.flush_options,
    )
    ways: list[Way] = []
    if facts.dma_buf and all(n.dma_buf for n in answers.nics):
        ways.append("dma-buf")
    if facts.gpu_direct and answers.peermem == "loaded":
        ways.append("peermem")
    if fabric is None or fabric.name != "verbs" or not ways:
        return answers
    try:
        with cuda.on(device):
            pointer = cuda.mem_alloc(nbytes)
    except MemKVError as exc:
        return replace(answers, memory=f"no memory to try it with: {exc}")
    try:
        memory = arrays.of_pointer(pointer, nbytes, True, None, on_gpu=True)
        if memory.reason:
            return replace(answers, memory=memory.reason)
        answers = replace(answers, host=timed_read(fabric, host_side(nbytes), host_side(nbytes), host))
        tried = {way: _try(fabric, cuda, memory, way, host) for way in ways}
        by_dma_buf, by_peermem = tried.get("dma-buf", Tried()), tried.get("peermem", Tried())
        return replace(answers, dma_buf=by_dma_buf, by_peermem=by_peermem)
    except (MemKVError, OSError) as exc:
        return replace(answers, memory=f"asking failed: {exc}")
    finally:
        with contextlib.suppress(MemKVError), cuda.on(device):
            cuda.mem_free(pointer)


def _try(fabric: Fabric, cuda: driver.Driver, memory: Memory, way: Way, host: str) -> Tried:
    tried = Tried()
    if way == "dma-buf":
        tried = replace(tried, export=_export(cuda, memory))
        if not tried.export.ok:
            return tried
    tried = replace(tried, register=_registers(fabric, cuda, memory, way))
    if not tried.register.ok:
        return tried
    there, here = device_side(cuda, memory, way), host_side(memory.nbytes)
    return replace(
        tried, get=timed_read(fabric, here, there, host), put=timed_read(fabric, there, here, host)
    )


def _export(cuda: driver.Driver, memory: Memory) -> Step:
    assert memory.device is not None
    try:
        with cuda.on(memory.device):
            os.close(cuda.export_dma_buf(*dmabuf.span(memory.address, memory.nbytes)))
    except driver.DriverError as exc:
        return Step(False, exc.errno or errno.EIO, str(exc))
    return Step(True, 0, "exported")


def _registers(fabric: Fabric, cuda: driver.Driver, memory: Memory, way: Way) -> Step:
    registry, domain = Registry(cuda), fabric.domain()
    try:
        for remote_read in (False, True):
            registry.acquire(domain, memory, remote_read=remote_read, way=way).close()
    except NotRegistered as exc:
        return Step(False, exc.errno or errno.EIO, str(exc))
    finally:
        domain.close()
    return Step(True, 0, "registered")


def device_side(cuda: driver.Driver, memory: Memory, way: Way) -> Side:
    """Memory of a GPU, reached by ``way``."""
    assert memory.device is not None
    device = memory.device
    registry, after = Registry(cuda), After(cuda, device)

    def register(domain: Domain, remote_read: bool) -> Region:
        """The whole registration: closing it is all there is to do, as this domain's and nobody else's."""
        return registry.acquire(domain, memory, remote_read=remote_read, way=way).region

    def copy(array: Bytes, into_device: bool) -> None:
        with cuda.on(device):
            stream = cuda.stream_create()
            try:
                if into_device:
                    cuda.memcpy_htod_async(memory.address, array.ctypes.data, memory.nbytes, stream)
                else:
                    cuda.memcpy_dtoh_async(array.ctypes.data, memory.address, memory.nbytes, stream)
                cuda.stream_synchronize(stream)
            finally:
                cuda.stream_destroy(stream)

    def read() -> Bytes:
        if after.needed != "impossible":
            after.visible()
        out = np.zeros(memory.nbytes, np.uint8)
        copy(out, False)
        return out

    return Side(memory.nbytes, register, lambda data: copy(np.ascontiguousarray(data), True), read)


# --- the machine ---


def _nics(fabric: Fabric | None) -> tuple[Nic, ...]:
    rails = getattr(fabric, "rails", ())
    return tuple(
        Nic(r.device.name, r.device.driver, r.device.dma_buf, r.device.notes.get("dma-buf", ""))
        for r in rails
    )


def peermem(root: Path = Path("/")) -> str:
    """The module by which the kernel maps GPU addresses for a NIC: "loaded", "loadable" or "absent"."""
    if any((root / "sys/module" / name).exists() for name in PEERMEM):
        return "loaded"
    listed = root / "lib/modules" / platform.release() / "modules.dep"
    try:
        known = listed.read_text()
    except OSError:
        return "absent"
    names = {Path(line.split(":")[0]).name.split(".")[0].replace("-", "_") for line in known.splitlines()}
    return "loadable" if names & set(PEERMEM) else "absent"
