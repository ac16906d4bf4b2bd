"""What the tests of the cost model have in common: a small fleet, and traces of all kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from memkv.cli import cost_work, trace
from memkv.cli.cost_setup import GPUS, Setup
from memkv.cli.shapes import LLAMA_3_8B

TRACE = Path(__file__).resolve().parents[3] / "shared" / "data" / "conversation_trace.jsonl"
needs_trace = pytest.mark.skipif(
    not TRACE.exists(), reason="Mooncake's conversation_trace.jsonl is not beside the checkout (shared/data)"
)
BLOCK = LLAMA_3_8B.kv_bytes() * trace.BLOCK_TOKENS

SMALL = Setup(
    shape=LLAMA_3_8B,
    gpu=GPUS["h100"],
    gpu_name="h100",
    gpus=1,
    replicas=1,
    mfu=0.5,
    decode_efficiency=0.7,
    decode_batch=32,
    hbm_kv=20 * BLOCK,
    host_memory=60 * BLOCK,
    host_bandwidth=50e9,
    nodes=1,
    node_memory=50 * BLOCK,
    node_flash=1000 * BLOCK,
    wire=45e9,
    flash_read=26e9,
    flash_write=14e9,
    node_price=10.0,
    lookup=0.001,
)
FOREVER: dict[str, Any] = {"node_memory": 1 << 60, "hbm_kv": 0}


def setup(**changes: Any) -> Setup:
    """The small fleet, with some of it changed."""
    return replace(SMALL, **changes)


def work(*prompts: tuple[int, tuple[int, ...]], outputs: int = 10) -> cost_work.Work:
    """Requests of full blocks, each (milliseconds, ids)."""
    return cost_work.of([trace.Request(at, 512 * len(ids), outputs, ids) for at, ids in prompts])


@st.composite
def traces(draw: st.DrawFn, most: int = 40) -> list[trace.Request]:
    """Requests whose prompts share prefixes: each goes on from some leading blocks of an earlier one."""
    requests: list[trace.Request] = []
    now, fresh = 0, 0
    for _ in range(draw(st.integers(1, most))):
        now += draw(st.integers(0, 3000))
        base = draw(st.sampled_from(requests)).ids if requests else ()
        shared = base[: draw(st.integers(0, len(base)))]
        more = draw(st.integers(0 if shared else 1, 12))
        ids = (*shared, *range(fresh, fresh + more))
        fresh += more
        tokens = 512 * len(ids) - draw(st.integers(0, 511))
        requests.append(trace.Request(now, tokens, draw(st.integers(0, 300)), ids))
    return requests
