"""Builds ``memkv.native._peer``: the location cache and the get job (run by setup.py)."""

import sys
from pathlib import Path

import cffi

HERE = Path("memkv/native")
RDMA = Path("memkv/rdma/native")
STORE = Path("memkv/store/native")
sys.path.insert(0, str(RDMA))
from cdef import declarations  # type: ignore[import-not-found]  # noqa: E402

HEADERS = [RDMA / "fabric.h", RDMA / "job.h", STORE / "layout.h", HERE / "cache.h", HERE / "get.h"]

ffi = cffi.FFI()
ffi.cdef(declarations(*HEADERS))
ffi.set_source(
    "memkv.native._peer",
    "\n".join(f'#include "{h.name}"' for h in HEADERS),
    sources=[
        str(HERE / "cache.c"),
        str(HERE / "get.c"),
        str(STORE / "checksum.c"),
        str(STORE / "checksum_avx2.c"),
    ],
    include_dirs=[str(HERE), str(RDMA), str(STORE)],
)
