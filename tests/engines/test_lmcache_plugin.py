# ruff: noqa: E402  the engine first: without it the tests are skipped
"""The in-process plug-in under LMCache's own engine, launcher and storage manager, against a node."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lmcache", reason="lmcache is not installed: script/test --engines brings it")
torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")

from memkv.connectors import lmcache_sites
from memkv.connectors.lmcache_plugin import MemKVStorageBackend
from memkv.peer import Peer
from memkv.rdma.errors import DeviceError
from memkv.status import Status
from memkv.store.node import NodeThread
from tests.nodes import MIB, NodeProcess, Proxy, StartNode, until

from .lmcache_engine import CHUNK, HEAD, HEADS, LAYERS, NBYTES, Host, config_of, kv_of, tokens_of
from .test_lmcache_l2_faults import pins

pytest_plugins = "tests.nodes"

Start = Callable[..., Host]
N = 8 * CHUNK  # tokens of a test's sequence


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


def keys_of(host: Host, tokens: list[int]) -> list[Any]:
    """LMCache's keys of the chunks of these tokens."""
    return [key for _, _, key in host.engine.token_database.process_tokens(tokens)]


# --- storing and retrieving ---


def test_another_host_retrieves_what_one_has_stored(host: Start) -> None:
    tokens, kv = tokens_of(N), kv_of(N, seed=1)
    host().store(tokens, kv)
    other = host()
    assert other.lookup(tokens) == N
    n, found = other.retrieve(tokens)
    assert n == N
    assert torch.equal(found, kv)


def test_chunks_go_into_the_cpu_tier_and_come_from_there_next_time(host: Start) -> None:
    tokens, kv = tokens_of(N), kv_of(N, seed=1)
    host().store(tokens, kv)
    other = host()
    assert torch.equal(other.retrieve(tokens)[1], kv)
    (site,) = other.backend._sites
    assert site.peer is not None
    before = site.peer.stats()["nodes"]
    for _ in range(3):
        assert torch.equal(other.retrieve(tokens)[1], kv)
    assert site.peer.stats()["nodes"] == before
    assert other.cpu_objects() == 8  # and nothing is leaked
    assert site._regions is not None
    assert len(site._regions) == 1


@pytest.mark.parametrize("unfull", [True, False])
def test_the_last_chunk_may_be_short(unfull: bool, host: Start) -> None:
    tokens, kv = tokens_of(N + 7), kv_of(N + 7, seed=1)
    options = {"save_unfull_chunk": unfull}
    host(options=options).store(tokens, kv)
    other, due = host(options=options), N + 7 if unfull else N
    assert other.lookup(tokens) == due
    n, found = other.retrieve(tokens)
    assert n == due
    assert torch.equal(found[:, :, :due], kv[:, :, :due])
    assert not found[:, :, due:].any()


def test_a_longer_prompt_retrieves_the_prefix_that_is_held(host: Start) -> None:
    tokens, kv = tokens_of(2 * N), kv_of(2 * N, seed=1)
    host().store(tokens[:N], kv[:, :, :N])
    other = host()
    assert other.lookup(tokens) == N
    n, found = other.retrieve(tokens)
    assert n == N
    assert torch.equal(found[:, :, :N], kv[:, :, :N])


def test_mla(host: Start) -> None:
    """A chunk of one latent instead of keys and values; only the first rank has LMCache's storage."""
    options = {
        "extra": {"save_only_first_rank": False},
        "use_mla": True,
        "kv_shape": (LAYERS, 1, CHUNK, 1, 64),
    }
    tokens, kv = tokens_of(N), kv_of(N, seed=1)[:1]
    host(**options).store(tokens, kv)
    n, found = host(**options).retrieve_into(tokens, torch.zeros_like(kv))
    assert n == N
    assert torch.equal(found, kv)


