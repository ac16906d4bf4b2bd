"""Flags of ``memkv-bench ttft``."""

from __future__ import annotations

import click

from ..rdma.errors import LocalError
from .bench_options import _stack


def lengths(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """A callback: numbers separated by commas; none if the value is empty."""
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if bad := [part for part in parts if not part.isdigit() or int(part) < 2]:
        raise LocalError(f"{bad[0]!r} is no length of a prompt", "--tokens 512,1024: two tokens at least")
    return tuple(dict.fromkeys(map(int, parts)))


ttft_options = _stack(
    click.option(
        "--model",
        metavar="NAME|FILE",
        default="tiny",
        help="tiny, llama-3-8b, llama-3-70b, or a config.json: its shape, with random weights. [tiny]",
    ),
    click.option("--layers", type=click.IntRange(1), help="Only so many of the model's. [all]"),
    click.option(
        "--backend",
        type=click.Choice(["auto", "numpy", "torch", "cuda"]),
        default="auto",
        help="auto: cuda where there is a GPU and torch, else numpy. torch: on the CPU. [auto]",
    ),
    click.option(
        "--tokens",
        callback=lengths,
        metavar="N,…",
        default="",
        help="Lengths of prompts. [tiny: 64,256; else 512,1024,2048]",
    ),
    click.option("--block-tokens", type=click.IntRange(1, 4096), default=16, help="Of a block. [16]"),
    click.option("--chunk", type=click.IntRange(1), help="Tokens computed at once. [256; cuda: 2048]"),
    click.option("--repeat", type=click.IntRange(1), default=3, help="Prompts of each length. [3]"),
    click.option("--seed", type=click.IntRange(0), default=1, help="Of weights and prompts. [1]"),
    click.option(
        "--threads", type=click.IntRange(1), help="Of the CPU's arithmetic. [tiny: 1; else its own choice]"
    ),
    click.option(
        "--tolerance",
        type=click.FloatRange(0),
        default=0.0,
        help="By which a logit may differ. [0: not in one bit]",
    ),
    click.option(
        "--flash", default="", metavar="PATH[:SIZE]", help="Restore from flash, too: a file or block device."
    ),
    click.option("--force", is_flag=True, help="What is at PATH is lost."),
)
