"""The transformers connector against the real package: tiny random models, real nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.rdma.errors import LocalError
from memkv.store.node import NodeThread

from ..nodes import StartNode, address_of

pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")
pytest.importorskip("transformers", reason="transformers is not installed: script/test --engines brings it")

import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    T5Config,
)

from memkv.connectors.transformers import PrefixStore
from memkv.connectors.transformers_identity import check, config_digest, weights_digest

pytest_plugins = "tests.nodes"
BLOCK = 16
PROMPT = 100  # six full blocks and four tokens
Open = Callable[..., PrefixStore]

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 512,
    "pad_token_id": 0,
}


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | more))).to(dtype).eval()


def qwen(dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """Its head dimension is not hidden / heads."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=32)).to(dtype).eval()


def prompt(seed: int = 0, tokens: int = PROMPT) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 512, (1, tokens)))


@torch.no_grad()
def forward(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of the next token; the cache grows."""
    logits: torch.Tensor = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
    return logits


def computed(model: PreTrainedModel, ids: torch.Tensor, cut: int = 0) -> tuple[torch.Tensor, DynamicCache]:
    """Logits and cache of a prompt that was computed in two parts, the first of ``cut`` tokens."""
    cache = DynamicCache(config=model.config)
    if cut:
        forward(model, ids[:, :cut], cache)
    return forward(model, ids[:, cut:], cache), cache


@pytest.fixture
def node(start_node: StartNode) -> NodeThread:
    return start_node(memory=64 << 20)


@pytest.fixture
def open_store(node: NodeThread, fabric_name: str) -> Iterator[Open]:
    stores: list[PrefixStore] = []

    def open_one(model: PreTrainedModel, **options: Any) -> PrefixStore:
        settings = {"nodes": address_of(node), "fabric": fabric_name} | options.pop("settings", {})
        stores.append(PrefixStore.of_model(model, settings, **({"buffer_bytes": 1 << 20} | options)))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


# --- restoring ---


@pytest.mark.parametrize("make", [llama, qwen])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_restored_prefix_gives_the_same_bits(open_store: Open, make: Any, dtype: torch.dtype) -> None:
    model, ids = make(dtype=dtype), prompt()
    due, cache = computed(model, ids, cut=96)  # the same kernels with the same shapes as after restoring

    assert open_store(model).save_prefix(cache, ids) == 96
    restored, n = open_store(model).restore_prefix(ids)

    assert n == 96
    for layer, original in zip(restored.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, original.keys[:, :, :96])
        assert torch.equal(layer.values, original.values[:, :, :96])
    assert torch.equal(forward(model, ids[:, n:], restored), due)


def test_logits_are_near_those_of_one_pass(open_store: Open) -> None:
    """One pass multiplies other shapes, for which BLAS adds in another order."""
    model, ids = llama(), prompt()
    due, cache = computed(model, ids)
    open_store(model).save_prefix(cache, ids)

    restored, n = open_store(model).restore_prefix(ids)

    torch.testing.assert_close(forward(model, ids[:, n:], restored), due, rtol=1e-4, atol=1e-5)


def test_generate_goes_on_as_if_nothing_had_been_restored(open_store: Open) -> None:
    model, ids = llama(), prompt()
    due = model.generate(ids, max_new_tokens=24, do_sample=False)
    _, cache = computed(model, ids)
    open_store(model).save_prefix(cache, ids)

    restored, n = open_store(model).restore_prefix(ids)
    again = model.generate(ids, past_key_values=restored, max_new_tokens=24, do_sample=False)

    assert n == 96
    assert torch.equal(again, due)
    assert len(set(due[0, PROMPT:].tolist())) > 1


def test_the_cache_of_a_conversation_is_kept_and_found_by_the_next_turn(open_store: Open) -> None:
    model, ids = llama(), prompt()
    store = open_store(model)
    cache = DynamicCache(config=model.config)
    answer = model.generate(ids, past_key_values=cache, max_new_tokens=30, min_new_tokens=30, do_sample=False)

    kept = store.save_prefix(cache, answer)  # the last token of the answer is not in the cache
    following = torch.cat([answer, prompt(1, 20)], dim=1)

    assert kept == (PROMPT + 29) // BLOCK * BLOCK
    assert open_store(model).restore_prefix(following)[1] == kept


def test_into_a_static_cache(open_store: Open) -> None:
    model, ids = llama(), prompt()
    _, cache = computed(model, ids, cut=96)
    open_store(model).save_prefix(cache, ids)
    store = open_store(model)

    static, n = store.restore_prefix(ids, into=StaticCache(model.config, max_cache_len=160))

    assert n == 96
    assert int(static.get_seq_length()) == 96
    for layer, original in zip(static.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys[:, :, :96], original.keys[:, :, :96])
    due = forward(model, ids[:, 96:], store.restore_prefix(ids)[0])
    torch.testing.assert_close(forward(model, ids[:, n:], static), due, rtol=1e-4, atol=1e-5)


def test_out_of_a_static_cache(open_store: Open) -> None:
    model, ids = llama(), prompt()
    static = StaticCache(model.config, max_cache_len=160)
    forward(model, ids, static)

    assert open_store(model).save_prefix(static, ids) == 96

    restored, _ = open_store(model).restore_prefix(ids)
    assert torch.equal(restored.layers[2].values, static.layers[2].values[:, :, :96])


def test_a_row_of_a_batch(open_store: Open) -> None:
    model = llama()
    batch = torch.cat([prompt(0), prompt(1)])
    _, cache = computed(model, batch)
    store = open_store(model)
    with pytest.raises(LocalError, match="2 rows"):
        store.save_prefix(cache, batch[1])
    with pytest.raises(LocalError, match="row 2 of 2"):
        store.save_prefix(cache, batch[1], row=2)

    assert store.save_prefix(cache, batch[1], row=1) == 96

    assert store.match(batch[0]) == 0
    restored, n = store.restore_prefix(batch[1])
    assert torch.equal(restored.layers[0].keys[0], cache.layers[0].keys[1, :, :n])


def test_buffers_smaller_than_a_prefix(open_store: Open) -> None:
    model, ids = llama(), prompt(tokens=400)
    _, cache = computed(model, ids)
    small = {"buffer_bytes": 2 * 3 * 2 * 2 * 16 * BLOCK * 4}  # two blocks

    assert open_store(model, **small).save_prefix(cache, ids) == 400
    restored, n = open_store(model, **small).restore_prefix(ids)

    assert n == 384
    for layer, original in zip(restored.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, original.keys[:, :, :n])
        assert torch.equal(layer.values, original.values[:, :, :n])


# --- how much is restored ---


@pytest.mark.parametrize(("tokens", "held"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (100, 96)])
def test_the_last_token_is_left_to_compute(open_store: Open, tokens: int, held: int) -> None:
    model, ids = llama(), prompt()
    _, cache = computed(model, ids)
    store = open_store(model)
    store.save_prefix(cache, ids)

    assert store.match(ids[:, :tokens]) == held
    assert store.restore_prefix(ids[:, :tokens])[1] == held


def test_only_the_blocks_in_front_of_the_first_gap(open_store: Open) -> None:
    model, ids = llama(), prompt()
    _, cache = computed(model, ids)
    store = open_store(model)
    store.save_prefix(cache, ids)
    store.peer.delete(store._keys(ids[0].numpy())[2:3])

    assert store.match(ids) == 32
    restored, n = store.restore_prefix(ids)
    assert n == 32
    assert restored.layers[0].keys.shape[2] == 32
    assert store.save_prefix(cache, ids) == 96  # and the gap is filled
    assert store.match(ids) == 96


def test_a_block_that_goes_between_match_and_get(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(), prompt()
    due, cache = computed(model, ids, cut=48)
    store = open_store(model)
    store.save_prefix(cache, ids)
    match = store.peer.match

    def match_and_lose(keys: Any, **options: Any) -> int:
        held = match(keys, **options)
        store.peer.delete(keys[3:4])
        return held

    monkeypatch.setattr(store.peer, "match", match_and_lose)
    restored, n = store.restore_prefix(ids)

    assert n == 48
    assert torch.equal(forward(model, ids[:, n:], restored), due)


def test_a_store_that_is_gone_is_a_miss(open_store: Open, node: NodeThread) -> None:
    model, ids = llama(), prompt()
    due, cache = computed(model, ids)
    store = open_store(model, settings={"get_timeout": 0.5, "put_timeout": 0.5})
    store.save_prefix(cache, ids)
    node.stop()

    restored, n = store.restore_prefix(ids)

    assert n == 0
    assert store.match(ids) == 0
    assert torch.equal(forward(model, ids, restored), due)
    assert store.save_prefix(cache, ids) == 0


# --- what must not hit ---


def test_another_model_cannot_hit(open_store: Open) -> None:
    ids = prompt()
    model = llama()
    _, cache = computed(model, ids)
    assert open_store(model, name="m").save_prefix(cache, ids) == 96
    assert open_store(llama(), name="m").match(ids) == 96  # the same seed: the same model

    others: dict[str, Any] = {
        "other weights": open_store(llama(seed=1), name="m"),
        "other name": open_store(model, name="n"),
        "revision": open_store(model, name="m", revision="v2"),
        "fingerprint": open_store(model, name="m", fingerprint="mine"),
        "config": open_store(llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), name="m"),
        "dtype": open_store(llama(dtype=torch.bfloat16), name="m"),
        "block size": open_store(model, name="m", block_tokens=32),
        "salt": open_store(model, name="m", settings={"salt": "tenant"}),
        "label": open_store(model, name="m", labels={"adapter": "a"}),
    }
    assert {why: store.match(ids) for why, store in others.items()} == dict.fromkeys(others, 0)


def test_one_changed_weight_changes_the_digest() -> None:
    model = llama()
    before = weights_digest(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] += 1
    assert weights_digest(model) != before


def test_what_kv_does_not_depend_on_is_not_in_the_digest() -> None:
    plain = LlamaConfig(**LLAMA)
    assert config_digest(LlamaConfig(**LLAMA, eos_token_id=7, use_cache=False)) == config_digest(plain)
    assert config_digest(LlamaConfig(**LLAMA | {"rms_norm_eps": 1e-3})) != config_digest(plain)


def test_windows_are_refused() -> None:
    for config in (
        MistralConfig(**LLAMA, sliding_window=32),
        Gemma2Config(**LLAMA, head_dim=16, sliding_window=32),
    ):
        with pytest.raises(LocalError, match="DynamicSlidingWindowLayer"):
            PrefixStore({"nodes": "x"}, config, name="m", fingerprint="f", dtype=torch.float32)


def test_models_whose_kv_is_not_of_the_token_ids_alone_are_refused() -> None:
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for config, why in (
        (LlamaConfig(**LLAMA, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "dynamic RoPE"),
        (LlamaConfig(**LLAMA, rope_parameters=long | {"original_max_position_embeddings": 64}), "longrope"),
        (T5Config(), "encoder"),
        (LlavaConfig(text_config=LlamaConfig(**LLAMA)), "images"),
    ):
        with pytest.raises(LocalError, match=why):
            PrefixStore({"nodes": "x"}, config, name="m", fingerprint="f", dtype=torch.float32)
    check(LlavaConfig(text_config=LlamaConfig(**LLAMA)), text_only=True)
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    check(LlamaConfig(**LLAMA, rope_parameters=linear), text_only=False)


def test_caches_of_another_kind_are_refused(open_store: Open) -> None:
    model, ids = llama(), prompt()
    store = open_store(model)
    _, halves = computed(llama(dtype=torch.bfloat16), ids)
    _, heads = computed(llama(num_key_value_heads=4), ids)
    _, layers = computed(llama(num_hidden_layers=2), ids)
    window = DynamicCache(config=MistralConfig(**LLAMA, sliding_window=32))
    for cache, why in (
        (halves, "bfloat16"),
        (heads, r"\(4, 16\)"),
        (layers, "2 layers"),
        (window, "SlidingWindow"),
    ):
        with pytest.raises(LocalError, match=why):
            store.save_prefix(cache, ids)
    with pytest.raises(LocalError, match="not empty"):
        store.restore_prefix(ids, into=computed(model, ids)[1])
    with pytest.raises(LocalError, match="for 64 tokens"):
        store.restore_prefix(ids, into=StaticCache(model.config, max_cache_len=64))
    with pytest.raises(LocalError, match="one sequence"):
        store.match(torch.zeros(2, 8, dtype=torch.long))
    with pytest.raises(LocalError, match="fingerprint"):
        PrefixStore({"nodes": "x"}, model.config, name="m", fingerprint="", dtype=torch.float32)
    assert store.save_prefix(DynamicCache(config=model.config), ids) == 0


# --- other processes ---

READER = """
import json, sys, torch
from tests.engines.test_transformers import forward, llama, prompt
from memkv.connectors.transformers import PrefixStore
torch.set_num_threads(int(sys.argv[2]))
model = llama()
with PrefixStore.of_model(model, {"nodes": sys.argv[1]}) as store:
    cache, n = store.restore_prefix(prompt())
print(json.dumps({"n": n, "logits": forward(model, prompt()[:, n:], cache)[0].tolist()}))
"""


def test_another_process_agrees(open_store: Open, node: NodeThread) -> None:
    model, ids = llama(), prompt()
    due, cache = computed(model, ids, cut=96)
    open_store(model).save_prefix(cache, ids)

    done = subprocess.run(
        [sys.executable, "-c", READER, address_of(node), str(torch.get_num_threads())],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["n"] == 96
    assert torch.equal(torch.tensor(found["logits"]), due[0])
