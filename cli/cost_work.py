"""A trace as the cost model plays it: arrival times, lengths, and what reuse there could be at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import trace


@dataclass(frozen=True, slots=True)
class Work:
    """Requests in order of arrival. ``arrivals`` in seconds from the first; ``due``: leading blocks that were
    in any earlier prompt, which is what a store finds that forgets nothing."""

    arrivals: tuple[float, ...]
    tokens: tuple[int, ...]
    outputs: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    due: tuple[int, ...]
    seconds: float  # that the trace lasts

    def __len__(self) -> int:
        return len(self.tokens)


def of(requests: Sequence[trace.Request]) -> Work:
    """Takes a trace, which has at least one request."""
    arrivals, seconds = spread([r.timestamp for r in requests])
    known: set[int] = set()
    due = []
    for r in requests:
        due.append(trace.prefix(r.ids, known))
        known.update(r.ids)
    return Work(
        arrivals,
        tuple(r.input_length for r in requests),
        tuple(r.output_length for r in requests),
        tuple(r.ids for r in requests),
        tuple(due),
        seconds,
    )


def spread(timestamps: Sequence[int]) -> tuple[tuple[float, ...], float]:
    """Arrivals in seconds, and how long they last. Mooncake's clock ticks every three seconds, and ten
    requests that arrive at once would be an artefact: those with equal timestamps are spread evenly until the
    next, but over no more than the usual gap. A timestamp that goes back counts as the one before."""
    times = np.maximum.accumulate(np.asarray(timestamps, np.float64)) / 1000
    values, counts = np.unique(times, return_counts=True)
    gaps = np.diff(values)
    usual = float(np.median(gaps)) if len(gaps) else 1.0
    gaps = np.minimum(np.append(gaps, usual), usual)
    groups = zip(values, counts, gaps, strict=True)
    arrivals = np.concatenate([value + gap * np.arange(n) / n for value, n, gap in groups])
    arrivals -= arrivals[0]
    return tuple(arrivals.tolist()), float(values[-1] - values[0] + usual)
