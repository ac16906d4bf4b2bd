"""The commands limit, get, put and mixed: which contestants meet, for every block size."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ..rdma.devices import Selection
from . import perftest, redis
from .compare import LIMIT, PERFTEST, REDIS, Contestant, contest
from .limits import Limit
from .report import Row, Steps, size_text
from .rig import LimitHolder, Options, Rig, heading, open_nodes, rail
from .sample import Sample

WHAT_IT_MEANS = (
    "GB/s: of the timed part, median over rounds; ratio: to the limit in the same round, median over rounds.",
    "limit: the bare loop over as large a working set. µs: of one batch. put: hits are blocks stored.",
)


def run(kind: str, options: Options, put_share: float = 0.1) -> tuple[dict[str, Any], list[Row], list[str]]:
    """Heading, rows and notes of one command."""
    rows: list[Row] = []
    notes = list(WHAT_IT_MEANS)
    head: dict[str, Any] = {}
    with Steps() as steps, LimitHolder(options) as holder:
        steps.now("starting")
        for size in options.sizes:
            with open_nodes(options, size) as nodes, Rig(nodes, options, size) as rig:
                lane = rig.load.lanes[0]
                head = head or heading(rig.peer, lane.memory) | lane.heading()
                limit = holder.open(rig.peer)
                steps.now(f"{size_text(size)}: calibrating the bare loop")
                head[f"limit {size_text(size)}"] = f"{limit.what}: {limit.calibrate(size)}"
                rig.prepare()
                field = _field(kind, rig, limit, put_share)
                with contextlib.ExitStack() as beside:
                    if kind == "limit" and rig.peer.fabric is not None and rig.peer.fabric.name == "tcp":
                        steps.now(f"{size_text(size)}: filling Redis")
                        field[1:1] = _redis(rig, beside)
                    rows += contest(field, size=size, rounds=options.rounds, steps=steps)
                rig.clean()
    if options.verify:
        notes.append(
            "Every byte of the last pass of each turn was compared with its key, outside of the timed part."
        )
    return head, rows, notes


def _field(kind: str, rig: Rig, limit: Limit, put_share: float) -> list[Contestant]:
    size, batch, seconds = rig.plan.size, rig.plan.batch, rig.options.slot_seconds
    field = [
        Contestant(
            (limit.what,), _bare(limit, size, seconds, rig.options.working_set), role=LIMIT, counts=False
        )
    ]
    device = rail(rig.peer)
    if device is not None and kind == "limit":
        run = _ib_read_bw(device, size, seconds, field[0])
        field.append(Contestant(("ib_read_bw",), run, role=PERFTEST, counts=False))

    def get(name: str, **kwargs: Any) -> Contestant:
        return Contestant((name,), lambda: rig.get(**kwargs), batch)

    if kind == "get":
        field.append(get("get"))
    if kind == "limit":
        field += [
            get("get", checksum=False),
            *([] if rig.plan.gpu else [get("get cold", cold=True, checksum=False)]),
            get("get checksum", checksum=True),
        ]
        field.append(Contestant(("put",), rig.put, batch))
    if kind == "put":
        field.append(Contestant(("put",), rig.put, batch))
    if kind == "mixed":
        field.append(Contestant(("mixed get", "mixed put"), lambda: rig.mixed(put_share), batch))
    return field


def _bare(limit: Limit, size: int, seconds: float, working_set: int) -> Any:
    """A turn of the bare loop: whole passes over the working set for about ``seconds``."""

    def run() -> Sequence[Sample]:
        sample = Sample()
        while sample.ns < seconds * 1e9:
            sample.add(Sample(nbytes=limit.moved(size, working_set), ns=limit.run(size, working_set)))
        return [sample]

    return run


def _redis(rig: Rig, beside: contextlib.ExitStack) -> list[Contestant]:
    """GETs from a Redis of our own, which ends with ``beside``; or the reason why there is none."""
    name, reason = ("redis GET, pipelined",), redis.available()
    if reason:
        return [Contestant(name, lambda: reason, role=REDIS, counts=False)]
    batch, seconds = rig.plan.batch, rig.options.slot_seconds
    server = beside.enter_context(redis.Redis(rig.plan))
    return [
        Contestant(name, lambda: [server.get(seconds, batch)], batch, role=REDIS),
        Contestant(("redis GET",), lambda: [server.get(seconds, 1)], 1),
    ]


def _ib_read_bw(device: Selection, size: int, seconds: float, bare: Contestant) -> Any:
    """A turn of ib_read_bw, as long as the bare loop's."""

    def run() -> Sequence[Sample] | str:
        rate = bare.samples[-1][0].gbps
        outcome = perftest.read_bandwidth(device, size, int(seconds * rate * 1e9 / size))
        if outcome.value is None:
            return outcome.note
        return [Sample(nbytes=int(outcome.value * 1e9), ns=10**9)]

    return run
