"""GPU ↔ memkv, on the side of a vLLM worker: blocks go from the KV caches to the nodes and back.

A vLLM block has a page in each of the tensors of its cache group: one if the layers of a block lie beside
each other in memory (layout BLHNC, which the connector asks for), else one for each layer. Every page is a
memkv block, its *piece*. The keys of a block's pieces share the placement tag, so that one node has them all.
A job is one call of the peer, whatever its number of blocks and pieces.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from ..batches import as_keys
from ..buffers import Buffer, Slices
from ..keys import KEY_BYTES, Keys
from ..peer import Peer
from ..rdma.errors import LocalError, MemKVError
from ..status import Status
from ..tickets import Ticket
from .identity import Identity, piece_mask
from .settings import Settings
from .vllm_gpu_manager import MemKVBlocks
from .vllm_outcomes import Outcomes

log = logging.getLogger("memkv.vllm")


@dataclass(slots=True)
class MemKVResult(TransferResult):
    """``number``: the job's in :class:`MemKVBlocks`; ``failed``: places in it of the blocks that have not
    come, or are not kept; ``blocks``: the GPU blocks of these.
    """

    number: int = -1
    failed: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Job:
    id: int
    number: int
    is_load: bool
    count: int  # of its digests
    blocks: npt.NDArray[np.int64]  # of the GPU, one for each digest
    started: float
    # What _batch finds: the place of each key of the batch in the digests, keys of blocks (that is, of their
    # last pieces), and bytes of all pieces.
    places: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    keys: Keys = field(default_factory=lambda: as_keys([]))
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Where the pages of one tensor are: block b's at ``base + b * stride`` of the buffer."""

    buffer: Buffer
    base: int
    stride: int
    length: int
    key: npt.NDArray[np.uint8]  # (16,), what makes this piece's key of its block's


def piece_key(piece: int, pieces: int, length: int) -> npt.NDArray[np.uint8]:
    """What is added (by exclusive or) to a block's key for one of its pieces; nothing for the last one, which
    stands for the block in lookups.
    """
    if piece == pieces - 1:
        return np.zeros(KEY_BYTES, np.uint8)
    return piece_mask(f"piece {piece} of {pieces}, {length} bytes".encode(), b"memkv-vllm-piece")


