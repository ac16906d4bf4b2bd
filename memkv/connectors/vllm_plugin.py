"""What vLLM calls in each of its processes, by the entry point ``vllm.general_plugins``: names become known.

Without it, everything works with module paths in the configuration (docs/engines/vllm.md).
"""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

TIER = "memkv.connectors.vllm_tier"
GPU = "memkv.connectors.vllm_gpu"


def register() -> None:
    """Registers the tier "memkv", the connector MemKVConnector and its spec. May be called again."""
    if "memkv" not in SecondaryTierFactory._registry:
        SecondaryTierFactory.register_tier("memkv", TIER, "MemKVTier")
    if "MemKVConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("MemKVConnector", GPU, "MemKVConnector")
    if "MemKVOffloadingSpec" not in OffloadingSpecFactory._registry:
        OffloadingSpecFactory.register_spec("MemKVOffloadingSpec", GPU, "MemKVOffloadingSpec")
