"""Asking a node to bring blocks from flash into memory, and taking its answers, which come in parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .batches import Batch
from .rdma.errors import MemKVError
from .session import Session
from .status import Status
from .store import messages as m

MESSAGE_KEYS = 16384
GENERATION = slice(16, 20)  # its bytes in a slot


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of a node's answer, or why there is none. ``index`` are the batch's keys that the request was
    about.
    """

    session: Session
    index: npt.NDArray[np.uint32]
    part: m.Staged | MemKVError

    @property
    def last(self) -> bool:
        return not isinstance(self.part, m.Staged) or self.part.last


def request_stage(
    session: Session,
    index: npt.NDArray[np.uint32],
    keys: bytes,
    seconds: float,
    prefetch: bool,
    take: Callable[[Answer], Any],
) -> None:
    """Sends a Stage from any thread; ``take`` is called on the control thread for each part of the answer."""

    def make(request: int) -> m.Message:
        return m.Stage(request, session.info.namespace, keys, int(seconds * 1000), prefetch)

    def answered(part: m.Staged | MemKVError) -> None:
        take(Answer(session, index, part))

    session.loop.call_soon_threadsafe(session.stream, make, answered)


def learn(batch: Batch, answer: Answer) -> tuple[Session, npt.NDArray[np.uint32]] | None:
    """Notes down what an answer says: statuses of keys that are not to be had, locations of those that are.

    :returns: the keys that can be READ now.
    """
    part = answer.part
    if not isinstance(part, m.Staged):
        here = answer.index[batch.status[answer.index] == Status.COLD]
        batch.status[here] = Status.ERROR_LINK if answer.session.closed else Status.ERROR_REFUSED
        return None
    where = answer.index[np.frombuffer(part.indices, "<u4")]
    status = np.frombuffer(part.statuses, np.uint8)
    batch.status[where] = status
    batch.learn(where, part.slots)
    ready = where[status == Status.HIT]
    batch.status[ready] = Status.PENDING
    return (answer.session, ready) if len(ready) else None


def let_go(batch: Batch, session: Session, index: npt.NDArray[np.uint32]) -> None:
    """Tells a node which of the places that it had named for a batch have been READ: it may use them again.

    Only a HIT is known to have been READ to its end. A block that was published meanwhile is none of ours any
    more; the node knows by itself.
    """
    done = index[batch.status[index] == Status.HIT]
    if batch.places is None or not len(done):
        return
    keys, generations = batch.keys[done].tobytes(), batch.places[done, GENERATION].tobytes()
    message = m.Unstage(session.info.namespace, keys, generations)
    with contextlib.suppress(RuntimeError):  # the peer was closed just now
        session.loop.call_soon_threadsafe(session.say, message)