class MemKVWorker(OffloadingWorker):
    """:param identity: this worker's.

    :raises MemKVError: the caches cannot be registered, or a page is longer than the namespace's blocks.
    """

    def __init__(
        self, peer: Peer, identity: Identity, caches: CanonicalKVCaches, block_bytes: int, settings: Settings
    ) -> None:
        self._peer = peer
        self._identity = identity
        self._settings = settings
        tensors = [cache.tensor for cache in caches.tensors]
        device = tensors[0].device
        self._device = device if device.type == "cuda" else None
        buffers: dict[int, Buffer] = {}
        for tensor in tensors:  # layers may share one allocation, which is registered once
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in buffers:
                place = (storage.data_ptr(), storage.nbytes())
                memory = place if device.type == "cpu" else (*place, f"{device.type}:{device.index or 0}")
                buffers[storage.data_ptr()] = peer.register(memory)
        self._pieces: list[list[Piece]] = []  # of each cache group
        for refs in caches.group_data_refs:
            pieces = []
            for i, ref in enumerate(refs):
                tensor = tensors[ref.tensor_idx]
                start = tensor.untyped_storage().data_ptr()
                if ref.page_size_bytes > block_bytes:
                    raise LocalError(f"a page of {ref.page_size_bytes} bytes, in blocks of {block_bytes}")
                pieces.append(
                    Piece(
                        buffer=buffers[start],
                        base=tensor.data_ptr() - start,
                        stride=tensor.stride(0) * tensor.element_size(),
                        length=ref.page_size_bytes,
                        key=piece_key(i, len(refs), ref.page_size_bytes),
                    )
                )
            self._pieces.append(pieces)
        for buffer in buffers.values():
            log.info(
                "memkv: %d bytes of KV cache on %s, get: %s (%s), put: %s (%s)",
                *(buffer.nbytes, buffer.device, buffer.get_rung.name, buffer.get_rung.reason),
                *(buffer.put_rung.name, buffer.put_rung.reason),
            )
        self._results: deque[MemKVResult] = deque()
        self._torn: deque[npt.NDArray[np.uint8]] = deque()  # keys of blocks of which a piece is gone
        self._under_way: set[int] = set()
        self._changed = threading.Condition()
        self._outcomes = {True: Outcomes("load"), False: Outcomes("store")}  # by whether it is a load

    # --- jobs ---

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._submit(job_id, dst_spec, src_spec, is_load=False)

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        return self._submit(job_id, src_spec, dst_spec, is_load=True)

    def _submit(self, job_id: int, ours: LoadStoreSpec, gpu: GPULoadStoreSpec, *, is_load: bool) -> bool:
        """Starts a job, once what the GPU has been given until now is over: always True, since what cannot be
        started is a job that failed.
        """
        assert isinstance(ours, MemKVBlocks)
        count = len(ours.digests)
        blocks = np.asarray(gpu.block_ids, np.int64)
        job = Job(job_id, ours.number, is_load, count, blocks, time.monotonic())
        with self._changed:
            self._under_way.add(job_id)
        try:
            if ours.namespace != self._peer.namespace:
                raise LocalError(
                    f"vLLM's scheduler has blocks of {ours.namespace}, this worker of {self._peer.namespace}"
                )
            if len(blocks) != count or len(gpu.group_sizes) != len(self._pieces):
                raise LocalError(
                    f"{len(blocks)} GPU blocks of {len(gpu.group_sizes)} groups, where {count} of "
                    f"{len(self._pieces)} are due"
                )
            keys, slices = self._batch(job, ours.digests, gpu.group_sizes)
            stream = None if self._device is None else torch.cuda.current_stream(self._device)
            done = partial(self._done, job)
            if not count:
                done(Ticket(done=True, status=np.empty(0, np.uint8)))
            elif is_load:
                self._peer.submit_get(
                    keys, slices, timeout=self._settings.get_timeout, exact=True, stream=stream, then=done
                )
            else:
                self._peer.submit_put(
                    keys,
                    slices,
                    timeout=self._settings.put_timeout,
                    durability=self._settings.durability,
                    stream=stream,
                    then=done,
                )
        except MemKVError as error:
            self._done(job, Ticket(done=True, error=error))
        return True

    def _batch(self, job: Job, digests: list[bytes], group_sizes: Sequence[int]) -> tuple[Keys, Slices]:
        """Keys and slices of all pieces of a job's blocks; where each belongs is noted in the job."""
        job.keys = block_keys = self._identity.keys(digests)
        keys: list[Any] = [block_keys[:0]]
        slices: list[Any] = []
        places: list[Any] = [job.places]
        start = 0
        for pieces, size in zip(self._pieces, group_sizes, strict=True):
            group = slice(start, start + size)
            for piece in pieces:
                keys.append(block_keys[group] ^ piece.key)
                offsets = piece.base + job.blocks[group] * piece.stride
                slices.append(piece.buffer.slices(offsets, piece.length))
                places.append(np.arange(start, start + size))
                job.nbytes += size * piece.length
            start += size
        job.places = np.concatenate(places)
        return np.concatenate(keys), np.concatenate(slices)

    def _done(self, job: Job, ticket: Ticket) -> None:
        """On the control thread, or where a job could not start. Nobody touches the caches any more."""
        count = job.count if ticket.status is None else len(job.places)
        good = self._outcomes[job.is_load].good(ticket, count)
        if ticket.status is None:
            failed, blocks = np.arange(job.count), job.blocks
        else:
            failed = np.unique(job.places[~good])
            blocks = job.blocks[failed]
            if job.is_load:
                gone = (ticket.status == Status.MISS) | (ticket.status == Status.CORRUPT)
                self._torn.extend(job.keys[np.unique(job.places[gone])])
        result = MemKVResult(
            job_id=job.id,
            success=ticket.status is not None and not len(failed),
            transfer_size=job.nbytes,
            transfer_time=time.monotonic() - job.started,
            number=job.number,
            failed=failed.tolist(),
            blocks=blocks.tolist() if job.is_load else [],
        )
        with self._changed:
            self._results.append(result)
            self._under_way.discard(job.id)
            self._changed.notify_all()

    def get_finished(self) -> list[TransferResult]:
        out: list[TransferResult] = []
        while self._results:
            out.append(self._results.popleft())
        torn = [self._torn.popleft() for _ in range(len(self._torn))]
        if torn:
            self._forget(np.stack(torn))
        return out

    def _forget(self, keys: Keys) -> None:
        """Deletes the last pieces of blocks that have lost another: a lookup would find them for ever, and
        every load fail.
        """
        with contextlib.suppress(MemKVError):
            self._peer.submit_delete(keys, then=lambda ticket: None)

    def wait(self, job_ids: set[int]) -> None:
        """Until these are done, well or not: until their deadlines at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._under_way.isdisjoint(job_ids))

    def shutdown(self) -> None:
        self._peer.close()
        self._pieces = []
