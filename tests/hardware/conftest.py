"""Fixtures for tests that need a GPU; script/gpu-check runs them where there is one."""

from __future__ import annotations

from typing import Any

import pytest

from memkv.gpudirect import driver


@pytest.fixture(scope="session")
def cuda() -> driver.Driver:
    """The CUDA driver, with the first GPU."""
    if why := driver.available():
        pytest.skip(f"no GPU here: {why}")
    return driver.load()


@pytest.fixture(scope="session")
def cupy(cuda: driver.Driver) -> Any:
    """CuPy, where it finds the GPU."""
    module = pytest.importorskip("cupy", exc_type=ImportError)
    try:
        module.zeros(1).sum().get()
    except Exception as exc:  # libraries that do not fit each other
        pytest.skip(f"CuPy cannot use the GPU: {exc}")
    return module


@pytest.fixture(scope="session")
def torch(cuda: driver.Driver) -> Any:
    """torch, where it was built for the GPU."""
    module = pytest.importorskip("torch", exc_type=ImportError)
    if not module.cuda.is_available():
        pytest.skip("this torch finds no GPU")
    return module
