"""The peer's side of a put: offer, ask, and be sure that nobody reads the source any more when it is over."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from .buffers import Slices
from .rdma.errors import DeadlineError, MemKVError
from .session import Session
from .status import Status
from .store import messages as m
from .store.columns import PutColumns
from .store.framing import Code, RefusedError

SLACK = 2.5  # seconds that a node may take to end a put whose deadline has passed


async def put_part(
    session: Session,
    keys: npt.NDArray[np.uint8],
    slices: Slices,
    part: npt.NDArray[np.uint32],
    status: npt.NDArray[np.uint8],
    until: float,
    durability: Any,
    checksums: npt.NDArray[np.uint64] | None,
) -> None:
    """Puts the blocks at ``part`` through one session and writes their statuses.

    The node ends the put at its deadline and says so; only then, or when our end of the pull channel is
    destroyed, can it no longer READ the sources. A node that stays silent loses its session for that reason.
    """
    where = slices[part]
    columns = PutColumns(keys[part], where["length"], where["region"], where["offset"], checksums)

    async def ask() -> m.PutDone:
        left = max(1, int((until - time.monotonic()) * 1000))
        try:
            done: m.PutDone = await session.ask(
                lambda r: columns.message(r, session.info.namespace, durability, left), left / 1000 + SLACK
            )
        except DeadlineError as exc:
            session.fail(exc)
            raise
        return done

    pulls = session.pulls
    try:
        with pulls.put():
            await pulls.ready(max(0.0, until - time.monotonic()))
            known = pulls.endpoints
            try:
                reply = await ask()
            except RefusedError as exc:
                if exc.code != Code.NOT_FOUND:
                    raise
                pulls.drop(known)  # they broke at their other ends, where earlier puts ended with them
                await pulls.ready(max(0.0, until - time.monotonic()))
                reply = await ask()
        status[part] = np.frombuffer(reply.statuses, np.uint8)
    except DeadlineError:
        status[part] = Status.TIMEOUT
    except MemKVError as exc:
        status[part] = Status.ERROR_LINK if session.closed else Status.ERROR_REFUSED
        session.note_refusal(exc)
