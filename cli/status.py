"""``memkv-node status``: what a running node says of itself over HTTP, as tables."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from rich.console import Console
from rich.table import Table

from ..rdma.errors import LocalError, RemoteError

TIMEOUT = 5.0
WHICH = "--metrics-url is the node's --metrics, not its --listen"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def fetch(url: str) -> dict[str, Any]:
    """``/status`` of the node whose metrics are at ``url``.

    :raises RemoteError: nobody answers there, or somebody else.
    """
    base = url.rstrip("/").removesuffix("/metrics").removesuffix("/status")
    if not base.startswith(("http://", "https://")):
        raise LocalError(f"{url} is no URL", "--metrics-url http://HOST:PORT, or --address HOST:PORT")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base}/status", timeout=TIMEOUT) as answer:
            status = json.load(answer)
    except http.client.HTTPException:
        raise RemoteError(f"{base} does not speak HTTP", WHICH) from None
    except (OSError, ValueError) as exc:
        why = exc.reason if isinstance(exc, urllib.error.URLError) else exc
        raise RemoteError(
            f"no status from {base}: {why}", "is the node up, with --metrics HOST:PORT?"
        ) from None
    if not isinstance(status, dict) or "incarnation" not in status:
        raise RemoteError(
            f"{base} is no memkv node", "--metrics-url is the node's --metrics, not its --listen"
        )
    return status


def show(status: dict[str, Any], console: Console) -> None:
    """Prints it."""
    head = Table(title=f"memkv node {status.get('node', '')}", show_header=False, title_justify="left")
    head.add_column(style="bold")
    head.add_column(overflow="fold")
    fabric, memory = dict(status.get("fabric", {})), dict(status.get("memory", {}))
    taken, reason = fabric.pop("fabric", "?"), fabric.pop("reason", "")
    head.add_row("address", str(status.get("address", "")))
    head.add_row("software", f"{status.get('software', '')}, incarnation {status['incarnation']}")
    head.add_row("up for", _duration(float(status.get("uptime_s", 0))))
    head.add_row("fabric", f"{taken}: {reason}")
    head.add_row("", ", ".join(f"{k} {v}" for k, v in fabric.items()))
    if memory:
        slabs, free = memory.get("slabs", 0), memory.get("slabs_free", 0)
        used = f"{slabs - free} of {slabs} slabs in use"
        head.add_row("memory", f"{_bytes(memory.get('bytes', 0))}, {used}; pages: {memory.get('pages', '?')}")
    head.add_row("sessions", str(status.get("sessions", 0)))
    puts = status.get("puts") or {}
    under_way = f"{status.get('puts_under_way', 0)} under way"
    head.add_row("puts", ", ".join([under_way, *(f"{n} {name}" for name, n in puts.items())]))
    console.print(head)
    namespaces = status.get("namespaces") or {}
    if not namespaces:
        console.print("no namespaces")
        return
    table = Table(title="namespaces", title_justify="left")
    table.add_column("name", overflow="fold")
    for title in (
        "blocks",
        "bytes",
        "slabs",
        "sessions",
        "puts",
        "evicted",
        "quarantine",
        "hits / lookups",
        "full",
    ):
        table.add_column(title, justify="right")
    for name, n in namespaces.items():
        table.add_row(
            name,
            str(n.get("blocks", "")),
            _bytes(n.get("bytes", 0)),
            str(n.get("slabs", "")),
            str(n.get("sessions", "")),
            str(n.get("puts", "")),
            str(n.get("evictions", "")),
            str(n.get("extents_quarantine", "")),
            f"{n.get('lookup_hits', '')} / {n.get('lookups', '')}",
            str(n.get("full", "")),
        )
    console.print(table)


def _bytes(n: float) -> str:
    for unit in UNITS:
        if n < 1024 or unit == UNITS[-1]:
            return f"{n:.0f} {unit}" if unit == "B" or n == int(n) else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def _duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02d}:{left:02d}"
