"""Peers for LMCache: one for each kind of object, connected in the background when the first one is met.

What a kind is (model, shapes, dtypes) is only known when LMCache names an object. So calls that come before
the peer is connected wait for it, for as long as a get may take; after that they miss at once until it is
there, and no call ever waits for a node that is not.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batches import Keys
from ..peer import Peer, Statuses
from ..rdma.errors import LocalError, MemKVError
from ..status import Status
from ..tickets import Ticket
from . import lmcache_memory as memory
from .identity import Identity
from .lmcache_memory import Numbers, Regions
from .settings import Settings

log = logging.getLogger("memkv.lmcache")

RETRY = 5.0  # seconds after no node could be reached
LOCK_TTL = 60.0  # seconds; see lock_ttl in docs/engines/lmcache.md
LONGEST_LOCK = 86400.0

Then = Callable[[Statuses], None]


def read_lock_ttl(given: Any) -> float:
    """The setting ``lock_ttl``. :raises LocalError: not a number of seconds that can be meant."""
    try:
        ttl = LOCK_TTL if given is None else float(given)
    except (TypeError, ValueError):
        ttl = 0.0
    if not 0.001 <= ttl <= LONGEST_LOCK:
        raise LocalError(f"lock_ttl is {given!r}", "lock_ttl: seconds, from 0.001 to 86400")
    return ttl


def statuses_of(ticket: Ticket, n: int) -> Statuses:
    """A ticket's statuses; errors for all if the batch was refused as a whole."""
    if ticket.status is not None:
        return ticket.status
    log.warning("a batch of %d blocks: %s", n, ticket.error)
    return np.full(n, Status.ERROR_INTERNAL, np.uint8)


