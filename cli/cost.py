"""Costs: what prefix hits are worth, by a model on top of a replay (docs/costs.md).

Four cases are played over the same trace, on the same replicas: no reuse; the engine's own prefix cache in
HBM; that and its own host's memory; and HBM with memkv behind. Each is played at several loads, and the
highest load that still meets the objective is sought.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .cost_setup import CASES, Setup
from .cost_sim import Result, simulate
from .cost_work import Work
from .report import Steps

NARROW = 0.02  # how well the highest load is known, relatively
HALVINGS = 8


@dataclass(frozen=True, slots=True)
class Costs:
    """All results: at the trace's own rate, at each load, and at the highest that meets the objective (None:
    not even the lowest of those tried does)."""

    work: Work
    setup: Setup
    base: dict[str, Result]
    sweep: list[Result]
    highest: dict[str, Result | None]
    counted: bool  # memkv's hits are those of a real replay


def model(
    work: Work,
    setup: Setup,
    loads: Sequence[float],
    steps: Steps,
    held: Sequence[int] | None = None,
) -> Costs:
    """Plays all cases."""

    def play(case: str, load: float) -> Result:
        steps.now(f"{case} at {load:g} times the rate")
        result = simulate(work, setup, case, load=load, held=held if case == "memkv" else None)
        steps.done()
        return result

    base = {case: play(case, 1.0) for case in CASES}
    sweep = [base[case] if load == 1.0 else play(case, load) for case in CASES for load in loads]
    highest = {
        case: _highest([r for r in sweep if r.case == case], setup, partial(play, case)) for case in CASES
    }
    return Costs(work, setup, base, sweep, highest, held is not None)


def meets(result: Result, setup: Setup) -> bool:
    """The objective: 90 of 100 first tokens in time, and no more work than the replicas have time for."""
    offered = (result.prefill + result.decode) / (setup.replicas * result.seconds)
    return offered <= 1 and float(np.percentile(result.ttft, 90)) <= setup.slo


def _highest(tried: Sequence[Result], setup: Setup, play: Callable[[float], Result]) -> Result | None:
    """Between the last load that meets the objective and the next, by halving."""
    good = [r for r in tried if meets(r, setup)]
    if not good:
        return None
    best = good[-1]
    bad = next((r.load for r in tried if r.load > best.load), None)
    if bad is None:
        bad = best.load * 2
        while meets(result := play(bad), setup):
            best, bad = result, bad * 2
    for _ in range(HALVINGS):
        if bad - best.load <= NARROW * best.load:
            break
        middle = (best.load + bad) / 2
        if meets(result := play(middle), setup):
            best = result
        else:
            bad = middle
    return best


def per_million(dollars: float, result: Result) -> float:
    """Of all tokens of prompts and answers, cached or not: they were served."""
    return dollars * 1e6 / (result.input_tokens + result.output_tokens)


def fleet_cost(result: Result, setup: Setup) -> float:
    """Dollars for a million tokens: all GPUs and nodes for as long as requests come."""
    return per_million(setup.hourly(result.case) * result.seconds / 3600, result)


def work_cost(result: Result, setup: Setup) -> float:
    """Dollars for a million tokens if GPUs were paid for while they are busy only; nodes for all the time."""
    busy = (result.prefill + result.decode) * setup.gpus * setup.gpu.price
    nodes = setup.nodes * setup.node_price * result.seconds if result.case == "memkv" else 0.0
    return per_million((busy + nodes) / 3600, result)
