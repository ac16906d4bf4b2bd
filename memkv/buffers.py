"""Buffers that an application has registered, and the slices of them that blocks go to or come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .gpudirect.buffers import Memory
from .gpudirect.copier import Window
from .gpudirect.ladder import Rung
from .rdma.errors import LocalError
from .rdma.fabric import Region

if TYPE_CHECKING:
    from .peer import Peer

SLICE = np.dtype([("offset", "<u8"), ("region", "<u4"), ("length", "<u4")])
Slices = npt.NDArray[np.void]


HOST = Rung("host", "host memory, which the fabric reaches")
READ_ONLY = Rung("none", "read-only memory")


class Buffer:
    """Memory known to a peer. Made by :meth:`memkv.Peer.register`; stays registered until :meth:`close`.

    Two regions lie over it: one that READs of gets may land in, which nobody else can reach, and one that
    nodes may READ puts from, into which nothing can be written. GPU memory has those that the fabric can
    have: ``get_rung`` and ``put_rung`` say which way blocks go ("host", "dma-buf", "peermem", "staged", or
    "none") and why, ``device`` where the memory is: "cpu" or "cuda:0".
    """

    def __init__(
        self,
        peer: Peer,
        id: int,
        memory: Memory,
        into: Region | Window | None,
        out: Region | Window | None,
        *,
        device: str = "cpu",
        get_rung: Rung = HOST,
        put_rung: Rung = HOST,
    ) -> None:
        self.peer = peer
        self.id = id
        self.address = memory.address
        self.nbytes = memory.nbytes
        self.device = device
        self.allocation_id = memory.buffer_id  # of GPU memory: another one here means that it was freed
        self.get_rung = get_rung
        self.put_rung = put_rung
        self._memory: Memory | None = memory
        self._into = into
        self._out = out

    @property
    def desc(self) -> Any:
        """What nodes need in order to pull from it; None where they cannot."""
        if self._out is None:
            return None
        return self._out.desc if isinstance(self._out, Region) else self._out.region.desc

    def window(self, into: bool) -> Window | None:
        """How the fabric reaches GPU memory, on the way ``into`` it or out of it."""
        found = self._into if into else self._out
        return None if isinstance(found, Region) else found

    def rung(self, into: bool) -> Rung:
        """The way that blocks go ``into`` it, or out of it."""
        return self.get_rung if into else self.put_rung

    def slices(self, offsets: npt.ArrayLike, lengths: npt.ArrayLike) -> Slices:
        """Slices of this buffer, dtype :data:`SLICE`, shape (n,).

        :param offsets: bytes from the start of the buffer. :param lengths: bytes; one for all, or one each.
        :raises LocalError: a slice is not inside the buffer.
        """
        try:
            start = np.atleast_1d(np.asarray(offsets, dtype=np.uint64))
            size = np.broadcast_to(np.asarray(lengths, dtype=np.uint64), start.shape)
        except (OverflowError, ValueError) as exc:
            raise LocalError(f"offsets and lengths of slices: {exc}") from None
        nbytes = np.uint64(self.nbytes)
        if (size > nbytes - np.minimum(start, nbytes)).any() or (start > nbytes).any():
            raise LocalError(f"a slice ends beyond the buffer's {self.nbytes} bytes")
        if start.size and int(size.max()) >= 1 << 32:
            raise LocalError(f"a slice of {int(size.max())} bytes", "blocks are shorter than 4 GiB")
        out = np.empty(start.shape, SLICE)
        out["offset"], out["region"], out["length"] = start, self.id, size
        return out

    def split(self, block_bytes: int) -> Slices:
        """The whole buffer as slices of ``block_bytes``, as many as fit."""
        if block_bytes <= 0:
            raise LocalError(f"slices of {block_bytes} bytes")
        return self.slices(np.arange(self.nbytes // block_bytes, dtype=np.uint64) * block_bytes, block_bytes)

    def _release(self) -> None:
        """Gives regions and memory back; nobody uses them any more."""
        for held in (self._into, self._out):
            if held is not None:
                held.close()
        self._memory = None

    def close(self) -> None:
        """Withdraws the buffer: waits for batches under way, and for the nodes to have let go of it."""
        self.peer._unregister(self)
