"""Figures that were measured instead of assumed: what ``memkv-bench ttft --json`` says, and what each request
of a replay found.

Prefill and loads are lines: so many seconds, and so many more for each FLOP or byte. They are fitted so that
relative errors count, by least squares; a line that would begin below zero begins at zero.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from ..rdma.errors import LocalError
from .shapes import Shape

T = TypeVar("T")


class _Model(msgspec.Struct):
    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype_bytes: int
    of_layers: int = 0


class _Seconds(msgspec.Struct):
    p50: float


class _Parts(msgspec.Struct):
    match: _Seconds
    get: _Seconds


class _Row(msgspec.Struct):
    tokens: int
    bytes: int
    recompute_seconds: _Seconds
    memory_seconds: _Seconds
    memory_parts_seconds: _Parts | None = None
    flash_seconds: _Seconds | None = None
    flash_parts_seconds: _Parts | None = None

    def loading(self, tier: str) -> float | None:
        """Seconds until the blocks are there: of match and get where they are told apart, else of all."""
        whole: _Seconds | None = getattr(self, f"{tier}_seconds")
        parts: _Parts | None = getattr(self, f"{tier}_parts_seconds")
        if parts is not None:
            return parts.match.p50 + parts.get.p50
        return None if whole is None else whole.p50


class _Ttft(msgspec.Struct):
    model: _Model
    rows: list[_Row]


class _Replay(msgspec.Struct):
    held: list[int]


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds: ``start`` and one ``rate``-th for each unit."""

    start: float
    rate: float

    def seconds(self, amount: float) -> float:
        """For so much."""
        return self.start + amount / self.rate


@dataclass(frozen=True, slots=True)
class Measured:
    """A machine: FLOPs of prefill, bytes from memkv's memory, and from its flash if it had some."""

    shape: Shape
    prefill: Line
    memory: Line
    flash: Line | None


def fit(amounts: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line through measured times, at least one."""
    x, t = np.asarray(amounts, np.float64), np.asarray(seconds, np.float64)
    slope = float(np.sum(x / t) / np.sum((x / t) ** 2))  # through zero
    start = 0.0
    if len(np.unique(x)) > 1:
        columns = np.stack([1 / t, x / x.max() / t], axis=1)  # of like size: seconds and seconds
        (a, b), *_ = np.linalg.lstsq(columns, np.ones(len(t)), rcond=None)
        if a > 0 and b > 0:
            start, slope = float(a), float(b / x.max())
    return Line(start, 1 / slope)


def load(path: Path) -> Measured:
    """What a run of ``memkv-bench ttft --json`` wrote. LocalError says what is missing."""
    knob = "--measured takes what memkv-bench ttft --json printed"
    doc = _read(path, _Ttft, knob)
    fields = {name: getattr(doc.model, name) for name in doc.model.__struct_fields__ if name != "of_layers"}
    if doc.model.of_layers > doc.model.layers:
        fields["name"] += f", {doc.model.layers} of its {doc.model.of_layers} layers"
    shape = Shape(**fields)

    def line(amounts: Sequence[float], seconds: Sequence[float]) -> Line:
        if not amounts or min(*amounts, *seconds) <= 0:
            raise LocalError(f"{path}: no rows, or a figure that is not above zero", knob)
        return fit(amounts, seconds)

    def loading(tier: str) -> Line | None:
        times = [(float(row.bytes), t) for row in doc.rows if (t := row.loading(tier)) is not None]
        return line([nbytes for nbytes, _ in times], [t for _, t in times]) if times else None

    flops = [shape.prefill_flops(row.tokens) for row in doc.rows]
    prefill = line(flops, [row.recompute_seconds.p50 for row in doc.rows])
    memory = loading("memory")
    assert memory is not None  # every row has it
    return Measured(shape, prefill, memory, loading("flash"))


def load_held(path: Path, requests: int) -> list[int]:
    """What each request found, as ``memkv-bench replay --cost --json`` wrote it."""
    knob = "--hits takes what memkv-bench replay --cost --json printed, for the same trace"
    held = _read(path, _Replay, knob).held
    if len(held) != requests:
        raise LocalError(f"{path}: hits of {len(held)} requests, the trace has {requests}", knob)
    return held


def _read(path: Path, kind: type[T], knob: str) -> T:
    try:
        doc: Any = json.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(doc, kind)
    except (OSError, ValueError) as error:  # msgspec's ValidationError is a ValueError
        why = getattr(error, "strerror", None) or str(error)
        raise LocalError(f"{path}: {why}", knob) from None
