"""What a node tells of itself: counters, a Prometheus collector, and a small HTTP endpoint.

``/metrics`` is for Prometheus, ``/health`` for load balancers and supervisors (200 or 503, JSON),
``/status`` for ``memkv-node status`` (JSON). Counting is per batch, never per block.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from .config import Address
from .flash import figures
from .native._store import lib
from .puts import PutOutcome

_STATUSES = (
    "TIMEOUT CORRUPT STORED EXISTS ERROR_LINK ERROR_UNREACHABLE ERROR_LENGTH ERROR_BOUNDS ERROR_TOO_LARGE "
    "ERROR_FULL ERROR_REFUSED ERROR_INTERNAL ERROR_DEVICE"
)
STATUS_NAMES = {int(getattr(lib, f"MKV_{name}")): name.lower() for name in _STATUSES.split()}
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
GAUGES = (
    "blocks",
    "bytes",
    "slots",
    "buckets",
    "slabs",
    "extents",
    "extents_free",
    "extents_filling",
    "extents_quarantine",
    "extents_idle",
    "extents_pinned",
    "pinned_bytes",
    "sessions",
)
COUNTERS = (
    "puts",
    "put_bytes",
    "duplicates",
    "evictions",
    "evicted_bytes",
    "deletes",
    "touches",
    "lookups",
    "lookup_hits",
    "full",
    "displacements",
    "grows",
    "slabs_retired",
)

REQUEST_BYTES = 8192
REQUEST_SECONDS = 5.0
MAX_CLIENTS = 32


class Counters:
    """What the core does not count: sessions, requests, and what became of put batches."""

    def __init__(self) -> None:
        self.sessions_opened = 0
        self.sessions_refused = 0  # never authenticated
        self.sessions_faulted = 0  # ended by a fault of theirs
        self.requests: dict[str, int] = {}
        self.refusals = 0
        self.put_blocks = np.zeros(256, np.int64)  # by status
        self.put_read_bytes = 0
        self.put_stored_bytes = 0
        self.put_batches = 0
        self.put_seconds = 0.0
        self.put_histogram = [0] * (len(SECONDS) + 1)
        self.channels_broken = 0
        self.channels_undrained = 0

    def request(self, kind: str) -> None:
        self.requests[kind] = self.requests.get(kind, 0) + 1

    def put(self, outcome: PutOutcome) -> None:
        """Counts a put job that has ended."""
        self.put_blocks += np.bincount(np.frombuffer(outcome.statuses, np.uint8), minlength=256)
        self.put_read_bytes += outcome.read_bytes
        self.put_stored_bytes += outcome.stored_bytes
        self.put_batches += 1
        self.put_seconds += outcome.seconds
        self.put_histogram[bisect_left(SECONDS, outcome.seconds)] += 1
        self.channels_broken += outcome.broken
        self.channels_undrained += outcome.undrained

    def put_statuses(self) -> dict[str, int]:
        """Blocks of puts by status, those that occurred."""
        return {
            STATUS_NAMES.get(int(s), str(int(s))): int(self.put_blocks[s])
            for s in self.put_blocks.nonzero()[0]
        }


class Subject(Protocol):
    """What is asked of a node."""

    counters: Counters

    def status(self) -> dict[str, Any]: ...

    def health(self) -> tuple[bool, str]: ...


class NodeCollector:
    """The node's figures, taken when Prometheus asks."""

    def __init__(self, node: Subject) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        status = self._node.status()
        fabric = {k: str(v) for k, v in status["fabric"].items()}
        yield InfoMetricFamily("memkv_fabric", "How bytes move, and why so", value=fabric)
        node = {k: str(status[k]) for k in ("node", "software", "incarnation")}
        yield InfoMetricFamily("memkv_node", "This node", value=node)
        yield GaugeMetricFamily("memkv_up", "1: able to serve", value=float(self._node.health()[0]))
        yield GaugeMetricFamily("memkv_sessions", "Control connections", value=status["sessions"])
        for name in ("bytes", "slabs", "slabs_free"):
            yield GaugeMetricFamily(f"memkv_arena_{name}", f"Arena: {name}", value=status["memory"][name])
        yield from self._namespaces(status["namespaces"])
        yield from figures.families(status)
        if served := status.get("responder"):
            for name in ("bytes", "reads", "refusals", "evictions"):
                yield CounterMetricFamily(
                    f"memkv_tcp_served_{name}", f"tcp responder: {name}", value=served[name]
                )
        yield from self._counters(self._node.counters)

    def _namespaces(self, namespaces: dict[str, dict[str, int]]) -> Iterator[Metric]:
        for kind, names in (
            (GaugeMetricFamily, GAUGES + figures.NAMESPACE_GAUGES),
            (CounterMetricFamily, COUNTERS + figures.NAMESPACE_COUNTERS),
        ):
            for name in names:
                family = kind(f"memkv_namespace_{name}", f"Namespace: {name}", labels=["namespace"])
                for namespace, stats in namespaces.items():
                    if name in stats:  # flash's only where there is flash
                        family.add_metric([namespace], stats[name])
                yield family

    def _counters(self, c: Counters) -> Iterator[Metric]:
        sessions = CounterMetricFamily("memkv_sessions_ended", "Connections by how they went", labels=["how"])
        for how in ("opened", "refused", "faulted"):
            sessions.add_metric([how], getattr(c, f"sessions_{how}"))
        yield sessions
        requests = CounterMetricFamily("memkv_requests", "Control messages", labels=["kind"])
        for kind, n in c.requests.items():
            requests.add_metric([kind], n)
        yield requests
        yield CounterMetricFamily("memkv_refusals", "Requests refused", value=c.refusals)
        blocks = CounterMetricFamily("memkv_put_blocks", "Blocks of put batches", labels=["status"])
        for status, n in c.put_statuses().items():
            blocks.add_metric([status], n)
        yield blocks
        yield CounterMetricFamily("memkv_put_read_bytes", "Payload pulled from peers", value=c.put_read_bytes)
        yield CounterMetricFamily("memkv_put_stored_bytes", "… and published", value=c.put_stored_bytes)
        yield CounterMetricFamily(
            "memkv_channels_broken", "Pull channels that broke", value=c.channels_broken
        )
        yield CounterMetricFamily(
            "memkv_channels_undrained",
            "… whose queue pair had to be destroyed to stop it",
            value=c.channels_undrained,
        )
        total, buckets = 0, []
        for bound, n in zip((*map(str, SECONDS), "+Inf"), c.put_histogram, strict=True):
            total += n
            buckets.append((bound, float(total)))
        yield HistogramMetricFamily(
            "memkv_put_seconds", "Put batches", buckets=buckets, sum_value=c.put_seconds
        )


