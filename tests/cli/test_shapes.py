"""Parameters, KV bytes and FLOPs beside published numbers and beside what a hand computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memkv.cli.cost_setup import GPUS, hbm_kv
from memkv.cli.shapes import LLAMA_3_8B, LLAMA_3_70B, Shape, find, from_config
from memkv.rdma.errors import LocalError

from .costs import setup

TINY = Shape(
    name="tiny", layers=2, hidden=8, intermediate=16, heads=4, kv_heads=2, head_dim=2, vocab=10, dtype_bytes=2
)


@pytest.mark.parametrize(
    ("shape", "params", "kv_bytes"),
    [  # parameters as the safetensors of meta-llama's repositories count them
        (LLAMA_3_8B, 8_030_261_248, 131_072),
        (LLAMA_3_70B, 70_553_706_496, 327_680),
    ],
)
def test_a_llama_has_its_published_size(shape: Shape, params: int, kv_bytes: int) -> None:
    assert (shape.params, shape.kv_bytes()) == (params, kv_bytes)


def test_flops_of_a_prefill_by_hand() -> None:
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # Q, K and V, O, MLP
    assert TINY.matmul_params == 2 * layer
    head, width = 8 * 10, 4 * 2
    assert TINY.prefill_flops(1) == 2 * 2 * layer + 2 * head + 2 * 4 * width
    pairs = (5 + 1) + (5 + 2) + (5 + 3)  # three tokens behind five
    assert TINY.prefill_flops(3, 5) == 2 * 2 * layer * 3 + 2 * head + 2 * 4 * width * pairs


def test_a_cached_prefix_saves_what_its_own_prefill_costs() -> None:
    head = 2 * LLAMA_3_8B.head_params  # of a token that is sampled from: once for each prefill
    whole, first, rest = (LLAMA_3_8B.prefill_flops(*a) for a in ((9000, 0), (4096, 0), (4904, 4096)))
    assert whole == pytest.approx(first + rest - head, rel=1e-12)


def test_flops_agree_with_kaplan() -> None:
    """C_forward = 2 N + 2 n_layer n_ctx d_attn a token (arXiv:2001.08361, table 1), N without embeddings."""
    tokens = 8192
    kaplan = tokens * (2 * LLAMA_3_70B.matmul_params + 2 * 80 * tokens * 64 * 128)
    assert LLAMA_3_70B.prefill_flops(tokens) == pytest.approx(kaplan, rel=1e-3)


def test_decode_reads_its_share_of_the_weights_and_its_own_cache() -> None:
    weights = (TINY.matmul_params + 80) * 2
    assert TINY.decode_bytes(100, 4) == weights / 4 + 100 * 2 * 2 * 2 * 2 * 2


def test_a_prefill_takes_no_less_than_reading_the_weights() -> None:
    one = setup().prefill_seconds(1)
    assert one == pytest.approx(16_060_522_496 / (3.35e12 * 0.7))
    assert setup().prefill_seconds(8192) == pytest.approx(LLAMA_3_8B.prefill_flops(8192) / (989e12 * 0.5))


def test_hbm_for_kv_cache_is_what_the_weights_leave() -> None:
    assert hbm_kv(LLAMA_3_70B, GPUS["h100"], 8) == int(8 * 80e9 * 0.9) - 2 * 70_553_706_496


def test_a_model_that_does_not_fit_is_refused() -> None:
    kv = hbm_kv(LLAMA_3_70B, GPUS["h100"], 1)
    with pytest.raises(LocalError, match="--gpus"):
        setup(shape=LLAMA_3_70B, hbm_kv=kv).check()


CONFIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def write(path: Path, **changes: object) -> str:
    path.write_text(json.dumps(CONFIG | changes))
    return str(path)


def test_a_config_json_is_read(tmp_path: Path) -> None:
    shape = find(write(tmp_path / "config.json"))
    assert shape.params == LLAMA_3_8B.params
    assert shape.kv_bytes() == LLAMA_3_8B.kv_bytes()
    assert shape.name == tmp_path.name


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    tied = find(write(tmp_path / "config.json", tie_word_embeddings=True))
    assert tied.params == LLAMA_3_8B.params - 128256 * 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"torch_dtype": "int3"}, "torch_dtype"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"kv_lora_rank": 512}, "latent attention"),
    ],
)
def test_a_config_that_the_formulas_do_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(LocalError, match=message):
        find(write(tmp_path / "config.json", **changes))


def test_a_model_that_is_not_there_names_the_flag() -> None:
    with pytest.raises(LocalError, match="--model takes tiny, llama-3-8b"):
        find("/nowhere/config.json")


def test_a_shape_from_a_configuration(tmp_path: Path) -> None:
    config = {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    for name in (tmp_path, tmp_path / "config.json"):
        shape = find(str(name))
        assert (shape.layers, shape.kv_heads, shape.head_dim, shape.rope_theta) == (16, 8, 64, 500000.0)
    assert from_config(config | {"head_dim": 128}, "m").head_dim == 128


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    dense = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 128,
    }
    for more, why in (
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"kv_lora_rank": 512}, "latent"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"hidden_size": None}, "hidden_size"),
    ):
        with pytest.raises(LocalError, match=why):
            from_config(dense | more, "m")
    with pytest.raises(LocalError, match="llama-3-8b"):
        find(str(tmp_path / "nothing"))
    with pytest.raises(LocalError, match="80 layers"):
        find("llama-3-70b").cut(81)
