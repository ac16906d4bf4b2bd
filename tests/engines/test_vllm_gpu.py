"""vLLM, no host tier: the connector between KV caches and memkv, in vLLM's scheduler, at a real node."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.connectors.settings import Settings
from memkv.rdma.errors import LocalError
from memkv.status import Status
from memkv.store.node import NodeThread
from tests.nodes import NodeProcess, StartNode, address_of

from .vllm_engine import LAYERS, PAGE, TOKENS, Engine, cache_config, model_folder, vllm_config

from vllm.config import KVTransferConfig  # isort: skip
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # isort: skip
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole  # isort: skip
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory  # isort: skip
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key  # isort: skip

from memkv.connectors import vllm_plugin  # isort: skip
from memkv.connectors.vllm_gpu import MemKVConnector  # isort: skip
from memkv.connectors.vllm_gpu_worker import piece_key  # isort: skip

pytest_plugins = "tests.nodes"

GPU = "memkv.connectors.vllm_gpu"
LAYOUTS = ["BLHNC", "LBHNC"]  # one piece a block, and one for each layer
PROMPT = 5 * TOKENS + 3
PATIENT = {"get_timeout": 20, "put_timeout": 20}  # on a loaded machine, too

StartEngine = Callable[..., Engine]


@pytest.fixture
def fabric_name() -> str:
    return "tcp"


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Any]:
    """A VllmConfig for a node. ``extra``: of kv_connector_extra_config, ``transfer``: of
    --kv-transfer-config, the rest: see vllm_engine.vllm_config.
    """

    def make(node: Any, *, extra: Any = None, transfer: Any = None, **options: Any) -> Any:
        settings = {
            "kv_connector": "MemKVConnector",
            "kv_connector_module_path": GPU,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"nodes": address_of(node), "fabric": "tcp"}
            | PATIENT
            | (extra or {}),
        }
        return vllm_config(model_folder(tmp_path / "model"), settings | (transfer or {}), **options)

    return make


@pytest.fixture
def start_engine(configure: Callable[..., Any]) -> Iterator[StartEngine]:
    """Starts engines at a node: see ``configure`` and Engine."""
    with ExitStack() as stack:

        def start(node: Any, **options: Any) -> Engine:
            engine = {k: options.pop(k) for k in ("blocks", "windows") if k in options}
            config = configure(node, **options)
            return stack.enter_context(Engine(config, tp=options.get("tp", 1), **engine))

        yield start


def prompt(n: int = PROMPT, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60000, n).tolist()


def block_keys(engine: Engine, name: str, group: int = 0) -> list[bytes]:
    """vLLM's keys of a request's blocks."""
    return [make_offload_key(h, group) for h in engine.done[name].block_hashes]


def delete(engine: Engine, keys: list[bytes], worker: int = 0, piece: Any = 0) -> None:
    """Deletes a worker's piece of each of these blocks from the node."""
    mine = engine.manager._identities[worker].keys(keys) ^ np.asarray(piece, np.uint8)
    assert (engine.manager._peer.delete(mine) == Status.DONE).all()


# --- loading ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_one_engine_computed_another_loads(
    node: NodeThread, start_engine: StartEngine, layout: str
) -> None:
    first, second = start_engine(node, layout=layout), start_engine(node, layout=layout)
    assert first.run(first.add(prompt())) == 0
    first.settle()
    assert second.run(second.add(prompt())) == 5 * TOKENS
    longer = prompt() + prompt(40, seed=1)
    assert second.run(second.add(longer[: 3 * TOKENS] + longer[PROMPT:])) == 3 * TOKENS


def test_layers_beside_each_other_are_one_block_of_the_node(
    node: NodeThread, start_engine: StartEngine
) -> None:
    held = []
    for layout in LAYOUTS:
        engine = start_engine(node, layout=layout)
        engine.run(engine.add(prompt()))
        engine.settle()
        stats = node.call(lambda e=engine: node.node.namespaces.by_name[e.manager._peer.namespace].stats())
        held.append(stats["blocks"])
    assert held == [5, 5 * LAYERS]


def test_the_connector_asks_for_the_layout_of_one_piece(configure: Callable[..., Any], node: Any) -> None:
    config = configure(node)
    connector = KVConnectorFactory.get_connector_class(config.kv_transfer_config)
    assert connector.get_required_kvcache_layout(config) == "BLHNC"


