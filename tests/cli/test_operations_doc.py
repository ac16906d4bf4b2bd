"""docs/operations.md names the settings, flags, metrics and statuses that exist, and all of them."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

from memkv.cli import options
from memkv.cli.node import main, serve
from memkv.status import Status

from .nodes import running

TEXT = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(text: str) -> set[str]:
    """What stands in backquotes in the first column of a section's table."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_settings_are_all_there() -> None:
    assert first_column(section("Settings")) == set(options.settings())


def test_flags_exist() -> None:
    known = {
        o for c in (serve, *main.commands.values()) for p in c.params for o in [*p.opts, *p.secondary_opts]
    }
    ours = [line for line in TEXT.splitlines() if "docker" not in line and "venv" not in line]
    named = {f for line in ours for f in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    others = {
        "--help",
        "--network",
        "--device",
        "--cap-add",
        "--ulimit",
        "--system-site-packages",
    }  # docker's, venv's

    assert named - others <= known


def test_metrics_are_all_there() -> None:
    with running() as node, urllib.request.urlopen(f"{node.metrics}/metrics", timeout=10) as answer:
        exposed = set(re.findall(r"^# TYPE (\S+)", answer.read().decode(), re.MULTILINE))

    table = {name.partition("{")[0] for name in first_column(section("Health and metrics"))}
    everywhere = set(re.findall(r"`(memkv_[a-z_]+)", TEXT))
    assert table == exposed
    assert everywhere <= exposed


def test_statuses_are_all_there() -> None:
    assert first_column(section("Statuses")) == {s.name for s in Status} - {"PENDING"}