class HttpEndpoint:
    """GET /metrics, /health and /status. One request per connection."""

    def __init__(self, node: Subject) -> None:
        self._node = node
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(NodeCollector(node))
        self._server: asyncio.Server | None = None
        self._clients = 0
        self.address: Address = ("", 0)

    async def start(self, address: Address) -> None:
        """Listens. :raises OSError: the address is taken."""
        self._server = await asyncio.start_server(self._serve, *address, limit=REQUEST_BYTES)
        self.address = self._server.sockets[0].getsockname()[:2]

    async def stop(self) -> None:
        if self._server:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                if self._clients <= MAX_CLIENTS:
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(head))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._clients -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        page = self._pages().get(path)
        if method not in (b"GET", b"HEAD"):
            return _response(405, "text/plain", b"GET\n")
        if page is None:
            return _response(404, "text/plain", b"/metrics, /health, /status\n")
        code, kind, body = page()
        return _response(code, kind, body if method == b"GET" else b"", len(body))

    def _pages(self) -> dict[bytes, Callable[[], tuple[int, str, bytes]]]:
        return {b"/metrics": self._metrics, b"/health": self._health, b"/status": self._status}

    def _metrics(self) -> tuple[int, str, bytes]:
        return 200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(self._registry)

    def _health(self) -> tuple[int, str, bytes]:
        good, reason = self._node.health()
        status = self._node.status()
        out = {"ok": good, "reason": reason} | {k: status[k] for k in ("incarnation", "sessions", "memory")}
        return 200 if good else 503, "application/json", _json(out)

    def _status(self) -> tuple[int, str, bytes]:
        return 200, "application/json", _json(self._node.status())


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def _response(code: int, kind: str, body: bytes, length: int | None = None) -> bytes:
    words = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
    head = (
        f"HTTP/1.1 {code} {words[code]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
