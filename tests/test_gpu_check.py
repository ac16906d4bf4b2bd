"""script/gpu-check: what it takes from a bundle, what it builds without, what it says of the results."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "script"


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """(gpu_check, gpu_bundle); they are scripts, beside each other."""
    sys.path.insert(0, str(SCRIPT / "lib"))
    yield importlib.import_module("gpu_check"), importlib.import_module("gpu_bundle")
    sys.path.remove(str(SCRIPT / "lib"))


@pytest.fixture
def bundle(modules: tuple[ModuleType, ModuleType]) -> Any:
    return modules[1]


@pytest.fixture
def gpu_check(modules: tuple[ModuleType, ModuleType]) -> Any:
    return modules[0]


def test_help_says_what_the_script_is_for() -> None:
    done = subprocess.run(
        [SCRIPT / "gpu-check", "-h"], capture_output=True, text=True, timeout=60, check=True
    )

    assert "script/gpu-check --bundle" in done.stdout
    assert "set -euo" not in done.stdout


# --- the bundle ---


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("click-8.1-py3-none-any.whl", True),
        ("six-1.16-py2.py3-none-any.whl", True),
        ("cffi-2.1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("cffi-2.1-cp311-cp311-manylinux_2_17_x86_64.whl", False),
        ("cffi-2.1-cp312-cp312-manylinux_2_17_aarch64.whl", False),
        ("x-1-cp39-abi3-manylinux_2_17_x86_64.whl", True),
        ("x-1-cp313-abi3-manylinux_2_17_x86_64.whl", False),
        ("x-1-cp312-cp312t-manylinux_2_17_x86_64.whl", False),
        ("x-1-py3-none-manylinux_2_17_x86_64.whl", True),
    ],
)
def test_a_wheel_fits_by_its_name(bundle: Any, wheel: str, fits: bool) -> None:
    assert bundle.fits(wheel, (3, 12), "x86_64") is fits


def test_only_what_is_missing_is_unpacked(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "WHEELS", ("pytest", "no-such-thing"))
    (tmp_path / "wheels").mkdir()
    for name in ("pytest-1.0-py3-none-any.whl", "No_Such.Thing-2.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / "wheels" / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}.py", "")

    here, unpacked = bundle.unpack_missing(tmp_path, tmp_path / "out")

    assert [h.split()[0] for h in here] == ["pytest"]
    assert unpacked == ["no-such-thing 2.0"]
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["No_Such.Thing.py"]


def test_what_is_nowhere_is_named(bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "WHEELS", ("no-such-thing", "nor-this"))

    with pytest.raises(bundle.BundleError, match=r"has no no-such-thing, nor-this.*--bundle"):
        bundle.unpack_missing(tmp_path, tmp_path / "out")


# --- headers ---


def compiler(folder: Path, *lacking: str) -> str:
    """A compiler that finds some headers only where it is pointed to a bundle."""
    script = folder / "cc"
    cases = "".join(f'*"<{h}>"*) case "$*" in *idirafter*) ;; *) exit 1 ;; esac ;; ' for h in lacking)
    script.write_text(
        f'#!/bin/sh\ntext=$(cat)\ncase "$text" in {cases}esac\nprintf "%s" "$text" | gcc "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def a_check(gpu_check: Any, folder: Path, *lacking: str) -> Any:
    out = folder / "out"
    (out / "logs").mkdir(parents=True)
    check = gpu_check.Check(folder, out, 1.0, True)
    check.env |= {"CC": compiler(folder, *lacking), "CPPFLAGS": ""}
    return check


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")


@needs_gcc
@pytest.mark.parametrize("what", ["verbs.h", "liburing.h"])
def test_the_core_is_built_without_what_is_nowhere(gpu_check: Any, tmp_path: Path, what: str) -> None:
    header = {"verbs.h": "infiniband/verbs.h"}.get(what, what)
    script = tmp_path / "cc"
    check = a_check(gpu_check, tmp_path, header)
    script.write_text(script.read_text().replace("*idirafter*) ;;", ""))

    note = check.headers()

    assert f"without {what.removesuffix('.h')}: no <{header}> here" in note
    assert check.env.get("MEMKV_WITHOUT") == ("verbs" if what == "verbs.h" else None)
    assert check.env["CPPFLAGS"] == ""


@needs_gcc
def test_headers_of_the_bundle_are_used_where_the_system_has_none(gpu_check: Any, tmp_path: Path) -> None:
    check = a_check(gpu_check, tmp_path, "infiniband/verbs.h")

    assert check.headers() == "verbs of the bundle"
    assert f"-idirafter {tmp_path}/build/gpu-bundle/include" in check.env["CPPFLAGS"]
    assert "MEMKV_WITHOUT" not in check.env


@needs_gcc
def test_without_xxhash_it_says_how_to_bring_it(gpu_check: Any, tmp_path: Path) -> None:
    check = a_check(gpu_check, tmp_path, "xxhash.h")
    script = tmp_path / "cc"
    script.write_text(script.read_text().replace("*idirafter*) ;;", ""))

    with pytest.raises(gpu_check.Failed, match=r"no <xxhash.h>.*--bundle"):
        check.headers()


# --- results ---


def row(what: str, ratio: float | None) -> dict[str, Any]:
    return {"what": what, "size": 1 << 20, "gbps": 20.0, "limit_gbps": 21.0, "ratio": ratio, "p50_us": 50.0}


def test_rows_with_a_target_are_judged(gpu_check: Any) -> None:
    rows = [
        row("pinned copies into the GPU", 1.0),
        row("staging into the GPU", 0.96),
        row("staging out of the GPU", 0.94),
        row("gather vllm", 0.81),
        row("checksum", 1.6),
        row("scatter vllm", None),
    ]

    found = gpu_check.judged({"benchmarks": {"gpu": {"rows": rows}}})

    assert [(r["what"].split()[0], r["reached"]) for r in found] == [
        ("staging", True),
        ("staging", False),
        ("gather", True),
        ("checksum", True),
    ]
    assert gpu_check.judged({}) == []


def test_a_failed_step_is_told_and_the_rest_goes_on(gpu_check: Any, tmp_path: Path) -> None:
    check = a_check(gpu_check, tmp_path)
    check.tree.mkdir(parents=True)

    def leave_out() -> str:
        raise gpu_check.LeftOut("no such thing here")

    assert check.step("good", lambda: "7 passed")
    assert not check.step("bad", lambda: check.run("bad", ["sh", "-c", "echo why >&2; exit 3"], 10))
    assert not check.step("slow", lambda: check.run("slow", ["sleep", "10"], 0.2))
    assert check.step("other", leave_out)

    saved = json.loads((tmp_path / "out/gpu-check.json").read_text())
    assert [s["outcome"] for s in saved["steps"]] == ["done", "failed", "failed", "left out"]
    assert saved["steps"][1]["note"].startswith("status 3: why; see ")
    assert saved["steps"][2]["note"].startswith("not done after 0 s")
    text = (tmp_path / "out/gpu-check.txt").read_text()
    assert "bad" in text
    assert "no such thing here" in text


def test_the_table_has_heading_targets_and_loads(gpu_check: Any, tmp_path: Path) -> None:
    check = a_check(gpu_check, tmp_path)
    check.found["answers"] = {"gpus": [{"index": 0, "dma_buf_export": "exported"}]}
    check.found["benchmarks"] = {
        "gpu": {"heading": {"gpu": "NVIDIA H100"}, "rows": [row("staging into the GPU", 0.9)]},
        "get": {"heading": {"fabric": "tcp"}, "rows": [row("get", 0.5)]},
    }
    check.save()

    text = (tmp_path / "out/gpu-check.txt").read_text()
    assert "NVIDIA H100" in text
    assert "exported" in text
    assert "MISSED" in text
    assert "memkv-bench get --memory cuda:0, over tcp" in text


def test_a_part_may_be_run_alone(gpu_check: Any, tmp_path: Path) -> None:
    def names(only: str) -> list[str]:
        return [name for name, _ in gpu_check.Check(tmp_path, tmp_path, 1.0, True, only).parts()]

    assert names("tests") == ["tests on the host", "tests on the GPU"]
    assert names("") == names("tests") + names("bench") + names("sanitizer")


@pytest.mark.slow
@needs_gcc
def test_a_dry_run_goes_through(tmp_path: Path) -> None:
    """About a minute: it builds the core and runs the kernels' tests."""
    env = os.environ | {"PYTHON": sys.executable}
    command = [SCRIPT / "gpu-check", "--dry-run", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert found["dry_run"]
    assert {"done", "left out"} >= {step["outcome"] for step in found["steps"]}
    assert found["tests"]["host"]["passed"] > 100
