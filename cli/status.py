"""``memkv-node status``: what a running node says of itself over HTTP, as tables.

A node of another version may say less, or more: what is missing is left out.
"""

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
        head.add_row("memory", f"{size(memory.get('bytes', 0))}, {used}; pages: {memory.get('pages', '?')}")
    head.add_row("sessions", str(status.get("sessions", 0)))
    puts = status.get("puts") or {}
    under_way = f"{status.get('puts_under_way', 0)} under way"
    head.add_row("puts", ", ".join([under_way, *(f"{n} {name}" for name, n in puts.items())]))
    if "flash" in status:
        _add_flash(head, status["flash"])
    console.print(head)
    _show_devices(status.get("flash_devices") or {}, console)
    namespaces = status.get("namespaces") or {}
    if not namespaces:
        console.print("no namespaces")
        return
    table = Table(title="namespaces", title_justify="left")
    table.add_column("name", overflow="fold")
    titles = [
        "blocks",
        "bytes",
        "slabs",
        "sessions",
        "puts",
        "evicted",
        "quarantine",
        "hits / lookups",
        "full",
    ]
    on_flash = any("flash_blocks" in n for n in namespaces.values())
    for title in [*titles, *(["on flash", "evicted there"] if on_flash else [])]:
        table.add_column(title, justify="right")
    for name, n in namespaces.items():
        table.add_row(
            name,
            str(n.get("blocks", "")),
            size(n.get("bytes", 0)),
            str(n.get("slabs", "")),
            str(n.get("sessions", "")),
            str(n.get("puts", "")),
            str(n.get("evictions", "")),
            str(n.get("extents_quarantine", "")),
            f"{n.get('lookup_hits', '')} / {n.get('lookups', '')}",
            str(n.get("full", "")),
            *([str(n.get("flash_blocks", "")), str(n.get("flash_evictions", ""))] if on_flash else []),
        )
    console.print(table)


# --- flash ---


def flash_summary(flash: dict[str, Any]) -> str:
    """In one line: by which engine and why, how much there is, what is out."""
    devices, out = flash.get("devices", 0), flash.get("devices_out", 0)
    if not devices:
        return f"none: {flash.get('reason', '')}"
    plural = "" if devices == 1 else "s"
    much = f"{devices} device{plural}, {size(flash.get('bytes', 0))}"
    state = f", {out} out of use" if out else ""
    return f"{much}{state}, by {flash.get('engine', '?')}: {flash.get('reason', '')}"


def device_state(facts: dict[str, Any]) -> str:
    """Good, or why not."""
    if facts.get("failed"):
        return f"OUT: {facts['failed']}"
    if facts.get("shortened"):
        return f"SHORTER: {facts['shortened']}"
    return "good" if facts.get("direct", True) else f"good; {facts.get('reason', '')}"


def _add_flash(head: Table, flash: dict[str, Any]) -> None:
    """Rows of the node's table."""
    head.add_row("flash", flash_summary(flash))
    if not flash.get("devices"):
        return

    def n(name: str) -> int:
        return int(flash.get(name, 0))

    def amount(what: str) -> str:
        return f"{n(f'{what}_blocks')} blocks, {size(n(f'{what}_bytes'))}"

    free = f"{size(n('bytes_free'))} in segments that nobody has"
    head.add_row("  holds", f"{amount('live')}; {free}; evicted {amount('evicted')}")
    limit = f" of {size(n('dirty_max'))} that may be" if n("dirty_max") else ""
    head.add_row("  to be written", f"{amount('dirty')}{limit}; written {amount('written')}")
    head.add_row("  staged", f"{amount('staged')}; {n('stages')} requests under way")
    dropped = {k.removeprefix("dropped_"): v for k, v in flash.items() if k.startswith("dropped_") and v}
    lost = {"acknowledged as memory": n("lost_memory_acks"), "whole segments": n("segments_lost")}
    losses = [f"{v} {k}" for k, v in (dropped | lost).items() if v]
    if losses:
        head.add_row("  dropped, lost", ", ".join(losses))
    if n("scan_total"):
        done, total = n("scanned"), n("scan_total")
        how = f"{100 * done // total} %: " if n("scan_left") else "over: "
        head.add_row("  scan", f"{how}{done} of {total} headers, {n('recovered')} blocks found again")
    if flash.get("degraded"):
        head.add_row("  degraded", str(flash["degraded"]), style="bold red")


def _show_devices(devices: dict[str, dict[str, Any]], console: Console) -> None:
    if not devices:
        return
    table = Table(title="flash devices", title_justify="left")
    table.add_column("path", overflow="fold")
    for title in ("size", "segments in use", "blocks' bytes", "errors", "corrupt", "start"):
        table.add_column(title, justify="right")
    table.add_column("state", overflow="fold")
    for path, d in devices.items():
        state = device_state(d)
        numbers = [""] * 6
        if "segments" in d:
            used = int(d["segments"]) - int(d.get("segments_free", 0))
            errors = int(d.get("read_errors", 0)) + int(d.get("write_errors", 0))
            numbers = [
                size(int(d.get("bytes", 0))),
                f"{used} of {d['segments']}",
                size(int(d.get("live_bytes", 0))),
                str(errors),
                str(d.get("corrupt", "")),
                str(d.get("start", "")),
            ]
        table.add_row(path, *numbers, state, style="" if state.startswith("good") else "bold red")
    console.print(table)


def size(n: float) -> str:
    """Bytes, for people."""
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
