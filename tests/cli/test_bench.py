"""memkv-bench: what it prints, what it counts, and that it notices a wrong byte."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from memkv.cli import fio, lanes, pattern, perftest, redis, trace
from memkv.cli.bench import main
from memkv.cli.compare import Contestant, contest, median_ratio
from memkv.cli.report import Steps, percentiles
from memkv.cli.sample import Sample
from memkv.keys import KeySpace, keys_from_ids
from memkv.rdma.errors import LocalError

TINY = ["--seconds", "0.02", "--rounds", "2", "--working-set", "1m", "--sizes", "4k,64k", "--batch", "8"]
SPACE = KeySpace(model="m", dtype="d", layout="l", block_tokens=512)


def bench(*args: str) -> dict[str, Any]:
    """Runs a command with --json; its object, after checking that it ended well and printed nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "memkv.cli.bench", *args, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    result: dict[str, Any] = json.loads(lines[0])
    assert set(result) == {"heading", "rows"}
    assert {"cpu", "cores", "kernel", "python", "memkv", "fabric", "reason", "clock"} <= set(
        result["heading"]
    )
    for row in result["rows"]:
        assert {
            "what",
            "size",
            "batch",
            "gbps",
            "p50_us",
            "p99_us",
            "hits",
            "misses",
            "errors",
            "ratio",
        } <= set(row)
        assert row["errors"] == 0, row
    return result


def rows(result: dict[str, Any], what: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["what"] == what]


# --- commands ---


def test_limit_has_every_contestant_at_every_size(fabric_name: str) -> None:
    result = bench("limit", "--fabric", fabric_name, *TINY)

    bare = "bare" if fabric_name == "verbs" else "bare sockets"
    for what in (bare, "get", "get cold", "get checksum", "put"):
        assert [row["size"] for row in rows(result, what)] == [4096, 65536]
    for what in ("get", "get cold", "get checksum", "put"):
        for row in rows(result, what):
            assert row["hits"] > 0
            assert row["misses"] == 0
            assert row["ratio"] > 0
            assert row["limit_gbps"] > 0
            assert row["p50_us"] <= row["p99_us"]
    assert result["heading"]["fabric"] == fabric_name
    if fabric_name == "tcp":
        (first, *_) = rows(result, "redis GET, pipelined")
        assert (first["gbps"] is None) == bool(redis.available())
        assert first.get("note", "") == redis.available()
        if not redis.available():
            assert all(row["gbps"] > 0 for row in rows(result, "redis GET"))
            assert all(row["redis_ratio"] > 0 for row in rows(result, "get"))
    if fabric_name == "verbs" and not perftest.available("ib_read_bw"):
        assert all(row["gbps"] > 0 for row in rows(result, "ib_read_bw"))
        assert all(row["perftest_ratio"] > 0 for row in rows(result, "get"))


def test_get_with_threads_depth_and_processes(fabric_name: str) -> None:
    more = ["--threads", "2", "--depth", "2", "--processes", "2", "--checksum"]
    result = bench("get", "--fabric", fabric_name, *TINY, *more)

    assert [row["size"] for row in rows(result, "get")] == [4096, 65536]
    assert all(row["hits"] > 0 and row["misses"] == 0 for row in rows(result, "get"))


def test_put_and_mixed_read_back_what_they_put(fabric_name: str) -> None:
    put = bench("put", "--fabric", fabric_name, *TINY)
    mixed = bench("mixed", "--fabric", fabric_name, "--put-share", "0.5", *TINY)

    assert all(row["hits"] > 0 for row in rows(put, "put"))
    for what in ("mixed get", "mixed put"):
        assert all(row["hits"] > 0 and row["misses"] == 0 for row in rows(mixed, what))


