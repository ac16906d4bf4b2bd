"""What the cost model says: as tables, and as JSON; every assumption beside the result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .cost import Costs, fleet_cost, meets, work_cost
from .cost_sensitivity import Varied
from .cost_setup import CASE_TITLES, CASES, Setup
from .cost_sim import TIERS, Result

NOTES = (
    "GPU seconds: of replicas, times their GPUs. recomputed: prefill of blocks that an earlier prompt had;",
    "useful: without it. busy: share of all GPU time while requests come. highest load: times the trace's",
    "rate, with the objective (slo) met and no more work than there is time for. $/M: dollars for a million",
    "tokens of prompts and answers; fleet: all GPUs and nodes for all that time; work: GPUs while they are",
    "busy, nodes for all of it.",
)


def as_json(costs: Costs, varied: Sequence[Varied] = ()) -> dict[str, Any]:
    """All of it. Times in seconds, shares from 0, prices in dollars."""
    work, setup = costs.work, costs.setup
    return {
        "trace": {
            "requests": len(work),
            "blocks": sum(map(len, work.ids)),
            "distinct_blocks": len({id for ids in work.ids for id in ids}),
            "reusable_blocks": sum(work.due),
            "input_tokens": sum(work.tokens),
            "output_tokens": sum(work.outputs),
            "seconds": work.seconds,
        },
        "assumptions": [
            {"name": a.name, "value": a.value, "unit": a.unit, "source": a.source}
            for a in setup.assumptions()
        ],
        "hits_from": "replay" if costs.counted else "model",
        "cases": [_case(costs, case) for case in CASES],
        "sweep": [_at_load(r, setup) for r in costs.sweep],
        "sensitivity": [
            {
                "assumption": v.name,
                "factor": v.factor,
                "gpu_seconds_saved": v.gpu_seconds_saved,
                "work_cost_saved_against": v.cost_saved,
            }
            for v in varied
        ],
    }


def _case(costs: Costs, case: str) -> dict[str, Any]:
    r, setup, none = costs.base[case], costs.setup, costs.base["none"]
    seconds, before = r.prefill + r.decode, none.prefill + none.decode
    highest = costs.highest[case]
    return {
        "case": case,
        "title": CASE_TITLES[case],
        **_at_load(r, setup),
        "hits": r.hits,
        "hit_ratio": sum(r.hits.values()) / max(1, r.blocks),
        "cached_token_share": r.cached_tokens / max(1, r.input_tokens),
        "prefill_gpu_seconds": r.prefill * setup.gpus,
        "recompute_gpu_seconds": r.recompute * setup.gpus,
        "decode_gpu_seconds": r.decode * setup.gpus,
        "gpu_seconds_saved": (before - seconds) * setup.gpus,
        "gpu_seconds_saved_share": 1 - seconds / before,
        "useful_of_busy": 1 - r.recompute / seconds,
        "left_gpu_seconds": r.left * setup.gpus,
        "links_busy": r.links,
        "put_bytes": r.put_bytes,
        "dropped_blocks": r.dropped,
        "work_cost": work_cost(r, setup),
        "at_slo": None if highest is None else _at_load(highest, setup),
    }


def _at_load(r: Result, setup: Setup) -> dict[str, Any]:
    p50, p90, p99 = np.percentile(r.ttft, [50, 90, 99]).tolist()
    return {
        "case": r.case,
        "load": r.load,
        "requests_per_second": len(r.ttft) / r.seconds,
        "ttft_p50": p50,
        "ttft_p90": p90,
        "ttft_p99": p99,
        "ttft_mean": float(r.ttft.mean()),
        "busy": r.busy,
        "useful": r.busy - r.recompute / (r.seconds * setup.replicas) * _within(r),
        "meets_slo": meets(r, setup),
        "fleet_cost": fleet_cost(r, setup),
    }


def _within(r: Result) -> float:
    """Share of the work that is done while requests come."""
    total = r.prefill + r.decode
    return (total - r.left) / total


def print_tables(costs: Costs, varied: Sequence[Varied] = ()) -> None:
    """To standard output."""
    console = Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else 220, highlight=False, markup=False
    )
    doc = as_json(costs, varied)
    setup = costs.setup
    console.print("\nassumptions", style="bold")
    console.print(
        _table(
            ("what", "value", "unit", "because"),
            ([a.name, _number(a.value), a.unit, a.source] for a in setup.assumptions()),
            left=(0, 2, 3),
        )
    )
    t = doc["trace"]
    console.print(
        f"\nAt the trace's rate: {t['requests']} requests in {t['seconds']:.0f} s, {t['reusable_blocks']} of "
        f"{t['blocks']} blocks were in an earlier prompt; memkv's hits: {_hits_from(costs)}."
    )
    console.print(_base_table(doc["cases"]))
    console.print(_links(costs.base["memkv"], setup))
    console.print("\nby load, in times the trace's rate", style="bold")
    console.print(_sweep_table(doc["sweep"]))
    if varied:
        console.print("\nat the trace's rate, what memkv saves if", style="bold")
        console.print(_varied_table(varied))
    console.print()
    for note in NOTES:
        console.print(note)


def _hits_from(costs: Costs) -> str:
    return "counted by a replay" if costs.counted else "of the model"


def _base_table(cases: Sequence[dict[str, Any]]) -> Table:
    """Cases side by side."""
    lines = [
        [f"TTFT {name}, s", *(f"{c[f'ttft_{name}']:.2f}" for c in cases)] for name in ("p50", "p90", "p99")
    ]
    lines += [[f"hits in {_TIERS[tier]}, blocks", *(str(c["hits"][tier]) for c in cases)] for tier in TIERS]

    def line(title: str, of: Callable[[dict[str, Any]], str]) -> None:
        lines.append([title, *map(of, cases)])

    line("prompt tokens not computed", lambda c: _percent(c["cached_token_share"]))
    line("prefill, GPU seconds", lambda c: f"{c['prefill_gpu_seconds']:.0f}")
    line("of it recomputed", lambda c: f"{c['recompute_gpu_seconds']:.0f}")
    line("decode, GPU seconds", lambda c: f"{c['decode_gpu_seconds']:.0f}")
    line("GPU seconds saved", lambda c: _percent(c["gpu_seconds_saved_share"]))
    line("GPUs busy", lambda c: _percent(c["busy"]))
    line("of it useful", lambda c: _percent(c["useful_of_busy"]))
    line("$/M, fleet", lambda c: f"{c['fleet_cost']:.3f}")
    line("$/M, work", lambda c: f"{c['work_cost']:.3f}")
    line("highest load", lambda c: _slo(c, "load", 2))
    line("requests/s at it", lambda c: _slo(c, "requests_per_second", 2))
    line("GPUs busy at it", lambda c: _percent(c["at_slo"]["busy"]) if c["at_slo"] else "-")
    line("$/M at it", lambda c: _slo(c, "fleet_cost", 3))
    return _table(("", *(c["title"] for c in cases)), lines)


def _links(r: Result, setup: Setup) -> str:
    """How much memkv's nodes have to do."""
    busy = ", ".join(f"{name.replace('_', ' ')} {_percent(share)}" for name, share in r.links.items())
    text = f"memkv's nodes: {busy}; {r.put_bytes / 1e12:.1f} TB put, {r.dropped} blocks not kept"
    if setup.node_flash:
        times = r.put_bytes / r.seconds * 86400 / (setup.nodes * setup.node_flash)
        text += f"; at this rate all of flash is written {times:.1f} times a day"
    return text


