"""Measured figures in place of assumed ones: what is read, how lines are fitted, what a bad file gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv.cli import cost_measured
from memkv.cli.cost_measured import fit
from memkv.cli.shapes import LLAMA_3_8B
from memkv.rdma.errors import LocalError

RATE, START = 400e12, 0.004


def ttft(**changes: Any) -> dict[str, Any]:
    """What memkv-bench ttft --json prints, of a device with these figures."""
    shape = LLAMA_3_8B
    fields = ("layers", "kv_heads", "head_dim", "hidden", "intermediate", "heads", "vocab", "dtype_bytes")
    rows = []
    for tokens in (1024, 4096, 16384):
        nbytes = tokens * shape.kv_bytes()
        rows.append(
            {
                "tokens": tokens,
                "bytes": nbytes,
                "recompute_seconds": {"p50": START + shape.prefill_flops(tokens) / RATE, "p99": 1.0},
                "memory_seconds": {"p50": 0.002 + nbytes / 20e9},
                "flash_seconds": {"p50": 0.005 + nbytes / 5e9},
            }
        )
    model = {"name": "tried", **{name: getattr(shape, name) for name in fields}}
    return {"heading": {}, "model": model, "rows": rows, "flops_per_second": 380e12} | changes


def write(path: Path, doc: Any) -> Path:
    path.write_text(json.dumps(doc))
    return path


def test_a_run_of_ttft_gives_rates_and_what_each_call_costs(tmp_path: Path) -> None:
    measured = cost_measured.load(write(tmp_path / "ttft.json", ttft()))
    assert measured.shape.params == LLAMA_3_8B.params
    assert measured.prefill.rate == pytest.approx(RATE)
    assert measured.prefill.start == pytest.approx(START)
    assert (measured.memory.start, measured.memory.rate) == pytest.approx((0.002, 20e9))
    assert measured.flash is not None
    assert (measured.flash.start, measured.flash.rate) == pytest.approx((0.005, 5e9))


def test_what_is_loaded_does_not_count_what_is_computed_behind_it(tmp_path: Path) -> None:
    doc = ttft()
    for row in doc["rows"]:
        row["memory_parts_seconds"] = {
            "match": {"p50": 0.001},
            "get": {"p50": row["bytes"] / 30e9},
            "compute": {"p50": 0.1},
        }
    memory = cost_measured.load(write(tmp_path / "t", doc)).memory
    assert (memory.start, memory.rate) == pytest.approx((0.001, 30e9))


def test_a_model_with_some_of_its_layers_says_so(tmp_path: Path) -> None:
    doc = ttft()
    doc["model"]["of_layers"] = 80
    assert cost_measured.load(write(tmp_path / "t", doc)).shape.name == "tried, 32 of its 80 layers"


def test_a_real_run_of_ttft_is_understood(tmp_path: Path) -> None:
    args = ["ttft", "--fabric", "tcp", "--backend", "numpy", "--tokens", "40,200", "--repeat", "1", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "memkv.cli.bench", *args], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    measured = cost_measured.load(write(tmp_path / "t", json.loads(result.stdout)))
    assert measured.shape.name == "tiny"
    assert measured.prefill.rate > 0
    assert measured.memory.rate > 0
    assert measured.flash is None


def test_a_run_without_flash_has_none(tmp_path: Path) -> None:
    doc = ttft()
    for row in doc["rows"]:
        del row["flash_seconds"]
    assert cost_measured.load(write(tmp_path / "t", doc)).flash is None


@given(st.floats(0, 1), st.floats(1, 1e15), st.lists(st.floats(1, 1e15), min_size=2, max_size=8, unique=True))
def test_a_line_is_found_again(start: float, rate: float, amounts: list[float]) -> None:
    line = fit(amounts, [start + a / rate for a in amounts])
    for a in amounts:
        assert line.seconds(a) == pytest.approx(start + a / rate, rel=1e-3)


def test_one_measurement_is_a_rate() -> None:
    assert fit([100.0], [2.0]) == cost_measured.Line(0.0, 50.0)


def test_a_line_never_begins_below_zero() -> None:
    line = fit([1.0, 2.0], [1.0, 3.0])
    assert line.start == 0
    assert line.rate > 0


@pytest.mark.parametrize(
    ("doc", "message"),
    [
        ([], "--measured takes"),
        (ttft(rows=[]), "no rows"),
        (ttft(model={"name": "m"}), "layers"),
        (ttft(rows=[{"tokens": 1, "bytes": 1, "recompute_seconds": {"p50": "x"}}]), "p50"),
        (ttft(rows=[ttft()["rows"][0] | {"memory_seconds": {"p50": 0.0}}]), "above zero"),
        (ttft(rows=[ttft()["rows"][0] | {"bytes": 0}]), "above zero"),
    ],
)
def test_a_file_that_is_not_such_a_run_is_refused(tmp_path: Path, doc: Any, message: str) -> None:
    with pytest.raises(LocalError, match=message):
        cost_measured.load(write(tmp_path / "t", doc))


def test_hits_of_another_trace_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "hits", {"held": [1, 2]})
    assert cost_measured.load_held(path, 2) == [1, 2]
    with pytest.raises(LocalError, match="2 requests, the trace has 3"):
        cost_measured.load_held(path, 3)
    with pytest.raises(LocalError, match="--hits takes"):
        cost_measured.load_held(tmp_path / "none", 3)
