"""Builds ``memkv.rdma.native._rdma``: channels, regions and the driver of jobs (run by setup.py).

With ``MEMKV_WITHOUT=verbs`` in the environment it needs no libibverbs headers, and has the tcp fabric only.
"""

import os
import sys
from pathlib import Path

import cffi

HERE = Path("memkv/rdma/native")
sys.path.insert(0, str(HERE))
from cdef import declarations  # type: ignore[import-not-found]  # noqa: E402

HEADERS = ["fabric.h", "job.h", "drive.h", "readjob.h", "table.h", "verbs.h", "tcp.h", "bare.h"]
SOURCES = ["drive.c", "readjob.c", "table.c", "tcp_channel.c", "tcp_responder.c", "bare_sockets.c"]
SOURCES += ["noverbs.c"] if "verbs" in os.environ.get("MEMKV_WITHOUT", "") else ["verbs.c", "bare.c"]

ffi = cffi.FFI()
ffi.cdef(declarations(*(HERE / h for h in HEADERS)) + "\nuint64_t mkv_clock_ns(void);\n")
ffi.set_source(
    "memkv.rdma.native._rdma",
    "\n".join(f'#include "{h}"' for h in HEADERS)
    + "\nstatic uint64_t mkv_clock_ns(void) { return mkv_now_ns(); }\n",
    sources=[str(HERE / s) for s in SOURCES],
    include_dirs=[str(HERE)],
    libraries=["dl", "pthread"],
)
