"""fio as the limit of the flash tier: the same file or device, block size, depth and kind of I/O."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``direct``: O_DIRECT. ``huge``: buffers in explicit huge pages."""

    path: Path
    offset: int
    span: int
    size: int  # of a block
    depth: int
    direct: bool
    uring: bool
    huge: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """Bytes and nanoseconds, or the reason why there are none."""

    nbytes: int = 0
    ns: int = 0
    note: str = ""


def available() -> str:
    """Empty if it is installed, else what to say."""
    return "" if shutil.which("fio") else "fio is not installed (apt install fio)"


def run(job: Job, kind: str, seconds: float | None) -> Outcome:
    """``randread`` or ``write`` for so long; None: once over the span.

    Writes are flushed at the end, within the time.
    """
    if why := available():
        return Outcome(note=why)
    span = job.span // job.size * job.size
    command = [
        "fio",
        "--name=limit",
        f"--filename={job.path}",
        f"--offset={job.offset}",
        f"--size={span}",
        f"--bs={job.size}",
        f"--iodepth={job.depth}",
        f"--rw={kind}",
        f"--direct={int(job.direct)}",
        "--ioengine=io_uring" if job.uring else "--ioengine=psync",
        "--randrepeat=0",
        "--norandommap",
        "--allow_file_create=1",
        "--output-format=json",
    ]
    if job.uring:
        command += ["--registerfiles=1", "--fixedbufs=1"]
    else:
        command += [f"--numjobs={job.depth}", "--group_reporting", "--thread"]
    command += ["--iomem=mmaphuge"] if job.huge else []
    command += ["--readonly"] if kind == "randread" else ["--end_fsync=1"]
    command += ["--time_based", f"--runtime={max(1, round(seconds * 1000))}ms"] if seconds is not None else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT + (seconds or 600.0), cwd=os.sep
        )
    except subprocess.TimeoutExpired:
        return Outcome(note="fio did not end")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return Outcome(note=f"fio failed: {lines[-1].strip() if lines else done.returncode}")
    return parse(done.stdout, "read" if kind == "randread" else "write")


def parse(text: str, direction: str) -> Outcome:
    """Of fio's JSON, which may follow lines of warnings."""
    try:
        found: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        side = found[direction]
        return Outcome(int(side["io_bytes"]), int(side["runtime"]) * 1_000_000)
    except (ValueError, KeyError, IndexError):
        return Outcome(note="fio printed no figure")
