"""Batches of keys: what a session's Lookup, Match, Pin, Unpin and Delete do in the C core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from . import messages as m
from .flash.tier import FlashTier
from .namespace import Namespace
from .native._store import ffi, lib

INLINE_KEYS = 2048  # larger batches leave the event loop

KeyBatch = m.Lookup | m.Match | m.Pin | m.Unpin | m.Delete


def call_of(ns: Namespace, r: KeyBatch) -> Callable[[], m.Message]:
    """The call that carries out a batch and makes its reply; from any thread."""
    core, n = ns.ns, r.blocks
    status = np.zeros(n, np.uint8)

    def call() -> m.Message:
        out, keys = ffi.from_buffer("uint8_t[]", status), ffi.from_buffer("uint8_t[]", r.keys)
        if isinstance(r, m.Match):
            return m.Count(r.request, lib.mkv_ns_match(core, keys, n))
        if isinstance(r, m.Pin):
            lib.mkv_ns_pin(core, keys, n, r.ttl_ms * 1_000_000, out)
        elif isinstance(r, m.Unpin):
            lib.mkv_ns_unpin(core, keys, n, out)
        elif isinstance(r, m.Delete):
            lib.mkv_ns_delete(core, keys, n, out)
        else:
            lib.mkv_ns_lookup(core, keys, n, out)
        return m.Statuses(r.request, status.tobytes())

    return call


async def delete(
    ns: Namespace, r: m.Delete, tier: FlashTier, pool: ThreadPoolExecutor, timeout: float
) -> m.Message:
    """A Delete where there is flash: answered when nothing can bring the blocks back.

    A key that the scan has not come upon yet is not known, so the scan has to be over before. TIMEOUT says
    that a key may or may not be deleted, now or at the next start.
    """
    assert ns.flash is not None
    events = asyncio.get_running_loop()
    until = events.time() + timeout
    unknown = m.Statuses(r.request, bytes([lib.MKV_TIMEOUT]) * r.blocks)
    if not await tier.scanned(ns.flash, until):
        return unknown
    reply = await events.run_in_executor(pool, call_of(ns, r))
    # also where nothing was found: the same keys may have been deleted by somebody who still waits
    return reply if await tier.barrier(until) else unknown
