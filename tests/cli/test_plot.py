"""The figure is whole SVG or PNG, and has every series; without matplotlib one line says what to install."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from memkv.cli import cost, cost_work, plot, trace
from memkv.cli.cost_setup import CASE_TITLES, CASES
from memkv.cli.report import Steps
from memkv.rdma.errors import LocalError

from .costs import setup

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def costs() -> cost.Costs:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install memkv[plot]")
    return cost.model(cost_work.of(trace.generate(60)), setup(), (0.5, 1.0, 2.0), Steps())


def test_a_figure_is_svg_with_every_series_and_words(costs: cost.Costs, tmp_path: Path) -> None:
    plot.draw(tmp_path / "f.svg", costs)
    root = ElementTree.parse(tmp_path / "f.svg").getroot()
    assert root.tag == f"{SVG}svg"
    drawn = {g.get("id") for g in root.iter(f"{SVG}g")} | {p.get("id") for p in root.iter(f"{SVG}path")}
    for case in CASES:
        for series in ("ttft", "busy", "cost"):
            assert f"{series}-{case}" in drawn
    words = {"".join(t.itertext()).strip() for t in root.iter(f"{SVG}text")}
    assert set(CASE_TITLES.values()) <= words
    for label in ("time to first token (s)", "requests (%)", "requests a second", "$ for a million tokens"):
        assert label in words


def test_the_same_costs_give_the_same_svg(costs: cost.Costs, tmp_path: Path) -> None:
    plot.draw(tmp_path / "a.svg", costs)
    plot.draw(tmp_path / "b.svg", costs)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_figure_is_png(costs: cost.Costs, tmp_path: Path) -> None:
    plot.draw(tmp_path / "f.png", costs)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_case_that_never_meets_the_objective_is_said_to(costs: cost.Costs, tmp_path: Path) -> None:
    never = cost.Costs(costs.work, costs.setup, costs.base, costs.sweep, dict.fromkeys(CASES), counted=False)
    plot.draw(tmp_path / "f.svg", never)
    assert "never" in (tmp_path / "f.svg").read_text()


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LocalError, match=r"pip install memkv\[plot\]"):
        plot.check(tmp_path / "f.svg")
