"""Runs a node in the foreground: limits, logging, banner, readiness, and a clean stop by a signal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

from ..rdma.errors import LocalError
from ..store.config import NodeConfig, is_loopback
from ..store.node import Node
from .options import written
from .status import device_state, flash_summary, size

log = logging.getLogger("memkv.node")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(
    config: NodeConfig, clock_reason: str, *, ready_fd: int | None = None, log_format: str = "text"
) -> int:
    """Serves until SIGTERM or SIGINT; a second one ends the process at once, whatever is not on flash yet.

    :returns: the exit code: 0 after a clean stop, 1 if it was not clean.
    :raises MemKVError: the node cannot start.
    """
    set_up_logging(config.log_level, log_format)
    _check_fd(ready_fd)
    _raise_limits()
    return asyncio.run(_serve(config, clock_reason, ready_fd, log_format))


async def _serve(config: NodeConfig, clock_reason: str, ready_fd: int | None, log_format: str) -> int:
    stop = asyncio.Event()

    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        for each in STOP_SIGNALS:  # the kernel's own way, which needs nothing of us that might hang
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        log.info("%s: stopping; once more ends at once", number.name)
        stop.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    node = Node(config)
    stopping = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(node.start())
    await asyncio.wait({stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return 0
    try:
        await starting
    except BaseException:
        stopping.cancel()
        raise
    facts = describe(node, clock_reason)
    if log_format == "json":
        log.info("ready", extra={"facts": facts})
    else:
        print(banner(facts), file=sys.stderr, flush=True)
    _announce(ready_fd, facts)
    await stopping
    _notify("STOPPING=1")
    ending = asyncio.create_task(node.stop())
    done, _ = await asyncio.wait({ending}, timeout=config.stop_timeout)
    if not done:  # not cancelled either: what it waits for still uses what would be taken apart next
        log.error("not everything could be given back within %d s; ending all the same", config.stop_timeout)
        logging.shutdown()
        os._exit(1)
    await ending
    return 0 if node.stopped_clean else 1


def describe(node: Node, clock_reason: str) -> dict[str, str]:
    """What the banner says of a node that has started."""
    config, status = node.config, node.status()
    memory = status["memory"]
    if config.secret:
        access = "shared secret"
    elif is_loopback(config.listen[0]):
        access = "no secret; only this machine can connect"
    else:
        access = "INSECURE: anybody who reaches the port can read and delete"
    metrics = node.metrics_address
    return {
        "node": f"{status['node']}, {status['software']}, incarnation {status['incarnation']}",
        "address": written(node.address),
        "fabric": f"{node.fabric.name}: {node.fabric.reason}",
        "memory": f"{memory['bytes'] >> 20} MiB in slabs of {memory['slab_bytes'] >> 20} MiB",
        "pages": f"{memory['pages']} ({memory['pages_reason']})",
        **_flash(status),
        "clock": f"{config.clock}: {clock_reason}",
        "access": access,
        "metrics": f"http://{written(metrics)}/metrics" if metrics else "off (--metrics HOST:PORT)",
    }


def _flash(status: dict[str, Any]) -> dict[str, str]:
    """What there is of flash: a line for all of it, and one for each device."""
    flash = status["flash"]
    if not status["flash_devices"]:
        return {"flash": "off (--flash PATH[:SIZE]): blocks live in memory only"}
    lines = {"flash": f"{flash_summary(flash)}; {size(flash['dirty_max'])} may be dirty"}
    for i, (path, d) in enumerate(status["flash_devices"].items()):
        facts = ""
        if "segments" in d:
            used = f"{d['segments'] - d['segments_free']} of {d['segments']} segments in use"
            facts = f"{size(d['bytes'])}, {used}, by {d['start']}, "
        lines[f"flash {i}"] = f"{path}: {facts}{device_state(d)}"
    if flash["scan_left"]:
        lines["scan"] = f"{flash['scan_left']} headers are to be read; until then what is not found is a miss"
    return lines


def banner(facts: dict[str, str]) -> str:
    """The start-up banner."""
    return "\n".join(f"memkv-node: {k:<8} {v}" for k, v in facts.items())


# --- readiness ---


def _check_fd(fd: int | None) -> None:
    if fd is not None:
        try:
            os.fstat(fd)
        except OSError:
            raise LocalError(
                f"file descriptor {fd} is not open", "--ready-fd; 1 is standard output"
            ) from None


def _announce(fd: int | None, facts: dict[str, str]) -> None:
    """One line, "ready ADDRESS METRICS-URL", for whoever started us; and systemd, if it did."""
    if fd is not None:
        metrics = facts["metrics"].removesuffix("/metrics") if facts["metrics"].startswith("http") else "-"
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(fd, f"ready {facts['address']} {metrics}\n".encode())
            if fd > 2:
                os.close(fd)
    _notify(f"READY=1\nSTATUS=serving on {facts['address']} over {facts['fabric']}")


def _notify(state: str) -> None:
    """Tells systemd (Type=notify); nothing without it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] in ("/", "@"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.sendto(state.encode(), path.replace("@", "\0", 1) if path[0] == "@" else path)


# --- the process ---


def _raise_limits() -> None:
    """Open files and locked memory: as much as we may have without asking."""
    for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        soft, hard = resource.getrlimit(what)
        if soft != hard:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(what, (hard, hard))


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        out: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        out |= getattr(record, "facts", {})
        if record.exc_info:
            out["trace"] = self.formatException(record.exc_info)
        return json.dumps(out, ensure_ascii=False)


def set_up_logging(level: str, log_format: str) -> None:
    """memkv's log on standard error, as text or one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    assert handler.formatter is not None
    handler.formatter.converter = time.gmtime
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
