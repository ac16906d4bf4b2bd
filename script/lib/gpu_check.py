"""The steps of script/gpu-check; see there. Nothing but the standard library: memkv is what it builds.

Steps run one after the other, each in a process of its own with a time limit, and all of them run even if
one fails, as far as they can. What they found goes to gpu-check.json as soon as it is known, so that a
machine that is taken away in the middle leaves what there was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_bundle import BundleError, gather, unpack_missing

TREE = (
    "memkv",
    "rdma",
    "store",
    "gpudirect",
    "cli",
    "tests",
    "docs",
    "setup.py",
    "pyproject.toml",
    "README.md",
)
TREE += ("MANIFEST.in", "LICENSE", "script")
GENERATED = (
    "*.so",
    "*.o",
    "__pycache__",
    "_rdma.c",
    "_store.c",
    "_copier.c",
    "_peer.c",
    "build",
    "*.egg-info",
)
TARGETS = {"staging": 0.95, "gather": 0.8, "scatter": 0.8, "checksum": 0.8}  # of the limit beside
PARTS = ("tests", "bench", "sanitizer")
HEADERS = {
    "Python.h": "python",
    "infiniband/verbs.h": "verbs",
    "xxhash.h": "xxhash",
    "liburing.h": "liburing",
}


class Failed(Exception):
    """A step failed, and why."""


class LeftOut(Exception):
    """A step does not apply here, and why."""


class Check:
    """A run: where its things lie, what it has found."""

    def __init__(self, repo: Path, out: Path, seconds: float, dry_run: bool, only: str = "") -> None:
        self.repo, self.out, self.seconds, self.dry_run, self.only = repo, out, seconds, dry_run, only
        self.bundle = repo / "build/gpu-bundle"
        self.work = out / "work"
        self.tree = self.work / "tree"
        self.logs = out / "logs"
        self.env = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MEMKV_SANITIZE", "LD_PRELOAD")
        }
        self.found: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "dry_run": dry_run,
            "python": f"{platform.python_version()} ({sys.executable})",
            "machine": f"{platform.machine()}, {os.cpu_count()} processors",
            "steps": [],
        }

    # --- steps ---

    def step(self, name: str, what: Callable[[], str]) -> bool:
        """Runs a step, announces it and notes what came of it; whether it did not fail."""
        say(f"== {name}")
        start, entry = time.monotonic(), {"name": name, "outcome": "done", "note": ""}
        self.found["steps"].append(entry)
        try:
            entry["note"] = what()
        except (Failed, BundleError, OSError, subprocess.SubprocessError) as exc:
            entry["outcome"], entry["note"] = "failed", str(exc)
        except LeftOut as exc:
            entry["outcome"], entry["note"] = "left out", str(exc)
        entry["seconds"] = round(time.monotonic() - start, 1)
        say(f"   {entry['outcome']}: {entry['note']}" if entry["note"] else f"   {entry['outcome']}")
        self.save()
        return entry["outcome"] != "failed"

    def run(self, name: str, command: list[str], limit: float, ok: tuple[int, ...] = (0,)) -> str:
        """Runs a command in the built tree; its standard output. Both streams are kept in a file."""
        log = self.logs / f"{name}.log"
        try:
            done = subprocess.run(
                command, cwd=self.tree, env=self.env, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired as exc:
            log.write_text(f"{text(exc.stdout)}\n{text(exc.stderr)}", encoding="utf-8")
            raise Failed(f"not done after {limit:.0f} s; see {log}") from None
        log.write_text(f"$ {shlex.join(command)}\n{done.stdout}\n{done.stderr}", encoding="utf-8")
        if done.returncode not in ok:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise Failed(f"status {done.returncode}: {last}; see {log}")
        return done.stdout

    def python(self, *args: str) -> list[str]:
        return [sys.executable, "-B", *args]

    def packages(self) -> str:
        """Finds what memkv imports, here or in the bundle."""
        into = self.work / "py"
        into.mkdir(parents=True)
        here, unpacked = unpack_missing(self.bundle, into)
        self.found["packages"] = {"here": here, "bundle": unpacked}
        self.env["PYTHONPATH"] = os.pathsep.join((str(self.tree), str(into)))
        return f"{len(here)} here, {len(unpacked)} from the bundle"

    def headers(self) -> str:
        """Finds a compiler and headers, here or in the bundle, and says what is built without."""
        compiler = shlex.split(self.env.get("CC") or sysconfig.get_config_var("CC") or "cc")
        if shutil.which(compiler[0]) is None:
            compiler = [c for c in ("gcc", "cc", "clang") if shutil.which(c)][:1]
            if not compiler:
                raise Failed("no C compiler here (apt install gcc libc6-dev)")
            self.env |= {"CC": compiler[0], "LDSHARED": f"{compiler[0]} -shared"}
        include = [sysconfig.get_path(which) for which in ("include", "platinclude")]

        def has(header: str) -> bool:
            flags = shlex.split(self.env.get("CPPFLAGS", "")) + [f"-I{path}" for path in include]
            command = [*compiler, *flags, "-fsyntax-only", "-xc", "-"]
            done = subprocess.run(command, input=f"#include <{header}>\n", text=True, capture_output=True)
            return done.returncode == 0

        notes, python = [], self.bundle / "include-python"
        for header, what in HEADERS.items():
            if has(header):
                continue
            before = self.env.get("CPPFLAGS", "")
            folders = [self.bundle / "include"]
            if what == "python":
                folders = [python, *python.glob("python3*"), *python.glob("*-linux-gnu")]
                folders += python.glob("*-linux-gnu/python3*")
            self.env["CPPFLAGS"] = (
                f"{before} {' '.join(f'-idirafter {shlex.quote(str(f))}' for f in folders)}"
            )
            if has(header):
                notes.append(f"{what} of the bundle")
                continue
            self.env["CPPFLAGS"] = before
            if what in ("python", "xxhash"):
                raise Failed(
                    f"no <{header}>, nor in {self.bundle}: script/gpu-check --bundle where there is a network"
                )
            if what == "verbs":
                self.env["MEMKV_WITHOUT"] = "verbs"
            notes.append(f"without {what}: no <{header}> here")
        if (self.bundle / "lib/liburing.a").exists():
            self.env["LDFLAGS"] = f"{self.env.get('LDFLAGS', '')} -L{shlex.quote(str(self.bundle / 'lib'))}"
        self.found["build"] = {"compiler": shlex.join(compiler), "notes": notes}
        return "; ".join(notes)

    def build(self) -> str:
        """Copies the tree, without what was built in it, and builds the core there."""
        self.tree.mkdir()
        for name in TREE:
            source = self.repo / name
            if source.is_dir():
                ignored = shutil.ignore_patterns(*GENERATED)
                shutil.copytree(source, self.tree / name, symlinks=True, ignore=ignored)
            elif source.exists():
                shutil.copy(source, self.tree / name)
        self.run("build", self.python("setup.py", "-q", "build_ext", "--inplace"), 300)
        return f"{len(list(self.tree.glob('*/native/*.so')))} libraries"

    def probe(self) -> str:
        """Asks the machine what it has."""
        self.found["answers"] = json.loads(self.run("probe", self.python("script/lib/gpu_probe.py"), 120))
        gpus = self.found["answers"]["gpus"]
        return (
            ", ".join(g["name"] if isinstance(g, dict) else g for g in gpus) or self.found["answers"]["cuda"]
        )

    def tests(self, name: str, *what: str, prefix: tuple[str, ...] = (), limit: float = 420) -> str:
        """Runs tests; how many passed, failed and were skipped, and why."""
        report = self.logs / f"{name}.xml"
        pytest = self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}")
        verbs = name != "host" and self.found["answers"]["rdma_devices"]
        pytest += ["-m", "not slow" if verbs else "not slow and not verbs", *what]
        try:
            self.run(name, [*prefix, *pytest], limit)
        finally:
            counts = self.counted(name, report)
        return counts

    def counted(self, name: str, report: Path) -> str:
        if not report.exists():
            return ""
        cases = list(ET.parse(report).getroot().iter("testcase"))
        skips: dict[str, int] = {}
        failures = []
        for case in cases:
            for node in case:
                if node.tag == "skipped":
                    reason = node.get("message", "")
                    skips[reason] = skips.get(reason, 0) + 1
                elif node.tag in ("failure", "error"):
                    failures.append(
                        f"{case.get('classname')}::{case.get('name')}: {node.get('message', '')[:300]}"
                    )
        counts = {"passed": len(cases) - len(failures) - sum(skips.values()), "failed": len(failures)}
        counts |= {"skipped": sum(skips.values())}
        self.found.setdefault("tests", {})[name] = counts | {"why_skipped": skips, "failures": failures}
        return ", ".join(f"{n} {what}" for what, n in counts.items())

    def sanitizer(self, tool: str) -> str:
        """Runs the kernels' tests under compute-sanitizer."""
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(program).exists():
            raise LeftOut("no compute-sanitizer here")
        if not self.has_gpu:
            raise LeftOut("no GPU here")
        prefix = (program, "--tool", tool, "--error-exitcode", "77", "--target-processes", "all")
        some = ("tests/hardware/test_gpu_kernels.py", "-k", "not batches")
        return self.tests(f"sanitizer-{tool}", *some, prefix=prefix)

    @property
    def has_gpu(self) -> bool:
        return any(isinstance(g, dict) for g in self.found.get("answers", {}).get("gpus", ()))

    def bench(self, name: str, *args: str) -> str:
        """Runs memkv-bench; without a GPU it has to say so in one line."""
        command = self.python("-m", "memkv.cli.bench", *args, "--json")
        if not self.has_gpu:
            self.run(f"bench-{name}", command, 60, ok=(1,))
            said = (self.logs / f"bench-{name}.log").read_text(encoding="utf-8").splitlines()[-1]
            raise LeftOut(said.removeprefix("memkv-bench: error: "))
        out = self.run(f"bench-{name}", command, 600, ok=(0, 1))
        if not out.startswith("{"):
            log = self.logs / f"bench-{name}.log"
            raise Failed(f"{log.read_text(encoding='utf-8').strip().splitlines()[-1]}; see {log}")
        result = json.loads(out)
        self.found.setdefault("benchmarks", {})[name] = result
        errors = sum(row["errors"] for row in result["rows"])
        if errors:
            raise Failed(f"{errors} errors: wrong bytes or failed calls")
        return f"{len(result['rows'])} rows"

    # --- results ---

    def save(self) -> None:
        self.found["judged"] = judged(self.found)
        (self.out / "gpu-check.json").write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        (self.out / "gpu-check.txt").write_text(table(self.found), encoding="utf-8")

    def all(self) -> bool:
        """All steps; whether none failed."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        ready = (
            self.step("packages", self.packages)
            and self.step("compiler and headers", self.headers)
            and self.step("build", self.build)
            and self.step("probe", self.probe)
        )
        if ready and not self.has_gpu and not self.dry_run:
            self.step("GPU", self.no_gpu)
        for name, what in self.parts() if ready else ():
            self.step(name, what)
        self.save()
        return all(step["outcome"] != "failed" for step in self.found["steps"])

    def parts(self) -> list[tuple[str, Callable[[], str]]]:
        """What runs on the core that was built: (name, step)."""
        seconds = ("--seconds", str(self.seconds))
        load = ("--memory", "cuda:0", "--sizes", "64k,1m,4m", *seconds)
        host = ("tests/gpudirect", "tests/cli/test_gpu_bench.py")
        parts: dict[str, list[tuple[str, Callable[[], str]]]] = {
            "tests": [
                ("tests on the host", lambda: self.tests("host", *host)),
                ("tests on the GPU", lambda: self.tests("gpu", "tests/hardware", limit=600)),
            ],
            "bench": [
                ("memkv-bench gpu", lambda: self.bench("gpu", "gpu", *seconds)),
                ("memkv-bench get --memory cuda:0", lambda: self.bench("get", "get", *load)),
                ("memkv-bench put --memory cuda:0", lambda: self.bench("put", "put", *load)),
                (
                    "memkv-bench latency --memory cuda:0",
                    lambda: self.bench("latency", "latency", "--memory", "cuda:0", "--calls", "200"),
                ),
            ],
            "sanitizer": [
                ("compute-sanitizer memcheck", lambda: self.sanitizer("memcheck")),
                ("compute-sanitizer synccheck", lambda: self.sanitizer("synccheck")),
            ],
        }
        return [step for part in PARTS if self.only in ("", part) for step in parts[part]]

    def no_gpu(self) -> str:
        raise Failed(
            f"no GPU here: {self.found['answers']['cuda']} (script/gpu-check --dry-run does the rest)"
        )


def judged(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of ``memkv-bench gpu`` that have a target, with whether it is reached."""
    out = []
    for row in found.get("benchmarks", {}).get("gpu", {}).get("rows", ()):
        target = TARGETS.get(row["what"].split()[0])
        if target is None or row["ratio"] is None:
            continue
        out.append({k: row[k] for k in ("what", "size", "gbps", "limit_gbps", "ratio")} | {"target": target})
        out[-1]["reached"] = row["ratio"] >= target
    return out


