"""What ``memkv-bench ttft`` found: whether logits are right, and the table, lines and JSON that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .report import Row, _round
from .shapes import Shape
from .ttft_worker import Computed, Restored

WAYS = ("memory", "flash")
FREE = 0.8  # of its time a recompute runs at least, on a machine that does nothing else


@dataclass(slots=True)
class Way:
    """What came of one way to the first token, over all repetitions."""

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    hit_tokens: list[int] = field(default_factory=list)
    hit_blocks: list[int] = field(default_factory=list)
    hits: int = 0
    missed: int = 0
    worst: float = 0.0  # difference of a logit
    identical: bool = True
    same_token: bool = True
    problem: str = ""


@dataclass(slots=True)
class Result:
    """Of one length of prompt."""

    tokens: int
    recompute: Way = field(default_factory=Way)
    cpu_seconds: list[float] = field(default_factory=list)  # of the recompute
    put_seconds: list[float] = field(default_factory=list)
    ways: dict[str, Way] = field(default_factory=dict)
    kept_less: int = 0
    problem: str = ""

    def errors(self, tolerance: float) -> int:
        """Blocks that could not be kept or fetched, and ways whose logits are not those of the recompute."""
        wrong = sum(not right(way, tolerance) for way in self.ways.values())
        return self.kept_less + sum(way.missed for way in self.ways.values()) + wrong


def right(way: Way, tolerance: float) -> bool:
    """Whether something was restored and gave the recompute's logits, and its token, every time."""
    close = way.identical or way.worst <= tolerance  # a NaN is not close to anything
    return bool(way.seconds) and min(way.hit_tokens) > 0 and close and way.same_token


def compare(way: Way, computed: Computed, restored: Restored) -> None:
    """Adds one prompt's outcome to ``way``."""
    way.seconds.append(restored.seconds)
    for name in ("match", "get", "compute"):
        way.parts.setdefault(name, []).append(getattr(restored, f"{name}_seconds"))
    way.hit_tokens.append(restored.tokens)
    way.hit_blocks.append(restored.hits)
    way.hits += restored.hits
    way.missed += restored.blocks - restored.hits
    way.problem = way.problem or restored.problem
    due, found = computed.logits, restored.logits
    worst = float(np.abs(due.astype(np.float64) - found).max())
    way.worst = worst if not worst <= way.worst else way.worst  # NaN stays
    way.identical &= due.tobytes() == found.tobytes()
    way.same_token &= bool(np.isfinite(found).all()) and int(due.argmax()) == int(found.argmax())


# --- what is said ---

NOTES = (
    "Times are from the prompt to the logits of its next token; weights are in place and peers connected.",
    "memory, flash: keys, match, get, and computing what is behind the last full block, in a process that",
    "has never computed the prompt.",
)


def _p(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q))


def busy(results: Sequence[Result]) -> list[str]:
    """A warning, where a processor that is shared has made long computations seem longer still."""
    ran = sum(sum(result.cpu_seconds) for result in results)
    share = ran / max(1e-9, sum(sum(result.recompute.seconds) for result in results))
    if share >= FREE or not any(result.cpu_seconds for result in results):
        return []
    return [f"BUSY MACHINE: the recompute ran {share:.0%} of its time on a processor; ratios are too high."]


def lines(results: Sequence[Result], tolerance: float) -> list[str]:
    """The last lines: what was saved, and whether the logits are the same."""
    out = []
    for result in results:
        base = _p(result.recompute.seconds, 50)
        for name, way in result.ways.items():
            if not way.seconds or not any(way.hit_tokens):
                out.append(f"prefill {result.tokens} tokens: nothing was restored from memkv's {name}")
                continue
            seconds = _p(way.seconds, 50)
            if way.identical:
                verdict = "logits identical"
            elif right(way, tolerance):
                verdict = f"logits within {way.worst:.2g}"
            else:
                verdict = f"LOGITS DIFFER by up to {way.worst:.2g}"
            where = "memkv" if name == "memory" else f"memkv from {name}"
            out.append(
                f"prefill {result.tokens} tokens: recompute {base:.3g} s, {where} {seconds:.3g} s "
                f"({base / seconds:.1f}×), {verdict}"
            )
    return out


