"""``memkv-node format`` and ``scrub``: making a flash store, and verifying one whose node is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..rdma.errors import LocalError
from ..store.config import FlashPath
from ..store.flash.prepare import format_devices
from ..store.flash.scrub import Report, scrub
from .status import size

Step = Callable[[str, int, int], None]


@contextmanager
def progress_bar(unit: Callable[[int], str]) -> Iterator[Step]:
    """A bar per thing that is being done, on standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def step(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of, count="")
            bars.update(tasks[what], completed=done, total=of, count=f"{unit(done)} of {unit(of)}")

        yield step


def make(
    paths: Sequence[FlashPath], force: bool, segment_bytes: int, console: Console
) -> list[dict[str, Any]]:
    """Formats devices and says what was made.

    :raises LocalError: one holds something and ``force`` is not set, or a path is named twice.
    """
    if len({path.path for path in paths}) != len(paths):
        raise LocalError("a path is named twice", "PATH[:SIZE], each once")
    with progress_bar(size) as step:
        blocks = format_devices(paths, force=force, segment_bytes=segment_bytes, progress=step)
    table = Table(title=f"flash store {blocks[0].store.hex()}", title_justify="left")
    for title in ("device", "used", "segments", "of"):
        table.add_column(title, justify="left" if title == "device" else "right", overflow="fold")
    for path, block in zip(paths, blocks, strict=True):
        table.add_row(str(path.path), size(block.size), str(block.segments), size(block.segment_bytes))
    console.print(table)
    return [asdict(block) for block in blocks]


def examine(paths: Sequence[FlashPath]) -> Report:
    """Scrubs a store, with a bar."""
    with progress_bar(str) as step:
        return scrub(paths, step)


def as_json(report: Report) -> dict[str, Any]:
    return {
        "ok": not report.bad,
        "bad": report.bad,
        "namespaces": {name: asdict(n) for name, n in report.namespaces.items()},
        "dropped": report.dropped,
        "devices": report.devices,
        "seconds": round(report.seconds, 3),
    }


def show(report: Report, console: Console) -> None:
    """Prints what a scrub found."""
    table = Table(title="blocks", title_justify="left")
    table.add_column("namespace", overflow="fold")
    for title in ("verified", "bad, dropped", "kept", "bytes"):
        table.add_column(title, justify="right")
    for name, n in report.namespaces.items():
        style = "bold red" if n.bad else ""
        table.add_row(name, str(n.checked), str(n.bad), str(n.blocks), size(n.bytes), style=style)
    console.print(table if report.namespaces else "no namespaces")
    devices = Table(title="devices", title_justify="left")
    devices.add_column("path", overflow="fold")
    for title in ("segments in use", "read errors", "corrupt"):
        devices.add_column(title, justify="right")
    devices.add_column("state", overflow="fold")
    for path, d in report.devices.items():
        used = int(d["segments"]) - int(d["segments_free"])
        devices.add_row(
            path,
            f"{used} of {d['segments']}",
            str(d["read_errors"]),
            str(d["corrupt"]),
            str(d["failed"] or "good"),
        )
    console.print(devices)
    dropped = ", ".join(f"{n} {reason}" for reason, n in report.dropped.items() if n)
    if dropped:
        console.print(f"images that were not taken: {dropped}", soft_wrap=True)
    verdict = f"{report.bad} blocks were bad and are gone" if report.bad else "every block is good"
    console.print(f"{verdict} ({report.seconds:.1f} s)", style="bold red" if report.bad else "bold green")
