"""Segments that change hands: who gives one back when all are handed out, and who gets it.

Segments are handed out as they are asked for, so whoever came first may have them all. A size class of a
namespace that wants one when none is free makes a *wish*, and one namespace gives a segment back for it. The
rule, by numbers of segments alone:

* A class that has none always gets one. A class that has some gets another if its namespace has at least
  two fewer than the one that gives: so namespaces that need flash tend to an equal share each. Else it gets
  one of its own namespace, if the largest class there has more than RATIO times as many: a class of odd
  lengths neither starves nor takes half of the flash.
* The namespace that has most gives, the one furthest above its share; its own, if no other has two more. In
  it the class that has most, and of that the segment that costs least. No class gives its last one.

So every exchange makes the parts more equal, and they come to an end. The blocks of a segment that is given
are evicted, as flash evicts for room; what is pinned, being written or being read is waited for. Until then,
but for PATIENCE_SECONDS at most, blocks of a class that has no segment stay dirty in memory, and durable puts
of them wait; after that they are told that there is none, and written if it comes all the same.

The record of the segment goes from the old owner to the new one in a single write, when the headers of the
old images have been zeroed (flash_drain.c), so after a crash it is the one's or the other's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from . import format as f
from .opened import OpenDevice

log = logging.getLogger("memkv.flash")

PATIENCE_SECONDS = 5.0
RATIO = 4

Place = tuple[int, int]  # a device's index in the I/O engine, and the number of a segment on it
Class = tuple[int, int]  # a namespace's id, and the payload of a size class


class Holder(Protocol):
    """A namespace that has segments, or wants some."""

    name: f.Name

    def give_up(self, devices: int) -> bool:
        """Begins to empty a segment on one of these devices (bits). False: it cannot now."""

    def given_up(self) -> Place | None:
        """The segment that has become empty since."""

    def add(self, d: OpenDevice, segment: f.Segment) -> None:
        """A segment is its own. :raises MemoryError: it cannot be used."""

    def promise(self, payload: int) -> None:
        """One is on its way for this size class."""

    def deny(self, payload: int) -> None:
        """There will be none for this size class."""


class Shelf(Protocol):
    """What is shared out."""

    def held(self) -> Counter[Class]:
        """Segments by size class; one that is being given up is still the giver's."""

    def devices_for(self, payload: int, align: int) -> int:
        """Those on which blocks of a size class can lie, as bits."""

    def hand_over(self, place: Place, namespace: int, payload: int) -> tuple[OpenDevice, f.Segment] | None:
        """Assigns a segment that somebody has to somebody else, or to nobody (payload 0)."""


@dataclass(eq=False)
class Wish:
    """A size class that waits for a segment."""

    holder: Holder
    payload: int
    devices: int  # bits: where blocks of it can lie
    until: float  # when its blocks have waited long enough
    giver: Holder | None = None
    late: bool = False  # they have, and were told so


def giver_of(held: Counter[Class], wanted: Class) -> int | None:
    """The namespace that gives a segment to a class, by what everybody has; None: nobody does."""
    me = wanted[0]
    spaces: Counter[int] = Counter()
    largest: Counter[int] = Counter()
    for (namespace, _), n in held.items():
        spaces[namespace] += n
        largest[namespace] = max(largest[namespace], n)
    givers = [namespace for namespace in spaces if largest[namespace] > 1]
    if not givers:
        return None
    most = max(givers, key=lambda namespace: spaces[namespace])
    if spaces[most] >= spaces[me] + 2:
        return most
    if not held[wanted]:
        return me if me in givers else most
    return me if largest[me] > RATIO * held[wanted] else None


class Sharing:
    """All wishes of a store. Its methods may block, and are called in the pool, from several threads."""

    def __init__(self, shelf: Shelf, clock: Callable[[], float] = time.monotonic) -> None:
        self._shelf = shelf
        self._clock = clock
        self._lock = threading.Lock()
        self._holders: dict[int, Holder] = {}
        self._wishes: dict[Class, Wish] = {}
        self.exchanged = 0  # segments that have changed hands

    def join(self, holder: Holder) -> None:
        """A namespace takes part from now on."""
        with self._lock:
            self._holders[holder.name.id] = holder

    def leave(self, holder: Holder) -> None:
        """It is closed: nothing is asked of it any more, and nothing given to it."""
        with self._lock:
            self._holders.pop(holder.name.id, None)
            self._wishes = {
                k: w for k, w in self._wishes.items() if w.holder is not holder and w.giver is not holder
            }

    @property
    def waiting(self) -> bool:
        """Whether :meth:`look` is to be called now and then."""
        return bool(self._wishes)

    def ask(self, holder: Holder, payload: int) -> None:
        """A size class wants a segment and none is free: it is promised one, or denied."""
        key = holder.name.id, payload
        with self._lock:
            devices = self._shelf.devices_for(payload, holder.name.align)
            if devices and key not in self._wishes and giver_of(self._shelf.held(), key) is not None:
                self._wishes[key] = Wish(holder, payload, devices, self._clock() + PATIENCE_SECONDS)
                self._pursue()
            wish = self._wishes.get(key)
            if wish and not wish.late:
                holder.promise(payload)
            else:
                holder.deny(payload)

    def collect(self, holder: Holder) -> None:
        """Passes on what a namespace has given up, if it has."""
        with self._lock:
            place = holder.given_up()
            if place is None:
                return
            wish = next((w for w in self._wishes.values() if w.giver is holder), None)
            if wish is None or not self._pass_on(place, holder, wish):
                self._shelf.hand_over(place, 0, 0)
            self._pursue()

    def look(self) -> None:
        """Once in a while: looks for givers again, and ends patience."""
        with self._lock:
            self._pursue()

    # --- the lock is held from here on ---

    def _pursue(self) -> None:
        held = self._shelf.held()
        for key, wish in list(self._wishes.items()):
            if wish.giver is None:
                self._find(held, key, wish)
            if self._clock() >= wish.until and not wish.late and key in self._wishes:
                wish.late = True
                wish.holder.deny(wish.payload)
                if wish.giver is None:
                    del self._wishes[key]

    def _find(self, held: Counter[Class], key: Class, wish: Wish) -> None:
        namespace = giver_of(held, key)
        giver = self._holders.get(namespace) if namespace is not None else None
        if giver is None:  # things have changed since
            del self._wishes[key]
            wish.holder.deny(wish.payload)
        elif giver.give_up(wish.devices):
            wish.giver = giver

    def _pass_on(self, place: Place, giver: Holder, wish: Wish) -> bool:
        """False: nobody has it."""
        found = self._shelf.hand_over(place, wish.holder.name.id, wish.payload)
        if found is None:  # its device has failed meanwhile: another one, then
            wish.giver = None
            return True
        del self._wishes[wish.holder.name.id, wish.payload]
        try:
            wish.holder.add(*found)
        except MemoryError as exc:
            log.error("%s", exc)
            wish.holder.deny(wish.payload)
            return False
        self.exchanged += 1
        log.info(
            "namespace %s gives a segment to blocks of up to %d bytes of namespace %s",
            giver.name.name,
            wish.payload,
            wish.holder.name.name,
        )
        return True