class Site:
    """The blocks of one identity, of at most ``block_bytes`` each. Nothing of it waits but :meth:`wait`,
    :meth:`fetch`.
    """

    def __init__(self, sites: Sites, identity: Identity, block_bytes: int) -> None:
        self.sites = sites
        self.identity = identity
        self.block_bytes = block_bytes
        self.peer: Peer | None = None
        self.error = "not connected yet"
        self._regions: Regions | None = None
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Callable[[Peer], None], Callable[[], None]]] = deque()
        self._connecting = False
        self._patience: threading.Timer | None = None  # calls wait for the connection under way until it ends
        self._retry_at = 0.0

    def keys(self, digests: Iterable[bytes]) -> Keys:
        return self.identity.keys(digests)

    def use(self, run: Callable[[Peer], None], fail: Callable[[], None]) -> None:
        """Does ``run(peer)``, now or as soon as there is a peer; or ``fail()``, if there is none in time."""
        with self._lock:
            peer = self.peer
            if peer is None and not self.sites.closed:
                if not self._connecting and time.monotonic() >= self._retry_at:
                    self._connecting = self.sites.later(self._connect)
                    self._patience = threading.Timer(self.sites.settings.get_timeout, self._lose_patience)
                    self._patience.daemon = True
                    self._patience.start()
                if self._connecting and self._patience:
                    self._waiting.append((run, fail))
                    return
        self._do(peer, run, fail)

    def _do(self, peer: Peer | None, run: Callable[[Peer], None], fail: Callable[[], None]) -> None:
        if peer is not None and not self.sites.closed:
            try:
                run(peer)
                return
            except MemKVError as exc:
                log.warning("%s: %s", self.identity.model, exc)
            except Exception:  # LMCache waits for an answer, whatever it is
                log.exception("a batch for %s", self.identity.model)
        fail()

    def _connect(self) -> None:
        """On the helper's thread."""
        peer, regions = None, None
        try:
            peer = self.sites.settings.connect(self.identity, self.block_bytes)
            regions = Regions(peer)
            for address, nbytes in self.sites.arenas:
                regions.add(address, nbytes)
        except Exception as exc:  # whatever it is, those that wait have to be told
            self.error = str(exc)
            log.warning("no memkv node for %s, tried again in %g s: %r", self.identity.model, RETRY, exc)
        with self._lock:
            self.peer, self._regions = peer, regions
            self._connecting = False
            self._retry_at = time.monotonic() + RETRY
            if self._patience:
                self._patience.cancel()
        self._serve(peer)

    def _lose_patience(self) -> None:
        with self._lock:
            self._patience = None
        self._serve(None)

    def _serve(self, peer: Peer | None) -> None:
        """What has been waiting, in its order."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                run, fail = self._waiting.popleft()
            self._do(peer, run, fail)

    def wait(self) -> Peer | None:
        """The peer, waited for as long as a get may take; None if there is none."""
        if self.peer is not None:
            return self.peer
        there = threading.Event()
        self.use(lambda peer: there.set(), there.set)
        there.wait(self.sites.settings.get_timeout + 1)
        return self.peer

    # --- objects ---

    def transfer(self, out: bool, keys: Keys, objects: Sequence[Any], then: Then) -> None:
        """Puts objects (``out``) or gets into them; ``then(statuses)`` on whatever thread when that is over,
        and nobody reads or writes them any more. It must not wait for anything.
        """
        n = len(keys)

        def fail() -> None:
            then(np.full(n, Status.ERROR_UNREACHABLE, np.uint8))

        try:
            addresses, sizes = memory.places(objects)
        except NotImplementedError as exc:
            log.warning("memkv needs LMCache's objects in host memory: %s", exc)
            then(np.full(n, Status.ERROR_BOUNDS, np.uint8))
            return

        def submit(peer: Peer, slices: Any) -> None:
            settings = self.sites.settings
            done: Callable[[Ticket], None] = lambda ticket: then(statuses_of(ticket, n))  # noqa: E731
            if out:
                peer.submit_put(
                    keys, slices, timeout=settings.put_timeout, durability=settings.durability, then=done
                )
            else:
                peer.submit_get(keys, slices, timeout=settings.get_timeout, exact=True, then=done)

        def run(peer: Peer) -> None:
            assert self._regions is not None
            slices = self._regions.slices(addresses, sizes)
            if slices is not None:
                submit(peer, slices)
            elif not self.sites.later(lambda: self._do(peer, uncommon, fail)):
                fail()

        def uncommon(peer: Peer) -> None:
            """Memory that is met for the first time, or cannot be registered: on the helper's thread."""
            assert self._regions is not None
            self._regions.cover(objects)
            slices = self._regions.slices(addresses, sizes)
            if slices is not None:
                submit(peer, slices)
            else:
                then(self._through(peer, out, keys, objects, addresses, sizes, np.zeros(n, np.uint32)))

        self.use(run, fail)

    def fetch(
        self, peer: Peer, keys: Keys, objects: Sequence[Any]
    ) -> tuple[Statuses, npt.NDArray[np.uint32]]:
        """Gets into objects, and waits: (statuses, length of each HIT in bytes).

        :raises MemKVError: the peer is closed.
        """
        assert self._regions is not None
        addresses, sizes = memory.places(objects)
        lengths = np.zeros(len(keys), np.uint32)
        slices = self._regions.slices(addresses, sizes)
        if slices is None:
            self._regions.cover(objects)
            slices = self._regions.slices(addresses, sizes)
        if slices is None:
            return self._through(peer, False, keys, objects, addresses, sizes, lengths), lengths
        timeout = self.sites.settings.get_timeout
        return peer.get_into(keys, slices, timeout=timeout, lengths=lengths), lengths

    def _through(
        self,
        peer: Peer,
        out: bool,
        keys: Keys,
        objects: Sequence[Any],
        addresses: Numbers,
        sizes: Numbers,
        lengths: npt.NDArray[np.uint32],
    ) -> Statuses:
        """By a copy."""
        settings = self.sites.settings
        try:
            if not memory.in_host_memory(objects):
                raise LocalError("an object of LMCache's that is not in host memory")
            if out:
                return memory.put_through(
                    peer,
                    keys,
                    addresses,
                    sizes,
                    timeout=settings.put_timeout,
                    durability=settings.durability,
                )
            return memory.get_through(
                peer, keys, addresses, sizes, timeout=settings.get_timeout, lengths=lengths
            )
        except (MemKVError, OSError) as exc:
            log.warning("%d blocks: %s", len(keys), exc)
            return np.full(len(keys), Status.ERROR_INTERNAL, np.uint8)

    def unpin(self, keys: Keys) -> None:
        """Takes pins back, some time: what a node is not told it finds out by the pins' time to live."""
        if self.peer is not None:
            with contextlib.suppress(MemKVError):
                self.peer.submit_unpin(keys, then=lambda ticket: None)


