"""What the cost model assumes: presets of GPUs, and every number with where it comes from.

GB are 10⁹ bytes, capacities in bytes, bandwidths in bytes a second, prices in dollars an hour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..rdma.errors import LocalError
from .shapes import Shape
from .trace import BLOCK_TOKENS

CASES = ("none", "hbm", "host", "memkv")
CASE_TITLES = {
    "none": "no reuse",
    "hbm": "HBM cache",
    "host": "HBM + own host",
    "memkv": "HBM + memkv",
}
HBM_SHARE = 0.9  # of HBM that an engine takes for weights and KV cache: vLLM's gpu_memory_utilization
DIRTY_SHARE = 0.5  # of a node's memory that may wait to be written: memkv's default


@dataclass(frozen=True, slots=True)
class Gpu:
    """Of one: dense bf16 FLOP/s, bytes a second and bytes of HBM, dollars an hour."""

    flops: float
    hbm_bandwidth: float
    hbm_bytes: float
    price: float
    source: str
    price_source: str = "middle of specialised clouds' rates, May 2026"


GPUS = {
    "a100": Gpu(312e12, 2.039e12, 80e9, 1.3, "NVIDIA A100 80GB SXM datasheet, dense"),
    "h100": Gpu(989e12, 3.35e12, 80e9, 3.0, "NVIDIA H100 SXM datasheet, dense"),
    "h200": Gpu(989e12, 4.8e12, 141e9, 4.0, "NVIDIA H200 SXM datasheet, dense"),
    "b200": Gpu(
        2250e12, 7.7e12, 180e9, 6.0, "NVIDIA HGX B200 datasheet, dense", "one cloud's rate, March 2026"
    ),
}


@dataclass(frozen=True, slots=True)
class Assumption:
    """A line of the result: what it is, how much, in which unit, and why so much."""

    name: str
    value: float | int | str
    unit: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A fleet of replicas of a model, each on some GPUs, and the nodes of memkv that they share."""

    shape: Shape
    gpu: Gpu
    gpu_name: str
    gpus: int  # of a replica
    replicas: int
    mfu: float
    decode_efficiency: float
    decode_batch: int
    hbm_kv: int  # bytes of a replica's KV cache
    host_memory: int  # bytes of a replica's host for KV cache, where the engine uses it
    host_bandwidth: float  # of a replica
    nodes: int
    node_memory: int  # of one node
    node_flash: int
    wire: float
    flash_read: float
    flash_write: float
    node_price: float
    lookup: float  # seconds for a request that asks memkv
    flash_latency: float = 0.0  # seconds more where something comes from flash
    deadline: float = 5.0
    policy: str = "sieve"
    routing: str = "ttft"
    slo: float = 5.0  # seconds, of the 90th percentile of TTFT
    prefill_rate: float = 0.0  # FLOP/s of a replica as measured; 0: from peak and MFU
    prefill_overhead: float = 0.0  # seconds of each prefill
    sources: dict[str, str] = field(default_factory=dict)  # by option, where a number is not the default

    @property
    def rate(self) -> float:
        """FLOP/s that a replica has for prefill."""
        return self.prefill_rate or self.gpus * self.gpu.flops * self.mfu

    @property
    def block_bytes(self) -> int:
        """Bytes of KV cache of one of the trace's blocks."""
        return self.shape.kv_bytes() * BLOCK_TOKENS

    def blocks(self, nbytes: int) -> int:
        """How many blocks fit."""
        return nbytes // self.block_bytes

    def prefill_seconds(self, tokens: int, cached: int = 0) -> float:
        """Of a replica, for ``tokens`` behind ``cached`` ones: no less than reading all weights takes."""
        flops = self.shape.prefill_flops(tokens, cached) / self.rate
        if self.prefill_rate:  # what was measured has read them
            return self.prefill_overhead + flops
        return self.prefill_overhead + max(flops, self.shape.weight_bytes / self._bandwidth)

    @property
    def _bandwidth(self) -> float:
        return self.gpus * self.gpu.hbm_bandwidth * self.decode_efficiency

    def decode_seconds(self, tokens: int, outputs: int) -> float:
        """Of a replica, for the ``outputs`` tokens that follow a prompt of ``tokens``; the first of them
        comes from the prefill."""
        steps = max(0, outputs - 1)
        context = tokens + outputs / 2
        read = self.shape.decode_bytes(context, self.decode_batch) / self._bandwidth
        flops = 2 * (self.shape.matmul_params + self.shape.head_params)
        return steps * max(read, flops / self.rate)

    def hourly(self, case: str) -> float:
        """Dollars an hour: the GPUs, and memkv's nodes where they are used."""
        gpus = self.replicas * self.gpus * self.gpu.price
        return gpus + (self.nodes * self.node_price if case == "memkv" else 0.0)

    def assumptions(self) -> list[Assumption]:
        """All of them, to be printed beside the result."""
        return [Assumption(*line[:3], self.sources.get(line[0], line[3])) for line in self._lines()]

    def _lines(self) -> Iterator[tuple[str, Any, str, str]]:
        s, g = self.shape, self.gpu
        yield "model", s.name, f"{s.params / 1e9:.4g} G parameters", "--model"
        yield "kv_bytes", s.kv_bytes(), "B a token", "2 · layers · KV heads · head dim · bytes of an element"
        yield "block", self.block_bytes / 1e6, f"MB of {BLOCK_TOKENS} tokens", "the trace's blocks"
        yield "gpu", self.gpu_name, f"{self.gpus} a replica", "--gpu, --gpus"
        yield "replicas", self.replicas, "of the model", "the fewest that no reuse keeps busy for 0.8"
        yield "gpu_flops", g.flops / 1e12, "TFLOP/s a GPU", g.source
        yield "mfu", self.mfu, "of it in prefill", "assumed (--mfu)"
        yield "prefill_rate", self.rate / 1e12, "TFLOP/s a replica", "GPUs · peak · MFU"
        yield "prefill_overhead", self.prefill_overhead * 1e3, "ms a prefill", "assumed"
        yield "hbm_bandwidth", g.hbm_bandwidth / 1e12, "TB/s a GPU", g.source
        yield "decode_efficiency", self.decode_efficiency, "of it in decode and short prefills", "assumed"
        yield "decode_batch", self.decode_batch, "sequences a step", "assumed, the same in all cases"
        yield (
            "hbm_kv",
            self.hbm_kv / 1e9,
            "GB a replica",
            f"{HBM_SHARE} of HBM less weights, for all prompts",
        )
        yield "host_memory", self.host_memory / 1e9, "GB a replica", "assumed: half of a GPU host's 2 TiB"
        yield (
            "host_bandwidth",
            self.host_bandwidth / 1e9,
            "GB/s a replica",
            "PCIe 5.0 x16: 50 GB/s a GPU",
        )
        yield "nodes", self.nodes, "of memkv", "--store-nodes"
        yield "node_memory", self.node_memory / 1e9, "GB a node", "assumed"
        yield "node_flash", self.node_flash / 1e12, "TB a node", "eight NVMe drives of 7.68 TB"
        yield "wire", self.wire / 1e9, "GB/s a node, each way", "400 Gb/s, 0.9 of it"
        yield "flash_read", self.flash_read / 1e9, "GB/s a node", "8 drives of 6.5 GB/s, half of it"
        yield "flash_write", self.flash_write / 1e9, "GB/s a node", "8 drives of 3.5 GB/s, half of it"
        yield "lookup", self.lookup * 1e3, "ms a request that asks memkv", "assumed"
        yield "flash_latency", self.flash_latency * 1e3, "ms more from flash", "assumed"
        yield "deadline", self.deadline, "s, then recomputed", "memkv's default"
        yield "policy", self.policy, "of memkv's memory and flash", "--policy; engines' own caches: LRU"
        yield "routing", self.routing, "of requests to replicas", "--routing, the same in all cases"
        yield "gpu_price", g.price, "$ a GPU hour", g.price_source
        yield "node_price", self.node_price, "$ a node hour", "assumed, no source: vary it"
        yield "slo", self.slo, "s, p90 of TTFT", "--slo"

    def check(self) -> None:
        """LocalError if the weights leave no room for a block."""
        if self.blocks(self.hbm_kv) < 1:
            raise LocalError(
                f"{self.shape.name} on {self.gpus} {self.gpu_name}: {self.hbm_kv / 1e9:.1f} GB for KV cache",
                "--gpus N, a GPU with more memory, or --hbm-kv",
            )


def hbm_kv(shape: Shape, gpu: Gpu, gpus: int) -> int:
    """Bytes that an engine has for KV cache: its share of HBM less the weights."""
    return int(gpus * gpu.hbm_bytes * HBM_SHARE) - shape.weight_bytes
