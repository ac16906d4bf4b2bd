"""``memkv-bench``: limit, get, put, mixed, latency, replay, flash, restart, ttft, gpu."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ._group import OneLineGroup
from .bench_options import arena, loading, options, reaching, sizes, wish
from .bench_options import size as a_size
from .cost_options import CostCommand, costing, take
from .report import Row, print_result
from .ttft_options import ttft_options


@click.group("memkv-bench", cls=OneLineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memkv-bench")
def main() -> None:
    """How fast memkv is here, beside what the hardware allows in the same run.

    Ends with 1 if a block was wrong or a call failed. GB are 10⁹ bytes.
    """


def _loads(kind: str, flags: dict[str, Any], **extra: Any) -> int:
    from .loads import run

    as_json = flags.pop("as_json")
    result = run(kind, options(flags), **extra)
    return _finish(*result, as_json=as_json)


def _finish(heading: dict[str, Any], rows: list[Row], notes: list[str], *, as_json: bool) -> int:
    print_result(heading, rows, as_json=as_json, notes=notes)
    return _errors(sum(row.errors for row in rows))


def _errors(errors: int) -> int:
    if errors:
        click.echo(f"memkv-bench: {errors} errors", err=True)
    return 1 if errors else 0


@main.command()
@loading
def limit(**flags: Any) -> int:
    """Gets and puts beside the plainest READ loop in C, and perftest."""
    return _loads("limit", flags)


@main.command()
@loading
def get(**flags: Any) -> int:
    """Gets from a warm location cache."""
    return _loads("get", flags)


@main.command()
@loading
def put(**flags: Any) -> int:
    """Puts of new blocks."""
    return _loads("put", flags)


@main.command()
@loading
@click.option("--put-share", type=click.FloatRange(0, 1), default=0.1, help="Of batches. [0.1]")
def mixed(put_share: float, **flags: Any) -> int:
    """Gets and puts at the same time."""
    return _loads("mixed", flags, put_share=put_share)


@main.command()
@reaching
@click.option("--size", callback=a_size, metavar="SIZE", default="4k", help="Of the block. [4k]")
@click.option("--calls", type=click.IntRange(10), default=1000, help="Of each kind. [1000]")
@click.option(
    "--rounds", type=click.IntRange(1), default=7, help="Turns that the calls are divided into. [7]"
)
@click.option(
    "--cpu-seconds",
    type=click.FloatRange(0.01),
    default=2.0,
    help="Of processor time, for each batch size where it is counted. [2]",
)
def latency(size: int, calls: int, rounds: int, cpu_seconds: float, as_json: bool, **flags: Any) -> int:
    """One block at a time; what Python adds to a call, and what a get costs the processor."""
    from .latency import run

    memory = flags.pop("memory")
    if memory.gpu:
        from .gpu_latency import run as run_gpu

        return _finish(*run_gpu(wish(flags), memory, size, calls, rounds), as_json=as_json)
    return _finish(*run(wish(flags), memory.arena, size, calls, rounds, cpu_seconds), as_json=as_json)


@main.command(cls=CostCommand)
@reaching
@click.option(
    "--trace", "file", type=click.Path(path_type=Path), help="Mooncake's JSON lines. [a generated trace]"
)
@click.option("--requests", type=click.IntRange(1), help="The first so many. [all of a file, 120 generated]")
@click.option("--seed", type=int, default=1, help="Of the generated trace. [1]")
@click.option(
    "--block-bytes", callback=a_size, metavar="SIZE", default="64k", help="KV cache of 512 tokens. [64k]"
)
@click.option("--peers", type=click.IntRange(1, 64), default=2, help="Processes that take turns. [2]")
@click.option(
    "--flash",
    default="",
    metavar="PATH[:SIZE]",
    help="Own nodes have flash; the memory then is a tenth of what is put.",
)
@click.option("--force", is_flag=True, help="What is at PATH is lost.")
@click.option("--grace-ms", type=click.IntRange(10, 60000), default=100, help="Of nodes with flash. [100]")
@click.option("--nodes-count", type=click.IntRange(1, 64), default=1, help="Own nodes. [1]")
@click.option(
    "--batch", type=click.IntRange(1), default=64, help="Blocks, where everything is got again. [64]"
)
@click.option("--verify/--no-verify", default=True, help="Compare every byte of every hit. [on]")
@costing
def replay(as_json: bool, **flags: Any) -> int:
    """Replays a trace of prompts: match, get the hits, put the rest. What that saves: --cost."""
    from .replay import Settings, run

    memory, costs = arena(flags), take(flags)
    settings = Settings(wish=wish(flags), memory=memory, **flags)
    if costs is None:
        played = run(settings)
        return _finish(played.heading, played.rows, played.notes, as_json=as_json)
    from .cost_run import run_costs

    return _errors(run_costs(settings, costs, as_json=as_json))


@main.command()
@reaching
@click.option(
    "--flash", required=True, metavar="PATH[:SIZE]", help="A file to be made, or a block device (--force)."
)
@click.option("--force", is_flag=True, help="What is at PATH is lost.")
@click.option("--sizes", callback=sizes, metavar="SIZE,…", default="1m", help="Block sizes. [1m]")
@click.option(
    "--working-set", callback=a_size, metavar="SIZE", help="Bytes of blocks in flash. [four times the memory]"
)
@click.option("--put-bytes", callback=a_size, metavar="SIZE", help="Put in a turn. [as much as the memory]")
@click.option("--batch", type=click.IntRange(1), default=16, help="Blocks of a batch. [16]")
@click.option(
    "--depth", type=click.IntRange(1, 64), default=2, help="Batches under way; fio's depth is both. [2]"
)
@click.option("--grace-ms", type=click.IntRange(10, 60000), default=100, help="The node's. [100]")
@click.option("--seconds", type=click.FloatRange(0.01), default=5.0, help="Timed, for each row. [5]")
@click.option(
    "--rounds", type=click.IntRange(1), default=5, help="Turns that the seconds are divided into. [5]"
)
@click.option("--verify/--no-verify", default=True, help="Compare bytes, outside of the timed part. [on]")
def flash(as_json: bool, **flags: Any) -> int:
    """Staged gets and write-behind beside fio on the same device."""
    from .flash_bench import Settings, run

    memory = arena(flags) or 512 << 20
    flags["working_set"] = flags["working_set"] or 0
    flags["put_bytes"] = flags["put_bytes"] or memory
    return _finish(*run(Settings(wish=wish(flags), memory=memory, **flags)), as_json=as_json)


@main.command()
@reaching
@click.option(
    "--flash", required=True, metavar="PATH[:SIZE]", help="A file to be made, or a block device (--force)."
)
@click.option("--force", is_flag=True, help="What is at PATH is lost.")
@click.option("--size", callback=a_size, metavar="SIZE", default="256k", help="Of a block. [256k]")
@click.option("--blocks", type=click.IntRange(1), default=4000, help="[4000]")
@click.option("--batch", type=click.IntRange(1), default=64, help="Blocks of a put or get. [64]")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Stops of each kind. [3]")
@click.option("--verify/--no-verify", default=True, help="Compare every byte of every block. [on]")
def restart(as_json: bool, **flags: Any) -> int:
    """How soon a node has its blocks on flash again: after a clean stop, and killed."""
    from .restart import Settings, run

    memory = arena(flags)
    return _finish(*run(Settings(wish=wish(flags), memory=memory, **flags)), as_json=as_json)


@main.command()
@reaching
@ttft_options
def ttft(as_json: bool, **flags: Any) -> int:
    """Time to first token: a prompt computed, and restored by a fresh process; the logits are compared."""
    from .ttft import Settings, run

    memory = arena(flags)
    return run(Settings(wish=wish(flags), memory=memory, **flags), as_json=as_json)


@main.command()
@click.option("--gpu", metavar="cuda:N", default="cuda:0", help="Which, as CUDA counts. [cuda:0]")
@click.option(
    "--sizes", callback=sizes, metavar="SIZE,…", default="1m,4m,16m", help="Block sizes. [1m,4m,16m]"
)
@click.option(
    "--working-set",
    callback=a_size,
    metavar="SIZE",
    default="512m",
    help="Bytes of blocks; twice on the GPU. [512m]",
)
@click.option("--seconds", type=click.FloatRange(0.01), default=2.0, help="Timed, for each row. [2]")
@click.option(
    "--rounds", type=click.IntRange(1), default=7, help="Turns that the seconds are divided into. [7]"
)
@click.option(
    "--verify/--no-verify", default=True, help="Compare every byte, outside of the timed part. [on]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def gpu(as_json: bool, **flags: Any) -> int:
    """Staging into GPU memory beside pinned copies, kernels beside a copy within the GPU."""
    from .gpu_bench import Settings, run

    return _finish(*run(Settings(**flags)), as_json=as_json)


if __name__ == "__main__":
    sys.exit(main(prog_name="memkv-bench"))
