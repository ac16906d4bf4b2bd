"""A peer of tests: the protocol's state machine, a socket, and endpoints driven by hand.

It does nothing by itself: no retries, no acknowledgements, no location cache. So a test can leave out,
repeat or garble whatever it is about.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from memkv.rdma import jobs
from memkv.rdma.fabric import Endpoint, Fabric, Offer, RailEnd, Region, RegionDesc, RemoteTable
from memkv.rdma.memory import HostMemory
from memkv.store import layout
from memkv.store import messages as m
from memkv.store.columns import PutColumns, pack_keys
from memkv.store.native._store import ffi, lib
from memkv.store.protocol import PeerProtocol

from ..conftest import make_fabric

PATIENCE = 10.0


class Refused(Exception):
    """The node answered with a Refusal."""

    def __init__(self, refusal: m.Refusal) -> None:
        super().__init__(f"{refusal.code}: {refusal.message} ({refusal.hint})")
        self.refusal = refusal


def keys_of(*numbers: int) -> npt.NDArray[np.uint8]:
    """Keys that are told apart by a number."""
    return np.array([list(n.to_bytes(16, "little")) for n in numbers], np.uint8).reshape(-1, 16)


def checksum(data: bytes | npt.NDArray[np.uint8]) -> int:
    return int(lib.mkv_checksum(ffi.from_buffer(data), len(data)))


class RawPeer:
    """A control connection, and the channels opened over it."""

    def __init__(self, address: tuple[str, int], fabric: str = "tcp", secret: bytes = b"") -> None:
        self.socket = socket.create_connection(address, timeout=PATIENCE)
        self.host = address[0]
        self.protocol = PeerProtocol(secret, software="test", role="raw")
        self.arrived: list[m.Message] = []
        self.notices: list[m.Message] = []
        self._requests = itertools.count(1)
        self._fabric_name = fabric
        self._fabric: Fabric | None = None
        self._closers: list[Callable[[], None]] = []
        try:
            self.write(b"")
            while self.protocol.welcome is None:
                self._receive()
        except Exception as exc:
            with contextlib.suppress(OSError):
                self.socket.sendall(getattr(exc, "reply", b""))
            self.socket.close()
            raise

    # --- the connection ---

    def write(self, data: bytes) -> None:
        self.socket.sendall(self.protocol.data_to_send() + data)

    def _receive(self, timeout: float = PATIENCE) -> None:
        self.socket.settimeout(timeout)
        data = self.socket.recv(1 << 20)
        if not data:
            self.protocol.receive_eof()
            raise ConnectionError("the node has closed the connection")
        self.arrived += self.protocol.receive_data(data)
        self.write(b"")

    def send(self, message: m.Message) -> None:
        self.write(self.protocol.send(message))

    def post_id(self) -> int:
        """A new request id."""
        return next(self._requests)

    def post(self, kind: type[m.Message], *fields: Any, **named: Any) -> int:
        """Sends a request; ``wait`` gets its answer."""
        request = self.post_id()
        self.send(kind(request, *fields, **named))
        return request

    def wait(self, request: int, timeout: float = PATIENCE) -> Any:
        """The answer to a request. :raises Refused:"""
        until = time.monotonic() + timeout
        while True:
            for i, message in enumerate(self.arrived):
                if getattr(message, "request", 0) == request:
                    del self.arrived[i]
                    if isinstance(message, m.Refusal):
                        raise Refused(message)
                    return message
            self._receive(max(0.01, until - time.monotonic()))

    def ask(self, kind: type[m.Message], *fields: Any, **named: Any) -> Any:
        return self.wait(self.post(kind, *fields, **named))

    def notice(self, kind: type[m.Message], namespace: int = 0, timeout: float = PATIENCE) -> Any:
        """The next notice of that kind (of that namespace)."""
        until = time.monotonic() + timeout
        while True:
            for i, message in enumerate(self.arrived):
                if isinstance(message, kind) and namespace in (0, getattr(message, "namespace", 0)):
                    del self.arrived[i]
                    return message
            self._receive(max(0.01, until - time.monotonic()))

    def vanish(self) -> None:
        """Closes the socket without a word."""
        self.socket.close()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.send(m.Bye("test is over"))
        self.socket.close()
        for closer in reversed(self._closers):
            closer()
        self._closers.clear()
        if self._fabric is not None:
            self._fabric.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- namespaces and channels ---

    @property
    def fabric(self) -> Fabric:
        if self._fabric is None:
            self._fabric = make_fabric(self._fabric_name, listen=False)
            self._offers = self._fabric.domain()
            self._landing = self._fabric.domain()
            self._closers += [self._offers.close, self._landing.close]
        return self._fabric

    def open(self, name: str = "test", **settings: Any) -> m.NamespaceInfo:
        info: m.NamespaceInfo = self.ask(m.OpenNamespace, name, **settings)
        return info

    def _connect(self, endpoint: Endpoint, info: m.NamespaceInfo, purpose: str) -> int:
        ends = [
            m.RailInfo(e.device, e.gid, e.qpn, e.psn, e.mtu, e.rd_atomic, e.lid) for e in endpoint.offer.rails
        ]
        answer = self.ask(m.OpenChannel, info.namespace, purpose, self.fabric.name, rails=ends)
        rails = tuple(RailEnd(r.device, r.gid, r.qpn, r.psn, r.mtu, r.rd_atomic, r.lid) for r in answer.rails)
        endpoint.connect(
            Offer(self.fabric.name, rails, answer.port, answer.token, answer.streams), self.host, PATIENCE
        )
        return int(answer.channel)

    def open_pull(self, info: m.NamespaceInfo) -> int:
        """A channel over which the node READs puts; returns its id."""
        assert self.fabric
        return self._connect(self._offers.endpoint("serve", dial=True), info, "pull")

    def open_get(self, info: m.NamespaceInfo) -> Reader:
        assert self.fabric
        remote = RemoteTable()
        endpoint = self._landing.endpoint("read", remote, dial=True)
        channel = self._connect(endpoint, info, "get")
        reader = Reader(self, endpoint, remote, channel)
        for region in (info.table.region, *info.slabs):
            reader.learn(region)
        return reader

    def source(self, data: npt.NDArray[np.uint8], offer: bool = True) -> Region:
        """Registers memory that holds ``data`` and (unless told not to) offers it."""
        assert self.fabric
        memory = HostMemory(len(data))
        memory.array[: len(data)] = data
        region = self._offers.register(memory.address, len(data), remote_read=True, owner=memory)
        if offer:
            self.offer(region)
        return region

    def offer(self, region: Region) -> None:
        rails = [m.RailKey(iova, rkey) for iova, rkey in region.desc.rails]
        self.ask(m.OfferRegions, [m.RegionInfo(region.id, region.length, 2, region.desc.secret, rails)])

    # --- batches ---

    def put(
        self,
        info: m.NamespaceInfo,
        keys: npt.NDArray[np.uint8],
        region: int,
        length: int,
        checksums: npt.ArrayLike | None = None,
        **named: Any,
    ) -> int:
        """Posts a put of blocks of one length that lie one behind the other in a region."""
        n = len(keys)
        columns = PutColumns(
            keys,
            np.full(n, length, np.uint32),
            np.full(n, region, np.uint32),
            np.arange(n, dtype=np.uint64) * np.uint64(length),
            None if checksums is None else np.asarray(checksums, np.uint64),
        )
        request = self.post_id()
        self.send(columns.message(request, info.namespace, **named))
        return request

    def statuses(self, request: int, timeout: float = PATIENCE) -> list[int]:
        return list(self.wait(request, timeout).statuses)

    def on_keys(
        self, kind: type[m.Message], info: m.NamespaceInfo, keys: npt.NDArray[np.uint8], *fields: Any
    ) -> list[int]:
        return list(self.ask(kind, info.namespace, pack_keys(keys), *fields).statuses)

    def stats(self, name: str = "test") -> dict[str, Any]:
        """The namespace's section."""
        stats: dict[str, Any] = self.ask(m.Stats).sections[f"namespace:{name}"]
        return stats


