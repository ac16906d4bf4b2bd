"""The list of tests that are run in emulation names tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from .emulated import CHOSEN, left_out


@pytest.mark.parametrize("file", CHOSEN)
def test_chosen_tests_exist(file: str) -> None:
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    assert all(f"def {name}(" in text for name in CHOSEN[file] or ())


def test_what_is_left_out_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMKV_TEST_LONG", raising=False)
    monkeypatch.setenv("MEMKV_SOFTROCE_RUNG", "tcg")
    assert left_out("test_peer.py", "test_empty_batches")
    assert left_out("store/test_soak.py", "test_peers_that_come_and_go")
    assert not left_out("test_peer.py", "test_strict_readers")
    assert not left_out("rdma/test_channels.py", "test_whatever")
    monkeypatch.setenv("MEMKV_SOFTROCE_RUNG", "kvm")
    assert not left_out("test_peer.py", "test_empty_batches")