def test_a_chunk_that_goes_between_lookup_and_retrieval(host: Start) -> None:
    tokens, kv = tokens_of(N), kv_of(N, seed=1)
    writer, other = host(), host()
    writer.store(tokens, kv)
    assert other.lookup(tokens, pin=True) == N
    assert writer.backend.remove(keys_of(writer, tokens)[5])
    n, found = other.retrieve(tokens)
    assert n == 5 * CHUNK
    assert torch.equal(found[:, :, :n], kv[:, :, :n])
    other.engine.lookup_unpin("request")
    until(lambda: other.cpu_objects() <= 8, what="memory of what was not used is free")


def test_memory_for_some_of_them_only(host: Start) -> None:
    """A CPU tier of less than a prompt's chunks: what there is room for is retrieved."""
    tokens, kv = tokens_of(N), kv_of(N, seed=1)
    host().store(tokens, kv)
    small = host(options={"local_cpu": False, "max_local_cpu_size": 5 * NBYTES / (1 << 30)})
    n, found = small.retrieve(tokens)
    assert n == 5 * CHUNK
    assert torch.equal(found[:, :, :n], kv[:, :, :n])
    assert small.cpu_objects() == 0


def test_asynchronous_loading(host: Start, node: NodeThread) -> None:
    """Lookup and prefetch on LMCache's loop; the pins of the lookup are given back."""

    class Lookups:
        answers: dict[str, int] = {}  # noqa: RUF012

        def send_response_to_scheduler(self, lookup_id: str, length: int) -> None:
            self.answers[lookup_id] = length

    tokens, kv = tokens_of(N), kv_of(N, seed=1)
    writer = host()
    writer.store(tokens[: N - CHUNK], kv[:, :, : N - CHUNK])
    other = host(options={"enable_async_loading": True})
    manager, lookups = other.engine.storage_manager, Lookups()
    manager.async_lookup_server = lookups
    keys = keys_of(other, tokens)
    asyncio.run_coroutine_threadsafe(
        manager.async_lookup_and_prefetch("r", keys, [i * CHUNK for i in range(9)], pin=True), manager.loop
    ).result(20)
    until(lambda: "r" in lookups.answers, what="answered")
    assert lookups.answers["r"] == N - CHUNK
    found = kv_of(N)
    mask = other.engine.retrieve(tokens, kvcaches=found, req_id="r")
    assert int(mask.sum()) == N - CHUNK
    assert torch.equal(found[:, :, : N - CHUNK], kv[:, :, : N - CHUNK])
    until(lambda: pins(node) == 0, what="unpinned")


# --- what may hit ---

