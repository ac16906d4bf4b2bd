"""Flags of the cost model, and the setup that follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from ..rdma.errors import LocalError
from . import cost_measured, shapes
from .bench_options import size
from .cost_setup import GPUS, Setup, hbm_kv
from .cost_work import Work

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_MODEL = "llama-3-70b"
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
BUSY_AT_MOST = 0.8  # of the replicas without reuse, where their number is not given
MOST_REPLICAS = 256
_ABOVE_0 = click.FloatRange(0, min_open=True)
_SHARE = click.FloatRange(0, 1, min_open=True)


@dataclass(frozen=True, slots=True)
class CostOptions:
    """What was asked for. ``numbers``: options by name, None where the default holds."""

    model_only: bool
    model: str | None
    gpu: str
    numbers: dict[str, Any]
    loads: tuple[float, ...]
    measured: Path | None
    hits: Path | None
    plot: Path | None
    sensitivity: bool


def _loads(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        loads = sorted({float(v) for v in value.split(",")})
    except ValueError:
        loads = []
    if not loads or not all(0 < load < 1e6 for load in loads):
        raise LocalError(f"--loads {value}", "--loads takes numbers above 0, as in 0.5,1,2")
    return tuple(loads)


_NUMBERS: tuple[tuple[str, Any, str], ...] = (
    ("--gpus", click.IntRange(1, 1024), "GPUs of a replica. [8; 1 with --measured]"),
    (
        "--replicas",
        click.IntRange(1, MOST_REPLICAS),
        "Of the model. [so many that 0.8 of their time is enough without reuse]",
    ),
    ("--mfu", _SHARE, "Share of peak FLOP/s in prefill. [0.5]"),
    ("--gpu-price", click.FloatRange(0), "Dollars an hour. [the GPU's]"),
    ("--decode-batch", click.IntRange(1), "Sequences of a step. [32]"),
    ("--decode-efficiency", _SHARE, "Share of HBM bandwidth in decode. [0.7]"),
    ("--hbm-kv", size, "KV cache of a replica. [0.9 of HBM less weights]"),
    ("--host-memory", size, "KV cache in a replica's own host. [1t]"),
    ("--host-gbps", _ABOVE_0, "GB/s between it and the replica. [50 a GPU]"),
    ("--store-nodes", click.IntRange(1, 4096), "Nodes of memkv. [1]"),
    ("--node-memory", size, "Of one node. [1t]"),
    ("--node-flash", size, "Of one node; 0: none. [61.4 TB]"),
    ("--node-price", click.FloatRange(0), "Dollars an hour. [10]"),
    ("--wire-gbps", _ABOVE_0, "GB/s of a node, each way. [45]"),
    ("--flash-read-gbps", _ABOVE_0, "GB/s of a node. [26]"),
    ("--flash-write-gbps", _ABOVE_0, "GB/s of a node. [14]"),
    ("--lookup-ms", click.FloatRange(0), "Of a request that asks memkv. [1]"),
    ("--deadline", _ABOVE_0, "Seconds; what is not there by then is recomputed. [5]"),
    ("--slo", _ABOVE_0, "Seconds that the 90th percentile of TTFT may take. [5]"),
)


class CostOption(click.Option):
    """A flag of the cost model: --help shows them apart."""


class CostCommand(click.Command):
    """A command with flags of the cost model beside its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], "Costs (docs/costs.md)": []}
        own, costs = sections.values()
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                (costs if isinstance(param, CostOption) else own).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _option(*names: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, cls=CostOption, **settings)


