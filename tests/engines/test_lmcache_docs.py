"""What docs/engines/lmcache.md says to paste is what LMCache reads; its table has every setting."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("lmcache", reason="lmcache is not installed: script/test --engines brings it")

from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.distributed.config import add_storage_manager_args
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config

from memkv.connectors.lmcache_l2 import MemKVL2AdapterConfig
from memkv.connectors.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs/engines/lmcache.md").read_text()
NODES = ("node-1:7420", "node-2:7420")


def block(language: str, start: str) -> str:
    """The code block of the text that has these words."""
    (found,) = (b for b in re.findall(rf"```{language}\n(.*?)```", TEXT, re.S) if start in b)
    return str(found)


def test_the_servers_command_line() -> None:
    command = block("sh", "lmcache server").split("\n\n")[0]
    parser = argparse.ArgumentParser()
    add_storage_manager_args(parser)
    args = parser.parse_args(shlex.split(command.replace("\\\n", " "))[2:])
    (config,) = parse_args_to_l2_adapters_config(args).adapters
    assert config.shared
    assert MemKVL2AdapterConfig.from_dict(config.adapter_params).settings.nodes == NODES


def test_engines_command_lines_are_json() -> None:
    for words in ("LMCacheMPConnector", "LMCacheConnectorV1"):
        command = next(c for c in block("sh", words).split("\n\n") if words in c)
        assert json.loads(shlex.split(command.replace("\\\n", " "))[-1])["kv_connector"] == words


def test_the_engines_file(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text(block("yaml", "storage_plugins"))
    config = LMCacheEngineConfig.from_file(str(file))
    assert config.storage_plugins == ["memkv"]
    extra = config.extra_config
    assert extra["storage_plugin.memkv.module_path"] == "memkv.connectors.lmcache_plugin"
    given = {k.removeprefix("memkv."): v for k, v in extra.items() if k.startswith("memkv.")}
    assert Settings.read(given).nodes == NODES


def test_the_table_has_every_setting() -> None:
    table = TEXT[TEXT.index("## Settings") : TEXT.index("## When nodes are away")]
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`[^|]*) \|", table, re.M))))
    assert named == {f.name for f in fields(Settings)} | {"lock_ttl"}
