"""Which assumption of the cost model matters: each one halved and doubled, at the trace's own rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .cost import work_cost
from .cost_setup import CASES, Setup
from .cost_sim import simulate
from .cost_work import Work
from .report import Steps


@dataclass(frozen=True, slots=True)
class Varied:
    """An assumption halved or doubled: what memkv then saves, against no reuse and against HBM and host."""

    name: str
    factor: float
    gpu_seconds_saved: float  # share of what no reuse takes
    cost_saved: dict[str, float]  # of work_cost, against each other case


_SHARES = ("mfu", "decode_efficiency")
_VARIED = (
    *("mfu", "decode_batch", "decode_efficiency", "hbm_kv", "host_memory", "node_memory", "node_flash"),
    *("wire", "flash_read", "flash_write", "lookup", "node_price", "gpu_price"),
)


def vary(work: Work, setup: Setup, steps: Steps) -> list[Varied]:
    """Each assumption halved and doubled, at the trace's rate."""
    out = [_saved("as assumed", 1.0, work, setup)]
    for name in _VARIED:
        for factor in (0.5, 2.0):
            steps.now(f"{name} times {factor:g}")
            tried, varied = _vary(setup, name, factor)
            out.append(_saved(name, tried, work, varied))
            steps.done()
    return out


def _vary(setup: Setup, name: str, factor: float) -> tuple[float, Setup]:
    """The factor may be less than asked for: no share is above 1."""
    if name == "gpu_price":
        return factor, replace(setup, gpu=replace(setup.gpu, price=setup.gpu.price * factor))
    value = getattr(setup, name)
    if name in _SHARES:
        factor = min(factor, 1 / value)
    if name == "mfu" and setup.prefill_rate:
        setup = replace(setup, prefill_rate=setup.prefill_rate * factor)
    changes: dict[str, Any] = {
        name: max(1, round(value * factor)) if isinstance(value, int) else value * factor
    }
    return factor, replace(setup, **changes)


def _saved(name: str, factor: float, work: Work, setup: Setup) -> Varied:
    results = {case: simulate(work, setup, case) for case in CASES}
    cost = {case: work_cost(result, setup) for case, result in results.items()}
    seconds = {case: r.prefill + r.decode for case, r in results.items()}
    return Varied(
        name,
        factor,
        1 - seconds["memkv"] / seconds["none"],
        {case: 1 - cost["memkv"] / cost[case] for case in CASES if case != "memkv"},
    )
