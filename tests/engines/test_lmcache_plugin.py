# ruff: noqa: E402  the engine first: without it the tests are skipped
"""The in-process plug-in under LMCache's own engine, launcher and storage manager, against a node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="lmcache is not installed: script/test --engines brings it")
torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")

from memkv.store.node import NodeThread

from .lmcache_engine import CHUNK, Host, config_of, kv_of, tokens_of

pytest_plugins = "tests.nodes"

Start = Callable[..., Host]


@pytest.fixture
def host(node: NodeThread, fabric_name: str) -> Iterator[Start]:
    """Starts engines on hosts of their own, with the node of the test; closes them in the end."""
    with ExitStack() as stack:

        def start(
            extra: dict[str, Any] | None = None,
            options: dict[str, Any] | None = None,
            at: Any = None,
            **metadata: Any,
        ) -> Host:
            config = config_of(at or node, fabric_name, extra, **(options or {}))
            return stack.enter_context(Host(config, **metadata))

        yield start


def test_another_host_retrieves_what_one_has_stored(host: Start) -> None:
    tokens, kv = tokens_of(8 * CHUNK), kv_of(8 * CHUNK, seed=1)
    host().store(tokens, kv)
    other = host()
    assert other.lookup(tokens) == 8 * CHUNK
    n, found = other.retrieve(tokens)
    assert n == 8 * CHUNK
    assert torch.equal(found, kv)
