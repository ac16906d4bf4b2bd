"""The benchmarks on a GPU, in their shortest form: they run, and every byte is right."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SHORT = ["--rounds", "2", "--seconds", "0.1", "--json"]


def bench(*args: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "memkv.cli.bench", *args], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert all(row["errors"] == 0 for row in result["rows"]), result
    return result


def test_gpu_measures_staging_and_kernels(cupy: Any) -> None:
    result = bench("gpu", "--sizes", "1m,4m", "--working-set", "64m", *SHORT)

    what = {row["what"] for row in result["rows"]}
    assert {"staging into the GPU", "staging out of the GPU", "checksum", "copy within the GPU"} <= what
    assert sum(name.startswith(("gather", "scatter")) for name in what) == 8
    assert all(row["gbps"] > 0 for row in result["rows"])


@pytest.mark.parametrize("command", ["get", "put", "mixed", "limit"])
def test_loads_on_the_gpu(cuda: object, command: str) -> None:
    flags = ["--memory", "cuda:0", "--fabric", "tcp", "--sizes", "1m", "--working-set", "32m", "--batch", "8"]
    result = bench(command, *flags, *SHORT)

    assert "get into" in result["heading"]
    assert all(row["misses"] in (0, None) for row in result["rows"])


def test_latency_on_the_gpu(cuda: object) -> None:
    flags = ["--memory", "cuda:0", "--fabric", "tcp", "--calls", "20", "--rounds", "2", "--json"]
    assert {row["hits"] for row in bench("latency", *flags)["rows"]} == {20}
