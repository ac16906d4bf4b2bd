"""``memkv-bench gpu`` without a GPU: what it says, and its staging half over a stand-in."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import memkv.gpu
from memkv.cli import bench_options, gpu_bench, gpu_rig, lanes, places, report
from memkv.cli.bench import main
from memkv.cli.gpu_bench import Settings
from memkv.cli.gpu_staging import Pipeline
from memkv.gpudirect import driver
from memkv.gpudirect.copier_host import HostDevice
from memkv.rdma.errors import DeviceError, LocalError
from memkv.rdma.memory import HostMemory

from ..gpudirect import standin

NO_GPU = driver.available()
MIB = 1 << 20


class HostRig:
    """A rig whose GPU is host memory."""

    index = 0

    def __init__(self) -> None:
        self.device = HostDevice()
        self._memory: list[Any] = []

    def alloc(self, nbytes: int) -> int:
        self._memory.append(np.zeros(nbytes, np.uint8))
        return int(self._memory[-1].ctypes.data)

    def fill(self, address: int, data: np.ndarray) -> None:
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def read(self, address: int, nbytes: int) -> np.ndarray:
        return np.frombuffer(ctypes.string_at(address, nbytes), np.uint8)

    def copies(self, address: int, pinned: HostMemory, size: int, count: int, into: bool) -> int:
        start = time.perf_counter_ns()
        for i in range(count):
            pair = (address + i * size, pinned.address + i % (pinned.nbytes // size) * size)
            ctypes.memmove(*(pair if into else pair[::-1]), size)
        return time.perf_counter_ns() - start

    def heading(self) -> dict[str, Any]:
        return {"gpu": "a stand-in"}

    def close(self) -> None:
        pass


@pytest.fixture
def rig() -> Iterator[HostRig]:
    rig = HostRig()
    yield rig
    assert not rig.device.pinned, "pinned memory was left"


def settings(**more: Any) -> Settings:
    given = {"sizes": (MIB, 3 * MIB), "working_set": 12 * MIB, "seconds": 0.05, "rounds": 2} | more
    return Settings(**given)


def no_kernels() -> Any:
    raise LocalError("no CuPy here", "pip install cupy-cuda12x")


def test_staging_is_measured_beside_copies_both_ways(
    rig: HostRig, capsys: pytest.CaptureFixture[str]
) -> None:
    head, rows, notes = gpu_bench.measure(rig, settings(), no_kernels)
    report.print_result(head, rows, as_json=True, notes=notes)
    out = json.loads(capsys.readouterr().out)

    assert out["heading"]["gpu"] == "a stand-in"
    assert {"cpu", "memkv", "cupy"} <= set(out["heading"])
    assert [(r["what"], r["size"]) for r in out["rows"]] == [
        (f"{what} {way} the GPU", size)
        for size in (MIB, 3 * MIB)
        for way in ("into", "out of")
        for what in ("pinned copies", "staging")
    ] + [("kernels", None)]
    assert all(r["errors"] == 0 for r in out["rows"])
    for row in out["rows"][:-1]:
        assert row["gbps"] > 0
        assert row["ratio"] > 0
        assert row["limit_gbps"] > 0
    assert "no CuPy here" in out["rows"][-1]["note"]


@pytest.mark.parametrize("into", [True, False])
def test_a_wrong_byte_is_seen(rig: HostRig, into: bool) -> None:
    memory = rig.alloc(8 * MIB)
    pipeline = Pipeline(rig, memory, MIB, 8, into)
    whole = rig.read if into else rig.fill
    try:
        assert pipeline.turn(0.001).hits % 8 == 0
        assert pipeline.wrong() == 0

        if into:
            rig.read = lambda a, n: whole(a, n) ^ (np.arange(n) == 5 * MIB)  # type: ignore[method-assign]
        else:
            rig.fill = lambda a, d: whole(a, d ^ (np.arange(d.size) == 5 * MIB).reshape(d.shape))  # type: ignore[method-assign]
        assert pipeline.wrong() == 1
    finally:
        pipeline.close()


def test_a_copy_that_fails_is_an_error_with_the_drivers_word(rig: HostRig) -> None:
    pipeline = Pipeline(rig, rig.alloc(4 * MIB), MIB, 4, True)
    rig.device.into.refuse(1, 719)
    try:
        with pytest.raises(DeviceError, match="719"):
            pipeline.turn(0.001)
    finally:
        rig.device.into.refuse(0, 0)
        pipeline.close()


def test_wrong_blocks_are_errors_of_the_command(rig: HostRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "wrong", lambda self: 2)

    _, rows, _ = gpu_bench.measure(rig, settings(sizes=(MIB,)), no_kernels)

    staged = [row for row in rows if row.what.startswith("staging")]
    assert [row.errors for row in staged] == [2, 2]
    assert "wrong bytes" in staged[0].note


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LocalError, match="16M does not fit"):
        gpu_bench.run(settings(sizes=(16 * MIB,)))


@pytest.mark.parametrize("name", ["gpu0", "cuda", "cuda:x", "cuda:-1"])
def test_a_gpu_is_named_as_cuda_counts(name: str) -> None:
    with pytest.raises(LocalError, match="cuda:0, as CUDA counts"):
        gpu_rig.check(name)


@pytest.mark.skipif(NO_GPU is None, reason="there is a GPU here")
@pytest.mark.parametrize("flags", [[], ["--json"], ["--gpu", "cuda:1"]])
def test_without_a_gpu_it_is_one_line(flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memkv.cli.bench", "gpu", *flags], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 1
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("memkv-bench: error: no cuda:")
    assert "libcuda.so.1" in line or "GPU" in line


def test_the_link_is_shown_as_the_kernel_has_it(tmp_path: Path) -> None:
    device = tmp_path / "sys/bus/pci/devices/0000:17:00.0"
    device.mkdir(parents=True)
    for name, text in {"current_link_speed": "32.0 GT/s PCIe", "current_link_width": "16"}.items():
        (device / name).write_text(text)
        (device / name.replace("current", "max")).write_text(text)

    assert gpu_rig.pcie("0000:17:00.0", tmp_path) == (
        "0000:17:00.0: 32.0 GT/s PCIe x16 (at most 32.0 GT/s PCIe x16)"
    )
    assert "does not show" in gpu_rig.pcie("0000:18:00.0", tmp_path)


# --- through the driver: libcuda's stand-in ---


@pytest.fixture
def libcuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library with libcuda's names, whose GPUs are memory of this host, in its place."""
    path = standin.build()
    monkeypatch.setattr(driver, "LIBRARY", path)
    made = standin.Standin(path)
    yield
    made.close()


