"""Comparing in one run: contestants take turns, round after round, and each round gives a ratio to the limit.

A machine's speed wanders, by far more than what is to be told apart. So every figure is the median over
rounds, and a ratio is the median of the ratios of each round, not a ratio of medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from .report import Row, Steps
from .sample import Sample

LIMIT, PERFTEST, REDIS = "limit", "perftest", "redis"


@dataclass(slots=True)
class Contestant:
    """Something that is run once a round.

    ``names``: of the samples that ``run`` returns, one row each. ``role``: LIMIT, PERFTEST and REDIS are what
    others are divided by. ``run`` may return a reason instead: then it has no figure and is not run again.
    """

    names: tuple[str, ...]
    run: Callable[[], Sequence[Sample] | str]
    batch: int | None = None
    role: str = ""
    counts: bool = True  # hits and misses mean something
    note: str = ""
    samples: list[Sequence[Sample]] = field(default_factory=list)


def contest(contestants: Sequence[Contestant], *, size: int, rounds: int, steps: Steps) -> list[Row]:
    """Runs all of them ``rounds`` times in turn; a row for each name."""
    running = list(contestants)
    steps.add(rounds * len(running))
    for number in range(rounds):
        for c in list(running):
            steps.now(f"{c.names[0]}, round {number + 1} of {rounds}")
            outcome = c.run()
            if isinstance(outcome, str):
                c.note = outcome
                running.remove(c)
            else:
                c.samples.append(outcome)
            steps.done()
    by_role = {c.role: [s[0].gbps for s in c.samples] for c in contestants if c.role}
    rows = [_row(c, i, size, by_role) for c in contestants for i in range(len(c.names))]
    return [row for row in rows if row is not None]


def _row(c: Contestant, index: int, size: int, by_role: dict[str, list[float]]) -> Row | None:
    row = Row(what=c.names[index], size=size, batch=c.batch, note=c.note)
    samples = [s[index] for s in c.samples]
    if not any(s.ns for s in samples):
        return row if c.note else None
    rates = [s.gbps for s in samples]
    total = Sample()
    for s in samples:
        total.add(s)
    if len(c.names) > 1:  # kinds that share a turn do not all occur in each: pooled
        rates = [total.gbps] * len(rates)
    row.gbps = median(rates)
    row.times_us = np.array(total.times_us) if total.times_us else None
    if c.counts:
        row.hits, row.misses = total.hits, total.misses
    row.errors = total.errors + total.wrong
    if total.wrong:
        row.note = f"{total.wrong} blocks with wrong bytes"
    elif total.first_error:
        row.note = total.first_error
    for role, others in by_role.items():
        if not others:
            continue
        if role == LIMIT:
            row.limit_gbps = median(others)
            row.ratio = median_ratio(rates, others)
        else:
            row.extra[f"{role}_gbps"] = median(others)
            row.extra[f"{role}_ratio"] = median_ratio(rates, others)
    return row


def median_ratio(values: Sequence[float], limits: Sequence[float]) -> float | None:
    """The median of the ratios of values and limits that belong together."""
    ratios = [v / limit for v, limit in zip(values, limits, strict=False) if limit]
    return median(ratios) if ratios else None
