"""Builds ``memkv.gpudirect.native._copier``: lanes of copies between host and device (run by setup.py)."""

import sys
from pathlib import Path

import cffi

HERE = Path("memkv/gpudirect/native")
RDMA = Path("memkv/rdma/native")
sys.path.insert(0, str(RDMA))
from cdef import declarations  # type: ignore[import-not-found]  # noqa: E402

HEADERS = [HERE / "copier.h", HERE / "hostcopy.h"]

ffi = cffi.FFI()
ffi.cdef(declarations(*HEADERS))
ffi.set_source(
    "memkv.gpudirect.native._copier",
    "\n".join(f'#include "{h.name}"' for h in HEADERS),
    sources=[str(HERE / "copier.c"), str(HERE / "hostcopy.c")],
    include_dirs=[str(HERE), str(RDMA)],
    libraries=["dl", "pthread"],
)
