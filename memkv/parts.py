"""Taking a batch with slices in GPU memory apart: which blocks go to which node through a device's slots."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .batches import Keys
from .buffers import SLICE, Buffer, Slices
from .gpudirect.copier import Device
from .gpudirect.staging import Addresses, Places, Way
from .rdma.fabric import Region
from .status import Status

if TYPE_CHECKING:
    from .gets import Route

log = logging.getLogger("memkv.peer")


@dataclass(slots=True)
class Whole:
    """A batch, ``into`` memory or out of it, and what becomes of its keys."""

    keys: Keys
    slices: Slices
    status: npt.NDArray[np.uint8]
    into: bool


@dataclass(slots=True)
class Stage:
    """One direction of one device: the way through its slots, and the ring as a region of the fabric's."""

    way: Way
    region: Region


@dataclass(slots=True)
class Part:
    """:class:`~memkv.gpudirect.staging.Blocks` of a batch. Statuses go to where those of the batch are."""

    whole: Whole
    index: Places  # which keys of the batch
    node: str
    address: Addresses
    room: Addresses
    device: Device

    def only(self, index: Places) -> Part:
        """Some of them."""
        return Part(
            self.whole, self.index[index], self.node, self.address[index], self.room[index], self.device
        )

    def late(self, index: Places) -> None:
        self.whole.status[self.index[index]] = Status.TIMEOUT

    def failed(self, index: Places, rc: int) -> None:
        self.whole.status[self.index[index]] = Status.ERROR_COPY
        way = "into" if self.whole.into else "out of"
        why = self.device.explain(rc) if rc > 0 else "the peer was closed"
        log.error("%d blocks could not be copied %s %s: %s", len(index), way, self.device.name, why)


def parts(whole: Whole, buffer: Buffer, device: Device, index: Places, route: Route, most: int) -> list[Part]:
    """The blocks at ``index``, all in one buffer, by node. Those that cannot be staged get their status here.

    :param most: bytes that the slots hold together.
    """
    where = whole.slices[index]
    nbytes = np.uint64(buffer.nbytes)
    outside = (where["length"] > nbytes) | (where["offset"] > nbytes - np.minimum(where["length"], nbytes))
    whole.status[index[outside]] = Status.ERROR_BOUNDS
    index = index[~outside]
    out = []
    for link, chosen in route(whole.keys[index]) if len(index) else []:
        part = index if chosen is None else index[chosen]
        if (session := link.session) is None:
            whole.status[part] = Status.ERROR_UNREACHABLE
            continue
        longest = int(session.info.block_bytes)
        room = whole.slices["length"][part].astype(np.uint64)
        if whole.into:
            room = np.minimum(room, np.uint64(longest))  # there may be more room than a block needs
        too_large = room > np.uint64(min(longest, most))
        whole.status[part[too_large]] = Status.ERROR_TOO_LARGE
        part, room = part[~too_large], room[~too_large]
        if len(part):
            address = whole.slices["offset"][part] + np.uint64(buffer.address)
            out.append(Part(whole, part, link.address, address, room, device))
    return out


def slices_of(offset: Addresses, region: int, length: Addresses) -> Slices:
    """Slices of one region."""
    out = np.empty(len(offset), SLICE)
    out["offset"], out["region"], out["length"] = offset, region, length
    return out


def was_freed(buffer: Buffer, device: Device, into: bool) -> bool:
    """Whether the application has freed GPU memory that is registered: who knows whose it is by now."""
    window = buffer.window(into)
    if window is not None:
        freed = bool(device.stale([window]))
    elif buffer.allocation_id:
        freed = device.allocation_id(buffer.address) != buffer.allocation_id
    else:
        freed = False
    if freed:
        log.error("buffer %d on %s was freed while it was registered", buffer.id, buffer.device)
    return freed