_TIERS = {"hbm": "HBM", "host": "own host", "memory": "memkv's memory", "flash": "memkv's flash"}


def _slo(case: dict[str, Any], name: str, digits: int) -> str:
    return f"{case['at_slo'][name]:.{digits}f}" if case["at_slo"] else "-"


def _sweep_table(sweep: Sequence[dict[str, Any]]) -> Table:
    loads = sorted({s["load"] for s in sweep})
    titles = [f"{CASE_TITLES[case]}:\n{what}" for what in ("busy", "TTFT p90, s") for case in CASES]
    at = {(s["case"], s["load"]): s for s in sweep}
    lines = (
        [
            f"{load:g}",
            f"{at[CASES[0], load]['requests_per_second']:.2f}",
            *(_percent(at[case, load]["busy"]) for case in CASES),
            *(f"{at[case, load]['ttft_p90']:.2f}" for case in CASES),
        ]
        for load in loads
    )
    return _table(("load", "requests/s", *titles), lines)


def _varied_table(varied: Sequence[Varied]) -> Table:
    against = [case for case in CASES if case != "memkv"]
    titles = ("assumption", "times", "GPU seconds", *(f"$/M work, to {CASE_TITLES[c]}" for c in against))
    lines = (
        [
            v.name,
            f"{v.factor:g}",
            _percent(v.gpu_seconds_saved),
            *(_percent(v.cost_saved[c]) for c in against),
        ]
        for v in varied
    )
    return _table(titles, lines)


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]], *, left: Sequence[int] = (0,)) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i in left else "right", no_wrap=i not in left or i == 0)
    for line in lines:
        table.add_row(*line)
    return table


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"


def _number(value: float | int | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
