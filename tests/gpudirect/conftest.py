"""Fixtures: libcuda's stand-in, in its place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memkv.gpudirect import driver

from .standin import Standin, build


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """Two devices that do what a test tells them; see standin.c."""
    path = build()
    monkeypatch.setattr(driver, "LIBRARY", path)
    made = Standin(path)
    yield made
    made.close()
