"""What every fabric offers: domains of registered memory, and channels that READ from one domain into
another.

::

    Fabric ── domain() ──► Domain ── register() ──► Region      our memory, under an id
                             │                        .desc ──►  what the other side needs to READ it
                             └──── endpoint() ──► Endpoint       one end of a channel
                                                   .offer ◄──►   exchanged over the control connection
                                                   .connect(offer of the other end)
                                                   .channel      the C channel, where we are the reader

A :class:`RemoteTable` holds the other side's regions by id. Descriptors of READs carry (region id, offset)
only, so they are the same whatever the fabric and however many rails.
"""

from __future__ import annotations

import errno
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import LocalError, NotRegistered
from .native._rdma import ffi, lib

LOCAL_WRITE = 1
REMOTE_READ = 2
MAX_RAILS = 4
TABLE_CAPACITY = 1 << 21

Role = Literal["read", "serve"]
# The fabric's own handles, one (iova, lkey, rkey) per rail, and the secret.
Registered = tuple[list[Any], list[tuple[int, int, int]], int]


@dataclass(frozen=True, slots=True)
class RegionDesc:
    """A region as the other side names it: per rail (iova, rkey) for verbs, a secret for tcp."""

    id: int
    length: int
    access: int = REMOTE_READ
    secret: int = 0
    rails: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RailEnd:
    """One queue pair's address."""

    device: str
    gid: bytes
    qpn: int
    psn: int
    mtu: int  # bytes
    rd_atomic: int
    lid: int = 0


@dataclass(frozen=True, slots=True)
class Offer:
    """One end of a channel, as it goes over the control connection."""

    fabric: str
    rails: tuple[RailEnd, ...] = ()
    port: int = 0  # tcp: where to dial
    token: bytes = b""  # tcp: shown by whoever dials
    streams: int = 0


class _Table:
    """A C region table that lives as long as anything refers to it."""

    def __init__(self, capacity: int = TABLE_CAPACITY) -> None:
        self.ptr: Any = ffi.gc(lib.mkv_table_new(capacity), lib.mkv_table_free)
        if self.ptr == ffi.NULL:
            raise MemoryError("no memory for a region table")

    def set(
        self, id: int, length: int, access: int, base: int, secret: int, keys: list[tuple[int, int, int]]
    ) -> None:
        region = ffi.new("struct mkv_region *")
        region.base, region.length, region.secret, region.id, region.access = base, length, secret, id, access
        region.nrails = len(keys)
        for i, (iova, lkey, rkey) in enumerate(keys):
            region.rail[i].iova, region.rail[i].lkey, region.rail[i].rkey = iova, lkey, rkey
        rc = lib.mkv_table_set(self.ptr, region)
        if rc:
            raise LocalError(f"region id {id} cannot be entered ({-rc})")

    def clear(self, id: int) -> None:
        lib.mkv_table_clear(self.ptr, id)


class RemoteTable(_Table):
    """The regions that the other side offers, by their id there."""

    def __init__(self, capacity: int = TABLE_CAPACITY) -> None:
        super().__init__(capacity)
        self.known: dict[int, RegionDesc] = {}

    def add(self, desc: RegionDesc) -> None:
        """Enters a region; one that is known already (with the same keys) is left alone."""
        if self.known.get(desc.id) == desc:
            return
        if desc.id in self.known:
            self.clear(desc.id)
        keys = [(iova, 0, rkey) for iova, rkey in desc.rails]
        self.set(desc.id, desc.length, desc.access, 0, desc.secret, keys)
        self.known[desc.id] = desc

    def remove(self, id: int) -> None:
        if self.known.pop(id, None) is not None:
            self.clear(id)


@dataclass(slots=True)
class Region:
    """Registered memory of ours. ``owner`` keeps the memory alive; :meth:`close` withdraws it. ``address`` is
    the memory's own: what each rail calls it is in ``desc``.
    """

    domain: Domain
    id: int
    address: int
    length: int
    access: int
    desc: RegionDesc
    owner: object
    handles: list[Any] = field(default_factory=list)  # the fabric's own: memory regions
    closed: bool = False

    def close(self) -> None:
        """Withdraws the region. No batch of ours may be using it; afterwards nobody can READ it any more."""
        if not self.closed:
            self.closed = True
            self.domain._withdraw(self)
            self.owner = None


