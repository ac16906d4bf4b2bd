"""The registration ladder: recorded answers of machines, and what is decided by them."""

from __future__ import annotations

import errno
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from memkv.gpudirect.ladder import (
    FIRST_RETRY,
    LAST_RETRY,
    WORTH,
    Answers,
    Decision,
    Ladder,
    Read,
    Step,
    Tried,
    decide,
)
from memkv.gpudirect.probe import peermem

RECORDED = Path(__file__).with_name("answers.json")
MACHINES: dict[str, Answers] = msgspec.json.decode(RECORDED.read_bytes(), type=dict[str, Answers])
GOOD = MACHINES["H100, ConnectX-7, open modules"]


@pytest.mark.parametrize(
    ("machine", "get", "put", "words"),
    [
        ("laptop without a GPU", "staged", "staged", "no CUDA: libcuda.so.1 is not installed"),
        ("GPU without an RDMA device", "staged", "staged", "the tcp fabric reaches host memory only"),
        ("soft-RoCE", "staged", "staged", "rxe0 (rxe) takes none: the driver takes no dma-buf regions"),
        ("H100, ConnectX-7, open modules", "dma-buf", "dma-buf", "arrive whole, 46.10 GB/s"),
        ("H100, closed modules, peermem", "peermem", "peermem", "CUDA 12.2 exports none here"),
        ("driver of 2021", "staged", "staged", "the module is loadable: modprobe nvidia_peermem"),
        ("consumer GPU", "staged", "staged", "the module is absent"),
        ("reads out of the BAR crawl", "dma-buf", "staged", "slow, 1.40 GB/s (host memory: 24.80)"),
        ("reads out of the BAR never end", "dma-buf", "staged", "out of it failed: Connection timed out"),
        ("BAR1 too small", "peermem", "peermem", "registering failed"),
        ("wrong bytes", "staged", "staged", "bytes differ"),
        ("one rail of two takes no dma-buf", "staged", "staged", "bnxt_re0 (bnxt_re) takes none"),
        ("writes that kernels cannot see", "staged", "dma-buf", "cannot be made visible"),
        ("expandable segments", "staged", "staged", "expandable_segments"),
    ],
)
def test_machines(machine: str, get: str, put: str, words: str) -> None:
    decision = decide(MACHINES[machine])
    assert (decision.get.name, decision.put.name) == (get, put)
    assert words in f"{decision.get.reason} | {decision.put.reason}"


def test_every_recorded_machine_is_tested_and_nothing_of_a_record_is_lost() -> None:
    listed = {case[0] for case in test_machines.pytestmark[0].args[1]}  # type: ignore[attr-defined]
    assert set(MACHINES) == listed
    for answers in MACHINES.values():
        assert msgspec.json.decode(msgspec.json.encode(answers), type=Answers) == answers


@pytest.mark.parametrize("machine", MACHINES)
def test_every_rung_that_is_taken_has_a_reason_that_is_a_line(machine: str) -> None:
    for rung in (decide(MACHINES[machine]).get, decide(MACHINES[machine]).put):
        assert rung.reason
        assert "\n" not in rung.reason
        assert len(rung.reason) < 400


def test_both_higher_rungs_are_named_with_what_spoke_against_them() -> None:
    reason = decide(MACHINES["driver of 2021"]).get.reason
    assert reason.startswith("dma-buf: ")
    assert "; peermem: " in reason


def test_registered_is_not_enough() -> None:
    registered = Tried(Step(True, 0, ""), Step(True, 0, ""))
    decision = decide(replace(GOOD, dma_buf=registered))
    assert (decision.get.name, decision.put.name) == ("staged", "staged")
    assert "a READ into it failed: not tried" in decision.get.reason


@pytest.mark.parametrize(("part", "name"), [(WORTH + 0.01, "dma-buf"), (WORTH - 0.01, "staged")])
def test_a_direct_way_must_be_worth_it(part: float, name: str) -> None:
    slow = replace(GOOD.dma_buf, put=Read(True, GOOD.host.gbps * part, ""))
    decision = decide(replace(GOOD, dma_buf=slow))
    assert (decision.get.name, decision.put.name) == ("dma-buf", name)


