"""``memkv-node``: serve, doctor, status."""

from __future__ import annotations

from typing import Any

import click

from .. import __version__
from ._group import OneLineGroup
from .options import as_toml, load, node_options


@click.group("memkv-node", cls=OneLineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memkv-node")
def main() -> None:
    """A memkv store node: serve blocks, say how it is, say what is missing."""


@main.command()
@click.option("--config", "config_file", metavar="FILE", help="Settings in TOML; flags go before it.")
@node_options
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    help="json: one object a line. [text]",
)
@click.option(
    "--ready-fd", type=int, metavar="N", help="Write a line 'ready ADDRESS METRICS-URL' there; 1: stdout."
)
@click.option("--print-config", is_flag=True, help="Print the settings as TOML and end.")
def serve(
    config_file: str | None, log_format: str, ready_fd: int | None, print_config: bool, **flags: Any
) -> int:
    """Run a node in the foreground until SIGTERM or SIGINT.

    Ends with 0 after a clean stop, 1 if the node cannot run here, 2 for a wrong setting.
    """
    config, clock_reason = load(config_file, flags)
    if print_config:
        click.echo(as_toml(config), nl=False)
        return 0
    config.check_exposure()
    from .serve import run  # the C core, and everything else that takes time to load

    return run(config, clock_reason, ready_fd=ready_fd, log_format=log_format)


if __name__ == "__main__":
    main(prog_name="memkv-node")
