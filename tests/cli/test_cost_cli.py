"""``memkv-bench replay --cost`` and ``--model-only``: JSON, tables, flags, and hits of a real replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from memkv.cli import trace
from memkv.cli.bench import main
from memkv.cli.cost_setup import CASES

from .costs import TRACE, needs_trace
from .test_cost_measured import ttft

QUICK = ["--model", "llama-3-8b", "--gpus", "1", "--loads", "0.5,1", "--hbm-kv", "2g"]


def invoke(*args: str) -> Any:
    return CliRunner().invoke(main, ["replay", *args])


def model(*args: str, quick: list[str] = QUICK) -> dict[str, Any]:
    """Runs the model alone; its JSON."""
    result = invoke("--model-only", "--json", *quick, *args)
    assert result.exit_code == 0, result.stderr
    doc: dict[str, Any] = json.loads(result.stdout)
    return doc


def by_case(doc: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["case"]: c for c in doc["cost"]["cases"]}


def assumed(doc: dict[str, Any]) -> dict[str, Any]:
    return {a["name"]: a["value"] for a in doc["cost"]["assumptions"]}


def test_the_model_alone_prints_one_object_with_everything() -> None:
    doc = model("--requests", "60", "--seed", "4")
    assert set(doc) == {"heading", "rows", "cost"}
    assert doc["rows"] == []
    cost = doc["cost"]
    assert set(cost) == {"trace", "assumptions", "hits_from", "cases", "sweep", "sensitivity"}
    due = trace.summarise(trace.generate(60, seed=4))
    assert cost["trace"]["blocks"] == due.references
    assert cost["trace"]["distinct_blocks"] == due.distinct
    assert cost["trace"]["reusable_blocks"] == due.hits
    assert cost["hits_from"] == "model"
    assert [c["case"] for c in cost["cases"]] == list(CASES)
    assert {(s["case"], s["load"]) for s in cost["sweep"]} == {(c, x) for c in CASES for x in (0.5, 1.0)}
    for a in cost["assumptions"]:
        assert set(a) == {"name", "value", "unit", "source"}
        assert a["source"]
    for c in cost["cases"]:
        assert 0 < c["ttft_p50"] <= c["ttft_p90"] <= c["ttft_p99"]
        assert 0 <= c["useful"] <= c["busy"] <= 1
        assert c["fleet_cost"] > 0


def test_the_table_has_every_assumption_and_every_case() -> None:
    result = invoke("--model-only", "--requests", "30", *QUICK)
    assert result.exit_code == 0, result.stderr
    for text in ("assumptions", "no source: vary it", "no reuse", "HBM + memkv", "$/M, fleet", "times a day"):
        assert text in result.stdout


def test_cost_is_price_by_tokens() -> None:
    doc = model("--requests", "60", "--gpu-price", "2", "--replicas", "3", "--node-price", "4")
    cost, cases = doc["cost"], by_case(doc)
    hours = cost["trace"]["seconds"] / 3600
    millions = (cost["trace"]["input_tokens"] + cost["trace"]["output_tokens"]) / 1e6
    assert cases["hbm"]["fleet_cost"] == pytest.approx(3 * 2 * hours / millions)
    assert cases["memkv"]["fleet_cost"] == pytest.approx((3 * 2 + 4) * hours / millions)
    seconds = cases["hbm"]["prefill_gpu_seconds"] + cases["hbm"]["decode_gpu_seconds"]
    assert cases["hbm"]["work_cost"] == pytest.approx(2 * seconds / 3600 / millions)


def test_the_highest_load_meets_the_objective_and_a_little_more_does_not() -> None:
    doc = model("--requests", "120", "--slo", "0.5")
    for c in by_case(doc).values():
        best = c["at_slo"]
        assert best["meets_slo"]
        assert best["ttft_p90"] <= 0.5
        more = model("--requests", "120", "--slo", "0.5", "--loads", f"1,{best['load'] * 1.25}")
        at = [s for s in more["cost"]["sweep"] if s["case"] == c["case"] and s["load"] != 1]
        assert not at[0]["meets_slo"]


def test_an_objective_that_nobody_meets_has_no_highest_load() -> None:
    doc = model("--requests", "30", "--slo", "0.0001")
    assert all(c["at_slo"] is None for c in by_case(doc).values())
    assert invoke("--model-only", "--requests", "30", "--slo", "0.0001", *QUICK).exit_code == 0


def test_a_replay_hands_its_hits_to_the_model(tmp_path: Path) -> None:
    moved = ["--fabric", "tcp", "--requests", "30", "--block-bytes", "4k", "--seed", "6"]
    result = invoke("--cost", "--json", *moved, *QUICK)
    assert result.exit_code == 0, result.stderr
    doc = json.loads(result.stdout)
    totals = next(row for row in doc["rows"] if row["what"] == "replay")
    assert totals["hits"] == totals["expected_hits"] == sum(doc["held"]) > 0
    assert doc["cost"]["hits_from"] == "replay"
    assert sum(by_case(doc)["memkv"]["hits"].values()) == totals["hits"]

    (tmp_path / "played.json").write_text(result.stdout)
    again = model("--requests", "30", "--seed", "6", "--hits", str(tmp_path / "played.json"))
    assert again["cost"]["cases"] == doc["cost"]["cases"]


def test_measured_figures_take_the_place_of_assumed_ones(tmp_path: Path) -> None:
    (tmp_path / "ttft.json").write_text(json.dumps(ttft()))
    args = ["--requests", "30", "--measured", str(tmp_path / "ttft.json")]
    doc = model(*args, quick=["--loads", "1"])
    said = assumed(doc)
    assert said["model"] == "tried"
    assert said["prefill_rate"] == pytest.approx(400)
    assert said["mfu"] == pytest.approx(400 / 989)
    assert said["wire"] == pytest.approx(20)
    assert said["flash_latency"] == pytest.approx(3)
    sources = {a["name"]: a["source"] for a in doc["cost"]["assumptions"]}
    assert "ttft.json" in sources["wire"]
    over = model(*args, "--wire-gbps", "7", "--mfu", "0.4", quick=["--loads", "1"])
    assert assumed(over)["wire"] == 7
    assert assumed(over)["prefill_rate"] == pytest.approx(0.4 * 989)


def test_sensitivity_varies_each_assumption() -> None:
    doc = model("--requests", "20", "--sensitivity")
    varied = doc["cost"]["sensitivity"]
    assert varied[0]["assumption"] == "as assumed"
    names = [v["assumption"] for v in varied[1:]]
    assert names == [n for n in dict.fromkeys(names) for _ in range(2)]
    decode = [v["factor"] for v in varied if v["assumption"] == "decode_efficiency"]
    assert decode == [0.5, pytest.approx(1 / 0.7)]  # no share is above 1


@needs_trace
def test_the_whole_real_trace_is_modelled() -> None:
    doc = model("--trace", str(TRACE), "--loads", "1", "--slo", "0.001", quick=[])  # no load is sought
    assert doc["cost"]["trace"]["requests"] == 12_031
    assert doc["cost"]["trace"]["blocks"] == 288_500
    assert doc["cost"]["trace"]["distinct_blocks"] == 182_790
    assert doc["cost"]["trace"]["reusable_blocks"] == 105_710
    cases = by_case(doc)
    saved = [cases[case]["gpu_seconds_saved_share"] for case in CASES]
    assert saved == sorted(saved)
    assert sum(cases["memkv"]["hits"].values()) == pytest.approx(105_710, rel=0.01)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "/nowhere"], "--model takes"),
        (["--model", "llama-3-70b", "--gpus", "1"], "GB for KV cache"),
        (["--gpus", "1", "--model", "llama-3-8b", "--loads", "1,x"], "--loads takes"),
        (["--gpus", "1", "--model", "llama-3-8b", "--loads", "0"], "--loads takes"),
        (["--measured", "/nowhere"], "--measured takes"),
        (["--hits", "/nowhere"], "--hits takes"),
        (["--plot", "x.gif"], "--plot takes a name"),
        (["--plot", "/nowhere/x.svg"], "no such folder"),
        (["--mfu", "1.5"], "--mfu"),
        (["--mfu", "0.000001"], "--replicas N"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(args: list[str], message: str) -> None:
    result = invoke("--model-only", "--requests", "30", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_hits_are_of_an_earlier_replay() -> None:
    result = invoke("--cost", "--hits", "x.json")
    assert result.exit_code == 2
    assert "--model-only" in result.stderr


def test_the_document_names_every_assumption() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "costs.md").read_text(encoding="utf-8")
    for name in assumed(model("--requests", "5")):
        assert f"`{name}`" in text, name