def test_workers_load_what_workers_stored(node: NodeThread, start_engine: StartEngine) -> None:
    first, second = start_engine(node, tp=2), start_engine(node, tp=2)
    first.run(first.add(prompt()))
    first.settle()
    assert second.run(second.add(prompt())) == 5 * TOKENS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_with_sliding_windows(node: NodeThread, start_engine: StartEngine, layout: str) -> None:
    options: dict[str, Any] = {"layout": layout, "windows": (None, 3 * TOKENS)}
    first, second = start_engine(node, **options), start_engine(node, **options)
    first.run(first.add(prompt()))
    first.settle()
    assert second.run(second.add(prompt())) == 5 * TOKENS


def test_blocks_that_are_held_are_not_stored_again(node: NodeThread, start_engine: StartEngine) -> None:
    engine = start_engine(node)
    name = engine.add(prompt())
    engine.run(name)
    engine.settle()
    context = ReqContext(req_id="x")
    again = engine.manager.prepare_store(block_keys(engine, name), context)
    assert again.keys_to_store == []
    assert engine.manager._jobs == {}


# --- loads that fail ---


def test_what_was_evicted_after_the_lookup_is_computed(node: NodeThread, start_engine: StartEngine) -> None:
    first, second = start_engine(node), start_engine(node)
    name = first.add(prompt())
    first.run(name)
    first.settle()
    other = second.add(prompt())
    second.before_transfers = lambda: delete(second, [block_keys(first, name)[2]])
    assert second.run(other) == 2 * TOKENS
    second.run(second.add(prompt()))
    second.settle()
    third = start_engine(node)
    assert third.run(third.add(prompt())) == 5 * TOKENS, "the block that was missing is stored again"


@pytest.mark.parametrize("windows", [(None,), (None, 3 * TOKENS)])
def test_a_scheduler_that_plans_a_step_ahead(
    node: NodeThread, start_engine: StartEngine, windows: tuple[int | None, ...]
) -> None:
    first, second = (start_engine(node, ahead=True, windows=windows) for _ in range(2))
    name = first.add(prompt(), answer=TOKENS)
    assert first.run(name) == 0
    first.settle()
    other = second.add(prompt(), answer=TOKENS)
    second.before_transfers = lambda: delete(second, [block_keys(first, name)[2]])
    assert second.run(other) <= 2 * TOKENS
    assert second.before_transfers is None, "a load failed"
    assert second.attended[False] == 0
    second.run(second.add(prompt()))
    second.settle()
    second.drop_gpu_cache()
    assert second.run(second.add(prompt())) == 5 * TOKENS


def test_a_piece_that_is_missing_is_a_block_that_is_missing(
    node: NodeThread, start_engine: StartEngine
) -> None:
    first, second = start_engine(node, layout="LBHNC"), start_engine(node, layout="LBHNC")
    name = first.add(prompt())
    first.run(name)
    first.settle()
    delete(first, [block_keys(first, name)[1]], piece=piece_key(0, LAYERS, PAGE))
    loaded = [second.run(second.add(prompt()))]
    while loaded[-1] != 5 * TOKENS:
        assert len(loaded) < 4, "it is not whole again"
        second.settle()
        second.drop_gpu_cache()
        loaded.append(second.run(second.add(prompt())))
    assert loaded[0] == TOKENS


def test_what_one_worker_cannot_load_all_compute(node: NodeThread, start_engine: StartEngine) -> None:
    first, second = start_engine(node, tp=2), start_engine(node, tp=2)
    name = first.add(prompt())
    first.run(name)
    first.settle()
    other = second.add(prompt())
    second.before_transfers = lambda: delete(second, [block_keys(first, name)[3]], worker=1)
    assert second.run(other) == 3 * TOKENS


def test_what_one_worker_does_not_hold_is_no_hit(node: NodeThread, start_engine: StartEngine) -> None:
    first, second = start_engine(node, tp=2), start_engine(node, tp=2)
    name = first.add(prompt())
    first.run(name)
    first.settle()
    delete(first, [block_keys(first, name)[3]], worker=1)
    second.before_transfers = lambda: None
    assert second.run(second.add(prompt())) == 3 * TOKENS
    assert second.before_transfers is None, "three blocks were loaded"


