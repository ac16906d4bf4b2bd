"""transformers: keeps the KV cache of a prompt's prefix, and gives it back to any process with that model.

    store = PrefixStore.of_model(model, {"nodes": "node-1:7420"}, name="meta-llama/Llama-3.1-8B")

    cache, n = store.restore_prefix(tokens)             # n tokens need no computing
    out = model.generate(ids, past_key_values=cache)    # computes the rest, and goes on
    store.save_prefix(out_cache, tokens)

A block is K and V of ``block_tokens`` tokens in all layers, one contiguous piece:

    │◄──────────── layer 0 ────────────►│◄─ layer 1 ─ …
    │ K                │ V              │
    │ head 0 │ head 1 …│ head 0 │ …     │
    │ t0 t1 … │                             a token: head dimension values

transformers keeps a tensor (batch, heads, tokens, dimension) for each layer's K and V, so blocks are packed
into a registered buffer, and unpacked from it, many at a time; the buffer is where the model is, on a GPU in
its memory.

Only full blocks are kept, and only leading blocks that all came back as HITs are restored. The last token of
a prompt is always left to compute, for its logits. What the store cannot do, for whatever reason, is left to
be computed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from ..keys import Keys, block_keys
from ..rdma.errors import LocalError, MemKVError
from ..status import Status, describe, kept
from .settings import Settings
from .transformers_identity import cache_shape, check, identity, weights_digest

log = logging.getLogger("memkv.transformers")

BLOCK_TOKENS = 16
BUFFER_BYTES = 128 << 20  # of the registered buffer: what one call moves at most


class PrefixStore:
    """KV caches of one model, in memkv. Calls may come from any thread; they take turns.

    A store is for the model as it is when the store is made: one whose weights change, or that switches
    adapters, needs another store.

    :param settings: a mapping as :class:`~memkv.connectors.settings.Settings` has it (``nodes``, …), or one
        of those; None: the environment.
    :param config: the model's. :param name: the model's; together with ``revision`` and ``fingerprint`` it
        must tell apart whatever has other weights.
    :param fingerprint: of the weights; :meth:`of_model` computes one.
    :param dtype: of the cache, ``torch.bfloat16`` say. :param device: where restored caches are to be.
    :param block_tokens: tokens of a block. :param buffer_bytes: of the registered buffer, at least a block.
    :param labels: whatever else KV depends on, such as an adapter that is not in the model's parameters.
    :param text_only: the model may be given more than token ids, such as images, but is not.
    :raises LocalError: a model whose cache is not all full attention, or whose KV does not follow from the
        token ids before it alone; or a wrong setting.
    :raises MemKVError: no node can be reached.
    """

    def __init__(
        self,
        settings: Settings | Mapping[str, Any] | None,
        config: PreTrainedConfig,
        *,
        name: str,
        fingerprint: str,
        dtype: torch.dtype,
        revision: str = "",
        device: torch.device | str = "cpu",
        block_tokens: int = BLOCK_TOKENS,
        buffer_bytes: int = BUFFER_BYTES,
        labels: Mapping[str, str] | None = None,
        text_only: bool = False,
    ) -> None:
        if not name or not fingerprint:
            raise LocalError("a model needs a name and a fingerprint of its weights", "name=, fingerprint=")
        self.settings = settings if isinstance(settings, Settings) else Settings.read(settings)
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        check(config, text_only=text_only)
        self.shape = cache_shape(config)
        self.block_tokens = block_tokens
        self.block_bytes = self.shape.block_bytes(block_tokens, dtype)
        self.identity = identity(
            config,
            name=name,
            revision=revision,
            fingerprint=fingerprint,
            dtype=dtype,
            block_tokens=block_tokens,
            salt=self.settings.salt,
            labels=labels or {},
        )
        blocks = max(1, buffer_bytes // self.block_bytes)
        shape = (blocks, self.shape.layers, 2, self.shape.heads, block_tokens, self.shape.dim)
        self._blocks = torch.empty(shape, dtype=dtype, device=self.device)
        self._lock = threading.Lock()
        self.peer = self.settings.connect(self.identity, self.block_bytes)
        try:
            self._slices = self.peer.register(_memory(self._blocks)).split(self.block_bytes)
        except BaseException:
            self.peer.close()
            raise

    @classmethod
    def of_model(
        cls,
        model: PreTrainedModel,
        settings: Settings | Mapping[str, Any] | None = None,
        *,
        name: str = "",
        fingerprint: str = "",
        **options: Any,
    ) -> Self:
        """A store for a model that is loaded: configuration, dtype, device, and a digest of its weights from
        there. :param name: by default what it was loaded as. ``options``: those of the class.

        :raises LocalError: the model is spread over several devices.
        """
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1:
            raise LocalError(
                f"the model is on {len(devices)} devices",
                "device_map: one device, to which caches are restored",
            )
        options.setdefault("dtype", model.dtype)
        options.setdefault("device", devices.pop())
        name = name or model.config.name_or_path or model.config.model_type
        return cls(
            settings, model.config, name=name, fingerprint=fingerprint or weights_digest(model), **options
        )

    # --- finding ---

    def match(self, tokens: Any) -> int:
        """How many leading tokens of a prompt are held, in full blocks; the last token never counts."""
        keys = self._keys(_token_array(tokens)[:-1])
        return self._match(keys) * self.block_tokens

    def _match(self, keys: Keys) -> int:
        try:
            return self.peer.match(keys, timeout=self.settings.get_timeout) if len(keys) else 0
        except LocalError:
            raise
        except MemKVError as error:
            log.warning("match: %s", error)
            return 0

    def _keys(self, tokens: npt.NDArray[Any]) -> Keys:
        return block_keys(tokens, space=self.identity.space)

    # --- keeping ---

    def save_prefix(self, cache: Cache, tokens: Any, *, row: int | None = None) -> int:
        """Keeps the full blocks of a prompt: how many leading tokens are held afterwards.

        :param cache: a DynamicCache or StaticCache whose first entries are of ``tokens``; what it has beyond
            them, or they beyond it, is left out.
        :param tokens: token ids from the very first on, without padding: (n,) or (1, n), a tensor or a list.
        :param row: of the batch; needed if there are several. A row with padding in front of it cannot be
            kept: its positions and places are others.
        :raises LocalError: the cache is of another kind, shape or dtype than the model's.
        """
        ids = _token_array(tokens)
        length, row = self._check(cache, row)
        keys = self._keys(ids[:length])
        with self._lock:
            held = self._match(keys)
            for first in range(held, len(keys), len(self._blocks)):
                part = keys[first : first + len(self._blocks)]
                self._pack(cache, row, first, len(part))
                kept = self._put(part)
                held += kept
                if kept < len(part):
                    break
        return held * self.block_tokens

    def _check(self, cache: Cache, row: int | None) -> tuple[int, int]:
        """Tokens in the cache, and the row."""
        self._check_layers(cache)
        rows, length = 1, None
        for i, layer in enumerate(cache.layers):
            if not layer.is_initialized or layer.keys is None or layer.values is None:
                return 0, 0
            here = int(layer.get_seq_length())
            length = here if length is None else length
            rows = layer.keys.shape[0]
            due = (self.shape.heads, self.shape.dim)
            for tensor in (layer.keys, layer.values):
                found = (tensor.shape[1], tensor.shape[3])
                if found != due or tensor.dtype != self.dtype or here != length:
                    raise LocalError(
                        f"layer {i} of the cache has {found} heads and dimension in {tensor.dtype} for "
                        f"{here} tokens, where {due} in {self.dtype} for {length} are due",
                        "a store is for one model and dtype: dtype=",
                    )
        if row is None and rows != 1:
            raise LocalError(f"the cache has {rows} rows", "row=")
        if not 0 <= (row or 0) < rows:
            raise LocalError(f"row {row} of {rows}", "row=")
        return length or 0, row or 0

    def _pack(self, cache: Cache, row: int, first: int, count: int) -> None:
        start, end = first * self.block_tokens, (first + count) * self.block_tokens
        for i, layer in enumerate(cache.layers):
            for j, tensor in enumerate((layer.keys, layer.values)):
                assert tensor is not None  # _check has looked
                some = tensor[row, :, start:end].unflatten(1, (count, self.block_tokens))
                self._blocks[:count, i, j].copy_(some.transpose(0, 1))

    def _put(self, keys: Keys) -> int:
        """How many of them, from the first on, are kept."""
        try:
            status = self.peer.put_from(
                keys,
                self._slices[: len(keys)],
                timeout=self.settings.put_timeout,
                durability=self.settings.durability,
                stream=self._stream(),
            )
        except LocalError:
            raise
        except MemKVError as error:
            log.warning("put: %s", error)
            return 0
        bad = np.flatnonzero(~kept(status))
        if len(bad):
            log.warning("put: %d of %d blocks, first: %s", len(bad), len(keys), describe(int(status[bad[0]])))
        return int(bad[0]) if len(bad) else len(keys)

    # --- restoring ---

    def restore_prefix(self, tokens: Any, *, into: Cache | None = None) -> tuple[Cache, int]:
        """A cache with the longest prefix of a prompt that is held, and how many tokens that is: less than
        the prompt has, and 0 if nothing is.

        :param tokens: as for :meth:`save_prefix`. :param into: an empty cache of the model to fill, such as a
            StaticCache for one row; by default a new DynamicCache.
        :raises LocalError: ``into`` is not empty, or too short.
        """
        keys = self._keys(_token_array(tokens)[:-1])
        cache = DynamicCache(config=self.config) if into is None else into
        self._check_into(cache, len(keys) * self.block_tokens)
        with self._lock:
            held = self._match(keys)
            found, n = self._fetch(keys[:held])
        if n:
            for i, layer in enumerate(cache.layers):
                k, v = (found[i, j][None, :, :n] for j in (0, 1))
                if type(layer) is DynamicLayer:  # takes them as they are: its update would copy
                    layer.lazy_initialization(k, v)
                    layer.keys, layer.values = k, v
                else:
                    layer.update(k, v)
        return cache, n

    def _check_layers(self, cache: Cache) -> None:
        if len(cache.layers) != self.shape.layers:
            raise LocalError(f"the cache has {len(cache.layers)} layers, the model {self.shape.layers}")
        for i, layer in enumerate(cache.layers):
            if type(layer) not in (DynamicLayer, StaticLayer):
                kind = type(layer).__name__
                raise LocalError(f"layer {i} of the cache is a {kind}", "DynamicCache or StaticCache")

    def _check_into(self, cache: Cache, most: int) -> None:
        self._check_layers(cache)
        for layer in cache.layers:
            if int(layer.get_seq_length()):
                raise LocalError("the cache is not empty", "into=: a new one")
            if type(layer) is StaticLayer and layer.max_cache_len < most:
                raise LocalError(f"a StaticCache for {layer.max_cache_len} tokens", "max_cache_len")

    def _fetch(self, keys: Keys) -> tuple[torch.Tensor, int]:
        """(layers, 2, heads, tokens, dimension), and how many of the tokens are good, from the first on."""
        s, size = self.shape, self.block_tokens
        out = torch.empty(
            (s.layers, 2, s.heads, len(keys) * size, s.dim), dtype=self.dtype, device=self.device
        )
        good = 0
        for first in range(0, len(keys), len(self._blocks)):
            part = keys[first : first + len(self._blocks)]
            hits = self._get(part)
            if hits:
                place = out[:, :, :, first * size : (first + hits) * size].unflatten(3, (hits, size))
                place.copy_(self._blocks[:hits].movedim(0, 3))
            good += hits
            if hits < len(part):
                break
        return out, good * size

    def _get(self, keys: Keys) -> int:
        """How many of them, from the first on, are in the buffer."""
        try:
            status = self.peer.get_into(
                keys,
                self._slices[: len(keys)],
                timeout=self.settings.get_timeout,
                exact=True,
                stream=self._stream(),
            )
        except LocalError:
            raise
        except MemKVError as error:
            log.warning("get: %s", error)
            return 0
        bad = np.flatnonzero(status != Status.HIT)
        if len(bad):
            log.info("get: %d of %d blocks, first: %s", len(bad), len(keys), describe(int(status[bad[0]])))
        return int(bad[0]) if len(bad) else len(keys)

    def _stream(self) -> Any:
        """What the buffer may still be in use by: the current stream, on a GPU."""
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def close(self) -> None:
        """Leaves the nodes. Caches that were restored are the caller's own."""
        with self._lock:
            self.peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _token_array(tokens: Any) -> npt.NDArray[Any]:
    """(n,) token ids out of a tensor, an array or a list, of (n,) or (1, n)."""
    array = np.asarray(tokens.cpu() if isinstance(tokens, torch.Tensor) else tokens)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1:
        raise LocalError(f"token ids of shape {array.shape}", "one sequence: (n,) or (1, n)")
    return array


def _memory(tensor: torch.Tensor) -> Any:
    """What a peer registers: a tensor of bytes on a GPU, else pointer and size."""
    if tensor.device.type == "cuda":
        return tensor.view(torch.uint8).reshape(-1)
    return tensor.data_ptr(), tensor.nbytes
