"""Flags that the commands of memkv-bench share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ..rdma.errors import LocalError
from ..store.config import parse_size
from .cluster import Wish
from .rig import Options

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Memories:
    """What --memory said: bytes of the own node's arena (0: enough), and the GPU of the peers' blocks."""

    arena: int
    gpu: str


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A callback: 64k, 1m, 4G, or bytes."""
    return None if value is None else _one(value, param)


def sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """A callback: several, separated by commas."""
    return tuple(_one(v, param) for v in value.split(","))


def memories(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Memories:
    """A callback: a size, a GPU, or both."""
    gpus = [v for v in values if v.startswith("cuda")]
    given = [v for v in values if v not in gpus]
    if len(gpus) > 1 or len(given) > 1:
        raise LocalError(f"--memory {' '.join(values)}", "--memory takes one size and one GPU")
    if gpus:
        from .gpu_rig import index_of

        index_of(gpus[0])
    return Memories(_one(given[0], param) if given else 0, gpus[0] if gpus else "")


def _one(value: str, param: click.Parameter) -> int:
    nbytes = parse_size(value, param.opts[0])
    if nbytes < 1:
        raise LocalError(f"{value!r} is no size", f"{param.opts[0]} takes at least one byte")
    return nbytes


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


reaching = _stack(
    click.option(
        "--nodes", metavar="HOST:PORT,…", help="Existing nodes; by default the benchmark starts its own."
    ),
    click.option(
        "--memory",
        callback=memories,
        multiple=True,
        metavar="SIZE|cuda:N",
        help="Of the own node's arena [enough that nothing is evicted]. cuda:N: that GPU's memory is what "
        "blocks are got into and put from (limit, get, put, mixed, latency).",
    ),
    click.option("--fabric", type=click.Choice(["auto", "verbs", "tcp"]), default="auto", help="[auto]"),
    click.option(
        "--device", "devices", metavar="NAME", multiple=True, help="RDMA device; repeated: several rails."
    ),
    click.option("--ib-port", type=int, help="Port of the device."),
    click.option("--gid-index", type=int, help="As memkv-node doctor lists them. [ranked]"),
    click.option("--secret-file", type=click.Path(), help="The cluster's shared secret; or MEMKV_SECRET."),
    click.option(
        "--clock", type=click.Choice(["auto", "plain", "strict"]), default="auto", help="How READs are dated."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."),
)

loading = _stack(
    reaching,
    click.option("--sizes", callback=sizes, metavar="SIZE,…", default="64k,1m", help="Block sizes. [64k,1m]"),
    click.option("--batch", type=click.IntRange(1), default=64, help="Blocks of a batch. [64]"),
    click.option(
        "--threads", type=click.IntRange(1, 64), default=1, help="Each with a buffer and channel. [1]"
    ),
    click.option(
        "--depth", type=click.IntRange(1, 64), default=1, help="Batches under way in a thread's hands. [1]"
    ),
    click.option("--processes", type=click.IntRange(1, 64), default=1, help="Peers, each in a process. [1]"),
    click.option("--seconds", type=click.FloatRange(0.01), default=3.0, help="Timed, for each row. [3]"),
    click.option(
        "--rounds", type=click.IntRange(1), default=7, help="Turns that the seconds are divided into. [7]"
    ),
    click.option(
        "--working-set",
        callback=size,
        metavar="SIZE",
        default="64m",
        help="Bytes of blocks that are got. [64m]",
    ),
    click.option(
        "--verify/--no-verify", default=True, help="Compare every byte, outside of the timed part. [on]"
    ),
    click.option(
        "--checksum/--no-checksum", default=False, help="The peer verifies payload checksums. [off]"
    ),
)


def wish(flags: dict[str, Any]) -> Wish:
    """Takes what concerns nodes and fabric out of ``flags``."""
    nodes = flags.pop("nodes")
    return Wish(
        nodes=tuple(n.strip() for n in nodes.split(",") if n.strip()) if nodes else (),
        fabric=flags.pop("fabric"),
        devices=tuple(flags.pop("devices")),
        ib_port=flags.pop("ib_port"),
        gid_index=flags.pop("gid_index"),
        secret_file=flags.pop("secret_file"),
        clock=flags.pop("clock"),
    )


def options(flags: dict[str, Any]) -> Options:
    """All flags of a load; ``flags`` must hold nothing else."""
    memory: Memories = flags.pop("memory")
    return Options(wish=wish(flags), memory=memory.arena, gpu=memory.gpu, **flags)


def arena(flags: dict[str, Any]) -> int:
    """Takes --memory out of ``flags``, for a command whose blocks are in host memory."""
    memory: Memories = flags.pop("memory")
    if memory.gpu:
        raise LocalError(
            f"this command has no --memory {memory.gpu}", "limit, get, put, mixed and latency do"
        )
    return memory.arena
