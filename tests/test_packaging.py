"""What is installed: sdist, wheel and editable install, and a C core that needs nothing but libc.

Everything happens in a copy of the tree, since builds write into it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from memkv import __version__

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("memkv", "rdma", "store", "gpudirect", "cli", "docs")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
GENERATED = ("_rdma.c", "_store.c", "_copier.c", "_peer.c")
BUILT = ("*.so", "*.o", "__pycache__", *GENERATED, "build", "*.egg-info")
CORES = {
    "memkv/rdma/native/_rdma.abi3.so",
    "memkv/store/native/_store.abi3.so",
    "memkv/gpudirect/native/_copier.abi3.so",
    "memkv/native/_peer.abi3.so",
}

needs_build = pytest.mark.skipif(
    any(shutil.which(t) is None for t in ("gcc", "readelf")),
    reason="no gcc or readelf to build with (apt install gcc)",
)


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MEMKV_SANITIZE", "LD_PRELOAD")}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=600
    )


def check(*command: str | Path, cwd: Path, **env: str) -> str:
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with the links in memkv/ as they are."""
    copy = tmp_path_factory.mktemp("tree")
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns(*BUILT))
    return copy


# --- before the build ---


def compiler(folder: Path, *lacking: str) -> str:
    """A compiler that does not find some headers."""
    script = folder / "cc"
    refusals = "".join(f'*"<{header}>"*) exit 1 ;; ' for header in lacking)
    lines = [
        "#!/bin/sh",
        "text=$(cat)",
        f'case "$text" in {refusals}esac',
        'printf "%s" "$text" | exec gcc "$@"',
        "",
    ]
    script.write_text("\n".join(lines))
    script.chmod(0o755)
    return str(script)


