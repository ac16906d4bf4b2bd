"""Statuses are those of the C header, and each has a text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from memkv.status import FIRST_ERROR, Status, describe

HEADER = Path(__file__).parents[1] / "store" / "native" / "layout.h"


def header() -> dict[str, int]:
    """The enum of statuses in layout.h: the one that begins with MKV_PENDING."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.S)
    body = next(b for b in re.findall(r"enum\s*{(.*?)}", text, re.S) if "MKV_PENDING" in b)
    values: dict[str, int] = {}
    last = -1
    for item in filter(None, (part.strip() for part in body.split(","))):
        name, _, value = (word.strip() for word in item.partition("="))
        last = int(value) if value else last + 1
        values[name.removeprefix("MKV_")] = last
    return values


def test_statuses_are_those_of_the_header() -> None:
    ours = {status.name: status.value for status in Status}
    assert {**ours, "ERROR": FIRST_ERROR} == header()


@pytest.mark.parametrize("status", Status)
def test_every_status_is_described_and_judged(status: Status) -> None:
    assert describe(status).startswith(f"{status.name}: ")
    assert status.is_error == status.name.startswith("ERROR")


def test_numbers_of_a_newer_node_are_described_too() -> None:
    assert describe(99) == "error 99: unknown to this version of memkv"
    assert describe(10) == "status 10: unknown to this version of memkv"
