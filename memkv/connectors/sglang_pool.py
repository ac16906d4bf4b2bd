"""A host pool of SGLang, known to a peer: its memory registered, its pages looked up, fetched and kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ..buffers import SLICE, Slices
from ..rdma.errors import LocalError, MemKVError
from ..status import FIRST_ERROR, Status, describe, kept
from .identity import Identity
from .settings import Settings
from .sglang_pages import Flags, Pieces, pages_of, piece_keys, whole

if TYPE_CHECKING:
    from ..buffers import Buffer
    from ..peer import Peer

log = logging.getLogger("memkv.sglang")

Statuses = npt.NDArray[np.uint8]
T = TypeVar("T")


class Blocks:
    """Blocks of one identity, through a peer of its own. Whatever goes wrong on the way is a block that is
    not held: the engine computes it. Why is logged once, until it works again or fails for another reason.
    """

    def __init__(self, settings: Settings, identity: Identity, block_bytes: int) -> None:
        self.settings = settings
        self.identity = identity
        self.peer = settings.connect(identity, block_bytes)
        self._failures: dict[str, str] = {}  # of gets, puts and lookups: the last one's, empty if it was well

    def keys(self, hashes: Sequence[str]) -> npt.NDArray[np.uint8]:
        """(n, 16), from SGLang's hashes of the pages, each of which stands for its whole prefix."""
        return self.identity.keys(h.encode() for h in hashes)

    def match(self, keys: npt.NDArray[np.uint8]) -> int:
        """How many are held from the first on."""
        return self._try("lookups", lambda: self.peer.match(keys, timeout=self.settings.get_timeout), 0)

    def held(self, keys: npt.NDArray[np.uint8]) -> Flags:
        """(n,): which are held."""
        timeout = self.settings.get_timeout
        status = self._statuses("lookups", len(keys), lambda: self.peer.exists(keys, timeout=timeout))
        held: Flags = status == Status.HIT
        return held

    def get(self, keys: npt.NDArray[np.uint8], slices: Slices) -> tuple[Flags, npt.NDArray[np.uint32]]:
        """(n,): which are in place now, and how long they are."""
        lengths, timeout = np.zeros(len(keys), np.uint32), self.settings.get_timeout
        status = self._statuses(
            "gets",
            len(keys),
            lambda: self.peer.get_into(keys, slices, timeout=timeout, lengths=lengths),
        )
        return status == Status.HIT, lengths

    def put(self, keys: npt.NDArray[np.uint8], slices: Slices) -> Flags:
        """(n,): which are kept now, whoever brought them."""
        s = self.settings
        status = self._statuses(
            "puts",
            len(keys),
            lambda: self.peer.put_from(keys, slices, timeout=s.put_timeout, durability=s.durability),
        )
        return kept(status)

    def _statuses(self, what: str, n: int, call: Callable[[], Statuses]) -> Statuses:
        status = self._try(what, call, np.full(n, Status.ERROR_UNREACHABLE, np.uint8))
        failed = status[status >= FIRST_ERROR]
        self._report(what, describe(int(failed[0])) if failed.size else "")
        return status

    def _try(self, what: str, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except LocalError:
            raise  # a mistake in the program, not in the world
        except MemKVError as exc:
            self._report(what, str(exc))
            return otherwise

    def _report(self, what: str, failure: str) -> None:
        if failure and failure != self._failures.get(what):
            log.warning("%s, %s: %s; such pages are computed instead", self.peer.namespace, what, failure)
        self._failures[what] = failure

    def close(self) -> None:
        self.peer.close()


class PoolBlocks(Blocks):
    """The pages of a host pool, moved straight between its memory and the nodes: one call a batch."""

    def __init__(self, settings: Settings, identity: Identity, pool: Any, pieces: Pieces) -> None:
        super().__init__(settings, identity, pieces.longest)
        self.pool = pool
        self.pieces = pieces
        self.page_size = int(pool.page_size)
        try:
            self._buffers: list[Buffer] = [self.peer.register(range) for range in memory_of(pool)]
            self._place = self._find()
        except BaseException:
            self.close()
            raise

    def _find(self) -> list[tuple[Buffer, npt.NDArray[np.intp]]]:
        """The pieces that each buffer holds."""
        first, last = self.pieces.at(np.array([0, self.pieces.pages - 1]))
        end = last + self.pieces.size
        out, found = [], 0
        for buffer in self._buffers:
            inside = (first >= buffer.address) & (end <= buffer.address + buffer.nbytes)
            if inside.any():
                out.append((buffer, np.flatnonzero(inside)))
                found += int(inside.sum())
        if found != len(self.pieces):
            raise LocalError(
                f"{type(self.pool).__name__}: pages outside the memory that it names",
                "--hicache-mem-layout: page_first, page_first_direct or layer_first",
            )
        return out

    def page_keys(self, hashes: Sequence[str]) -> npt.NDArray[np.uint8]:
        """(n · pieces, 16)."""
        return piece_keys(self.keys(hashes), len(self.pieces))

    def slices(self, indices: Any, n: int) -> Slices:
        """(n · pieces,) where the pages at these slots lie; ``indices``: of each token, a tensor."""
        slots = indices.detach().cpu().numpy().astype(np.int64, copy=False)
        pages = pages_of(slots, n, self.page_size, self.pieces.pages)
        out = np.empty((n, len(self.pieces)), SLICE)
        where = self.pieces.at(pages)
        for buffer, held in self._place:
            offsets = (where[:, held] - np.uint64(buffer.address)).reshape(-1)
            lengths = np.broadcast_to(self.pieces.size[held], (n, len(held))).reshape(-1)
            out[:, held] = buffer.slices(offsets, lengths).reshape(n, len(held))
        return out.reshape(-1)

    def match_pages(self, hashes: Sequence[str]) -> int:
        return self.match(self.page_keys(hashes)) // len(self.pieces)

    def held_pages(self, hashes: Sequence[str]) -> Flags:
        return whole(self.held(self.page_keys(hashes)), len(self.pieces))

    def get_pages(self, hashes: Sequence[str], indices: Any) -> Flags:
        """(n,): which pages are in place in the pool now; what others hold is undefined."""
        slices = self.slices(indices, len(hashes))
        hit, lengths = self.get(self.page_keys(hashes), slices)
        return whole(hit & (lengths == slices["length"]), len(self.pieces))

    def put_pages(self, hashes: Sequence[str], indices: Any) -> Flags:
        """(n,): which pages are kept now."""
        slices = self.slices(indices, len(hashes))
        return whole(self.put(self.page_keys(hashes), slices), len(self.pieces))


class Bounce:
    """Registered memory for a few blocks of up to ``block_bytes``, which tensors are copied through."""

    def __init__(self, peer: Peer, block_bytes: int) -> None:
        self.lock = threading.Lock()
        self._step = -(-block_bytes // 64) * 64  # whatever the type of a tensor, its elements are aligned
        self.slots = max(1, min(128, (64 << 20) // self._step))
        self.memory = torch.zeros(self.slots, self._step, dtype=torch.uint8)
        self._buffer = peer.register((self.memory.data_ptr(), self.memory.nbytes))

    def slices(self, n: int, lengths: npt.ArrayLike) -> Slices:
        return self._buffer.slices(np.arange(n, dtype=np.uint64) * np.uint64(self._step), lengths)


class FlatBlocks(Blocks):
    """Tensors in any memory, of up to ``block_bytes`` each: what SGLang calls without ``interface_v1``."""

    def __init__(self, settings: Settings, identity: Identity, block_bytes: int) -> None:
        super().__init__(settings, identity, block_bytes)
        self.block_bytes = block_bytes
        try:
            self._into, self._out = Bounce(self.peer, block_bytes), Bounce(self.peer, block_bytes)
        except BaseException:
            self.close()
            raise

    def get_tensors(self, hashes: Sequence[str], targets: Sequence[Any]) -> list[Any]:
        """The targets, filled, or None for each that is not held, or not with the target's size. A target
        that is None is made: a tensor of bytes.
        """
        out: list[Any] = []
        with self._into.lock:
            for start in range(0, len(hashes), self._into.slots):
                end = start + self._into.slots
                out += self._get_few(self.keys(hashes[start:end]), targets[start:end])
        return out

    def _get_few(self, keys: npt.NDArray[np.uint8], targets: Sequence[Any]) -> list[Any]:
        hit, lengths = self.get(keys, self._into.slices(len(keys), self.block_bytes))
        out: list[Any] = []
        for i, target in enumerate(targets):
            found = self._into.memory[i, : int(lengths[i])]
            if not hit[i] or (target is not None and target.nbytes != found.nbytes):
                out.append(None)
            elif target is None:
                out.append(found.clone())
            else:
                out.append(target.copy_(found.view(target.dtype).reshape(target.shape)))
        return out

    def put_tensors(self, hashes: Sequence[str], values: Sequence[Any]) -> Flags:
        """(n,): which are kept now. One that is longer than a page is not."""
        out = np.zeros(len(hashes), np.bool_)
        with self._out.lock:
            for start in range(0, len(hashes), self._out.slots):
                end = start + self._out.slots
                out[start:end] = self._put_few(self.keys(hashes[start:end]), values[start:end])
        return out

    def _put_few(self, keys: npt.NDArray[np.uint8], values: Sequence[Any]) -> Flags:
        sizes = np.array([v.nbytes for v in values])
        fits = (sizes > 0) & (sizes <= self.block_bytes)
        for i in np.flatnonzero(fits).tolist():
            plain = values[i].detach().contiguous().view(-1).view(torch.uint8)
            self._out.memory[i, : plain.nbytes].copy_(plain)
        out = np.zeros(len(keys), np.bool_)
        out[fits] = self.put(keys[fits], self._out.slices(len(keys), sizes * fits)[fits])
        return out


def memory_of(pool: Any) -> list[tuple[int, int]]:
    """(address, bytes) of the pool's memory, its tensors joined where one follows the other. None for a pool
    whose data are all in others, or that has no layers.

    :raises LocalError: a tensor that does not lie in one stretch, or not in host memory.
    """
    named = pool.get_hybrid_pool_buffer() if hasattr(pool, "get_hybrid_pool_buffer") else []
    more = [getattr(pool, n, None) for n in ("kv_buffer", "k_buffer", "v_buffer", *INDEXERS)]
    tensors: list[Any] = []
    for given in [*named, *([] if named else more)]:
        tensors += given if isinstance(given, list | tuple) else [given]
    ranges: list[tuple[int, int]] = []
    tensors = [t for t in tensors if t is not None and t.numel()]
    for tensor in sorted(tensors, key=lambda t: (t.data_ptr(), -t.nbytes)):
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise LocalError(f"{type(pool).__name__}: a buffer on {tensor.device}, or not in one stretch")
        start, size = tensor.data_ptr(), tensor.nbytes
        if ranges and start <= sum(ranges[-1]):
            ranges[-1] = ranges[-1][0], max(sum(ranges[-1]), start + size) - ranges[-1][0]
        else:
            ranges.append((start, size))
    return ranges


INDEXERS = ("index_k_buffer", "index_k_scale_buffer")  # of a pool whose latents are split (Ascend)


def check(pool: Any) -> None:
    """:raises LocalError: the slots that SGLang names do not say where a page is in this rank's memory: the
    pool shares it with others, its pages are spread over ranks, or another rank has them all.
    """
    name = type(pool).__name__
    shared = getattr(pool, "shared_allocation_domain", None) is not None
    if shared or getattr(pool, "logical_size", pool.size) != pool.size:
        raise LocalError(
            f"{name}: its pages are shared, or spread over ranks",
            "memkv needs a pool of each rank's own: no --dcp-size, no --enable-unified-memory",
        )
    if getattr(pool, "layer_num", 0) > 0 and not memory_of(pool):
        raise LocalError(
            f"{name}: its pages are in another rank's memory",
            "name the backend at start, --hicache-storage-backend: host memory is not shared then",
        )


def pieces_of(pool: Any) -> Pieces:
    """Where the pages of a pool lie.

    :raises LocalError: a layout whose pages do not lie in one piece or a few.
    """
    try:
        return Pieces.learn(
            lambda i: pool.get_page_buffer_meta(torch.from_numpy(i)), int(pool.size), int(pool.page_size)
        )
    except LocalError:
        raise
    except (ValueError, NotImplementedError, AssertionError) as exc:
        raise LocalError(
            f"{type(pool).__name__} cannot be read without a copy in this layout: {exc}",
            "--hicache-mem-layout page_first (with --hicache-io-backend direct: page_first_direct)",
        ) from exc