def test_latency_tells_c_from_python(fabric_name: str) -> None:
    result = bench(
        "latency", "--fabric", fabric_name, "--calls", "20", "--rounds", "2", "--cpu-seconds", "0.02"
    )

    for what in ("get cached", "get cold"):
        (row,) = rows(result, what)
        assert 0 < row["p50_us"] < row["python_p50_us"]
        assert (row["hits"], row["misses"]) == (40, 0)  # back to back and apart
        assert row["ratio"] > 0
    for n in (1, 64, 1024):
        (row,) = rows(result, f"python adds to {n}")
        assert row["batch"] == n
        assert row["p50_us"] > 0
    for n in (1, 16, 64, 256, 1024):
        (row,) = rows(result, f"cpu of a get of {n}")
        assert (row["batch"], row["misses"]) == (n, 0)
        assert row["hits"] >= n
        assert row["user_us_a_block"] + row["kernel_us_a_block"] > 0


def test_replay_finds_what_the_trace_implies(fabric_name: str, tmp_path: Path) -> None:
    requests = trace.generate(40, seed=7)
    trace.write(tmp_path / "trace.jsonl", requests)
    due = trace.summarise(requests[:30])

    result = bench(
        *("replay", "--fabric", fabric_name, "--trace", str(tmp_path / "trace.jsonl"), "--requests", "30"),
        *("--block-bytes", "4k", "--peers", "3"),
    )

    (totals,) = rows(result, "replay")
    assert totals["requests"] == 30
    assert (totals["references"], totals["distinct"]) == (due.references, due.distinct)
    assert totals["hits"] == totals["expected_hits"] == due.hits
    assert totals["prefill_tokens_saved"] == due.saved_tokens
    assert totals["bytes_got"] == due.hits * 4096
    assert totals["bytes_put"] == due.distinct * 4096
    assert totals["mismatches"] == 0
    (again,) = rows(result, "get everything")
    assert again["hits"] >= due.distinct
    assert again["misses"] == 0
    (node,) = rows(result, "node, get everything")
    assert node["cpu_s"] >= 0


def test_replay_spreads_over_nodes() -> None:
    result = bench(
        "replay", "--fabric", "tcp", "--requests", "20", "--block-bytes", "4k", "--nodes-count", "2"
    )

    (totals,) = rows(result, "replay")
    assert result["heading"]["nodes"] == 2
    assert totals["hits"] == totals["expected_hits"]


# --- flash ---

SMALL = ["--memory", "16m", "--seconds", "0.1", "--rounds", "1", "--batch", "4", "--put-bytes", "8m"]


def test_flash_has_every_contestant_and_leaves_nothing(fabric_name: str, tmp_path: Path) -> None:
    args = ["--fabric", fabric_name, "--flash", str(tmp_path / "f"), "--sizes", "64k,256k", *SMALL]
    result = bench("flash", *args)

    for what in ("stage", "staged get", "get from memory", "put to flash", "put, written behind"):
        found = rows(result, what)
        assert [row["size"] for row in found] == [65536, 262144]
        for row in found:
            assert row["hits"] > 0
            assert row["misses"] == 0
            assert row["gbps"] > 0
            assert (row["ratio"] is None) == bool(fio.available())
    for what in ("fio randread", "fio write"):
        assert all(row.get("note", "") == fio.available() for row in rows(result, what))
    assert {"flash", "flash engine", "arena pages", "grace", "fio"} <= set(result["heading"])
    assert not list(tmp_path.iterdir())


def test_a_restarted_node_has_every_block_again(tmp_path: Path) -> None:
    args = ["--fabric", "tcp", "--flash", str(tmp_path / "f"), "--size", "64k", "--blocks", "300"]
    result = bench("restart", *args, "--rounds", "1")

    for what in ("snapshot", "scan"):
        (row,) = rows(result, what)
        assert (row["blocks"], row["hits"], row["misses"]) == (300, 300, 0)
        assert 0 < row["serves_s"] < row["first_s"] <= row["found_s"]
    (row,) = rows(result, "empty")
    assert row["serves_s"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["flash", "--flash", "{there}"], "--force"),
        (["flash", "--flash", "{new}", "--memory", "16m", "--working-set", "16m"], "--working-set"),
        (["flash", "--flash", "{new}", "--memory", "16m", "--batch", "64"], "--batch"),
        (["flash", "--flash", "{new}:64m", "--memory", "128m"], "too small"),
        (["flash", "--flash", "{new}", "--nodes", "h:1"], "--nodes"),
        (["restart", "--flash", "{there}"], "--force"),
        (["restart", "--flash", "{new}", "--nodes", "h:1"], "--nodes"),
        (["replay", "--flash", "{new}", "--nodes", "h:1"], "--nodes"),
    ],
)
def test_flash_is_not_taken_where_it_cannot_be(args: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"something")
    names = {"there": str(tmp_path / "there"), "new": str(tmp_path / "new")}
    done = CliRunner().invoke(main, [arg.format(**names) for arg in args])

    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_bytes() == b"something"