def test_a_failed_load_of_several_groups_computes_the_whole_request(
    node: NodeThread, start_engine: StartEngine
) -> None:
    options: dict[str, Any] = {"windows": (None, 3 * TOKENS)}
    first, second = start_engine(node, **options), start_engine(node, **options)
    name = first.add(prompt())
    first.run(name)
    first.settle()
    other = second.add(prompt())
    second.before_transfers = lambda: delete(second, [block_keys(first, name)[2]])
    assert second.run(other) <= 2 * TOKENS  # it may look up again, and knows that the third is missing


def test_a_node_that_dies_before_the_load(
    start_process: Callable[..., NodeProcess], start_engine: StartEngine
) -> None:
    node = start_process()
    first, second = start_engine(node), start_engine(node)
    first.run(first.add(prompt()))
    first.settle()
    other = second.add(prompt())
    second.before_transfers = node.kill
    assert second.run(other) == 0
    assert second.run(second.add(prompt(seed=1))) == 0, "and the engine goes on"
    second.settle()
    assert second.manager._kept == {}, "what was not stored does not count as stored"


# --- a node that does not answer ---


def test_a_stopped_node_is_a_miss_and_never_a_wait(
    start_process: Callable[..., NodeProcess], start_engine: StartEngine
) -> None:
    node = start_process()
    quick = {"get_timeout": 0.3, "put_timeout": 0.3}
    first, second = start_engine(node), start_engine(node, extra=quick)
    name = first.add(prompt())
    first.run(name)
    first.settle()
    manager, context = second.manager, ReqContext(req_id="by hand")
    key = block_keys(first, name)[0]
    with node.stopped():
        seen = []
        assert manager.lookup(key, context) is LookupResult.RETRY
        manager._lookups.flush()
        while not seen or seen[-1] is LookupResult.RETRY:
            seen.append(manager.lookup(key, context))
        assert seen[0] is LookupResult.RETRY, "the call came back, and the node had not answered"
        assert seen[-1] is LookupResult.MISS
        manager.on_request_finished(context)
        assert second.run(second.add(prompt())) == 0
        second.settle()
        assert second.manager._kept == {}


def test_what_could_not_be_stored_is_offered_again(
    start_process: Callable[..., NodeProcess], start_engine: StartEngine
) -> None:
    node = start_process()
    engine = start_engine(node, extra={"get_timeout": 0.3, "put_timeout": 0.3})
    with node.stopped():
        engine.run(engine.add(prompt()))
        engine.settle()
    other = start_engine(node)
    for _ in range(20):  # until the node is joined again
        name = engine.add(prompt())
        engine.run(name)
        engine.settle()
        if set(block_keys(engine, name)) <= set(engine.manager._kept):
            break
    assert other.run(other.add(prompt())) == 5 * TOKENS


# --- what may not hit ---


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"revision": "other"},
        {"layout": "LBHNC"},
        {"tp": 2},
        {"windows": (None, 3 * TOKENS)},
        {"algorithm": "sha256"},
        {"extra": {"salt": "tenant"}},
        {"extra": {"namespace": "staging"}},
    ],
    ids=lambda change: ",".join(change) if isinstance(change, dict) else str(change),
)
def test_another_configuration_never_hits(
    node: NodeThread, start_engine: StartEngine, change: dict[str, Any]
) -> None:
    first = start_engine(node)
    first.run(first.add(prompt()))
    first.settle()
    other = start_engine(node, **change)
    assert other.run(other.add(prompt())) == 0
    other.settle()
    same = start_engine(node)
    assert same.run(same.add(prompt())) == 5 * TOKENS, "and the same one does"


def test_a_request_with_another_salt_never_hits(node: NodeThread, start_engine: StartEngine) -> None:
    first, second = start_engine(node), start_engine(node)
    first.run(first.add(prompt(), cache_salt="one"))
    first.settle()
    assert second.run(second.add(prompt(), cache_salt="two")) == 0
    assert second.run(second.add(prompt(), cache_salt="one")) == 5 * TOKENS


