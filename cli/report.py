"""What a benchmark says: a heading, rows as a table or as one JSON object, and progress on a terminal.

Standard output carries the result and nothing else; progress goes to standard error, and only to a terminal.
A GB is 10⁹ bytes, a time is in microseconds.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__

PERCENTILES = (("p50_us", 50.0), ("p90_us", 90.0), ("p99_us", 99.0), ("p999_us", 99.9))

Times = npt.NDArray[np.float64]


@dataclass(slots=True, kw_only=True)
class Row:
    """One line of a result. None: does not apply. ``extra`` holds what only some benchmarks have."""

    what: str
    size: int | None = None
    batch: int | None = None
    gbps: float | None = None
    times_us: Times | None = None  # of each call
    given_us: dict[str, float | None] = field(default_factory=dict)  # percentiles that somebody else took
    hits: int | None = None
    misses: int | None = None
    errors: int = 0
    limit_gbps: float | None = None
    ratio: float | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row with percentiles for times; ``block_p50_us`` is a call's divided by its blocks."""
        out: dict[str, Any] = {
            "what": self.what,
            "size": self.size,
            "batch": self.batch,
            "gbps": _round(self.gbps),
        }
        out |= percentiles(self.times_us)
        out |= {name: _round(value) for name, value in self.given_us.items()}
        p50 = out["p50_us"]
        out["block_p50_us"] = _round(p50 / self.batch) if p50 is not None and self.batch else None
        out |= {"hits": self.hits, "misses": self.misses, "errors": self.errors}
        out |= {"limit_gbps": _round(self.limit_gbps), "ratio": _round(self.ratio)}
        out |= {name: _round(value) for name, value in self.extra.items()}
        if self.note:
            out["note"] = self.note
        return out


def percentiles(times_us: Times | None) -> dict[str, float | None]:
    """p50, p90, p99 and p99.9; None without times."""
    if times_us is None or not len(times_us):
        return {name: None for name, _ in PERCENTILES}
    values = np.percentile(times_us, [q for _, q in PERCENTILES])
    return {name: _round(float(v)) for (name, _), v in zip(PERCENTILES, values, strict=True)}


def _round(value: Any) -> Any:
    """Four significant digits are more than a benchmark knows."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine() -> dict[str, str | int]:
    """The part of the heading that does not depend on memkv's connections."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "memkv": __version__,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def print_result(
    heading: dict[str, Any], rows: Sequence[Row], *, as_json: bool, notes: Iterable[str] = ()
) -> None:
    """Prints the result to standard output; ``notes`` (what the figures mean) only beside a table."""
    if as_json:
        print(json.dumps({"heading": heading, "rows": [row.as_json() for row in rows]}))
        return
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 220, highlight=False)
    width = max(len(name) for name in heading)
    for name, value in heading.items():
        console.print(f"{name:<{width}}  {value}", markup=False)
    console.print()
    shared = _shared_extras(rows)
    console.print(_table(rows, shared))
    console.print()
    for row in rows:
        own = [
            f"{k.replace('_', ' ')} {_cell(k, _round(v))}" for k, v in row.extra.items() if k not in shared
        ]
        if own or row.note:
            console.print(f"{row.what}: {', '.join([*own, *([row.note] if row.note else [])])}", markup=False)
    for note in notes:
        console.print(note, markup=False)


def _shared_extras(rows: Sequence[Row]) -> list[str]:
    """Extras that several rows have: columns; those of one row are told below the table."""
    names = dict.fromkeys(name for row in rows for name in row.extra)
    return [name for name in names if sum(name in row.extra for row in rows) > 1]


_COLUMNS = (
    ("what", "what"),
    ("size", "size"),
    ("batch", "batch"),
    ("gbps", "GB/s"),
    ("p50_us", "p50 µs"),
    ("p90_us", "p90 µs"),
    ("p99_us", "p99 µs"),
    ("p999_us", "p99.9 µs"),
    ("block_p50_us", "µs/block"),
    ("hits", "hits"),
    ("misses", "misses"),
    ("errors", "errors"),
    ("limit_gbps", "limit GB/s"),
    ("ratio", "ratio"),
)


def _table(rows: Sequence[Row], extras: Sequence[str]) -> Table:
    """Columns that are empty in all rows are left out."""
    records = [row.as_json() for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = [*_COLUMNS, *((key, key.replace("_", " ")) for key in extras)]
    shown = [(key, title) for key, title in columns if any(r.get(key) is not None for r in records)]
    for key, title in shown:
        table.add_column(title, justify="left" if key == "what" else "right", no_wrap=True)
    for r in records:
        table.add_row(*(_cell(key, r.get(key)) for key, _ in shown))
    return table


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "size":
        return size_text(value)
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def size_text(nbytes: int) -> str:
    """64K, 1M, or bytes."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if nbytes >= 1 << shift and nbytes % (1 << shift) == 0:
            return f"{nbytes >> shift}{unit}"
    return str(nbytes)


class Steps:
    """A progress bar on standard error if that is a terminal; else nothing. Use as a context manager."""

    def __init__(self, total: int | None = None) -> None:
        console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def add(self, more: int) -> None:
        """Expects ``more`` further steps."""
        task = self._bar.tasks[0]
        self._bar.update(self._task, total=(task.total or 0) + more)

    def now(self, what: str) -> None:
        """Says what is being done."""
        self._bar.update(self._task, description=what)

    def done(self, steps: int = 1) -> None:
        """Counts steps as done."""
        self._bar.advance(self._task, steps)