class Domain(ABC):
    """A trust domain: who is connected to it may READ its REMOTE_READ regions, and nothing else."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.table = _Table()
        self.regions: dict[int, Region] = {}
        self._next_id = 1
        self._lock = threading.Lock()

    def reserve_id(self) -> int:
        """An id that :meth:`register` will not give out by itself."""
        with self._lock:
            self._next_id += 1
            return self._next_id - 1

    def register(
        self,
        address: int,
        length: int,
        *,
        remote_read: bool = False,
        owner: object = None,
        region_id: int | None = None,
    ) -> Region:
        """Registers ``length`` bytes at ``address``, either for READs of ours to land in or, with
        ``remote_read``, for the other side to READ.

        :param region_id: the id to use (below 2²¹), the caller's to keep apart; by default the next one.
        :raises DeviceError: the kernel refuses (memlock, an address that is not mapped).
        """
        if length <= 0 or address <= 0:
            raise LocalError("an empty buffer cannot be registered")
        access = REMOTE_READ if remote_read else LOCAL_WRITE
        return self._enter(self._register(address, length, access), address, length, access, owner, region_id)

    def register_device(
        self,
        address: int,
        length: int,
        *,
        dma_buf: tuple[int, int] | None,
        remote_read: bool = False,
        owner: object = None,
        region_id: int | None = None,
    ) -> Region:
        """Registers memory that the CPU does not reach: a GPU's.

        :param dma_buf: (file descriptor, where in it ``address`` lies); the descriptor may be closed
            afterwards. None: by its address, for which the kernel needs a module of the GPU's maker.
        :raises NotRegistered: it cannot be done this way; ``errno`` and the message say why.
        """
        if length <= 0 or address <= 0:
            raise LocalError("an empty buffer cannot be registered")
        access = REMOTE_READ if remote_read else LOCAL_WRITE
        made = self._register_device(address, length, access, dma_buf)
        return self._enter(made, address, length, access, owner, region_id, base=0)

    def window(
        self, of: Region, address: int, length: int, *, owner: object = None, region_id: int | None = None
    ) -> Region:
        """A region over a part of another, with its keys: several buffers may share one registration. Only
        bounds in software keep the other side inside it. Close it before the other.

        :param address: the memory's own, as in ``of.address``.
        """
        offset = address - of.address
        if length <= 0 or offset < 0 or offset + length > of.length:
            raise LocalError("a window must lie inside its region")
        entry = lib.mkv_table_at(self.table.ptr, of.id)
        rails = [entry.rail[i] for i in range(entry.nrails)]
        keys = [(int(r.iova) + offset, int(r.lkey), int(r.rkey)) for r in rails]
        base = int(entry.base) + offset if entry.base else 0
        made: Registered = [], keys, int(entry.secret)
        return self._enter(made, address, length, of.access, owner, region_id, base)

    def _enter(
        self,
        made: Registered,
        address: int,
        length: int,
        access: int,
        owner: object,
        region_id: int | None,
        base: int | None = None,
    ) -> Region:
        """:param base: where C may look at the bytes; 0: nowhere. By default ``address``."""
        handles, keys, secret = made
        if region_id is None:
            region_id = self.reserve_id()
        self.table.set(region_id, length, access, address if base is None else base, secret, keys)
        rails = tuple((iova, rkey) for iova, _, rkey in keys)
        desc = RegionDesc(region_id, length, access, secret, rails)
        region = Region(self, region_id, address, length, access, desc, owner, handles)
        self.regions[region_id] = region
        return region

    def _withdraw(self, region: Region) -> None:
        self._unregister(region)
        self.table.clear(region.id)
        self.regions.pop(region.id, None)

    @abstractmethod
    def _register(self, address: int, length: int, access: int) -> Registered: ...

    def _register_device(
        self, address: int, length: int, access: int, dma_buf: tuple[int, int] | None
    ) -> Registered:
        name = self.fabric.name
        raise NotRegistered(f"the {name} fabric reaches host memory only", errno.EOPNOTSUPP, "--fabric verbs")

    @abstractmethod
    def _unregister(self, region: Region) -> None: ...

    @abstractmethod
    def endpoint(
        self, role: Role, remote: RemoteTable | None = None, *, depth: int = 128, dial: bool = False
    ) -> Endpoint:
        """Our end of a new channel.

        :param role: "read": our READs go over it; "serve": the other side's.
        :param remote: the other side's regions (reader only).
        :param depth: READs that may be under way at once.
        :param dial: tcp: this side opens the connections (the peer does, the node accepts).
        """

    @abstractmethod
    def close(self) -> None:
        """Withdraws all regions. Endpoints must be closed before."""


class Endpoint(ABC):
    """One end of a channel. ``number`` is what the node calls the channel, where that has been learnt."""

    offer: Offer
    number: int = 0

    @abstractmethod
    def connect(self, other: Offer, host: str, timeout: float) -> None:
        """Completes this end with the other's offer.

        :param host: the other side's address, for fabrics that dial.
        :raises DeviceError: the device refuses. :raises DeadlineError: not within ``timeout`` seconds.
        """

    @property
    @abstractmethod
    def channel(self) -> Any:
        """The ``struct mkv_channel *`` of the reading end."""

    @abstractmethod
    def close(self) -> None:
        """Destroys this end; when it returns no device writes for it any more."""


class Fabric(ABC):
    """A way to move bytes. ``reason`` says why this one was taken."""

    name: str
    reason: str = ""

    @abstractmethod
    def domain(self) -> Domain: ...

    @abstractmethod
    def describe(self) -> dict[str, str | int | float | bool]:
        """What a heading or ``doctor`` shows."""

    @abstractmethod
    def close(self) -> None: ...