def test_replay_tells_the_tier_of_every_hit(tmp_path: Path) -> None:
    args = ["--fabric", "tcp", "--requests", "100", "--block-bytes", "64k", "--memory", "8m"]
    result = bench("replay", *args, "--flash", str(tmp_path / "f"))

    (totals,) = rows(result, "replay")
    assert totals["distinct"] * 65536 > 16 << 20, "too little to leave the memory"
    assert totals["hits"] == totals["expected_hits"]
    assert totals["hits_memory"] + totals["hits_flash"] == totals["hits"]
    assert totals["bytes_memory"] + totals["bytes_flash"] == totals["bytes_got"]
    (again,) = rows(result, "get everything")
    assert again["misses"] == 0
    assert again["hits_flash"] > 0
    assert not list(tmp_path.iterdir())


def test_fio_output_is_understood() -> None:
    text = 'a warning\n{"jobs": [{"read": {"io_bytes": 4096, "runtime": 2}}]}'

    assert fio.parse(text, "read") == fio.Outcome(4096, 2_000_000)
    assert fio.parse(text, "write").note
    assert fio.parse("nothing", "read").note


def test_a_table_names_the_machine_and_the_rows() -> None:
    done = CliRunner().invoke(main, ["get", "--fabric", "tcp", *TINY])

    assert done.exit_code == 0, done.output
    for word in ("cpu", "fabric", "GB/s", "p99.9", "bare sockets", "4K", "64K", "tcp was asked for"):
        assert word in done.stdout


# --- wrong bytes ---


@pytest.mark.parametrize("command", ["get", "put", "mixed"])
def test_a_wrong_byte_is_an_error(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pattern.fill

    def fill(out: Any, keys: Any, common: Any) -> None:
        right(out, keys, common)
        out[-1, -1] ^= 1

    monkeypatch.setattr(lanes.pattern, "fill", fill)
    share = ["--put-share", "0.5"] if command == "mixed" else []
    done = CliRunner().invoke(main, [command, "--fabric", "tcp", *share, *TINY])

    assert done.exit_code == 1
    assert "wrong bytes" in done.stdout


def test_without_verification_a_wrong_byte_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes.pattern, "fill", lambda out, keys, common: None)

    done = CliRunner().invoke(main, ["get", "--fabric", "tcp", "--no-verify", *TINY])

    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("size", [1, 7, 8, 4096, 4099])
def test_any_byte_that_differs_shows(size: int) -> None:
    keys = keys_from_ids(range(3), space=SPACE)
    block = np.zeros((3, size), np.uint8)
    pattern.fill(block, keys, pattern.ramp(size))
    assert not pattern.wrong(block, keys, pattern.ramp(size)).any()

    for at in {0, size // 2, size - 1}:
        block[1, at] ^= 0x40
        assert pattern.wrong(block, keys, pattern.ramp(size)).tolist() == [False, True, False]
        block[1, at] ^= 0x40


def test_blocks_in_each_others_places_show() -> None:
    keys = keys_from_ids(range(2), space=SPACE)
    block = np.zeros((2, 64), np.uint8)
    pattern.fill(block, keys, pattern.ramp(64))

    assert pattern.wrong(block[::-1].copy(), keys, pattern.ramp(64)).all()


# --- errors ---


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["get", "--nodes", "127.0.0.1:1"], 1, "cannot be reached"),
        (["get", "--sizes", "many"], 2, "is not a size"),
        (["get", "--fabric", "tcp", "--secret-file", "/nowhere"], 2, "/nowhere"),
        (["replay", "--trace", "/nowhere"], 2, "cannot be read"),
        (["get", "--fabric", "tcp", "--sizes", "1m", "--memory", "16m"], 2, "--memory"),
    ],
)
def test_an_error_is_one_line(args: list[str], code: int, says: str) -> None:
    done = CliRunner().invoke(main, args)

    assert done.exit_code == code
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


