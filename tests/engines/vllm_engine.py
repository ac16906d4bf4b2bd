"""vLLM's real scheduler, and its workers' connectors, around a model that writes made-up keys and values.

The model is the only thing that is not vLLM's: for every token that a step computes it writes into each
layer's page what :func:`content` makes of the layer and of all tokens up to that one, as attention would.
What it attends to is compared with that, every byte of it at every step; it answers with another token if
anything is not the same.
"""

from __future__ import annotations

import copy
import json
import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")
pytest.importorskip("vllm", reason="vllm is not installed: script/test --engines brings it")

from vllm.config import (  # noqa: E402
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import get_hash_fn_by_name  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

TOKENS = 16  # of a block
HEADS, CONTENT = 4, 32  # of one worker; values of two bytes
PAGE = HEADS * TOKENS * CONTENT * 2  # bytes of a block in one layer
LAYERS = 2  # of a cache group
ANSWER = 7  # the token that the model says,
WRONG = 8  # and this one, if anything that it attends to is not what it should be

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": CONTENT // 2,
    "vocab_size": 1 << 16,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
    "rms_norm_eps": 1e-5,
}


def model_folder(folder: Path) -> str:
    """A model without weights: only its configuration is read."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    return str(folder)


def vllm_config(model: str, transfer: dict[str, Any], *, layout: str = "BLHNC", **options: Any) -> Any:
    """A real VllmConfig. ``options``: tp, dtype, revision, algorithm (of block hashes), ahead
    (asynchronous scheduling).
    """
    config = VllmConfig(
        model_config=ModelConfig(
            model=model,
            skip_tokenizer_init=True,
            dtype=options.get("dtype", "float16"),
            revision=options.get("revision"),
            seed=0,
            max_model_len=2048,
            enforce_eager=True,
        ),
        cache_config=CacheConfig(
            block_size=TOKENS,
            enable_prefix_caching=True,
            prefix_caching_hash_algo=options.get("algorithm", "sha256_cbor"),
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            max_model_len=2048,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=options.get("ahead", False),
        ),
        parallel_config=ParallelConfig(
            tensor_parallel_size=options.get("tp", 1), distributed_executor_backend="mp"
        ),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=KVTransferConfig(**transfer),
    )
    config.cache_config.kv_cache_layout = layout
    return config


def cache_config(blocks: int, layout: str, windows: Sequence[int | None] = (None,)) -> Any:
    """A real KVCacheConfig of one group of layers for each of ``windows``, which lie over each other."""
    packed = layout == "BLHNC"
    groups, tensors = [], []
    for g, window in enumerate(windows):
        names = [f"model.layers.{g * LAYERS + i}.attn" for i in range(LAYERS)]
        kind: dict[str, Any] = {"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": CONTENT // 2}
        kind["dtype"] = torch.float16
        if window is None:
            spec = FullAttentionSpec(**kind)
        else:
            spec = SlidingWindowSpec(**kind, sliding_window=window)
        groups.append(KVCacheGroupSpec(names, spec))
        tensors.append(
            KVCacheTensor(
                size=blocks * PAGE * LAYERS,
                layers=names,
                layer_stride=PAGE if packed else PAGE * blocks,
                block_stride=PAGE * LAYERS if packed else PAGE,
            )
        )
    return KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_groups=groups, kv_cache_layout=layout
    )


def content(layer: str, rank: int, tokens: Sequence[int]) -> Any:
    """(HEADS, CONTENT) int16: what attention would have kept for the last of these tokens."""
    seed = blake2b(f"{layer} {rank} {list(tokens)}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(seed, "little"))
    return torch.from_numpy(rng.integers(1, 30000, (HEADS, CONTENT), np.int16))


class Worker:
    """One worker: its caches and its side of the connector."""

    def __init__(self, config: Any, caches: Any, rank: int) -> None:
        self.config = copy.deepcopy(config)
        self.config.parallel_config.rank = self.rank = rank
        self.caches: dict[str, Any] = {}
        memory = torch.zeros(caches.kv_cache_tensors[0].size // 2, dtype=torch.float16)
        for tensor in caches.kv_cache_tensors:
            for i, name in enumerate(tensor.layers):
                self.caches[name] = memory.as_strided(
                    (caches.num_blocks, HEADS, TOKENS, CONTENT),
                    (tensor.block_stride // 2, TOKENS * CONTENT, CONTENT, 1),
                    (tensor.offset + i * tensor.layer_stride) // 2,
                )
        self.connector = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, caches)
        self.connector.register_kv_caches(self.caches)

    def begin(self, out: Any) -> None:
        self.connector.handle_preemptions(out.kv_connector_metadata)
        self.connector.bind_connector_metadata(out.kv_connector_metadata)
        self.connector.start_load_kv(None)

    def end(self, out: Any) -> ModelRunnerOutput:
        connector = self.connector
        connector.wait_for_save()
        results = connector.get_transfer_results(out.finished_req_ids)
        output = KVConnectorOutput(
            finished_sending=results.finished_sending or None,
            finished_recving=results.finished_recving or None,
            failed_recving=results.failed_recving,
            invalid_block_ids=connector.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=pickle.loads(pickle.dumps(connector.build_connector_worker_meta())),
        )
        connector.clear_connector_metadata()
        ids = list(out.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={r: i for i, r in enumerate(ids)},
            sampled_token_ids=[],
            kv_connector_output=output,
        )


class Engine:
    """One engine of ``tp`` workers. A context manager."""

    def __init__(
        self, config: Any, *, blocks: int = 64, windows: Sequence[int | None] = (None,), tp: int = 1
    ) -> None:
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        self.caches = cache_config(blocks, config.cache_config.kv_cache_layout, windows)
        config.cache_config.num_gpu_blocks = blocks
        self.ahead = config.scheduler_config.async_scheduling
        self.scheduler = (AsyncScheduler if self.ahead else Scheduler)(
            config, self.caches, StructuredOutputManager(config), block_size=TOKENS, hash_block_size=TOKENS
        )
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(TOKENS, hash_function)
        self.workers = [Worker(config, self.caches, rank) for rank in range(tp)]
        self.aggregator = KVOutputAggregator(tp)
        self.computed: dict[str, int] = {}  # tokens of each request's prompt that the model wrote
        self.prompts: dict[str, list[int]] = {}
        self.done: dict[str, Any] = {}
        self.attended = {
            True: 0,
            False: 0,
        }  # steps of requests, by whether all that they attended to was right
        self.outputs: deque[tuple[Any, ModelRunnerOutput]] = deque()  # that the scheduler has not seen
        self.before_transfers: Callable[[], object] | None = None
        self._number = 0

    @property
    def manager(self) -> Any:
        return self.connector.scheduler.manager

    @property
    def connector(self) -> Any:
        return self.scheduler.connector

    def add(self, prompt: Sequence[int], *, answer: int = 2, **options: Any) -> str:
        name = f"request-{self._number}"
        self._number += 1
        self.prompts[name] = list(prompt)
        self.computed[name] = 0
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
            pooling_params=None,
            block_hasher=self.hasher,
            **options,
        )
        self.scheduler.add_request(request)
        self.done[name] = request
        return name

    def step(self) -> Any:
        """One step of the engine: what the scheduler had planned. ``before_transfers`` is called, once, when
        the scheduler has decided on a load and no worker has begun it.
        """
        out = self.scheduler.schedule()
        if self.before_transfers is not None and out.kv_connector_metadata.load_jobs:
            self.before_transfers()
            self.before_transfers = None
        out.kv_connector_metadata = pickle.loads(pickle.dumps(out.kv_connector_metadata))  # to the workers
        for worker in self.workers:
            worker.begin(out)
        sampled = []
        for name, count in out.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            start = request.num_computed_tokens - count
            self._compute(name, start, count)
            right = self._is_right(name, start + count)
            self.attended[right] += 1
            token = ANSWER if right else WRONG
            sampled.append([token] if start + count >= request.num_tokens else [])
        outputs = [worker.end(out) for worker in self.workers]
        for output in outputs:
            output.sampled_token_ids = sampled
        result = self.aggregator.aggregate(outputs, 0)
        assert result is not None
        self.outputs.append((out, result))
        if not self.ahead or len(self.outputs) == 2:
            self.scheduler.update_from_output(*self.outputs.popleft())
        if not out.num_scheduled_tokens:
            time.sleep(0.001)  # the engine's thread has nothing to do; transfers have
        return out

    def _tokens(self, name: str, count: int) -> list[int]:
        """The first of a request's prompt and answer."""
        prompt = self.prompts[name]
        return (prompt + [ANSWER] * (count - len(prompt)))[:count]

    def _compute(self, name: str, start: int, count: int) -> None:
        blocks = self.scheduler.kv_cache_manager.get_block_ids(name)
        tokens = self._tokens(name, start + count)
        self.computed[name] += max(0, min(start + count, len(self.prompts[name])) - start)
        for group, ids in zip(self.caches.kv_cache_groups, blocks, strict=True):
            for layer in group.layer_names:
                for place in range(start, start + count):
                    block = ids[place // TOKENS]
                    assert block or group is not self.caches.kv_cache_groups[0]
                    for worker in self.workers if block else ():
                        worker.caches[layer].view(torch.int16)[block, :, place % TOKENS] = content(
                            layer, worker.rank, tokens[: place + 1]
                        )

    def _is_right(self, name: str, count: int) -> bool:
        """Whether every key and value is the right one that the request's first tokens have, as far as its
        windows reach.
        """
        tokens = self._tokens(name, count)
        blocks = self.scheduler.kv_cache_manager.get_block_ids(name)
        for group, ids in zip(self.caches.kv_cache_groups, blocks, strict=True):
            window = getattr(group.kv_cache_spec, "sliding_window", None) or count
            for layer in group.layer_names:
                for place in range(max(0, count - window + 1), count):
                    for worker in self.workers:
                        found = worker.caches[layer].view(torch.int16)[
                            ids[place // TOKENS], :, place % TOKENS
                        ]
                        if not torch.equal(found, content(layer, worker.rank, tokens[: place + 1])):
                            return False
        return True

    def run(self, name: str, seconds: float = 60.0) -> int:
        """Until the request is over, with an answer that comes of nothing but right keys and values. How many
        of its prompt's tokens were loaded instead of computed.
        """
        end, request = time.monotonic() + seconds, self.done[name]
        while not request.is_finished():
            assert time.monotonic() < end, f"{name} is {request.status} after {seconds:g} s"
            self.step()
        assert request.status.name == "FINISHED_LENGTH_CAPPED"
        assert list(request.output_token_ids) == [ANSWER] * request.max_tokens
        return len(self.prompts[name]) - self.computed[name]

    def settle(self, seconds: float = 60.0) -> None:
        """Steps until no transfer is under way."""
        end = time.monotonic() + seconds
        while self.connector.has_pending_push_work() or self.scheduler.has_requests():
            assert time.monotonic() < end, f"transfers do not end within {seconds:g} s"
            self.step()

    def drop_gpu_cache(self) -> None:
        """What the GPU still has of requests that are over is forgotten."""
        assert self.scheduler.kv_cache_manager.reset_prefix_cache()

    def close(self) -> None:
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.connector.shutdown()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