def costing(function: F) -> F:
    """A decorator: the cost model's flags."""
    options = [
        _option("--cost", is_flag=True, help="What the hits are worth, by a model."),
        _option("--model-only", is_flag=True, help="The model alone: no byte is moved."),
        _option(
            "--plot",
            type=click.Path(path_type=Path),
            metavar="FILE.svg|.png",
            help="Draws first tokens, utilisation and cost.",
        ),
        _option("--model", help="llama-3-8b, llama-3-70b, or a config.json. [llama-3-70b]"),
        _option("--gpu", type=click.Choice(list(GPUS)), default="h100", help="Peak, HBM and price. [h100]"),
        *(_number(*line) for line in _NUMBERS),
        _option(
            "--policy",
            type=click.Choice(["sieve", "lru"]),
            default="sieve",
            help="Of memkv's memory and flash. [sieve]",
        ),
        _option(
            "--routing",
            type=click.Choice(["ttft", "round-robin"]),
            default="ttft",
            help="To the replica that is to answer first, or in turn. [ttft]",
        ),
        _option(
            "--loads",
            callback=_loads,
            metavar="X,…",
            default=",".join(f"{load:g}" for load in LOADS),
            help="Times the trace's rate that are tried. [0.25 to 2.5]",
        ),
        _option("--measured", type=click.Path(path_type=Path), help="What memkv-bench ttft --json printed."),
        _option("--hits", type=click.Path(path_type=Path), help="What replay --cost --json printed."),
        _option("--sensitivity", is_flag=True, help="Each assumption halved and doubled."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _number(name: str, kind: Any, text: str) -> Callable[[F], F]:
    if kind is size:
        return _option(name, callback=_size_or_0, metavar="SIZE", help=text)
    return _option(name, type=kind, help=text)


def _size_or_0(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return 0 if value == "0" else size(ctx, param, value)


def take(flags: dict[str, Any]) -> CostOptions | None:
    """Takes the cost model's flags out of ``flags``; None if no costs were asked for."""
    numbers = {option[0][2:].replace("-", "_"): None for option in _NUMBERS}
    numbers |= {name: flags.pop(name) for name in (*numbers, "policy", "routing")}
    wanted = flags.pop("cost")
    options = CostOptions(
        model_only=flags.pop("model_only"),
        model=flags.pop("model"),
        gpu=flags.pop("gpu"),
        numbers=numbers,
        loads=flags.pop("loads"),
        measured=flags.pop("measured"),
        hits=flags.pop("hits"),
        plot=flags.pop("plot"),
        sensitivity=flags.pop("sensitivity"),
    )
    if options.hits and not options.model_only:
        raise LocalError("--hits beside a replay, which counts its own", "--hits goes with --model-only")
    return options if wanted or options.model_only or options.plot or options.sensitivity else None


def setup_of(options: CostOptions, work: Work) -> Setup:
    """All assumptions: defaults, measured figures over them, flags over both."""
    measured = cost_measured.load(options.measured) if options.measured else None
    shape = measured.shape if measured and not options.model else shapes.find(options.model or DEFAULT_MODEL)
    gpu, given = GPUS[options.gpu], {k: v for k, v in options.numbers.items() if v is not None}
    gpus = given.get("gpus", 1 if measured else 8)
    setup = Setup(
        shape=shape,
        gpu=gpu,
        gpu_name=options.gpu,
        gpus=gpus,
        replicas=1,
        mfu=0.5,
        decode_efficiency=0.7,
        decode_batch=32,
        hbm_kv=hbm_kv(shape, gpu, gpus),
        host_memory=1 << 40,
        host_bandwidth=gpus * 50e9,
        nodes=1,
        node_memory=1 << 40,
        node_flash=8 * 7_680_000_000_000,
        wire=45e9,
        flash_read=26e9,
        flash_write=14e9,
        node_price=10.0,
        lookup=1e-3,
    )
    if measured:
        setup = _as_measured(setup, measured, str(options.measured))
    setup = _as_given(setup, given)
    setup.check()
    return setup if "replicas" in given else replace(setup, replicas=_enough(setup, work))


def _as_measured(setup: Setup, measured: cost_measured.Measured, name: str) -> Setup:
    flash, said = measured.flash, f"measured: {name}"
    sources = dict.fromkeys(("prefill_rate", "prefill_overhead", "wire", "lookup"), said)
    sources["mfu"] = f"{said}, by the peak of --gpu"
    setup = replace(
        setup,
        mfu=measured.prefill.rate / setup.gpu.flops,
        prefill_rate=setup.gpus * measured.prefill.rate,
        prefill_overhead=measured.prefill.start,
        wire=measured.memory.rate,
        lookup=measured.memory.start,
    )
    if flash:
        sources |= dict.fromkeys(("flash_read", "flash_latency"), said)
        latency = max(0.0, flash.start - measured.memory.start)
        setup = replace(setup, flash_read=flash.rate, flash_latency=latency)
    return replace(setup, sources=sources)


_SCALES = {
    "host_gbps": ("host_bandwidth", 1e9),
    "wire_gbps": ("wire", 1e9),
    "flash_read_gbps": ("flash_read", 1e9),
    "flash_write_gbps": ("flash_write", 1e9),
    "lookup_ms": ("lookup", 1e-3),
    "store_nodes": ("nodes", 1),
}


def _as_given(setup: Setup, given: dict[str, Any]) -> Setup:
    given = dict(given)
    sources = dict(setup.sources)
    if (price := given.pop("gpu_price", None)) is not None:
        setup = replace(setup, gpu=replace(setup.gpu, price=price))
        sources["gpu_price"] = "--gpu-price"
    if "mfu" in given:
        setup = replace(setup, prefill_rate=0.0)
        sources.pop("prefill_rate", None)
    changes: dict[str, Any] = {}
    for name, value in given.items():
        field, scale = _SCALES.get(name, (name, 1))
        changes[field] = value if scale == 1 else value * scale
        if name not in ("gpus", "policy", "routing", "slo"):
            sources[field] = f"--{name.replace('_', '-')}"
    return replace(setup, **changes, sources=sources)


def _enough(setup: Setup, work: Work) -> int:
    """The fewest replicas that are busy at most so much where nothing is reused."""
    seconds = sum(map(setup.prefill_seconds, work.tokens))
    seconds += sum(map(setup.decode_seconds, work.tokens, work.outputs))
    replicas = max(1, -int(-seconds // (work.seconds * BUSY_AT_MOST)))
    if replicas > MOST_REPLICAS:
        raise LocalError(
            f"{replicas} replicas of {setup.shape.name} would be needed at this trace's rate",
            "--replicas N, more --gpus, or fewer --requests",
        )
    return replicas