def test_the_rig_copies_through_the_driver(libcuda: None) -> None:
    with gpu_rig.GpuRig("cuda:1") as rig:
        memory, pinned = rig.alloc(4 * MIB), HostMemory(2 * MIB)
        pinned.array[:] = np.arange(2 * MIB, dtype=np.uint32).astype(np.uint8)[: 2 * MIB]
        assert rig.copies(memory, pinned, MIB, 4, True) > 0
        assert (rig.read(memory, 4 * MIB) == np.tile(pinned.array, 2)).all()

        rig.fill(memory + 3 * MIB, np.full(MIB, 9, np.uint8))
        rig.copies(memory, pinned, MIB, 4, False)
        assert (pinned.array[MIB:] == 9).all()
        assert "Stand-in 1" in rig.heading()["gpu"]

    with pytest.raises(DeviceError, match="no cuda:2 here: 2 GPUs are visible"):
        gpu_rig.GpuRig("cuda:2")


def test_the_command_goes_through_the_driver(libcuda: None) -> None:
    head, rows, _ = gpu_bench.run(settings(sizes=(MIB,)))

    assert "Stand-in 0" in head["gpu"]
    assert [row.what for row in rows[:4]] == [
        "pinned copies into the GPU",
        "staging into the GPU",
        "pinned copies out of the GPU",
        "staging out of the GPU",
    ]
    assert all(row.gbps and not row.errors for row in rows[:4])
    assert rows[4].what == "kernels"  # no CuPy, or one that finds no GPU behind these names
    assert "CuPy" in rows[4].note


def test_a_load_goes_through_the_driver(libcuda: None) -> None:
    code, result = bench("get", *LOAD)

    assert code == 0, result
    assert "Stand-in 0" in result["heading"]["gpu"]
    assert result["heading"]["get into"].startswith("staged (the tcp fabric")
    assert next(row for row in result["rows"] if row["what"] == "get")["hits"] > 0


