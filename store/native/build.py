"""Builds ``memkv.store.native._store`` through cffi; setup.py runs it from the root of the repository.

The declarations that Python sees are the parts of the C headers marked ``cdef`` (cdef.py cuts them out).
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile

from cffi import FFI

HERE = "memkv/store/native"
sys.path.insert(0, "memkv/rdma/native")
from cdef import declarations  # type: ignore[import-not-found]  # noqa: E402

# Order matters: a type is declared before it is used.
HEADERS = ["layout.h", "store.h", "checksum.h", "index.h", "put.h", "flashio.h", "flash.h"]
SOURCES = [
    "checksum.c",
    "checksum_avx2.c",
    "index.c",
    "arena.c",
    "slab.c",
    "retire.c",
    "sieve.c",
    "quarantine.c",
    "reserve.c",
    "pin.c",
    "table.c",
    "tick.c",
    "fill.c",
    "namespace.c",
    "check.c",
    "put.c",
    "flashio.c",
    "flashio_run.c",
    "flashio_uring.c",
    "flashio_threads.c",
    "flashio_fault.c",
    "flash.c",
    "flash_barrier.c",
    "flash_segment.c",
    "flash_cell.c",
    "flash_zero.c",
    "flash_drain.c",
    "flash_writeback.c",
    "flash_stage.c",
    "flash_kept.c",
    "flash_scan.c",
    "flash_snapshot.c",
    "flash_scrub.c",
    "flash_ns.c",
    "flash_check.c",
]


def has_liburing() -> bool:
    """Whether the static liburing can be linked into an extension, which then needs none where it runs.

    Without it the flash engine has its lower rung only, and says why.
    """
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    command += shlex.split(os.environ.get("CPPFLAGS", "") + " " + os.environ.get("CFLAGS", ""))
    command += ["-shared", "-fPIC", "-xc", "-", *shlex.split(os.environ.get("LDFLAGS", ""))]
    source = (
        "#include <liburing.h>\n"
        "int probe(struct io_uring *r, struct io_uring_params *p)"
        " { return io_uring_queue_init_params(8, r, p); }\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        command += ["-l:liburing.a", "-o", f"{folder}/probe.so"]
        try:
            return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0
        except OSError:  # no compiler; setup.py says so where something is to be built
            return False


LIBURING = has_liburing()

# Inline functions of layout.h have bodies, which cffi does not read.
INLINES = """
void mkv_candidates(const uint8_t key[16], uint64_t salt, uint64_t buckets, uint64_t out[2]);
uint64_t mkv_location(uint32_t state, uint32_t slab, uint64_t offset);
uint32_t mkv_location_state(uint64_t loc);
uint32_t mkv_location_moved(uint64_t loc);
uint32_t mkv_location_slab(uint64_t loc);
uint64_t mkv_location_offset(uint64_t loc);
"""

ffi = FFI()
ffi.cdef(declarations(*(f"{HERE}/{name}" for name in HEADERS)) + INLINES)
ffi.set_source(
    "memkv.store.native._store",
    "".join(f'#include "{name}"\n' for name in HEADERS),
    sources=[f"{HERE}/{name}" for name in SOURCES],
    include_dirs=[HERE, "memkv/rdma/native"],
    define_macros=[("MKV_LIBURING", "1")] if LIBURING else [],
    libraries=["pthread", *([":liburing.a"] if LIBURING else [])],
    extra_link_args=["-Wl,--exclude-libs,liburing.a"],  # its symbols stay inside
)
