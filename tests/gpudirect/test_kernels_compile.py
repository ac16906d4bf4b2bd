"""The kernels compile for the GPUs that count, by the compiler that CuPy uses; no GPU is needed for that."""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from memkv.gpudirect import kernels
from memkv.rdma.errors import LocalError

ARCHITECTURES = ("compute_80", "compute_90")
KERNELS = {
    "checksum": {"mkv_chunks", "mkv_verdicts"},
    "pages": {f"mkv_{way}_{width}" for way in ("gather", "scatter") for width in (16, 8, 4, 2, 1)},
}


def nvrtc() -> ctypes.CDLL | None:
    """NVRTC, from the system or from a wheel."""
    wheels = [w for p in sys.path for w in glob.glob(f"{p}/nvidia/*/lib/libnvrtc.so.*")]
    for name in (ctypes.util.find_library("nvrtc"), *wheels):
        try:
            if name:
                return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def by_nvrtc(lib: ctypes.CDLL, source: str, architecture: str) -> str:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture={architecture}".encode(), *(o.encode() for o in kernels.OPTIONS)]
    assert lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    what = "ProgramLog" if failed else "PTX"
    assert getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert getattr(lib, f"nvrtcGet{what}")(program, text) == 0
    assert not failed, text.value.decode()
    return text.value.decode()


def by_nvcc(source: str, architecture: str, folder: Path) -> str:
    (folder / "kernels.cu").write_text(source, encoding="utf-8")
    command = ["nvcc", *kernels.OPTIONS, f"-arch={architecture}", "-ptx", "-o", "kernels.ptx", "kernels.cu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return (folder / "kernels.ptx").read_text(encoding="utf-8")


@pytest.fixture
def compile_ptx(tmp_path: Path) -> Callable[[str, str], str]:
    lib = nvrtc()
    if lib is not None:
        return lambda source, architecture: by_nvrtc(lib, source, architecture)
    if shutil.which("nvcc"):
        return lambda source, architecture: by_nvcc(source, architecture, tmp_path)
    return pytest.skip("neither NVRTC nor nvcc here (pip install nvidia-cuda-nvrtc-cu12)")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", kernels.NAMES)
def test_it_compiles_and_has_its_kernels(
    name: str, architecture: str, compile_ptx: Callable[[str, str], str]
) -> None:
    ptx = compile_ptx(kernels.source(name), architecture)

    entries = {line.split()[2].split("(")[0] for line in ptx.splitlines() if ".visible .entry" in line}
    assert entries == KERNELS[name]
    assert "ld.global.cs" in ptx  # streamed past the cache


def test_pages_are_moved_by_16_bytes(compile_ptx: Callable[[str, str], str]) -> None:
    ptx = compile_ptx(kernels.source("pages"), "compute_80")

    body = ptx.split(".entry mkv_gather_16", 1)[1].split(".entry", 1)[0]
    assert body.count("ld.global.cs.v4.u32") == 4
    assert body.count("st.global.cs.v4.u32") == 4


def test_without_cupy_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)

    with pytest.raises(LocalError, match="no CuPy here"):
        kernels.function("pages", "mkv_gather_16")