def test_after_a_reset_nothing_from_before_is_found(node: NodeThread, start_engine: StartEngine) -> None:
    engine = start_engine(node)
    engine.run(engine.add(prompt()))
    engine.settle()
    engine.drop_gpu_cache()
    assert engine.connector.reset_cache()
    assert engine.run(engine.add(prompt())) == 0, "weights may have changed under the same name"
    engine.settle()
    engine.drop_gpu_cache()
    assert engine.run(engine.add(prompt())) == 5 * TOKENS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_requests_on_a_node_that_evicts(
    start_node: StartNode, start_engine: StartEngine, layout: str
) -> None:
    """Whatever is loaded, evicted and computed: what is attended to is right (Engine.run compares it all)."""
    node = start_node(memory=2 << 20, slab_bytes=1 << 20, grace_ms=100)
    engines = [start_engine(node, layout=layout, blocks=48) for _ in range(2)]
    rng = np.random.default_rng(5)
    roots = [prompt(8 * TOKENS, seed) for seed in range(40)]
    loaded = 0
    for turn in range(64):
        engine = engines[turn % 2]
        root = roots[int(rng.integers(len(roots)))]
        name = engine.add(root[: int(rng.integers(20, len(root)))] + prompt(20, seed=100 + turn % 5))
        loaded += engine.run(name)
        engine.settle()
        engine.drop_gpu_cache()
    assert loaded
    stats = node.call(lambda: node.node.namespaces.by_name[engines[0].manager._peer.namespace].stats())
    assert stats["evictions"]


def test_a_scheduler_that_means_other_blocks_gets_none(node: NodeThread, start_engine: StartEngine) -> None:
    first, second = start_engine(node), start_engine(node)
    first.run(first.add(prompt()))
    first.settle()
    worker = second.workers[0].connector.connector_worker.worker
    worker._peer.namespace += "x"
    assert second.run(second.add(prompt())) == 0


# --- what is refused ---


def test_the_plug_in_makes_the_name_known(configure: Callable[..., Any], node: NodeThread) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    config = configure(node, transfer={"kv_connector_module_path": None})
    assert KVConnectorFactory.get_connector_class(config.kv_transfer_config) is MemKVConnector


@pytest.mark.parametrize(
    ("change", "knob"),
    [
        ({"transfer": {"kv_load_failure_policy": "fail"}}, "kv_load_failure_policy"),
        ({"algorithm": "xxhash"}, "prefix-caching-hash-algo"),
        ({"extra": {"blocks_per_chunk": 2}}, "blocks_per_chunk"),
        ({"extra": {"block_size": 32}}, "block_size"),
        ({"extra": {"sync_load_budget_bytes": 1 << 30}}, "sync_load_budget_bytes"),
        ({"extra": {"get_timeuot": 1}}, "get_timeout"),
        ({"extra": {"spec_name": "CPUOffloadingSpec"}}, "spec_name"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_name(
    node: NodeThread,
    configure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    knob: str,
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    config = configure(node, **change)
    with pytest.raises(LocalError, match=knob):
        KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, cache_config(16, "BLHNC"))


def test_a_hash_seed_for_all_makes_any_algorithm_fit(
    node: NodeThread, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    config = configure(node, algorithm="xxhash")
    caches = cache_config(16, "BLHNC")
    KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, caches).shutdown()


def test_vllms_own_connector_is_refused(node: NodeThread, configure: Callable[..., Any]) -> None:
    spec = {"spec_name": "MemKVOffloadingSpec", "spec_module_path": GPU}
    config = configure(
        node, extra=spec, transfer={"kv_connector": "OffloadingConnector", "kv_connector_module_path": None}
    )
    config.kv_transfer_config.kv_connector_extra_config |= {"nodes": address_of(node), **spec}
    with pytest.raises(LocalError, match="MemKVConnector"):
        KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, cache_config(16, "BLHNC"))


def test_pipeline_parallelism_is_refused(node: NodeThread, configure: Callable[..., Any]) -> None:
    config = configure(node)
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(LocalError, match="pipeline"):
        KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, cache_config(16, "BLHNC"))


def test_what_the_documentation_says_to_paste() -> None:
    vllm_plugin.register()
    text = (Path(__file__).parents[2] / "docs/engines/vllm.md").read_text()
    pasted = [
        json.loads(part) for part in re.findall(r"--kv-transfer-config '\n(\{.*?\})'\n", text, re.DOTALL)
    ]
    tier, gpu = (KVTransferConfig(**options) for options in pasted)
    (entry,) = tier.kv_connector_extra_config["secondary_tiers"]
    assert SecondaryTierFactory.get_tier_class(entry).__name__ == "MemKVTier"
    Settings.read(entry, ignore=("type",))
    assert KVConnectorFactory.get_connector_class(gpu) is MemKVConnector
    Settings.read(gpu.kv_connector_extra_config)
    for field in fields(Settings):
        assert f"`{field.name}`" in text