def test_errno_is_named() -> None:
    refused = Tried(Step(True, 0, ""), Step(False, errno.ENOMEM, "no room"))
    assert "registering failed: no room (ENOMEM)" in decide(replace(GOOD, dma_buf=refused)).get.reason


# --- over time ---


class Machine:
    def __init__(self, *answers: Answers) -> None:
        self.answers = list(answers)
        self.now = 1000.0
        self.ladder = Ladder(self.probe, lambda: self.now)

    def probe(self) -> Answers:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def after(self, seconds: float) -> Decision:
        self.now += seconds
        return self.ladder.decision()


def test_the_best_rung_is_not_probed_again() -> None:
    machine = Machine(GOOD)
    for _ in range(10):
        assert machine.after(1000).get.name == "dma-buf"
    assert machine.ladder.probes == 1


def test_a_lower_rung_is_probed_again_later_and_later() -> None:
    machine = Machine(MACHINES["soft-RoCE"])
    machine.after(0)
    probed = []
    for second in range(2000):
        before = machine.ladder.probes
        machine.after(1)
        if machine.ladder.probes > before:
            probed.append(second)
    gaps = [b - a for a, b in pairwise(probed)]
    assert gaps[:3] == [4, 8, 16]
    assert max(gaps) == LAST_RETRY
    assert len(probed) < 16


def test_a_module_that_is_loaded_later_is_found() -> None:
    closed = MACHINES["H100, closed modules, peermem"]
    machine = Machine(replace(closed, peermem="loadable", by_peermem=Tried()), closed)
    assert machine.after(0).get.name == "staged"
    assert machine.after(FIRST_RETRY / 2).get.name == "staged"
    assert machine.after(FIRST_RETRY).get.name == "peermem"


def test_a_rung_that_fails_in_use_is_left_at_once_for_that_direction_and_comes_back() -> None:
    machine = Machine(GOOD)
    machine.after(0)
    decision = machine.ladder.failed("dma-buf", "put", "vendor error 0x88")
    assert (decision.get.name, decision.put.name) == ("dma-buf", "staged")
    assert "dma-buf: failed in use: vendor error 0x88" in decision.put.reason
    assert machine.after(FIRST_RETRY / 2).put.name == "staged"
    assert machine.ladder.probes == 1
    assert machine.after(FIRST_RETRY).put.name == "dma-buf"
    assert machine.ladder.probes == 2


def test_one_that_goes_on_failing_is_tried_less_and_less_often() -> None:
    machine = Machine(GOOD)
    machine.after(0)
    tries = 0
    for _ in range(1000):
        if machine.after(1).put.name == "dma-buf":
            machine.ladder.failed("dma-buf", "put", "again")
            tries += 1
    assert tries < 12


def test_memory_that_cannot_be_registered_says_so_and_costs_no_probe() -> None:
    machine = Machine(GOOD)
    decision = machine.ladder.decision("managed memory moves between host and device")
    assert decision.get.reason == "managed memory moves between host and device"
    assert machine.ladder.decision().get.name == "dma-buf"
    assert machine.ladder.probes == 1


# --- the module ---


def test_peermem_is_loaded_loadable_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "6.1.0")
    assert peermem(tmp_path) == "absent"
    listed = tmp_path / "lib/modules/6.1.0/modules.dep"
    listed.parent.mkdir(parents=True)
    listed.write_text("kernel/drivers/net/dummy.ko.xz:\n")
    assert peermem(tmp_path) == "absent"
    listed.write_text("updates/dkms/nvidia-peermem.ko.xz: updates/dkms/nvidia.ko.xz\n")
    assert peermem(tmp_path) == "loadable"
    (tmp_path / "sys/module/nv_peer_mem").mkdir(parents=True)
    assert peermem(tmp_path) == "loaded"
