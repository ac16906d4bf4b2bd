"""perftest's ib_read_bw and ib_read_lat, as the neutral figure beside our own limit: one run over loopback,
parsed.

They READ one hot buffer again and again, where a store's blocks lie all over its memory: on a software device
that is faster by some ten per cent. So the bare loop of :mod:`memkv.cli.limits` is what our figures are
divided by.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ..rdma.devices import Selection

TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A figure (GB/s, or p50 µs and percentiles), or None and the reason."""

    value: float | None
    note: str = ""
    p99_us: float | None = None
    p999_us: float | None = None


def available(tool: str) -> str:
    """Empty if the tool is installed, else what to say."""
    return "" if shutil.which(tool) else f"{tool} is not installed (apt install perftest)"


def read_bandwidth(where: Selection, size: int, count: int) -> Outcome:
    """``count`` READs of ``size`` bytes by ib_read_bw, in GB/s."""
    found, note = _figures("ib_read_bw", where, size, count, ["--report_gbits"], 4)
    return Outcome(found[2] / 8) if found else Outcome(None, note)  # peak, average, rate


def read_latency(where: Selection, size: int, count: int) -> Outcome:
    """``count`` READs of ``size`` bytes, one at a time, by ib_read_lat, in µs."""
    found, note = _figures("ib_read_lat", where, size, count, [], 8)
    return Outcome(found[3], p99_us=found[6], p999_us=found[7]) if found else Outcome(None, note)


def _figures(
    tool: str, where: Selection, size: int, count: int, more: list[str], columns: int
) -> tuple[list[float], str]:
    """A tool's line, or nothing and the reason. It times the processor's clock itself and, on a busy machine,
    sometimes fails to: then all its figures are infinite, and it is run again."""
    for _ in range(3):
        text, note = _run(tool, where, ["-s", str(size), "-n", str(max(5, count)), *more])
        if not text:
            return [], note
        found = parse(text, size)
        if found is not None and len(found) >= columns and all(map(math.isfinite, found)):
            return found, ""
    return [], f"{tool} printed no figure"


def parse(text: str, size: int) -> list[float] | None:
    """The line of figures for ``size``: itself, iterations, then the tool's own columns (bandwidth: peak,
    average, rate; latency: least, most, typical, mean, deviation, 99 %, 99.9 %), without the iterations' own
    column."""
    for line in text.splitlines():
        words = line.split()
        if words and words[0] == str(size) and all(re.fullmatch(r"[\d.]+|-?nan|inf", w) for w in words):
            numbers = [float(w) for w in words]
            return [numbers[0], *numbers[2:]]
    return None


def _run(tool: str, where: Selection, arguments: list[str]) -> tuple[str, str]:
    """(output, "") or ("", reason)."""
    if why := available(tool):
        return "", why
    port = _free_port()
    command = [
        tool,
        "-F",
        "-d",
        where.device.name,
        "-i",
        str(where.port.number),
        "-x",
        str(where.gid.gid.index),
    ]
    command += ["-p", str(port), *arguments]
    if len(os.sched_getaffinity(0)) == 1:
        command.append("-e")  # a spinning client would take the processor from the device
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + TIMEOUT
        while not _listening(port):
            if server.poll() is not None or time.monotonic() > until:
                return "", f"{tool}'s server ended with status {server.returncode}"
            time.sleep(0.02)
        client = subprocess.run(
            [*command, "127.0.0.1"], capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL
        )
        if client.returncode:
            lines = (client.stderr or client.stdout).strip().splitlines()
            return "", f"{tool} failed: {lines[-1].strip() if lines else client.returncode}"
        return client.stdout, ""
    except subprocess.TimeoutExpired:
        return "", f"{tool} did not end within {TIMEOUT:.0f} s"
    finally:
        try:
            server.wait(2)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _listening(port: int) -> bool:
    """Asked of the kernel: a connection would be taken for the client."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                return True
    return False