class Sites:
    """All that one connector holds. :param arenas: (address, size in bytes) of memory that is known to hold
    objects.
    """

    def __init__(self, settings: Settings, arenas: Sequence[tuple[int, int]] = ()) -> None:
        self.settings = settings
        self.arenas = list(arenas)
        self.closed = False
        self._lock = threading.Lock()
        self._sites: dict[Hashable, Site] = {}
        self._helper = ThreadPoolExecutor(
            1, thread_name_prefix="memkv-lmcache"
        )  # no thread before its first job

    def get(self, name: Hashable, identity: Callable[[], Identity], block_bytes: int) -> Site:
        """The site of this name, made when it is first asked for."""
        site = self._sites.get(name)
        if site is None:
            with self._lock:
                site = self._sites.get(name)
                if site is None:
                    site = self._sites[name] = Site(self, identity(), block_bytes)
        return site

    def __iter__(self) -> Iterator[Site]:
        return iter(list(self._sites.values()))

    def later(self, job: Callable[[], None]) -> bool:
        """Has the helper's thread do what may take a moment: connecting, registering, copying."""
        try:
            self._helper.submit(job)
        except RuntimeError:  # it has ended
            return False
        return True

    def close(self) -> None:
        """When this returns nobody reads or writes LMCache's memory any more. Batches under way end with what
        became of them, what has not begun fails.
        """
        self.closed = True
        self._helper.shutdown(wait=True)
        for site in self:
            site._serve(None)
            if site.peer is not None:
                site.peer.close()


class Holds:
    """The pins that this process has taken and not given back, by LMCache's names of their blocks.

    A pin that has outlived its time is forgotten, not taken back: by now the block may be somebody else's.
    """

    def __init__(self, ttl: float) -> None:
        self.ttl = ttl
        self._lock = threading.Lock()
        self._held: dict[Hashable, deque[tuple[Site, bytes, float]]] = defaultdict(deque)
        self._swept = time.monotonic()

    def __len__(self) -> int:
        """Pins that have not expired."""
        with self._lock:
            now = time.monotonic()
            return sum(until > now for pins in self._held.values() for _, _, until in pins)

    def add(self, site: Site, names: Sequence[Hashable], keys: Keys, asked_at: float) -> None:
        """:param asked_at: time.monotonic() before the node was asked for these pins."""
        with self._lock:
            self._sweep()
            for name, key in zip(names, keys, strict=True):
                self._held[name].append((site, key.tobytes(), asked_at + self.ttl))

    def _sweep(self) -> None:
        """Forgets what nobody has unlocked, now and then."""
        now = time.monotonic()
        if now - self._swept < self.ttl:
            return
        self._swept = now
        for name, pins in list(self._held.items()):
            if pins[-1][2] <= now:
                del self._held[name]

    def release(self, names: Iterable[Hashable]) -> None:
        """Takes one pin of each name back; names that have none are left alone."""
        found: dict[Site, list[bytes]] = defaultdict(list)
        with self._lock:
            now = time.monotonic()
            for name in names:
                pins = self._held.get(name)
                while pins:
                    site, key, until = pins.popleft()
                    if until > now:
                        found[site].append(key)
                        break
                if pins is not None and not pins:
                    del self._held[name]
        for site, keys in found.items():
            site.unpin(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16))

    def release_all(self) -> None:
        with self._lock:
            names = [name for name, pins in self._held.items() for _ in pins]
        self.release(names)
