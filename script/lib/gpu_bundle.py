"""script/gpu-check --bundle, and taking things out of a bundle: wheels and headers for a machine without a
network. Nothing but the standard library, on both sides.

    BUNDLE/wheels/*.whl          for CPython 3.11 and 3.12
    BUNDLE/include/…             headers of verbs, liburing and xxhash
    BUNDLE/include-python/…      Python.h and what belongs to it; its stable ABI fits later Pythons too
    BUNDLE/lib/liburing.a
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MOST = 60 << 20  # bytes
PYTHONS = ("3.11", "3.12")
# What memkv and its tests import, with what that imports. CuPy and torch are the GPU machine's own.
WHEELS = ("cffi", "pycparser", "msgspec", "click", "rich", "markdown-it-py", "mdurl", "pygments")
WHEELS += ("prometheus-client", "pytest", "iniconfig", "pluggy", "packaging", "setuptools", "numpy")
WHEELS += ("hypothesis", "sortedcontainers", "xxhash")
HEADERS = ("libxxhash-dev", "libibverbs-dev", "liburing-dev")  # Debian's names


class BundleError(Exception):
    """It cannot be gathered, and why."""


def gather(bundle: Path) -> str:
    """Fills ``bundle`` anew; what is in it, in a line."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise BundleError("headers are taken from Debian's packages, and this is no Debian")
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / "wheels").mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="memkv-bundle-") as folder:
        _headers(Path(folder), bundle)
        for version in PYTHONS:
            _wheels(bundle / "wheels", version)
    files = [f for f in bundle.rglob("*") if f.is_file()]
    nbytes = sum(f.stat().st_size for f in files)
    if nbytes > MOST:
        raise BundleError(f"{bundle} has {nbytes >> 20} MiB, {MOST >> 20} are allowed")
    return f"{len(list(bundle.glob('wheels/*')))} wheels and {len(files)} files, {nbytes / (1 << 20):.1f} MiB"


def _wheels(into: Path, version: str) -> None:
    machine = platform.machine()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
    command += [
        "--only-binary",
        ":all:",
        "--python-version",
        version,
        "--implementation",
        "cp",
        "-d",
        str(into),
    ]
    for tag in (f"manylinux_2_17_{machine}", f"manylinux2014_{machine}", f"manylinux_2_28_{machine}"):
        command += ["--platform", tag]
    done = subprocess.run([*command, *WHEELS], capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"pip download for {version}: {done.stderr.strip().splitlines()[-1]}")


def _headers(folder: Path, bundle: Path) -> None:
    here = next((v for v in PYTHONS if _knows(f"libpython{v}-dev")), None)
    packages = [*HEADERS, *([f"libpython{here}-dev"] if here else [])]
    done = subprocess.run(
        ["apt-get", "-q", "download", *packages], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise BundleError(f"apt-get download: {done.stderr.strip().splitlines()[-1]} (apt-get update?)")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
    include = folder / "root/usr/include"
    multiarch = include / f"{platform.machine()}-linux-gnu"
    for name in include.iterdir():
        if name == multiarch:
            continue
        target = bundle / ("include-python" if name.name.startswith("python") else "include")
        _copy(name, target if name.name.startswith("python") else target / name.name)
    for name in multiarch.iterdir() if multiarch.is_dir() else ():  # pyconfig.h
        target = f"include-python/{multiarch.name}" if name.name.startswith("python") else "include"
        _copy(name, bundle / target / name.name)
    (bundle / "lib").mkdir()
    for archive in (folder / "root").rglob("liburing.a"):
        shutil.copy(archive, bundle / "lib")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _knows(package: str) -> bool:
    done = subprocess.run(["apt-cache", "show", package], capture_output=True, text=True)
    return done.returncode == 0 and bool(done.stdout)


# --- on the other side ---


def distribution(name: str) -> str:
    """A distribution's name as all spellings of it are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def fits(wheel: str, version: tuple[int, int] = sys.version_info[:2], machine: str | None = None) -> bool:
    """Whether a wheel, by its file name, is for this Python and machine."""
    python, abi, place = wheel.removesuffix(".whl").split("-")[-3:]
    if place != "any" and (machine or platform.machine()) not in place:
        return False
    mine = f"cp{version[0]}{version[1]}"
    if abi == "none":
        return any(tag in ("py3", mine) for tag in python.split("."))
    if abi == "abi3":
        since = [tuple(map(int, m.groups())) for m in re.finditer(r"cp(\d)(\d+)", python)]
        return any(s <= version for s in since)
    return mine in python.split(".") and mine in abi.split(".")


def unpack_missing(bundle: Path, into: Path) -> tuple[list[str], list[str]]:
    """Unpacks the wheels of distributions that this Python lacks; (those that were there, those unpacked).

    :raises BundleError: one is neither here nor in the bundle.
    """
    here, unpacked, lacking = [], [], []
    for name in WHEELS:
        try:
            here.append(f"{name} {importlib.metadata.version(name)}")
            continue
        except importlib.metadata.PackageNotFoundError:
            pass
        found = [w for w in bundle.glob("wheels/*.whl") if distribution(w.name.split("-")[0]) == name]
        found = [w for w in found if fits(w.name)]
        if not found:
            lacking.append(name)
            continue
        zipfile.ZipFile(found[0]).extractall(into)
        unpacked.append(f"{name} {found[0].name.split('-')[1]}")
    if lacking:
        raise BundleError(
            f"this Python ({sys.executable}, {platform.python_version()}) has no {', '.join(lacking)}, "
            f"nor has {bundle}: script/gpu-check --bundle where there is a network, and bring it along"
        )
    return here, unpacked