DIFFERENT: dict[str, dict[str, Any]] = {
    "model": {"model_name": "meta-llama/Llama-3.1-8B-Instruct"},
    "rank": {"worker_id": 0},
    "size of the world": {"world_size": 4},
    "dtype": {"kv_dtype": torch.float16},
    "chunk size": {"options": {"chunk_size": 2 * CHUNK}, "chunk_size": 2 * CHUNK},
    "layers": {"kv_shape": (2 * LAYERS, 2, CHUNK, HEADS, HEAD)},
    "layers and heads of as many bytes": {"kv_shape": (2 * LAYERS, 2, CHUNK, HEADS // 2, HEAD)},
    "MLA": {"use_mla": True, "extra": {"save_only_first_rank": False}},
    "hash": {"options": {"pre_caching_hash_algorithm": "sha256_cbor"}},
    "salt": {"extra": {"memkv.salt": "a"}},
    "namespace": {"extra": {"memkv.namespace": "a"}},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_configuration_does_not_hit(what: str, host: Start) -> None:
    tokens = tokens_of(N)
    writer = host()
    writer.store(tokens, kv_of(N, seed=1))
    other = host(**DIFFERENT[what])
    assert other.lookup(tokens) == 0
    make = other.engine.token_database._make_key_by_hash
    same = [make(key.chunk_hash) for key in keys_of(writer, tokens)]  # as if it came to the same hashes
    for keys in (keys_of(other, tokens), same):
        assert other.backend.batched_contains(keys) == 0
        assert other.backend.batched_get_blocking(keys) == [None] * len(keys)


def test_tags_of_requests_tell_chunks_apart(host: Start) -> None:
    tokens = tokens_of(N)
    one = host()
    one.engine.store(tokens, kvcaches=kv_of(N, seed=1), request_configs={"lmcache.tag.user": "a"})
    until(lambda: not one.backend._putting, what="stored")
    other = host()
    assert other.engine.lookup(tokens, request_configs={"lmcache.tag.user": "a"}) == N
    assert other.engine.lookup(tokens, request_configs={"lmcache.tag.user": "b"}) == 0
    assert other.engine.lookup(tokens) == 0


@pytest.mark.slow  # a minute or two: four processes import vLLM
def test_processes_agree_on_keys_if_their_hashes_do() -> None:
    """LMCache's chain of hashes starts from vLLM's, which Python's own hash makes a random one."""
    pytest.importorskip("vllm", reason="vllm is not installed: script/test --engines brings it")
    program = """
from tests.engines.lmcache_engine import METADATA, config_of, tokens_of
from lmcache.v1.token_database import ChunkedTokenDatabase
from memkv.connectors.lmcache_keys import engine_digest
for algorithm in ("builtin", "sha256_cbor"):
    config = config_of(("127.0.0.1", 1), "tcp", pre_caching_hash_algorithm=algorithm)
    database = ChunkedTokenDatabase(config, METADATA)
    print("digests", *(engine_digest(key).hex() for _, _, key in database.process_tokens(tokens_of(32))))
"""

    def run(**seed: str) -> list[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"} | seed
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("digests")]
        assert len(lines) == 2, done.stderr
        return lines

    assert run(PYTHONHASHSEED="0") == run(PYTHONHASHSEED="0")
    one, other = run(), run()
    assert one[0] != other[0]
    assert one[1] == other[1]


def test_it_says_that_nobody_will_find_its_chunks(
    host: Start, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    host()
    assert "PYTHONHASHSEED is not set" not in caplog.text
    monkeypatch.delenv("PYTHONHASHSEED")
    host(options={"pre_caching_hash_algorithm": "sha256_cbor"})
    assert "PYTHONHASHSEED is not set" not in caplog.text
    host()
    assert "PYTHONHASHSEED is not set" in caplog.text


def test_a_block_of_a_length_that_no_chunk_has_is_a_miss(host: Start) -> None:
    """Somebody else's, under the same key: not a token's multiple, and short though chunks are full."""
    one, tokens = host(options={"save_unfull_chunk": False}), tokens_of(N)
    assert one.lookup(tokens) == 0
    backend, keys = one.backend, keys_of(one, tokens)[:2]
    site = backend._site()
    peer = site.wait()
    assert peer is not None
    memory = peer.register(np.ones(2 * NBYTES, np.uint8))
    blocks = backend._keys(site, keys)
    status = peer.put_from(blocks, memory.slices([0, NBYTES], [NBYTES // 2, NBYTES - 3]))
    assert set(status) == {Status.STORED}
    assert one.lookup(tokens) == 2 * CHUNK
    assert one.retrieve(tokens)[0] == 0
    assert one.cpu_objects() == 0
    del memory


# --- pins ---


def test_lookups_pin_and_unpin(host: Start, node: NodeThread) -> None:
    tokens = tokens_of(N)
    host().store(tokens[: N - CHUNK], kv_of(N, seed=1))
    other = host()
    assert other.lookup(tokens, pin=True) == N - CHUNK
    assert pins(node) == 7
    other.engine.lookup_unpin("request")
    until(lambda: pins(node) == 0, what="unpinned")
    other.engine.lookup_unpin("request")


def test_only_the_prefix_stays_pinned(host: Start, node: NodeThread) -> None:
    tokens = tokens_of(N)
    writer, other = host(), host()
    writer.store(tokens, kv_of(N, seed=1))
    assert writer.backend.remove(keys_of(writer, tokens)[3])
    assert other.lookup(tokens, pin=True) == 3 * CHUNK
    until(lambda: pins(node) == 3, what="what is behind the hole is not held")


def test_single_keys(host: Start, node: NodeThread) -> None:
    one, tokens = host(), tokens_of(N)
    one.store(tokens, kv_of(N, seed=1))
    backend, key = one.backend, keys_of(one, tokens)[0]
    assert backend.contains(key)
    assert backend.pin(key)
    assert pins(node) == 1
    assert backend.unpin(key)
    until(lambda: pins(node) == 0, what="unpinned")
    obj = backend.get_blocking(key)
    assert obj is not None
    obj.ref_count_down()
    assert backend.remove(key)
    assert not backend.remove(key)
    assert not backend.contains(key)
    assert backend.get_blocking(key) is None
    assert backend.batched_contains([]) == 0
    assert backend.batched_get_blocking([]) == []


# --- storing ---


def test_a_chunk_is_put_once_at_a_time_and_told_of(host: Start, node: NodeThread) -> None:
    with Proxy(node) as proxy:
        one, tokens = host(at=proxy), tokens_of(N)
        assert one.lookup(tokens) == 0
        backend, keys = one.backend, keys_of(one, tokens)
        cpu = backend.get_allocator_backend()
        objects = [cpu.allocate(one.metadata.get_shapes(), one.metadata.get_dtypes()) for _ in keys]
        told: list[Any] = []
        proxy.flowing.clear()
        backend.batched_submit_put_task(keys, objects, on_complete_callback=told.append)
        backend.batched_submit_put_task(keys, objects, on_complete_callback=told.append)
        assert all(map(backend.exists_in_put_tasks, keys))
        assert {obj.get_ref_count() for obj in objects} == {2}
        proxy.flowing.set()
        until(lambda: len(told) == 8, what="told of what is stored")
        assert told == keys
        assert not any(map(backend.exists_in_put_tasks, keys))
        assert {obj.get_ref_count() for obj in objects} == {1}


def test_what_is_no_chunk_is_not_stored(host: Start, caplog: Any) -> None:
    one = host()
    cpu = one.backend.get_allocator_backend()
    key = keys_of(one, tokens_of(N))[0]
    for shape, dtype in (((2, LAYERS, CHUNK, 8), torch.bfloat16), ((NBYTES,), torch.uint8)):
        obj = cpu.allocate([torch.Size(shape)], [dtype])
        one.backend.batched_submit_put_task([key], [obj])
        assert not one.backend.exists_in_put_tasks(key)
        assert obj.get_ref_count() == 1
    assert not one.backend.contains(key)
    assert caplog.text.count("not stored") == 1


def test_memory_that_cannot_be_registered(host: Start, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    register = Peer.register

    def limited(peer: Peer, buffer: Any) -> Any:
        if isinstance(buffer, tuple):
            raise DeviceError("the memlock limit is 8 MiB", 12, "ulimit -l unlimited")
        return register(peer, buffer)

    monkeypatch.setattr(Peer, "register", limited)
    tokens, kv = tokens_of(N + 3), kv_of(N + 3, seed=1)
    options = {"save_unfull_chunk": True}
    host(options=options).store(tokens, kv)
    n, found = host(options=options).retrieve(tokens)
    assert n == N + 3
    assert torch.equal(found, kv)
    assert "ulimit" in caplog.text


# --- nodes, and the end ---


def test_a_node_that_dies_is_a_miss(start_process: Callable[..., NodeProcess], host: Start) -> None:
    process, tokens, kv = start_process(), tokens_of(N), kv_of(N, seed=1)
    extra = {"memkv.get_timeout": 1.0, "memkv.put_timeout": 1.0, "memkv.connect_timeout": 1.0}
    writer, other = host(extra, at=process), host(extra, at=process)
    writer.store(tokens, kv)
    assert other.lookup(tokens, pin=True) == N
    process.kill()
    assert other.retrieve(tokens)[0] == 0
    other.engine.lookup_unpin("request")
    assert other.lookup(tokens) == 0
    assert other.backend.batched_remove(keys_of(other, tokens)) == 0
    other.store(tokens_of(N, seed=2), kv)  # into the CPU tier, at least
    assert other.lookup(tokens_of(N, seed=2)) == N
    assert other.cpu_objects() == 8


def test_a_node_that_comes_later(
    start_process: Callable[..., NodeProcess], host: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmcache_sites, "RETRY", 0.1)
    process, tokens, kv = start_process(), tokens_of(N), kv_of(N, seed=1)
    process.kill()
    extra = {"memkv.connect_timeout": 1.0}
    writer, other = host(extra, at=process), host(extra, at=process)
    writer.store(tokens, kv)
    assert other.lookup(tokens) == 0
    process.start()
    until(lambda: other.backend._site().wait(), 20, "joined")
    until(lambda: writer.backend._site().wait(), 20, "joined")
    writer.store(tokens, kv)
    assert other.lookup(tokens) == N


def test_evicted_chunks_are_missed(start_node: StartNode, host: Start) -> None:
    node = start_node(memory=4 * MIB, slab_bytes=2 * MIB, block_bytes=NBYTES)
    writer, other = host(at=node), host(at=node)
    old, kv = tokens_of(N), kv_of(N, seed=1)
    writer.store(old, kv)
    for seed in range(2, 200):
        writer.store(tokens_of(N, seed), kv)
        if other.lookup(old) < N:
            break
    n, found = other.retrieve(old)
    assert n < N
    assert torch.equal(found[:, :, :n], kv[:, :, :n])


def test_lmcache_unmaps_its_memory_only_when_memkv_is_done_with_it(host: Start, node: NodeThread) -> None:
    with Proxy(node) as proxy:
        one, tokens = host({"memkv.put_timeout": 2.0}, at=proxy), tokens_of(N)
        assert one.lookup(tokens) == 0
        backend = one.backend
        allocator = backend.get_allocator_backend().get_memory_allocator()
        (site,) = backend._sites
        seen: list[bool] = []
        close = allocator.close

        def closing() -> None:
            assert site.peer is not None
            seen.append(site.peer._control.closed and not backend._putting)
            close()

        allocator.close = closing
        proxy.flowing.clear()
        one.engine.store(tokens, kvcaches=kv_of(N, seed=1))
        assert backend._putting
        one.close()
        assert seen == [True]


@pytest.mark.parametrize(
    ("extra", "options", "knob"),
    [
        ({"memkv.nodes": ""}, {}, "nodes"),
        ({"memkv.get_timout": 1}, {}, "get_timout"),
        ({"memkv.lock_ttl": -1}, {}, "lock_ttl"),
        ({}, {"use_layerwise": True}, "use_layerwise"),
    ],
)
def test_what_cannot_be_served_is_refused_and_lmcache_goes_on(
    extra: dict[str, Any],
    options: dict[str, Any],
    knob: str,
    host: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    monkeypatch.delenv("MEMKV_NODES", raising=False)
    one = host(extra, options)
    assert "memkv" not in one.engine.storage_manager.storage_backends
    assert knob in caplog.text


def test_a_scheduler_can_look_up_without_memory(host: Start, node: NodeThread, fabric_name: str) -> None:
    writer, tokens = host(), tokens_of(N)
    writer.store(tokens, kv_of(N, seed=1))
    backend = MemKVStorageBackend("cpu", config_of(node, fabric_name), writer.metadata, None, None)
    keys = keys_of(writer, tokens)
    assert backend.batched_contains(keys, pin=True) == 8
    assert pins(node) == 8
    for key in keys:
        backend.unpin(key)
    until(lambda: pins(node) == 0, what="unpinned, without a loop")
    assert backend.batched_get_blocking(keys) == [None] * 8
    backend.close()
    backend.close()
    assert backend.batched_contains(keys) == 0
