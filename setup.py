"""Packaging: the Python rooms behind the one import name ``memkv``, and three C extensions built by cffi.

``memkv/rdma``, ``memkv/store``, ``memkv/gpudirect`` and ``memkv/cli`` are links to the top-level folders, so every
path below goes through ``memkv/``: that is what makes wheel, sdist and editable install agree.
"""

from setuptools import setup

PACKAGES = [
    "memkv",
    "memkv.native",
    "memkv.rdma",
    "memkv.rdma.native",
    "memkv.store",
    "memkv.store.native",
    "memkv.gpudirect",
    "memkv.cli",
]

setup(
    name="memkv",
    version="0.1.0",
    description="Shared context memory for LLM inference: KV blocks by one-sided RDMA",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={
        "memkv": ["py.typed"],
        "memkv.native": ["*.h", "*.c", "*.pyi"],
        "memkv.rdma.native": ["*.h", "*.c", "*.pyi"],
        "memkv.store.native": ["*.h", "*.c", "*.pyi"],
    },
    cffi_modules=[
        "memkv/rdma/native/build.py:ffi",
        "memkv/store/native/build.py:ffi",
        "memkv/native/build.py:ffi",
    ],
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
        "dev": ["hypothesis>=6.100", "mypy>=1.10", "pytest>=8", "ruff>=0.6", "xxhash>=3.4"],
    },
    entry_points={
        "console_scripts": ["memkv-node=memkv.cli.node:main", "memkv-bench=memkv.cli.bench:main"],
    },
    zip_safe=False,
)
