"""Host memory: which pages it has, why, and that the advice for huge ones is given and followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from memkv.rdma import memory as module
from memkv.rdma.errors import DeviceError, LocalError
from memkv.rdma.memory import HUGE, HostMemory, given_of, transparent_refused, try_transparent

MIB = 1 << 20


def flags_at(address: int) -> set[str]:
    """VmFlags of the mapping that holds an address."""
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = line.split(" ", 1)[0].split("-")
        if len(span) == 2 and not line[0].isupper():
            mine = int(span[0], 16) <= address < int(span[1], 16)
        elif mine and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(hex(address))


def without_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_meminfo", lambda name: 0)


@pytest.mark.parametrize("nbytes", [1, 4096, 5000, HUGE, HUGE + 1, 5 * MIB])
@pytest.mark.parametrize("huge", [None, False])
def test_it_is_zeroed_and_as_long_as_it_says(nbytes: int, huge: bool | None) -> None:
    memory = HostMemory(nbytes, huge)
    array = memory.array
    assert len(array) == memory.nbytes >= nbytes
    assert array.ctypes.data == memory.address
    assert memory.address % 4096 == 0
    assert not array.any()
    array[:] = 7
    assert (memory.array == 7).all()
    del array
    memory.close()
    memory.close()


def test_huge_pages_are_advised_where_they_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    if why := transparent_refused():
        pytest.skip(why)
    without_explicit(monkeypatch)
    memory = HostMemory(8 * MIB)
    assert memory.address % HUGE == 0
    assert "hg" in flags_at(memory.address)
    assert "hg" in flags_at(memory.address + memory.nbytes - 1)
    assert memory.pages == "4 KiB, transparent huge pages advised"
    assert "0 huge pages are free, 4 would be needed" in memory.reason
    memory.array[:] = 1
    assert given_of(memory.address, memory.nbytes) <= memory.nbytes
    memory.close()
    given, of = try_transparent()
    assert 0 <= given <= of


def test_normal_pages_if_that_is_what_was_asked_for() -> None:
    memory = HostMemory(8 * MIB, False)
    assert (memory.pages, memory.reason) == ("4 KiB", "normal pages were asked for")
    assert "hg" not in flags_at(memory.address)
    memory.close()


def test_little_memory_needs_no_huge_page() -> None:
    memory = HostMemory(MIB)
    assert (memory.pages, memory.reason) == ("4 KiB", "less than a huge page")
    memory.close()


def test_a_kernel_that_gives_none_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    without_explicit(monkeypatch)
    monkeypatch.setattr(module, "transparent_refused", lambda: "the kernel says never")
    memory = HostMemory(8 * MIB)
    assert memory.pages == "4 KiB"
    assert memory.reason.startswith("0 huge pages are free")
    assert memory.reason.endswith("; no transparent ones: the kernel says never")
    memory.close()


@pytest.mark.parametrize(
    ("mode", "status", "why"),
    [
        ("always [madvise] never", "", ""),
        ("[always] madvise never", "Name:\tx\nTHP_enabled:\t1\n", ""),
        ("always madvise [never]", "", "says never"),
        ("", "", "this kernel has none"),
        ("[always] madvise never", "Name:\tx\nTHP_enabled:\t0\n", "disabled for this process"),
    ],
)
def test_why_none_are_given(mode: str, status: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_read", lambda path: mode if path == module.THP else status)
    got = transparent_refused()
    assert why in got
    assert bool(got) == bool(why)


def test_huge_pages_that_were_demanded_and_are_not_there_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_explicit(monkeypatch)
    with pytest.raises(DeviceError, match=r"vm\.nr_hugepages"):
        HostMemory(8 * MIB, True)
    with pytest.raises(LocalError):
        HostMemory(0)
