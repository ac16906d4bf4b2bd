"""What operators tell connectors: by mapping, by environment, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from memkv.connectors.settings import Settings
from memkv.rdma.errors import LocalError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.__dataclass_fields__:
        monkeypatch.delenv(f"MEMKV_{name.upper()}", raising=False)


def test_a_mapping_says_it_all() -> None:
    read = Settings.read(
        {"nodes": "a:1, b:2", "durability": "flash", "checksum": "yes", "get_timeout": "0.5", "gid_index": 3}
    )
    assert read == Settings(
        nodes=("a:1", "b:2"), durability="flash", checksum=True, get_timeout=0.5, gid_index=3
    )


def test_nodes_may_be_a_list() -> None:
    assert Settings.read({"nodes": ["a:1", "b:2"]}).nodes == ("a:1", "b:2")


def test_the_environment_says_what_the_mapping_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMKV_NODES", "env:1")
    monkeypatch.setenv("MEMKV_SALT", "env")
    monkeypatch.setenv("MEMKV_MAX_CHANNELS", "7")
    assert Settings.read({"salt": "given"}) == Settings(nodes=("env:1",), salt="given", max_channels=7)
    assert Settings.read(None).salt == "env"


def test_names_of_the_engine_are_passed_over() -> None:
    assert Settings.read({"nodes": "a", "module_path": "x"}, ignore={"module_path"}).nodes == ("a",)


@pytest.mark.parametrize(
    ("given", "knob"),
    [
        ({}, "nodes"),
        ({"nodes": " , "}, "nodes"),
        ({"nodes": "a", "time_out": 1}, "time_out"),
        ({"nodes": "a", "durability": "disk"}, "durability"),
        ({"nodes": "a", "fabric": "rdma"}, "fabric"),
        ({"nodes": "a", "get_timeout": "soon"}, "get_timeout"),
        ({"nodes": "a", "get_timeout": 0}, "get_timeout"),
        ({"nodes": "a", "put_timeout": True}, "put_timeout"),
        ({"nodes": "a", "checksum": "maybe"}, "checksum"),
        ({"nodes": "a", "gid_index": 1.5}, "gid_index"),
        ({"nodes": "a", "max_channels": 0}, "max_channels"),
        ({"nodes": "a", "salt": 5}, "salt"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(given: dict[str, Any], knob: str) -> None:
    with pytest.raises(LocalError, match=knob):
        Settings.read(given)
