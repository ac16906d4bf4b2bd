"""Packaging: the Python rooms behind the one import name ``memkv``, and four C extensions built by cffi.

``memkv/rdma``, ``memkv/store``, ``memkv/gpudirect`` and ``memkv/cli`` are links to the top-level folders, so
every path below goes through ``memkv/``: that is what makes wheel, sdist and editable install agree.

``MEMKV_WITHOUT=verbs`` in the environment: no libibverbs headers are needed, and no RDMA device can be used.

``MEMKV_SANITIZE=1 python setup.py build_ext --build-lib DIR --build-temp DIR2`` builds with ASan and UBSan.
"""

import os
import shlex
import subprocess
import sysconfig
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if find_spec("cffi") is None:  # setuptools would only warn, and install a memkv without its C core
    raise SystemExit("memkv cannot be built: no cffi here: pip install cffi setuptools wheel")

NATIVE = ["memkv/rdma/native", "memkv/store/native", "memkv/gpudirect/native", "memkv/native"]
CFLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-O1", "-g", "-U_FORTIFY_SOURCE"]
HEADERS = {  # what a build includes, and the Debian package that has it
    "Python.h": "python3-dev",
    "infiniband/verbs.h": "libibverbs-dev",
    "xxhash.h": "libxxhash-dev",
}


def check_toolchain() -> None:
    """Ends the build with one line that names what to install."""
    without_verbs = "verbs" in os.environ.get("MEMKV_WITHOUT", "")
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    command += shlex.split(os.environ.get("CPPFLAGS", "") + " " + os.environ.get("CFLAGS", ""))
    command += [f"-I{sysconfig.get_path(which)}" for which in ("include", "platinclude")]

    def compiles(source: str) -> bool:
        done = subprocess.run(
            [*command, "-fsyntax-only", "-xc", "-"], input=source, text=True, capture_output=True
        )
        return done.returncode == 0

    try:
        if not compiles("#include <stdint.h>\n"):
            raise OSError("it compiles nothing: are there C headers?")
    except OSError as exc:
        raise SystemExit(
            f"memkv cannot be built: no C compiler ({command[0]}: {exc}): apt install gcc libc6-dev"
        ) from None
    needed = {h: p for h, p in HEADERS.items() if not (without_verbs and h.startswith("infiniband/"))}
    missing = {h: p for h, p in needed.items() if not compiles(f"#include <{h}>\n")}
    if missing:
        names, packages = ", ".join(f"<{h}>" for h in missing), " ".join(missing.values())
        raise SystemExit(f"memkv cannot be built: no {names}: apt install {packages}")


class BuildExt(build_ext):
    """The same flags for all, and no older build left where Python would import it first."""

    def pre_run(self, ext, ffi):  # cffi calls it before it writes the C code of an extension
        ext.extra_compile_args = CFLAGS + [f for f in ext.extra_compile_args if f not in CFLAGS]
        ext.depends = [h for folder in NATIVE for h in glob(f"{folder}/*.h")]
        if os.environ.get("MEMKV_SANITIZE", "") not in ("", "0"):
            ext.extra_compile_args += SANITIZE
            ext.extra_link_args += SANITIZE[:1]

    def run(self):
        check_toolchain()
        super().run()
        if self.inplace:
            for ext in self.extensions:
                built = Path(self.get_ext_fullpath(ext.name))
                for other in built.parent.glob(built.name.split(".")[0] + ".*.so"):
                    if other.name != built.name:
                        other.unlink()


class BuildPy(build_py):
    """Leaves out what only a build needs."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [m for m in found if not (package.endswith(".native") and m[1] in ("build", "cdef"))]


setup(
    name="memkv",
    version="0.1.0",
    description="Shared context memory for LLM inference: KV blocks by one-sided RDMA",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["memkv", "memkv.*"]),  # it follows the links
    package_data={
        "memkv": ["py.typed"],
        "memkv.gpudirect.kernels": ["*.cu"],  # compiled by CuPy where they run
        **{f.replace("/", "."): ["*.pyi"] for f in NATIVE},
    },
    include_package_data=False,
    cffi_modules=[f"{folder}/build.py:ffi" for folder in NATIVE],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    install_requires=[
        "cffi>=1.16",
        "click>=8.1",
        "msgspec>=0.18",
        "numpy>=1.26",
        "prometheus-client>=0.20",
        "rich>=13",
    ],
    extras_require={
        "gpu": ["cupy-cuda12x>=13"],
        "plot": ["matplotlib>=3.7"],
        "dev": [
            "hypothesis>=6.100",
            "matplotlib>=3.7",
            "mypy>=1.10",
            "pytest>=8",
            "ruff>=0.6",
            "xxhash>=3.4",
        ],
    },
    entry_points={
        "console_scripts": ["memkv-node=memkv.cli.node:main", "memkv-bench=memkv.cli.bench:main"],
        "vllm.general_plugins": ["memkv=memkv.connectors.vllm_plugin:register"],
    },
    zip_safe=False,
)