def test_an_interrupted_benchmark_leaves_no_process_behind() -> None:
    args = ["replay", "--fabric", "tcp", "--requests", "100000", "--block-bytes", "4k", "--memory", "64m"]
    process = subprocess.Popen(
        [sys.executable, "-m", "memkv.cli.bench", *args],
        stderr=subprocess.PIPE,
        # a shell's background jobs ignore SIGINT, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + 30
    while len(children := _children(process.pid)) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert b"Traceback" not in stderr
    # multiprocessing's resource tracker ends by itself, once it sees that its parent is gone.
    until = time.monotonic() + 10
    while left := [pid for pid in children if _runs(pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- traces ---


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    requests = trace.generate(5)
    trace.write(tmp_path / "t", requests)

    assert trace.read(tmp_path / "t") == requests
    assert trace.read(tmp_path / "t", 2) == requests[:2]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"timestamp": 0}',
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [-1]}',
    ],
)
def test_a_line_that_is_no_request_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("\n" + line + "\n")

    with pytest.raises(LocalError, match="t:2"):
        trace.read(tmp_path / "t")


def test_hits_are_leading_blocks_seen_before() -> None:
    requests = [trace.Request(0, 1500, 1, (0, 1, 2)), trace.Request(1, 1800, 1, (0, 1, 3, 2))]

    assert trace.summarise(requests) == trace.Summary(
        requests=2, references=7, distinct=4, hits=2, saved_tokens=1024, longest=4
    )


def test_conversations_grow_and_share_their_system_prompts() -> None:
    requests = trace.generate(200, seed=3)

    assert requests == trace.generate(200, seed=3)
    assert requests != trace.generate(200, seed=4)
    assert all(len(r.ids) == -(-r.input_length // trace.BLOCK_TOKENS) for r in requests)
    seen: list[int] = list(dict.fromkeys(id for r in requests for id in r.ids))
    assert seen == sorted(seen), "new ids are handed out in order of first appearance"
    assert sum(r.ids[0] == 0 for r in requests) > 20
    assert 0.5 < trace.summarise(requests).hits / trace.summarise(requests).references < 0.95


# --- figures ---


def test_ratios_are_medians_of_rounds() -> None:
    limit = iter([100, 200, 400])
    mine = iter([50, 150, 400])

    def turn(rates: Any) -> Any:
        return lambda: [Sample(nbytes=next(rates), ns=1, times_us=[1.0])]

    field = [Contestant(("limit",), turn(limit), role="limit"), Contestant(("get",), turn(mine), batch=1)]
    result = {row.what: row for row in contest(field, size=1, rounds=3, steps=Steps())}

    assert result["get"].ratio == 0.75
    assert (result["get"].gbps, result["get"].limit_gbps) == (150, 200)


def test_a_tool_that_is_missing_leaves_its_reason() -> None:
    field = [Contestant(("tool",), lambda: "not installed", role="perftest")]
    (row,) = contest(field, size=1, rounds=2, steps=Steps())

    assert (row.note, row.gbps) == ("not installed", None)


def test_percentiles_of_nothing_are_nothing() -> None:
    assert set(percentiles(None).values()) == {None}
    assert percentiles(np.array([5.0]))["p999_us"] == 5.0
    assert median_ratio([], []) is None


def test_perftest_output_is_understood() -> None:
    bandwidth = " #bytes  #iterations  BW peak[Gb/sec]\n 65536      2000     5.35   3.75   0.007152\n"
    latency = " 4096    1000   47.90   6654.10   52.08   103.93   437.86   3578.68   6654.10 \n"

    assert perftest.parse(bandwidth, 65536) == [65536, 5.35, 3.75, 0.007152]
    assert (perftest.parse(latency, 4096) or [])[3] == 52.08
    assert perftest.parse(bandwidth, 4096) is None