class Reader:
    """READs from the node's slabs and tables, by hand."""

    def __init__(self, peer: RawPeer, endpoint: Endpoint, remote: RemoteTable, channel: int) -> None:
        self.endpoint = endpoint
        self.remote = remote
        self.id = channel
        self.memory = HostMemory(4 << 20)
        self.region = peer._landing.register(self.memory.address, self.memory.nbytes, owner=self.memory)

    def learn(self, info: m.RegionInfo) -> None:
        rails = tuple((k.iova, k.rkey) for k in info.rails)
        self.remote.add(RegionDesc(info.id, info.length, info.access, info.secret, rails))

    def read(self, region: int, offset: int, length: int, timeout: float = PATIENCE) -> bytes:
        """:raises OSError: the READ failed."""
        reads = np.zeros(1, jobs.READ)
        reads[0]["offset"], reads[0]["region"], reads[0]["nseg"] = offset, region, 1
        reads[0]["seg"][0] = (0, self.region.id, length)
        status = int(jobs.read_batch(self.endpoint.channel, reads, timeout)[0]["status"])
        if status:
            raise OSError(-status, f"a READ of region {region} failed")
        return bytes(self.memory.array[:length])

    def find(self, info: m.NamespaceInfo, key: npt.NDArray[np.uint8]) -> np.void | None:
        """The key's slot in the table of ``info``."""
        for bucket in layout.candidates(key.reshape(1, 16), info.salt, info.table.buckets)[0]:
            data = self.read(info.table.region.id, layout.INDEX_HEADER + 256 * int(bucket), 256)
            for slot in np.frombuffer(data, layout.SLOT):
                if slot["location"] and bytes(slot["key"]) == key.tobytes():
                    return np.void(slot)
        return None

    def get(self, info: m.NamespaceInfo, key: npt.NDArray[np.uint8]) -> bytes | None:
        """The block, verified against its live line; None if it is not in the table."""
        slot = self.find(info, key)
        if slot is None:
            return None
        slab, offset = (
            int(layout.location_slab(slot["location"])),
            int(layout.location_offset(slot["location"])),
        )
        data = self.read(slab, offset - layout.LINE_BYTES, layout.LINE_BYTES + int(slot["length"]))
        line = np.frombuffer(data[: layout.LINE_BYTES], layout.LINE)[0]
        assert bytes(line["key"]) == key.tobytes()
        assert line["length"] == slot["length"]
        assert int(line["generation"]) & 0xFFFFFFFF == slot["generation"]
        payload = data[layout.LINE_BYTES :]
        assert checksum(payload) == line["checksum"]
        return payload
