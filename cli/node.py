"""``memkv-node``: serve, doctor, status, and what there is to do to flash: format, scrub."""

from __future__ import annotations

import json
from typing import Any

import click

from .. import __version__
from ..store.config import DEFAULT_PORT, NodeConfig, parse_address, parse_path, parse_size
from ._group import OneLineGroup
from .options import as_toml, load, node_options, written


@click.group("memkv-node", cls=OneLineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memkv-node")
def main() -> None:
    """A memkv store node: serve blocks, say how it is, say what is missing, look after its flash."""


@main.command()
@click.option("--config", "config_file", metavar="FILE", help="Settings in TOML; flags go before it.")
@node_options()
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


@main.command()
@click.option(
    "--config", "config_file", metavar="FILE", help="The node's settings in TOML; flags go before it."
)
@node_options("listen", "memory", "huge", "fabric", "devices", "ib_port", "gid_index")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(config_file: str | None, as_json: bool, **flags: Any) -> int:
    """Say what this machine has and lacks, which way a node takes, why, and what to do.

    Ends with 0 if a node can run here at all, else 1.
    """
    from rich.console import Console

    from .doctor import check_named, examine, show

    config, _ = load(config_file, flags)
    check_named(config)
    report = examine(config)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=1))
    else:
        show(report, Console())
    return 0 if report.ok else 1


@main.command()
@click.option("--metrics-url", metavar="URL", help="Of the node's --metrics, like http://node-1:7421.")
@click.option("--address", metavar="HOST:PORT", help=f"The same, shorter. [127.0.0.1:{DEFAULT_PORT + 1}]")
@click.option("--json", "as_json", is_flag=True, help="What the node said, as it is.")
def status(metrics_url: str | None, address: str | None, as_json: bool) -> None:
    """Show how a running node is (it needs --metrics)."""
    from rich.console import Console

    from .status import fetch, show

    if metrics_url and address:
        raise click.UsageError("--metrics-url and --address say the same thing: give one of them")
    host, port = parse_address(address or "127.0.0.1", "--address", DEFAULT_PORT + 1)
    found = fetch(metrics_url or f"http://{written((host, port))}")
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        show(found, Console())


@main.command("format")
@click.argument("paths", nargs=-1, required=True, metavar="PATH[:SIZE]...")
@click.option("--force", is_flag=True, help="Also over what is not blank. What lies there is lost.")
@click.option(
    "--segment-bytes", metavar="SIZE", default="0", help="What namespaces take flash by; 0: by the device."
)
def format_(paths: tuple[str, ...], force: bool, segment_bytes: str) -> int:
    """Make a flash store of files and block devices, all of them for one node.

    A file is made if there is none, and written through: a later write then changes no metadata.
    """
    from rich.console import Console

    from .flash import make

    wanted = [parse_path(path) for path in paths]
    make(wanted, force, parse_size(segment_bytes, "--segment-bytes"), Console())
    return 0


@main.command()
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--config", "config_file", metavar="FILE", help="The node's settings: its devices.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def scrub(paths: tuple[str, ...], config_file: str | None, as_json: bool) -> int:
    """Verify every block on flash; the node has to be stopped.

    All devices of the store have to be named. Ends with 1 if bad blocks were found; they are dropped.
    """
    from rich.console import Console

    from . import flash

    if not paths:
        paths = NodeConfig.load(config_file).flash if config_file else ()
    if not paths:
        raise click.UsageError("no devices: name them, or give the node's --config")
    report = flash.examine([parse_path(path) for path in paths])
    if as_json:
        click.echo(json.dumps(flash.as_json(report), indent=1))
    else:
        flash.show(report, Console())
    return 1 if report.bad else 0


if __name__ == "__main__":
    main(prog_name="memkv-node")