def build_ext(tree: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Builds the extensions out of the tree, as script/test does."""
    where = ("--build-lib", out / "lib", "--build-temp", out / "temp")
    return run(sys.executable, "setup.py", "-q", "build_ext", *where, cwd=tree, **env)


@needs_build
@pytest.mark.parametrize(
    ("lacking", "packages"),
    [
        (["infiniband/verbs.h"], "apt install libibverbs-dev"),
        (["xxhash.h"], "apt install libxxhash-dev"),
        (["Python.h"], "apt install python3-dev"),
        (["Python.h", "xxhash.h"], "apt install python3-dev libxxhash-dev"),
    ],
)
def test_missing_header_is_one_line_with_the_package(
    lacking: list[str], packages: str, tree: Path, tmp_path: Path
) -> None:
    done = build_ext(tree, tmp_path, CC=compiler(tmp_path, *lacking))

    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("memkv cannot be built: no <")
    assert last.endswith(packages)
    assert all(f"<{h}>" in last for h in lacking)


NO_VERBS = """
import sys
sys.path.insert(0, sys.argv[1])
from memkv.rdma._pv import missing
from memkv.rdma.native._rdma import lib
assert lib.mkv_verbs_built() == 0
assert "built without verbs" in missing(), missing()
from memkv.cli.node import main
main(["doctor", "--fabric", "tcp"], prog_name="memkv-node")
"""


@needs_build
def test_without_verbs_it_builds_without_their_headers_and_says_so(tree: Path, tmp_path: Path) -> None:
    lacking = ["infiniband/verbs.h", "liburing.h"]
    built = run(
        sys.executable,
        *("setup.py", "-q", "build", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"),
        cwd=tree,
        CC=compiler(tmp_path, *lacking),
        MEMKV_WITHOUT="verbs",
    )

    assert built.returncode == 0, built.stderr
    out = check(sys.executable, "-c", NO_VERBS, tmp_path / "lib", cwd=tmp_path)
    assert "a node can run here, over tcp" in out


def test_missing_compiler_is_one_line_with_the_package(tree: Path, tmp_path: Path) -> None:
    done = build_ext(tree, tmp_path, CC="/nonexistent/cc")

    assert done.returncode == 1
    assert "no C compiler" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("apt install gcc libc6-dev")


def test_versions_agree() -> None:
    assert f'version="{__version__}"' in (ROOT / "setup.py").read_text(encoding="utf-8")


# --- what a build makes (the whole of it: about two minutes) ---


def build(tree: Path, what: str, into: Path) -> Path:
    """An sdist or a wheel of ``tree``, by the tools that are here (no isolation)."""
    into.mkdir(exist_ok=True)
    program = f"from setuptools import build_meta as b; print(b.build_{what}({str(into)!r}))"
    return into / check(sys.executable, "-c", program, cwd=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist"))


@needs_build
def test_wheel_has_every_module_and_nothing_of_the_build(wheel: Path, tree: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(Path("" if room == "memkv" else "memkv", file.relative_to(tree)))
        for room in ("memkv", "rdma", "store", "gpudirect", "cli")
        for file in (tree / room).rglob("*.py")
        if file.name not in ("build.py", "cdef.py")
    }

    assert wheel.name.startswith(f"memkv-{__version__}-cp311-abi3-linux_")
    assert names >= CORES
    kernels = {f"memkv/gpudirect/kernels/{name}.cu" for name in ("checksum", "pages")}
    assert names >= modules | kernels | {"memkv/py.typed"}
    assert modules >= {"memkv/peer.py", "memkv/rdma/gid.py", "memkv/store/node.py", "memkv/cli/node.py"}
    assert not [n for n in names if n.endswith((".c", ".h", ".o", "native/build.py", "native/cdef.py"))]
    assert not [n for n in names if n.split("/")[0] not in ("memkv", f"memkv-{__version__}.dist-info")]


@needs_build
def test_core_needs_nothing_but_libc(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)

    for core in CORES:
        dynamic = check("readelf", "-d", core, cwd=tmp_path)
        needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
        assert set(needed) <= {"libc.so.6", "libpthread.so.0", "libdl.so.2"}, core


@needs_build
def test_sdist_has_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = {m.name.partition("/")[2] for m in tar.getmembers() if m.isfile()}

    rooms = ("rdma", "store", "gpudirect", "memkv")
    native = [p.relative_to(ROOT) for f in rooms for p in (ROOT / f / "native").glob("*.[ch]")]
    sources = {str(p if p.parts[0] == "memkv" else Path("memkv", p)) for p in native}
    assert names >= {s for s in sources if Path(s).name not in GENERATED}
    assert names >= {
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "docs/protocol.md",
        "memkv/py.typed",
    }
    assert names >= {f"memkv/{f}native/build.py" for f in ("", "rdma/", "store/", "gpudirect/")}
    assert not [n for n in names if n.endswith((".so", ".o")) or Path(n).name in GENERATED]


@needs_build
def test_wheel_of_the_sdist_has_the_same_files(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path)

    again = build(next(tmp_path.glob("memkv-*")), "wheel", tmp_path / "out")

    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def pip(python: Path, *args: str | Path, cwd: Path) -> None:
    """pip in an environment; skips the test if there is nothing to install from."""
    done = run(python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *args, cwd=cwd)
    unreachable = ("No matching distribution", "Temporary failure", "Connection", "HTTPError", "Max retries")
    if done.returncode and any(words in done.stderr for words in unreachable):
        pytest.skip(f"no package index here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


NOTHING = """
import ctypes, sys
real = ctypes.CDLL
def refuse(name, *args, **kwargs):
    if name and any(w in str(name) for w in ("ibverbs", "cuda", "uring")):
        raise OSError(f"{name}: cannot open shared object file")
    return real(name, *args, **kwargs)
ctypes.CDLL = refuse
for name in ("pyverbs", "cupy", "torch"):
    sys.modules[name] = None
import memkv, memkv.peer, memkv.store.node, memkv.rdma.verbs
from memkv.rdma._pv import missing
assert missing(), "pyverbs was found after all"
from memkv.cli.node import main
main(["doctor", "--fabric", "tcp"], prog_name="memkv-node")
"""


@needs_build
def test_wheel_in_an_empty_environment_runs_where_there_is_no_rdma(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    bin_ = tmp_path / "env/bin"
    pip(bin_ / "python", wheel, cwd=tmp_path)

    assert __version__ in check(bin_ / "memkv-node", "--version", cwd=tmp_path)
    assert "serve" in check(bin_ / "memkv-node", "--help", cwd=tmp_path)
    assert "Usage" in check(bin_ / "memkv-bench", "--help", cwd=tmp_path)
    out = check(bin_ / "python", "-c", NOTHING, cwd=tmp_path)
    assert "a node can run here, over tcp" in out
    assert "libibverbs  absent" in out


@needs_build
def test_editable_install_leaves_the_core_in_the_tree(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns(*BUILT))
    (
        copy / "rdma/native/_rdma.cpython-311-x86_64-linux-gnu.so"
    ).touch()  # an older build, first in line for import
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    pip(python, "setuptools>=66", "wheel", "cffi", cwd=tmp_path)

    pip(python, "--no-build-isolation", "-e", copy, cwd=tmp_path)

    where = check(
        python, "-c", "import memkv.store.node, memkv.rdma.native._rdma as r; print(r.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).resolve() == copy / "rdma/native/_rdma.abi3.so"
    assert {str(p.relative_to(copy)) for p in copy.rglob("native/*.so")} == {
        "rdma/native/_rdma.abi3.so",
        "store/native/_store.abi3.so",
        "gpudirect/native/_copier.abi3.so",
        "memkv/native/_peer.abi3.so",
    }


def test_build_without_cffi_says_so(tree: Path, tmp_path: Path) -> None:
    lines = [
        "import importlib.util as u",
        "f = u.find_spec",
        "u.find_spec = lambda n, *a: None if n == 'cffi' else f(n, *a)",
    ]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))

    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, PYTHONPATH=str(tmp_path))

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install cffi setuptools wheel")


@needs_build
def test_sanitized_build_carries_both_sanitizers(tree: Path, tmp_path: Path) -> None:
    done = build_ext(tree, tmp_path, MEMKV_SANITIZE="1")

    assert done.returncode == 0, done.stderr

    for core in CORES:
        dynamic = check("readelf", "-d", core, cwd=tmp_path / "lib")
        assert "libasan" in dynamic
        assert "libubsan" in dynamic
