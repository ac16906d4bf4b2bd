"""Blocks into GPU memory and out of it, on every fabric that is here, with random data."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from memkv.peer import Peer
from memkv.rdma.errors import LocalError
from memkv.status import Status

from ..nodes import KIB, MIB, Connect, StartNode, blocks_of, count, keys_of

pytest_plugins = "tests.nodes"

HIT, MISS, STORED = Status.HIT, Status.MISS, Status.STORED
SIZES = [1, 63, 64, 511, 4096, 64 * KIB, MIB - 1, MIB, 3 * MIB + 17, 16 * MIB]


class Memory:
    """GPU memory by one of the libraries: an array to register, and access from the host."""

    def __init__(self, array: Any, write: Callable[[int, Any], None], read: Callable[[], Any]) -> None:
        self.array, self.write, self.read = array, write, read


@pytest.fixture(params=["cupy", "torch", "slab"])
def make(request: pytest.FixtureRequest) -> Callable[[int], Memory]:
    """Makes GPU memory of so many bytes."""
    if request.param == "torch":
        torch = request.getfixturevalue("torch")

        def by_torch(nbytes: int) -> Memory:
            tensor = torch.full((nbytes,), 0xA5, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()

            def write(at: int, data: Any) -> None:
                tensor[at : at + data.size] = torch.from_numpy(data).cuda()
                torch.cuda.synchronize()

            return Memory(tensor, write, lambda: tensor.cpu().numpy())

        return by_torch
    cupy = request.getfixturevalue("cupy")

    def by_cupy(nbytes: int) -> Memory:
        if request.param == "slab":  # cudaMalloc itself, past the pool
            pointer = cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
            array = cupy.ndarray(nbytes, cupy.uint8, memptr=pointer)
        else:
            array = cupy.empty(nbytes, cupy.uint8)
        array.fill(0xA5)
        cupy.cuda.Device().synchronize()

        def write(at: int, data: Any) -> None:
            array[at : at + data.size] = cupy.asarray(data)
            cupy.cuda.Device().synchronize()

        return Memory(array, write, lambda: array.get())

    return by_cupy


def a_peer(start_node: StartNode, connect: Connect, length: int, count_of: int) -> Peer:
    room = max(64 * MIB, 4 * count_of * (length + 8192))
    node = start_node(memory=-(-room // (32 * MIB)) * 32 * MIB, slab_bytes=32 * MIB)
    return connect(node, block_bytes=length)


@pytest.mark.parametrize("length", SIZES)
def test_every_size_there_and_back(
    start_node: StartNode, connect: Connect, make: Callable[[int], Memory], length: int
) -> None:
    n = max(2, min(16, 32 * MIB // length))
    peer, keys, pitch = a_peer(start_node, connect, length, n), keys_of(n), length + 64
    content = blocks_of(keys, length)
    source, target = make(n * pitch), make(n * pitch)
    for i in range(n):
        source.write(i * pitch, content[i])
    put_from, get_into = peer.register(source.array), peer.register(target.array)
    offsets = np.arange(n, dtype=np.uint64) * np.uint64(pitch)

    assert count(peer.put_from(keys, put_from.slices(offsets, length))) == {STORED: n}
    assert count(peer.get_into(keys, get_into.slices(offsets[::-1], length), checksum=True)) == {HIT: n}

    got = target.read().reshape(n, pitch)[::-1]
    assert (got[:, :length] == content).all()
    assert (got[:, length:] == 0xA5).all()


def test_random_batches_at_random_places(
    start_node: StartNode, connect: Connect, make: Callable[[int], Memory]
) -> None:
    dice = random.Random(4)
    peer = a_peer(start_node, connect, 64 * KIB, 200)
    memory = make(24 * MIB)
    buffer = peer.register(memory.array)
    for turn in range(12):
        n = dice.choice([1, 2, 7, 64, 200])
        length = dice.choice([1, 100, 4096, 5001, 64 * KIB])
        keys = keys_of(n, seed=turn)
        content = blocks_of(keys, length)
        offsets = np.array(sorted(dice.sample(range(24 * MIB // (64 * KIB) - 1), n)), np.uint64) * np.uint64(
            64 * KIB
        )
        offsets += np.uint64(dice.choice([0, 1, 8, 16, 100]))
        for at, row in zip(offsets.tolist(), content, strict=True):
            memory.write(at, row)
        assert count(peer.put_from(keys, buffer.slices(offsets, length))) == {STORED: n}
        memory.write(0, np.full(24 * MIB, 0x5A, np.uint8))

        order = dice.sample(range(n), n)
        asked = np.concatenate([keys[order], keys_of(3, seed=1000 + turn)])
        places = np.concatenate([offsets, [np.uint64(0)] * 3])
        status = peer.get_into(asked, buffer.slices(places, np.where(np.arange(n + 3) < n, length, 1)))

        assert status.tolist() == [HIT] * n + [MISS] * 3
        got = memory.read()
        expected = np.full(24 * MIB, 0x5A, np.uint8)
        for at, i in zip(offsets.tolist(), order, strict=True):
            expected[at : at + length] = content[i]
        assert (got == expected).all()


def test_host_and_gpu_slices_in_one_batch(start_node: StartNode, connect: Connect, cupy: Any) -> None:
    peer, keys = a_peer(start_node, connect, 64 * KIB, 8), keys_of(8)
    content = blocks_of(keys, 64 * KIB)
    host = peer.register(content.copy())
    assert count(peer.put_from(keys, host.split(64 * KIB))) == {STORED: 8}
    on_host = np.zeros((8, 64 * KIB), np.uint8)
    on_gpu = cupy.zeros((8, 64 * KIB), cupy.uint8)
    a, b = peer.register(on_host).split(64 * KIB), peer.register(on_gpu).split(64 * KIB)

    mixed = np.where(np.arange(8) % 2 == 0, a, b)
    assert count(peer.get_into(keys, mixed)) == {HIT: 8}

    assert (on_host[::2] == content[::2]).all()
    assert (on_gpu.get()[1::2] == content[1::2]).all()


def test_a_put_waits_for_the_stream_that_makes_the_blocks(
    start_node: StartNode, connect: Connect, cupy: Any
) -> None:
    peer, keys = a_peer(start_node, connect, 4 * MIB, 4), keys_of(4)
    content = blocks_of(keys, 4 * MIB)
    source, made = cupy.zeros((4, 4 * MIB), cupy.uint8), cupy.asarray(content)
    heavy = cupy.ones(1 << 26, cupy.float32)
    buffer = peer.register(source)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(200):  # what the copy below has to wait for
            heavy *= cupy.float32(1.0001)
        source[...] = made

    assert count(peer.put_from(keys, buffer.split(4 * MIB), stream=stream)) == {STORED: 4}

    back = np.zeros((4, 4 * MIB), np.uint8)
    assert count(peer.get_into(keys, peer.register(back).split(4 * MIB))) == {HIT: 4}
    assert (back == content).all()


def test_what_is_launched_after_a_get_sees_the_blocks(
    start_node: StartNode, connect: Connect, cupy: Any
) -> None:
    peer, keys = a_peer(start_node, connect, MIB, 16), keys_of(16)
    content = blocks_of(keys, MIB)
    peer.put_from(keys, peer.register(content.copy()).split(MIB))
    target = cupy.zeros((16, MIB), cupy.uint8)
    slices = peer.register(target).split(MIB)
    expected = content.astype(np.int64).sum(axis=1).tolist()
    stream = cupy.cuda.Stream(non_blocking=True)
    for _ in range(10):
        with stream:
            target[...] = 0
        assert count(peer.get_into(keys, slices, stream=stream)) == {HIT: 16}
        with stream:
            sums = target.astype(cupy.int64).sum(axis=1)
        stream.synchronize()
        assert sums.get().tolist() == expected


def test_a_strided_view_is_refused(start_node: StartNode, connect: Connect, cupy: Any) -> None:
    peer = a_peer(start_node, connect, 4096, 4)
    with pytest.raises(LocalError, match="contiguous"):
        peer.register(cupy.zeros((8, 8), cupy.uint8)[:, ::2])


@pytest.mark.parametrize("kind", ["managed", "async pool"])
def test_memory_that_no_nic_can_be_given_is_staged_and_says_why(
    start_node: StartNode, connect: Connect, cupy: Any, kind: str
) -> None:
    peer, keys = a_peer(start_node, connect, 64 * KIB, 8), keys_of(8)
    try:
        pointer = (
            cupy.cuda.malloc_managed(8 * 64 * KIB)
            if kind == "managed"
            else cupy.cuda.malloc_async(8 * 64 * KIB)
        )
    except cupy.cuda.runtime.CUDARuntimeError as exc:
        pytest.skip(f"this GPU has no {kind} memory: {exc}")
    array: Any = cupy.ndarray((8, 64 * KIB), cupy.uint8, memptr=pointer)
    array[...] = cupy.asarray(blocks_of(keys, 64 * KIB))
    cupy.cuda.Device().synchronize()
    buffer = peer.register(array)

    assert buffer.get_rung.name == "staged"
    assert ("managed" if kind == "managed" else "pool") in buffer.get_rung.reason
    assert count(peer.put_from(keys, buffer.split(64 * KIB))) == {STORED: 8}
    array[...] = 0
    cupy.cuda.Device().synchronize()
    assert count(peer.get_into(keys, buffer.split(64 * KIB))) == {HIT: 8}
    assert (array.get() == blocks_of(keys, 64 * KIB)).all()


def test_gathered_pages_are_kept_and_come_back(start_node: StartNode, connect: Connect, cupy: Any) -> None:
    """A cache's pages, packed by the kernel, put, got, unpacked: what an engine does."""
    from memkv.gpudirect import checksum, layouts, pages

    cache = [
        cupy.random.RandomState(i).randint(0, 1 << 15, (2, 40, 16, 2, 64), dtype=cupy.int32) for i in range(2)
    ]
    before = [layer.get() for layer in cache]
    layout = layouts.vllm_kv_first(cache)
    table = np.random.default_rng(2).permutation(40).astype(np.int32).reshape(10, 4)
    length = layout.block_bytes(4)
    peer, keys = a_peer(start_node, connect, length, 10), keys_of(10)
    packed = cupy.zeros((10, length), cupy.uint8)
    places = packed.data.ptr + np.arange(10, dtype=np.uint64) * np.uint64(length)
    buffer = peer.register(packed)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()

    pages.gather(layout, table, places, stream=stream)
    sums = checksum.checksums(places, length, stream=stream)
    assert count(peer.put_from(keys, buffer.split(length), stream=stream)) == {STORED: 10}
    due = sums.get()
    with stream:
        packed[...] = 0
        for layer in cache:
            layer[...] = 0
    assert count(peer.get_into(keys, buffer.split(length), stream=stream)) == {HIT: 10}
    verdicts = checksum.verify(places, length, due, stream=stream)
    pages.scatter(layout, table, places, stream=stream)
    stream.synchronize()

    assert verdicts.get().all()
    assert all((layer.get() == b).all() for layer, b in zip(cache, before, strict=True))