def table_rows(result: Result, shape: Shape, dtype_bytes: int, tolerance: float) -> list[Row]:
    """For the table: the recompute, and each way."""
    base = _p(result.recompute.seconds, 50)
    prompt = f"{result.tokens} tokens"
    first = Row(what=f"{prompt}, recompute", errors=result.kept_less, note=result.problem)
    first.given_us = _microseconds(result.recompute.seconds)
    first.extra = {
        "gflop_per_s": shape.prefill_flops(result.tokens) / base / 1e9,
        "put_ms": _p(result.put_seconds, 50) * 1e3,
    }
    rows = [first]
    for name, way in result.ways.items():
        row = Row(what=f"{prompt}, {name}", hits=way.hits, misses=way.missed, note=way.problem)
        row.given_us = _microseconds(way.seconds)
        row.errors = way.missed + (not right(way, tolerance))
        row.extra = {"faster": base / _p(way.seconds, 50), "hit_tokens": min(way.hit_tokens)}
        row.extra |= {f"{part}_ms": _p(times, 50) * 1e3 for part, times in way.parts.items()}
        row.extra |= {"MB": shape.kv_bytes(min(way.hit_tokens), dtype_bytes) / 1e6}
        row.extra |= {"max_abs_diff": way.worst}
        rows.append(row)
    return rows


def _microseconds(seconds: Sequence[float]) -> dict[str, float | None]:
    return {"p50_us": _p(seconds, 50) * 1e6, "p99_us": _p(seconds, 99) * 1e6}


def report(
    head: dict[str, Any], shape: Shape, dtype_bytes: int, results: Sequence[Result], tolerance: float
) -> dict[str, Any]:
    """The JSON object: see docs/ttft.md."""
    rows = [_json_row(result, shape, dtype_bytes, tolerance) for result in results]
    best = max(rows, key=lambda row: row["tokens"])
    return {
        "heading": head,
        "model": shape.as_json() | {"dtype_bytes": dtype_bytes},
        "flops_per_second": best["flops_per_second"],
        "rows": rows,
    }


def _json_row(result: Result, shape: Shape, dtype_bytes: int, tolerance: float) -> dict[str, Any]:
    ways = result.ways.values()
    hit = min(min(way.hit_tokens) for way in ways)
    flops = shape.prefill_flops(result.tokens)
    worst = float(np.max([way.worst for way in ways]))
    out: dict[str, Any] = {
        "what": "ttft",
        "tokens": result.tokens,
        "recompute_seconds": _spread(result.recompute.seconds),
        "recompute_cpu_seconds": _spread(result.cpu_seconds) if result.cpu_seconds else None,
        "put_seconds": _spread(result.put_seconds),
    }
    for name in WAYS:
        way = result.ways.get(name)
        out[f"{name}_seconds"] = _spread(way.seconds) if way else None
        out[f"{name}_parts_seconds"] = (
            {part: _spread(times) for part, times in way.parts.items()} if way else None
        )
    return out | {
        "hit_tokens": hit,
        "blocks": min(min(way.hit_blocks) for way in ways),
        "bytes": shape.kv_bytes(hit, dtype_bytes),
        "flops": flops,
        "flops_per_second": _round(flops / _p(result.recompute.seconds, 50)),
        "max_abs_diff": None if np.isnan(worst) else worst,  # JSON has no NaN
        "identical": all(way.identical for way in ways),
        "same_token": all(way.same_token for way in ways),
        "errors": result.errors(tolerance),
        "notes": [text for text in (result.problem, *(way.problem for way in ways), *busy([result])) if text],
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"p50": _round(_p(seconds, 50)), "p99": _round(_p(seconds, 99)), "min": _round(min(seconds))}
