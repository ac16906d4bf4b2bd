"""The benchmark's transformer beside the one of transformers, and its torch backend."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from memkv.cli.shapes import Shape
from memkv.cli.transformer import NumpyModel, Weights, restorable

pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")
pytest.importorskip("transformers", reason="transformers is not installed: script/test --engines brings it")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memkv.cli.ttft_torch import TorchModel

SHAPE = Shape(
    name="small",
    layers=3,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=32,
    intermediate=96,
    vocab=128,
    rope_theta=5000.0,
    eps=1e-4,
)
OPTIONS = {"longest": 256, "block": 16, "chunk": 48}


def prompt(tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(tokens).integers(0, SHAPE.vocab, tokens)


def llama(weights: Weights) -> LlamaForCausalLM:
    """transformers' model with the benchmark's weights."""
    s = SHAPE
    config = LlamaConfig(
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        intermediate_size=s.intermediate,
        vocab_size=s.vocab,
        rms_norm_eps=s.eps,
        rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
        tie_word_embeddings=False,
    )
    state = {
        "model.embed_tokens.weight": weights.embed,
        "model.norm.weight": weights.norm,
        "lm_head.weight": weights.head.T,
    }
    ends = np.cumsum([s.heads, s.kv_heads]) * s.head_dim
    for i, w in enumerate(weights.layers):
        at = f"model.layers.{i}."
        for name, part in zip("qkv", np.split(w.qkv, ends, axis=1), strict=True):
            state[f"{at}self_attn.{name}_proj.weight"] = part.T
        gate, up = np.split(w.gate_up, 2, axis=1)
        state[f"{at}self_attn.o_proj.weight"] = w.out.T
        state[f"{at}mlp.gate_proj.weight"], state[f"{at}mlp.up_proj.weight"] = gate.T, up.T
        state[f"{at}mlp.down_proj.weight"] = w.down.T
        state[f"{at}input_layernorm.weight"], state[f"{at}post_attention_layernorm.weight"] = w.norm1, w.norm2
    model = LlamaForCausalLM(config)
    model.load_state_dict({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in state.items()})
    return model.eval()


@pytest.mark.parametrize("tokens", [2, 17, 100, 200])
def test_numpy_computes_what_transformers_llama_does(tokens: int) -> None:
    ours = NumpyModel(SHAPE, 1, **OPTIONS)
    theirs = llama(ours.weights)
    ids = prompt(tokens)
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids)[None], use_cache=True)

    np.testing.assert_allclose(ours.prefill(ids), out.logits[0, -1].numpy(), rtol=1e-3, atol=1e-4)
    for i, layer in enumerate(out.past_key_values.layers):
        for j, due in enumerate((layer.keys, layer.values)):
            np.testing.assert_allclose(ours._read(i, j, tokens), due[0].numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [2, 17, 100, 200])
def test_torch_computes_what_numpy_does(tokens: int) -> None:
    ours, torchs = NumpyModel(SHAPE, 1, **OPTIONS), TorchModel(SHAPE, 1, device="cpu", **OPTIONS)
    ids = prompt(tokens)

    np.testing.assert_allclose(torchs.prefill(ids), ours.prefill(ids), rtol=1e-3, atol=1e-4)
    full = tokens // 16
    np.testing.assert_allclose(torchs.pages[:full].numpy(), ours.pages[:full], rtol=1e-3, atol=1e-4)
    assert torchs.weights.fingerprint == ours.weights.fingerprint


def test_torch_goes_on_from_pages_with_the_same_bits() -> None:
    first, second = (TorchModel(SHAPE, 1, device="cpu", **OPTIONS) for _ in range(2))
    due = first.prefill(prompt(100))
    second.forget()
    start = restorable(100, 16)
    second.pages[: start // 16] = first.pages[: start // 16]

    assert np.array_equal(second.prefill(prompt(100), start), due)


def test_the_command_with_torch() -> None:
    command = [sys.executable, "-m", "memkv.cli.bench", "ttft", "--backend", "torch", "--tokens", "40,100"]
    done = subprocess.run(
        [*command, "--repeat", "1", "--json"], capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(done.stdout)

    assert found["heading"]["backend"].startswith("torch ")
    assert [row["hit_tokens"] for row in found["rows"]] == [32, 96]
    assert all(row["identical"] and row["errors"] == 0 for row in found["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "memkv.cli.bench", "ttft", "--backend", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "torch sees no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
