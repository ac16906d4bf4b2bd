"""memkv: shared context memory for LLM inference.

>>> peer = memkv.connect("node-1:7420", "llama-3-70b")
>>> buffer = peer.register(kv_cache)
>>> held = peer.match(keys)
>>> peer.get_into(keys[:held], buffer.slices(offsets, block_bytes))
>>> peer.put_from(keys[held:], buffer.slices(offsets, block_bytes))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Buffer", "Peer", "Status", "__version__", "connect"]

if TYPE_CHECKING:
    from .buffers import Buffer
    from .peer import Peer
    from .status import Status


def connect(nodes: Any, namespace: str, **options: Any) -> Peer:
    """Connects to nodes and opens a namespace; see :class:`memkv.peer.Peer` for all options.

    :param nodes: "host:port", or several; keys are placed on them by rendezvous hashing of their placement
        tags.
    :param namespace: one per model and layout; made if it is missing, unless ``create=False``.
    :raises MemKVError: none of the nodes can be used. One of several that is down is only logged.
    """
    from .peer import Peer

    return Peer(nodes, namespace, **options)


def __getattr__(name: str) -> Any:
    """The heavy parts are imported when they are asked for: ``import memkv`` loads no device library."""
    if name == "Peer":
        from .peer import Peer

        return Peer
    if name == "Buffer":
        from .buffers import Buffer

        return Buffer
    if name == "Status":
        from .status import Status

        return Status
    raise AttributeError(name)
