"""Getting blocks into GPU memory through slots, from one node: those in its memory at once, those in its
flash as they are brought.

Slots are for blocks that can be READ now. While a node brings blocks from its flash nobody has slots in hand,
so a flash that hangs costs those who want what is in it.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
import numpy.typing as npt

from .batches import Batch
from .gets import STAGINGS, Gets
from .gpudirect import staging
from .gpudirect.staging import Addresses, Fetch
from .parts import Part, Stage, slices_of
from .staging import let_go
from .status import Status

BRINGING = 2  # portions of a batch that are being brought from flash, READ and copied at once


async def get_staged(
    gets: Gets, stage: Stage, part: Part, lengths: npt.NDArray[np.uint32], checksum: bool, until: float
) -> None:
    """Ends when no copy is under way into any of the slices.

    :param lengths: by key of the batch, receives those of HITs. :param until: time.monotonic().
    """
    status = part.whole.status
    await staging.get(stage.way, part, _fetch(gets, stage, part, lengths, checksum), until)
    for _ in range(STAGINGS):
        cold = np.flatnonzero(status[part.index] == Status.COLD)
        if not len(cold):
            break
        gate = asyncio.Semaphore(BRINGING)

        async def bring(some: Part, gate: asyncio.Semaphore = gate) -> None:
            async with gate:
                batch = Batch(part.whole.keys[some.index], None, False, False)
                ready = await gets.bring_async(batch, until - time.monotonic())
                status[some.index] = batch.status
                there = np.flatnonzero(batch.status == Status.PENDING)
                here, places = some.only(there), None if batch.places is None else batch.places[there]
                fetch = _fetch(gets, stage, here, lengths, checksum, places)
                await staging.get(stage.way, here, fetch, until)
                batch.status[:] = status[some.index]
                for session, index in ready:
                    let_go(batch, session, index)

        portions = stage.way.portions(part.room[cold])
        work = [bring(part.only(cold[start:stop])) for start, stop in portions]
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
    left = part.index[status[part.index] == Status.COLD]
    status[left] = Status.STALE  # evicted again each time before it was READ


def _fetch(
    gets: Gets,
    stage: Stage,
    part: Part,
    lengths: npt.NDArray[np.uint32],
    checksum: bool,
    places: npt.NDArray[np.uint8] | None = None,
) -> Fetch:
    """READs blocks of a part into slots; keys in flash only are left COLD.

    :param places: by key of the part: where a node has staged them.
    """

    async def fetch(some: slice, offset: Addresses, seconds: float) -> Addresses:
        index = part.index[some]
        slots = slices_of(offset, stage.region.id, part.room[some])
        batch = Batch(part.whole.keys[index], slots, checksum, False)
        batch.places = None if places is None else np.ascontiguousarray(places[some])
        await gets.read_async(batch, seconds)
        part.whole.status[index], lengths[index] = batch.status, batch.lengths
        return np.where(batch.status == Status.HIT, batch.lengths, 0).astype(np.uint64)

    return fetch
