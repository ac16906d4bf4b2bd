"""memkv-bench ttft: its transformer, what it measures, and that it notices KV which is not the prompt's."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.cli import ttft_report
from memkv.cli.cluster import Wish
from memkv.cli.shapes import SHAPES, Shape
from memkv.cli.transformer import NumpyModel, chunks, draw, restorable
from memkv.cli.ttft_worker import Computed, Job, Restored, Worker

from ..nodes import StartNode, address_of

pytest_plugins = "tests.nodes"
SMALL = Shape(name="small", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=128)


def model(shape: Shape = SMALL, seed: int = 0, block: int = 16, chunk: int = 32) -> NumpyModel:
    return NumpyModel(shape, seed, longest=256, block=block, chunk=chunk)


def prompt(tokens: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, tokens]).integers(0, SMALL.vocab, tokens)


# --- arithmetic ---


def test_flops_are_those_of_the_multiplications() -> None:
    """Counted one product after the other, pairs of query and key one by one."""
    s, tokens = SMALL, 20
    width, inner = s.heads * s.head_dim, s.intermediate
    matrices = s.hidden * (width + 2 * s.kv_heads * s.head_dim) + width * s.hidden + 3 * s.hidden * inner
    linear = 2 * matrices * tokens
    attention = sum(2 * 2 * s.heads * s.head_dim for query in range(tokens) for key in range(query + 1))
    assert s.prefill_flops(tokens) == s.layers * (linear + attention) + 2 * s.hidden * s.vocab
    head = 2 * s.hidden * s.vocab
    assert s.prefill_flops(16) - head + s.prefill_flops(4, cached=16) == s.prefill_flops(20)


# --- the transformer ---


@pytest.mark.parametrize("tokens", [2, 16, 17, 33, 100])
@pytest.mark.parametrize("chunk", [16, 48, 256])
def test_chunks_cover_a_prompt_and_end_with_what_is_never_kept(tokens: int, chunk: int) -> None:
    parts = list(chunks(tokens, 0, chunk, 16))
    assert [first for first, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1] == (restorable(tokens, 16), tokens)
    assert all(0 < end - first <= max(chunk, 16) for first, end in parts)


def test_weights_and_logits_are_the_same_every_time() -> None:
    one, other = draw(SMALL, 3), draw(SMALL, 3)
    assert one.fingerprint == other.fingerprint != draw(SMALL, 4).fingerprint
    assert np.array_equal(one.layers[1].down, other.layers[1].down)
    assert one.fingerprint != draw(replace(SMALL, rope_theta=1.0), 3).fingerprint

    tokens = prompt(100)
    assert np.array_equal(model().prefill(tokens), model().prefill(tokens))


def test_everything_is_single_precision() -> None:
    made = model()
    assert made.prefill(prompt(40)).dtype == made._extend(prompt(3), 0).dtype == np.float32


@pytest.mark.parametrize("tokens", [17, 64, 100])
def test_chunks_do_not_change_what_is_computed(tokens: int) -> None:
    """But for the order in which BLAS adds: other shapes, other kernels."""
    due = model(chunk=256).prefill(prompt(tokens))
    np.testing.assert_allclose(model(chunk=16).prefill(prompt(tokens)), due, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [17, 64, 100])
def test_going_on_from_pages_gives_the_same_bits(tokens: int) -> None:
    first, second = model(), model()
    due = first.prefill(prompt(tokens))
    second.forget()
    start = restorable(tokens, 16)
    second.pages[: start // 16] = first.pages[: start // 16]

    assert np.array_equal(second.prefill(prompt(tokens), start), due)


def test_a_token_sees_no_later_one() -> None:
    """Nor depends a page on what comes after it."""
    one, other = model(), model()
    one.prefill(prompt(100))
    other.prefill(np.concatenate([prompt(100)[:48], prompt(52, seed=1)]))

    assert np.array_equal(one.pages[:3], other.pages[:3])
    assert not np.array_equal(one.pages[3], other.pages[3])


def test_the_order_of_tokens_matters() -> None:
    tokens = prompt(33)
    turned = tokens.copy()
    turned[[4, 5]] = turned[[5, 4]]
    assert not np.allclose(model().prefill(tokens), model().prefill(turned))


# --- a worker, and KV that is wrong ---


def job(fabric_name: str, **more: Any) -> Job:
    given: dict[str, Any] = {
        "shape": SMALL,
        "backend": "numpy",
        "seed": 1,
        "longest": 128,
        "block": 16,
        "chunk": 32,
        "wish": Wish(fabric=fabric_name),
        "salt": "test",
    }
    return Job(**(given | more))


def outcome(computed: Computed, restored: Restored) -> ttft_report.Way:
    way = ttft_report.Way()
    ttft_report.compare(way, computed, restored)
    return way


@pytest.fixture
def workers(start_node: StartNode, fabric_name: str) -> Any:
    """Two, with the same weights, connected to one node."""
    address = address_of(start_node())
    pair = [Worker(job(fabric_name)) for _ in range(2)]
    for worker in pair:
        worker.open([address])
    yield pair
    for worker in pair:
        worker.close()


def test_a_prompt_is_restored_by_another_worker(workers: list[Worker]) -> None:
    writer, reader = workers
    computed = writer.compute(prompt(100))
    restored = reader.restore(prompt(100))

    assert (computed.kept, computed.blocks) == (6, 6)
    assert (restored.hits, restored.tokens, restored.problem) == (6, 96, "")
    way = outcome(computed, restored)
    assert way.identical
    assert ttft_report.right(way, 0.0)


def test_a_single_wrong_bit_of_kv_is_noticed(workers: list[Worker]) -> None:
    """The block of another prompt differs; so does one of which a bit was turned."""
    writer, reader = workers
    computed = writer.compute(prompt(100))
    assert writer.peer is not None
    keys = writer._keys(prompt(100))
    page = writer.model.pages[2]  # type: ignore[attr-defined]
    page.reshape(-1).view(np.uint32)[300] ^= 1 << 22
    assert writer.peer.delete(keys[2:3])[0]
    assert writer.peer.put_from(keys[2:3], writer._slices[2:3])[0]

    restored = reader.restore(prompt(100))

    assert restored.hits == 6  # memkv's part was done: it gave what was put
    way = outcome(computed, restored)
    assert not way.identical
    assert not ttft_report.right(way, 0.0)
    assert "LOGITS DIFFER" in ttft_report.lines([result(way)], 0.0)[0]
    assert result(way).errors(0.0) == 1


def test_kv_of_another_prompt_is_noticed_even_with_a_tolerance(workers: list[Worker]) -> None:
    writer, reader = workers
    computed = writer.compute(prompt(100))
    reader.compute(prompt(100, seed=1))
    way = outcome(computed, reader.restore(prompt(100, seed=1)))
    assert not ttft_report.right(way, 1e-3)


def test_blocks_that_are_missing_are_counted_and_computed(workers: list[Worker]) -> None:
    writer, reader = workers
    computed = writer.compute(prompt(100))
    assert writer.peer is not None
    writer.peer.delete(writer._keys(prompt(100))[1:2])

    restored = reader.restore(prompt(100))

    assert (restored.hits, restored.tokens) == (1, 16)
    way = outcome(computed, restored)
    assert way.missed == 5
    assert result(way).errors(0.0) >= 5
    np.testing.assert_allclose(restored.logits, computed.logits, rtol=1e-4, atol=1e-5)


def test_nothing_restored_is_an_error(workers: list[Worker]) -> None:
    writer, reader = workers
    computed = writer.compute(prompt(100))
    way = outcome(computed, reader.restore(prompt(100, seed=2)))
    assert result(way).errors(0.0) > 0
    assert ttft_report.lines([result(way)], 0.0)[0].endswith("nothing was restored from memkv's memory")


def test_other_weights_or_blocks_cannot_hit(start_node: StartNode, fabric_name: str) -> None:
    address = address_of(start_node(memory=64 << 20))
    jobs = [
        job(fabric_name),
        job(fabric_name, seed=2),
        job(fabric_name, block=32),
        job(fabric_name, salt="else"),
        job(fabric_name, shape=replace(SMALL, rope_theta=2.0)),
    ]
    held = []
    for each in jobs:
        worker = Worker(each)
        worker.open([address])
        held.append(worker.restore(prompt(100)).hits)
        if not held[1:]:
            worker.compute(prompt(100))
        worker.close()
    assert held == [0] * len(jobs)


def test_a_nan_is_never_right() -> None:
    due = np.zeros(4, np.float32)
    found = np.array([0, np.nan, 0, 0], np.float32)
    way = outcome(Computed(1.0, due), Restored(1.0, 0, 0, 0, found, 16, 1, 1))
    assert np.isnan(way.worst)
    assert not ttft_report.right(way, 1e9)
    ttft_report.compare(way, Computed(1.0, due), Restored(1.0, 0, 0, 0, due, 16, 1, 1))
    assert not ttft_report.right(way, 1e9)  # nor does a later one make it good


def test_a_busy_machine_is_told() -> None:
    found = ttft_report.Result(100)
    found.recompute.seconds = [2.0, 2.0]
    found.cpu_seconds = [1.9, 1.9]
    assert ttft_report.busy([found]) == []
    found.cpu_seconds = [0.5, 0.5]
    assert "25%" in ttft_report.busy([found])[0]


def result(way: ttft_report.Way) -> ttft_report.Result:
    out = ttft_report.Result(100, ways={"memory": way})
    out.recompute.seconds.append(1.0)
    return out


# --- the command ---


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memkv.cli.bench", "ttft", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command_as_json(fabric_name: str) -> None:
    done = bench(
        "--fabric", fabric_name, "--tokens", "40,100", "--repeat", "2", "--backend", "numpy", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)

    assert set(found) == {"heading", "model", "flops_per_second", "rows"}
    tiny = SHAPES["tiny"]
    for name in ("name", "layers", "kv_heads", "head_dim", "hidden", "intermediate", "heads", "vocab"):
        assert found["model"][name] == getattr(tiny, name)
    assert found["model"]["dtype_bytes"] == 4
    assert found["flops_per_second"] > 0
    assert found["heading"]["fabric"] == fabric_name
    assert "threads: 1," in found["heading"]["backend"]
    assert [row["tokens"] for row in found["rows"]] == [40, 100]
    for row, hit in zip(found["rows"], (32, 96), strict=True):
        assert (row["hit_tokens"], row["blocks"]) == (hit, hit // 16)
        assert row["bytes"] == tiny.kv_bytes(hit, 4)
        assert row["recompute_seconds"]["p50"] > 0
        assert row["memory_seconds"]["p50"] > 0
        assert row["flash_seconds"] is None
        assert row["identical"] is True
        assert row["same_token"] is True
        assert (row["max_abs_diff"], row["errors"]) == (0, 0)
        assert [note for note in row["notes"] if "BUSY" not in note] == []


def test_the_command_from_flash_ends_with_its_lines(tmp_path: Path) -> None:
    flash = tmp_path / "flash"
    done = bench("--tokens", "40,100", "--repeat", "2", "--layers", "1", "--flash", str(flash))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not flash.exists()
    last = done.stdout.splitlines()[-4:]
    for line, tokens, where in zip(last, (40, 40, 100, 100), ("", " from flash") * 2, strict=True):
        assert line.startswith(f"prefill {tokens} tokens: recompute ")
        assert f"memkv{where} " in line
        assert line.endswith("logits identical")
    assert "ONLY these of 2" in done.stdout


def test_existing_nodes_are_used(start_node: StartNode, fabric_name: str) -> None:
    node = start_node(memory=64 << 20)
    done = bench("--nodes", address_of(node), "--fabric", fabric_name, "--tokens", "40", "--repeat", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("logits identical")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--tokens", "16"], "no full block of 16"),
        (["--tokens", "x"], "--tokens"),
        (["--chunk", "24"], "--chunk"),
        (["--model", "gpt"], "--model"),
        (["--layers", "4"], "--layers"),
        (["--nodes", "127.0.0.1:1", "--flash", "/tmp/f"], "--flash"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(args: list[str], why: str) -> None:
    done = bench(*args)
    assert done.returncode != 0
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
