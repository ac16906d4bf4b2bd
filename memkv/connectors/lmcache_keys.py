"""Which block an object of LMCache is: all that its key says, and all that is known of its bytes.

    identity   model, shapes and dtypes of the object, format, release of LMCache → namespace, root of keys
    digest     chunk hash, rank and size of the world, object group, salt, tags   → the key below that root

What cannot be seen from here (which weights are behind a model's name, which float8 a byte is) is told apart
by the setting ``salt``: docs/engines/lmcache.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from .identity import Identity


@dataclass(frozen=True, slots=True)
class Layout:
    """How an object's bytes are to be read. ``text`` says all of it; ``nbytes`` is the object's size."""

    text: str
    dtype: str
    nbytes: int


@lru_cache(1024)
def _layout(shapes: tuple[Any, ...], dtypes: tuple[Any, ...]) -> Layout:
    names = [str(d).removeprefix("torch.") for d in dtypes]
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    parts = [f"{n}[{','.join(map(str, s))}]" for n, s in zip(names, shapes, strict=True)]
    return Layout("+".join(parts), "+".join(dict.fromkeys(names)), sum(sizes))


def layout_of(shapes: Sequence[Any], dtypes: Sequence[Any]) -> Layout:
    """The layout of an object of these tensors (torch.Size, torch.dtype), one behind the other."""
    return _layout(tuple(shapes), tuple(dtypes))


def layout_of_object(obj: Any) -> Layout:
    """The layout of a MemoryObj, from its metadata."""
    meta = obj.meta
    return layout_of(meta.shapes or [meta.shape], meta.dtypes or [meta.dtype])


def identity_of(mode: str, model: str, layout: Layout, salt: str, labels: Mapping[str, str]) -> Identity:
    """:param mode: "mp" or "engine": the two do not share blocks, their hashes are not the same.

    How many tokens a chunk has is in the shapes; ranks are in the digests.
    """
    release = {"lmcache": version("lmcache")}  # what an object's bytes mean is LMCache's to change
    return Identity(
        engine=f"lmcache-{mode}",
        model=model,
        dtype=layout.dtype,
        layout=layout.text,
        block_tokens=1,
        salt=salt,
        labels=release | dict(labels),
    )


def object_digest(key: Any) -> bytes:
    """Of an ObjectKey (multi-process mode): everything in it but the model's name."""
    return _pack(
        b"%d" % key.kv_rank, b"%d" % key.object_group_id, key.cache_salt.encode(), bytes(key.chunk_hash)
    )


def engine_digest(key: Any) -> bytes:
    """Of a CacheEngineKey (in-process mode): everything that LMCache compares."""
    tags = [text for pair in key.tags or () for text in pair]
    hash_ = key.chunk_hash
    fields = [
        key.model_name,
        key.world_size,
        key.worker_id,
        key.dtype,
        getattr(key, "layer_id", "all"),
        *tags,
    ]
    content = hash_ if isinstance(hash_, bytes) else b"%d" % hash_
    return _pack(*(str(f).encode() for f in fields), content)


def _pack(*fields: bytes) -> bytes:
    """So that no two lists of fields give the same bytes."""
    return b"".join(len(f).to_bytes(4, "little") + f for f in fields)