def table(found: dict[str, Any]) -> str:
    """The run for a reader."""
    heading = found.get("benchmarks", {}).get("gpu", {}).get("heading", {})
    lines = [f"gpu-check of {found['date']}" + (", a dry run" if found["dry_run"] else "")]
    facts = {"machine": found["machine"], "python": found["python"]} | heading
    for gpu in found.get("answers", {}).get("gpus", ()):
        if isinstance(gpu, dict):
            facts[f"dma-buf of cuda:{gpu['index']}"] = gpu["dma_buf_export"]
    lines += [f"{name:<20}  {value}" for name, value in facts.items()]
    lines += ["", f"{'step':<40}{'outcome':<10}{'s':>7}  note"]
    for step in found["steps"]:
        lines.append(f"{step['name']:<40}{step['outcome']:<10}{step.get('seconds', 0):>7}  {step['note']}")
    for name, counts in found.get("tests", {}).items():
        lines += [f"  {name}: {reason} ({n} skipped)" for reason, n in counts["why_skipped"].items()]
        lines += [f"  {name}: FAILED {failure}" for failure in counts["failures"]]
    if rows := found.get("judged"):
        lines += ["", f"{'what':<40}{'block':>10}{'GB/s':>9}{'limit':>9}{'ratio':>8}{'target':>8}"]
    for row in rows or ():
        verdict = "reached" if row["reached"] else "MISSED"
        lines.append(
            f"{row['what']:<40}{row['size']:>10}{row['gbps']:>9.2f}{row['limit_gbps']:>9.2f}"
            f"{row['ratio']:>8.3f}{row['target']:>8}  {verdict}"
        )
    for name, result in found.get("benchmarks", {}).items():
        if name == "gpu":
            continue
        lines += ["", f"memkv-bench {name} --memory cuda:0, over {result['heading'].get('fabric', '?')}"]
        for row in result["rows"]:
            speed = "" if row["gbps"] is None else f"{row['gbps']:.2f} GB/s"
            p50 = "" if row["p50_us"] is None else f"p50 {row['p50_us']:.0f} µs"
            lines.append(f"  {row['what']:<30}{row['size'] or '':>10}  {speed:>12}  {p50}")
    return "\n".join(lines) + "\n"


def say(line: str) -> None:
    print(f"gpu-check: {line}", file=sys.stderr, flush=True)


def text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="script/gpu-check", add_help=False)
    parser.add_argument("repo", type=Path)
    parser.add_argument("--bundle", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", choices=PARTS, default="")
    args = parser.parse_args()
    if args.bundle:
        try:
            say(f"build/gpu-bundle: {gather(args.repo / 'build/gpu-bundle')}")
        except BundleError as exc:
            say(str(exc))
            return 1
        return 0
    out = (args.out or Path(os.environ.get("OUT") or args.repo / "build/gpu-check")).absolute()
    check = Check(args.repo, out, args.seconds, args.dry_run, args.only)
    good = check.all()
    print((out / "gpu-check.txt").read_text(encoding="utf-8"), end="")
    say(f"{out}/gpu-check.json and gpu-check.txt")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
