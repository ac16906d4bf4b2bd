"""What this machine has: libraries, kernel modules, limits, containers. It looks, and changes nothing.

Nothing here raises for what is absent: every answer is a fact or a reason.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
from pathlib import Path

ROOT = Path("/")
IO_URING_SETUP = 425  # the same number on every architecture


def read(path: str, root: Path | None = None) -> str:
    """A file's text without white space around it; empty if it is not there."""
    try:
        return ((root or ROOT) / path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def library(name: str) -> tuple[str, str]:
    """(path, "") of a shared library that can be loaded, or ("", why not)."""
    try:
        ctypes.CDLL(name)
    except OSError as exc:
        return "", str(exc)
    stem = name.split(".so")[0]
    for line in read("proc/self/maps").splitlines():
        path = line.partition("/")[2]
        if path.rpartition("/")[2].startswith(stem):
            return str(Path("/" + path).resolve()), ""
    return name, ""


def libibverbs() -> tuple[str, str]:
    """(what is installed, ""), or ("", why it cannot be loaded)."""
    path, why = library("libibverbs.so.1")
    version = re.search(r"\.so\.1\.\d+\.(.+)$", path)
    return (f"{path} (rdma-core {version[1]})" if version else path), why


def pyverbs() -> tuple[str, str]:
    """(where pyverbs is, ""), or ("", why it cannot be used)."""
    from ..rdma import _pv

    if _pv.missing():
        return "", _pv.missing()
    import importlib.metadata
    import importlib.util

    spec = importlib.util.find_spec("pyverbs")
    place = next(iter(spec.submodule_search_locations or []), "") if spec else ""
    try:
        return f"{importlib.metadata.version('pyverbs')} ({place})", ""
    except importlib.metadata.PackageNotFoundError:  # Debian's has no metadata; it belongs to libibverbs
        version = re.search(r"rdma-core (.+)\)", libibverbs()[0])
        return f"{version[1] if version else 'version unknown'} ({place})", ""


def io_uring() -> tuple[bool, str, str]:
    """(usable, why, what to do): by asking the kernel for a ring."""
    params = (ctypes.c_uint32 * 30)()
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(IO_URING_SETUP, 8, params)
    if fd >= 0:
        os.close(fd)
        return True, "the kernel gives rings", ""
    code = ctypes.get_errno()
    why = f"io_uring_setup: {os.strerror(code)}"
    if code == 38:
        return False, f"{why}: this kernel has no io_uring", "a kernel from 5.10 on, with CONFIG_IO_URING"
    if code == 1:
        disabled = read("proc/sys/kernel/io_uring_disabled")
        if disabled not in ("", "0"):
            return False, f"{why}: kernel.io_uring_disabled = {disabled}", "sysctl kernel.io_uring_disabled=0"
        return (
            False,
            f"{why}: a seccomp filter forbids it",
            "containers: --security-opt seccomp=FILE that allows it",
        )
    if code == 12:
        return False, f"{why}: locked memory is used up", "ulimit -l unlimited"
    return False, why, ""


def module(name: str, root: Path | None = None) -> str:
    """ "loaded", "loadable" or "absent" for a kernel module, by either spelling of its name."""
    root = root or ROOT
    plain = name.replace("-", "_")
    loaded = {line.split()[0] for line in read("proc/modules", root).splitlines() if line}
    if plain in loaded or (root / "sys/module" / plain).is_dir():
        return "loaded"
    base = f"lib/modules/{platform.release()}"
    for file in ("modules.dep", "modules.builtin"):
        for line in read(f"{base}/{file}", root).splitlines():
            stem = line.split(":")[0].rpartition("/")[2].split(".ko")[0]
            if stem.replace("-", "_") == plain:
                return "loaded" if file == "modules.builtin" else "loadable"
    return "absent"


def container(root: Path | None = None) -> str:
    """The kind of container that this process seems to be in, or an empty string."""
    root = root or ROOT
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    found = re.search(r"kubepods|docker|containerd|libpod|lxc", read("proc/1/cgroup", root))
    if found:
        return {"kubepods": "kubernetes", "libpod": "podman"}.get(found[0], found[0])
    init = read("proc/1/environ", root)
    named = re.search(r"(?:^|\0)container=([^\0]+)", init)
    return named[1] if named else ""


def user_namespace(root: Path | None = None) -> bool:
    """Whether capabilities are those of a user namespace only; CAP_IPC_LOCK then counts for nothing."""
    words = read("proc/self/uid_map", root).split()
    return bool(words) and words != ["0", "0", "4294967295"]


def cpus() -> str:
    """How many CPUs this process may use, and how many there are."""
    mine, all_ = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    text = str(mine) if mine == all_ else f"{mine} of {all_}"
    quota = read("sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        text += f", limited to {int(quota[0]) / int(quota[1]):.2g} by the cgroup"
    return text


def memory() -> str:
    """Memory, what of it is available, and the cgroup's limit."""
    kib = {
        w[0].rstrip(":"): int(w[1]) for w in map(str.split, read("proc/meminfo").splitlines()) if len(w) > 1
    }
    text = f"{kib.get('MemTotal', 0) >> 10} MiB, {kib.get('MemAvailable', 0) >> 10} MiB available"
    limit = read("sys/fs/cgroup/memory.max")
    return text + (f", limited to {int(limit) >> 20} MiB by the cgroup" if limit.isdigit() else "")


def interfaces() -> list[str]:
    """Network interfaces other than loopback, those that are up first."""
    base = ROOT / "sys/class/net"
    names = sorted(p.name for p in base.iterdir()) if base.is_dir() else []
    names = [n for n in names if n != "lo"]
    return sorted(names, key=lambda n: read(f"sys/class/net/{n}/operstate") not in ("up", "unknown"))


def facts() -> dict[str, str]:
    """The heading of a report."""
    ibverbs, why_ibverbs = libibverbs()
    pv, why_pv = pyverbs()
    uring, why_uring = library("liburing.so.2")
    tools = [t for t in ("ib_read_bw", "ib_read_lat", "ibv_devinfo", "rdma", "ip") if shutil.which(t)]
    where = container()
    return {
        "python": f"{platform.python_version()} ({platform.machine()})",
        "kernel": platform.release(),
        "cpus": cpus(),
        "memory": memory(),
        "container": (where or "none seen") + (", in a user namespace" if user_namespace() else ""),
        "libibverbs": ibverbs or f"absent: {why_ibverbs}",
        "pyverbs": pv or f"absent: {why_pv}",
        "liburing": uring or f"absent: {why_uring}",
        "tools": ", ".join(tools) or "none of perftest, ibverbs-utils, iproute2",
        "modules": ", ".join(f"{m} {module(m)}" for m in ("ib_uverbs", "rdma_rxe", "nvidia_peermem")),
    }