# --- --memory cuda:0 ---


class HostGpuPlace(places.GpuPlace):
    """A place on the stand-in, which a peer is told by name."""

    @property
    def buffer(self) -> Any:
        return self.address, self.memory.nbytes, self.rig.device.name


@pytest.fixture
def on_stand_in(rig: HostRig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPU of loads is the stand-in; which places were asked for."""
    asked: list[str] = []

    def open_place(gpu: str, count: int, size: int) -> places.Place:
        asked.append(gpu)
        return HostGpuPlace(rig, count, size) if gpu else places.Place(count, size)

    monkeypatch.setattr(lanes, "open_place", open_place)
    monkeypatch.setattr(memkv.gpu, "open_device", lambda name: rig.device)
    return asked


TINY = ["--fabric", "tcp", "--memory", "cuda:0", "--rounds", "2", "--json"]
LOAD = [*TINY, "--seconds", "0.02", "--working-set", "1m", "--sizes", "64k", "--batch", "8"]


def bench(*args: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(main, args)
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("{") else {"said": done.output}


@pytest.mark.parametrize("command", ["get", "put", "mixed", "limit"])
def test_blocks_go_to_the_gpu_and_come_from_there(command: str, on_stand_in: list[str]) -> None:
    share = ("--put-share", "0.5") if command == "mixed" else ()  # or a short turn has no put
    code, result = bench(command, *LOAD, *share)

    assert code == 0, result
    assert on_stand_in == ["cuda:0"]
    assert result["heading"]["gpu"] == "a stand-in"
    assert result["heading"]["get into"].startswith("staged (")
    assert result["heading"]["put from"].startswith("staged (")
    ours = [row for row in result["rows"] if row["what"].split()[0] in ("get", "put", "mixed")]
    assert ours
    assert all(row["hits"] > 0 and not row["misses"] and not row["errors"] for row in ours)


def test_a_wrong_byte_on_the_gpu_is_seen(
    rig: HostRig, on_stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostRig, "read", lambda self, a, n: np.full(n, 7, np.uint8))

    code, result = bench("get", *LOAD)

    assert code == 1
    assert any("wrong bytes" in row.get("note", "") for row in result["rows"])


def test_latency_of_the_gpu_stands_beside_that_of_host_memory(on_stand_in: list[str]) -> None:
    code, result = bench("latency", *TINY, "--calls", "10", "--size", "4k")

    assert code == 0, result
    assert [row["what"] for row in result["rows"]] == [
        "get, host memory",
        "get, cuda:0",
        "put, host memory",
        "put, cuda:0",
    ]
    assert all((row["hits"], row["misses"], row["errors"]) == (10, 0, 0) for row in result["rows"])
    assert all(row["p50_us"] > 0 and row["ratio"] > 0 for row in result["rows"])


@pytest.mark.skipif(NO_GPU is None, reason="there is a GPU here")
def test_without_a_gpu_a_load_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memkv.cli.bench", "get", *LOAD], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("memkv-bench: error: no cuda:0 here: ")


@pytest.mark.parametrize(
    ("given", "arena", "gpu"),
    [
        ((), 0, ""),
        (("2g",), 2 << 30, ""),
        (("cuda:1",), 0, "cuda:1"),
        (("cuda:0", "64m"), 64 * MIB, "cuda:0"),
    ],
)
def test_memory_is_a_size_or_a_gpu_or_both(given: tuple[str, ...], arena: int, gpu: str) -> None:
    option = next(p for p in main.commands["get"].params if p.name == "memory")

    found = bench_options.memories(None, option, given)  # type: ignore[arg-type]

    assert (found.arena, found.gpu) == (arena, gpu)


@pytest.mark.parametrize("given", [("1g", "2g"), ("cuda:0", "cuda:1"), ("cuda",), ("cuda:x",), ("x",)])
def test_other_memory_is_refused(given: tuple[str, ...]) -> None:
    option = next(p for p in main.commands["get"].params if p.name == "memory")

    with pytest.raises(LocalError):
        bench_options.memories(None, option, given)  # type: ignore[arg-type]


def test_commands_on_the_host_have_no_gpu() -> None:
    done = CliRunner().invoke(main, ["replay", "--memory", "cuda:0"])

    assert done.exit_code == 2
    assert "this command has no --memory cuda:0" in done.output
