"""memkv-node doctor: what it says about machines that lack this or that, and about a device that works."""

from __future__ import annotations

import ctypes
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from memkv.cli import cuda, host, ladders, selftest
from memkv.cli.doctor import examine
from memkv.cli.node import main
from memkv.cli.selftest import Outcome
from memkv.gpudirect import driver
from memkv.gpudirect.ladder import Answers, decide
from memkv.rdma import _pv, devices
from memkv.rdma.tcp import TcpFabric
from memkv.store.config import NodeConfig
from tests.conftest import NO_DEVICE
from tests.gpudirect.standin import Standin, build
from tests.gpudirect.test_ladder import RECORDED

from .nodes import environment

MIB = 1 << 20


def doctor(*args: str) -> Result:
    return CliRunner(env={"MEMKV_SECRET": ""}).invoke(main, ["doctor", *args], prog_name="memkv-node")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without RDMA devices, CUDA, libibverbs, pyverbs, liburing and perftest."""
    monkeypatch.setattr(devices, "names", list)
    monkeypatch.setattr(host, "library", lambda name: ("", f"{name}: cannot open shared object file"))
    monkeypatch.setattr(host, "pyverbs", lambda: ("", "pyverbs cannot be used: No module named 'pyverbs'"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(host, "module", lambda name, root=None: "absent")
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-that-is-not-there.so.1")


# --- a machine that has nothing ---


def test_bare_machine_can_run_a_node_over_tcp_and_is_told_the_rest(bare: None) -> None:
    done = doctor()

    assert done.exit_code == 0, done.output
    out = done.output
    for words in (
        "a node can run here, over tcp",
        "libibverbs  absent",
        "pyverbs     absent",
        "liburing    absent",
        "no RDMA device",
        "modprobe rdma_rxe && rdma link add rxe0 type rxe netdev",
        "✗ pinned staging: no CUDA: libcuda-that-is-not-there.so.1 is not installed",
        "→ host memory: blocks move between host memories",
        "✓ tcp: 1048576 bytes",
    ):
        assert words in out


def test_json_has_every_ladder_with_the_rung_taken(bare: None) -> None:
    report = json.loads(doctor("--json").output)

    assert set(report) == {
        "memkv",
        "ok",
        "verdict",
        "facts",
        "ladders",
        "devices",
        "broken_devices",
        "gpus",
        "self_tests",
    }
    assert list(report["ladders"]) == ["fabric", "gpu_get", "gpu_put", "pages", "memlock", "flash", "clock"]
    for name, ladder in report["ladders"].items():
        assert set(ladder) == {"decides", "taken", "rungs"}, name
        first = next(r["name"] for r in ladder["rungs"] if r["usable"])
        assert ladder["taken"] == first
        assert all(r["why"] for r in ladder["rungs"]), f"{name}: a rung without a reason"
    assert report["ok"] is True
    assert report["ladders"]["fabric"]["taken"] == "tcp"
    assert [(t["fabric"], t["ok"]) for t in report["self_tests"]] == [("tcp", True)]
    assert 0 < report["self_tests"][0]["best_s"] <= report["self_tests"][0]["first_s"]


def test_verbs_that_was_demanded_and_is_not_there_ends_with_1(bare: None) -> None:
    done = doctor("--fabric", "verbs", "--json")

    report = json.loads(done.output)
    assert done.exit_code == 1
    assert report["ok"] is False
    assert report["ladders"]["fabric"]["taken"] is None
    assert "no RDMA device" in report["verdict"]


def test_unknown_device_is_a_slip_not_a_diagnosis(bare: None) -> None:
    done = doctor("--device", "mlx5_7")

    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "mlx5_7" in done.stderr


def test_it_reads_the_node_s_file(bare: None, tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('fabric = "tcp"\nmemory = "8G"\n')

    out = doctor("--config", str(file)).output

    assert "verbs: --fabric tcp was given" in out
    assert "8192 MiB need 4096" in out


def test_without_the_c_core_it_says_how_to_build_it(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "memkv.store.node", None)

    done = doctor()

    assert done.exit_code == 1
    assert "no node can run here: the C core cannot be loaded" in done.output
    assert "pip install ." in done.output


def test_gpu_libraries_are_never_imported() -> None:
    program = (
        "import sys; from memkv.cli.node import main\n"
        "try: main(['doctor', '--fabric', 'tcp'])\n"
        "except SystemExit as exc: assert exc.code == 0\n"
        "print([m for m in ('cupy', 'torch', 'cuda') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60
    )

    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# --- a device that is there and does not work ---


def test_verbs_that_fails_its_self_test_is_told_with_the_way_out(
    bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(config: NodeConfig) -> TcpFabric:
        fabric = TcpFabric(("127.0.0.1", 0))
        fabric.name = "tcp" if config.fabric == "tcp" else "verbs"
        return fabric

    real = selftest.run

    def run(fabric: TcpFabric, at: str) -> Outcome:
        return (
            Outcome("verbs", False, "the READ failed: error 110")
            if fabric.name == "verbs"
            else real(fabric, at)
        )

    monkeypatch.setattr("memkv.store.node.open_fabric", opened)
    monkeypatch.setattr(selftest, "run", run)

    report = examine(NodeConfig())

    assert report.ok
    assert [(t.fabric, t.ok) for t in report.self_tests] == [("verbs", False), ("tcp", True)]
    assert "does not work (the READ failed: error 110)" in report.verdict
    assert "--fabric tcp" in report.verdict


def test_self_test_sees_a_wrong_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    real = selftest.jobs.read_batch

    def spoiled(*args: Any) -> Any:
        out = real(*args)
        read = args[1][0]["seg"][0]
        region = next(r for r in domains[0].regions.values() if r.id == read["region"])
        ctypes.c_ubyte.from_address(region.address + 4097).value ^= 1
        return out

    fabric = TcpFabric(("127.0.0.1", 0))
    domains: list[Any] = []
    make = fabric.domain
    monkeypatch.setattr(fabric, "domain", lambda: domains.append(make()) or domains[0])
    monkeypatch.setattr(selftest.jobs, "read_batch", spoiled)

    outcome = selftest.run(fabric)
    fabric.close()

    assert not outcome.ok
    assert "from byte 4097 on" in outcome.why


# --- what to do about it ---


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("loaded", "or soft-RoCE: rdma link add rxe0"),
        ("loadable", "or soft-RoCE: modprobe rdma_rxe && rdma link add rxe0"),
        ("absent", "has no rdma_rxe"),
    ],
)
def test_how_to_get_a_device_depends_on_the_kernel(
    state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "names", list)
    monkeypatch.setattr(host, "module", lambda name, root=None: state)

    assert words in ladders.how_to_get_verbs()


@pytest.mark.parametrize(
    ("libibverbs", "pyverbs", "uverbs", "words"),
    [
        ("", "", False, "apt install libibverbs1 ibverbs-providers"),
        ("/lib/libibverbs.so.1", "", False, "apt install python3-pyverbs"),
        ("/lib/libibverbs.so.1", "44.0", False, "--device /dev/infiniband"),
        ("/lib/libibverbs.so.1", "44.0", True, "ip link set"),
    ],
)
def test_what_is_missing_beside_a_device(
    libibverbs: str, pyverbs: str, uverbs: bool, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "names", lambda: ["mlx5_0"])
    monkeypatch.setattr(host, "libibverbs", lambda: (libibverbs, ""))
    monkeypatch.setattr(host, "pyverbs", lambda: (pyverbs, ""))
    monkeypatch.setattr(host, "ROOT", tmp_path)
    (tmp_path / "dev/infiniband").mkdir(parents=True)
    if uverbs:
        (tmp_path / "dev/infiniband/uverbs0").touch()

    assert words in ladders.how_to_get_verbs()


@pytest.mark.parametrize(
    ("free", "huge", "thp", "taken", "do"),
    [
        (600, None, "always [madvise] never", "explicit huge pages", ""),
        (511, None, "always [madvise] never", "transparent huge pages", "vm.nr_hugepages=617"),
        (0, None, "always madvise [never]", "4 KiB pages", "vm.nr_hugepages="),
        (0, None, "", "4 KiB pages", "vm.nr_hugepages="),
        (600, False, "[always] madvise never", "4 KiB pages", ""),
        (0, True, "[always] madvise never", None, "vm.nr_hugepages="),
    ],
)
def test_pages(
    free: int,
    huge: bool | None,
    thp: str,
    taken: str | None,
    do: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(host, "ROOT", tmp_path)
    for path, text in {
        "proc/meminfo": f"HugePages_Total: 600\nHugePages_Free: {free}\nHugepagesize: 2048 kB\n",
        "sys/kernel/mm/transparent_hugepage/enabled": thp,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    ladder = ladders.pages(1024 * MIB, huge, lambda: (3 * MIB, 8 * MIB))

    tried = "advised for 8 MiB, 3 MiB were given" in ladder.rungs[1].why
    assert tried == (huge is not False and "[never]" not in thp and bool(thp))
    assert (ladder.taken.name if ladder.taken else None) == taken
    assert do in ladder.rungs[0].do


@pytest.mark.parametrize(
    ("limit", "binds", "userns", "verbs", "taken"),
    [
        (-1, True, False, True, "unlimited"),
        (8 * MIB, False, False, True, "unlimited"),
        (8 * MIB, False, True, True, None),  # capabilities of a user namespace do not count
        (8 * MIB, True, False, True, None),
        (8 * MIB, True, False, False, "limited"),
        (2048 * MIB, True, False, True, "limited"),
    ],
)
def test_memlock(
    limit: int, binds: bool, userns: bool, verbs: bool, taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "memlock", lambda: (limit, binds))
    monkeypatch.setattr(host, "user_namespace", lambda root=None: userns)

    ladder = ladders.memlock(1024 * MIB, verbs)

    assert (ladder.taken.name if ladder.taken else None) == taken
    if taken is None:
        assert "LimitMEMLOCK=infinity" in ladder.rungs[0].do


@pytest.mark.parametrize(
    ("code", "disabled", "words"),
    [
        (errno.ENOSYS, "", "no io_uring"),
        (errno.EPERM, "2", "sysctl kernel.io_uring_disabled=0"),
        (errno.EPERM, "0", "seccomp"),
        (errno.ENOMEM, "0", "ulimit -l"),
    ],
)
def test_io_uring_that_is_refused(
    code: int, disabled: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Refusing:
        def syscall(self, *args: object) -> int:
            ctypes.set_errno(code)
            return -1

    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/io_uring_disabled").write_text(disabled)
    monkeypatch.setattr(host, "ROOT", tmp_path)
    monkeypatch.setattr(host.ctypes, "CDLL", lambda *a, **k: Refusing())

    usable, why, do = host.io_uring()

    assert not usable
    assert words in f"{why} ({do})"


def test_device_advice() -> None:
    from tests.rdma.test_devices import a_device, a_port

    slow = a_device("mlx5_0", a_port(mtu=1024), a_port(number=2, active=False))

    said = " ".join(ladders.device_advice(slow))

    assert "ip link set eth0 mtu 9000" in said
    assert "port 2 is not active" in said


# --- the host ---


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({}, ""),
        ({".dockerenv": ""}, "docker"),
        ({"run/.containerenv": ""}, "podman"),
        ({"proc/1/cgroup": "0::/kubepods/burstable/pod1\n"}, "kubernetes"),
        ({"proc/1/environ": "PATH=/bin\0container=lxc\0"}, "lxc"),
    ],
)
def test_container(files: dict[str, str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert host.container(tmp_path) == kind


def test_modules_are_loaded_loadable_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.platform, "release", lambda: "6.1.0")
    base = tmp_path / "lib/modules/6.1.0"
    base.mkdir(parents=True)
    (base / "modules.dep").write_text("kernel/drivers/infiniband/sw/rxe/rdma_rxe.ko.xz: kernel/x.ko.xz\n")
    (base / "modules.builtin").write_text("kernel/drivers/infiniband/core/ib_uverbs.ko\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/modules").write_text("nvidia_peermem 16384 0 - Live 0x0\n")

    states = {m: host.module(m, tmp_path) for m in ("rdma_rxe", "ib_uverbs", "nvidia-peermem", "siw")}

    assert states == {
        "rdma_rxe": "loadable",
        "ib_uverbs": "loaded",
        "nvidia-peermem": "loaded",
        "siw": "absent",
    }


# --- GPUs ---

H100 = "H100, ConnectX-7, open modules"
SLOW = "reads out of the BAR crawl"


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """Two GPUs, as far as libcuda's stand-in goes."""
    monkeypatch.setattr(driver, "LIBRARY", build())
    made = Standin(driver.LIBRARY)
    for which, value in ((driver.DMA_BUF_SUPPORTED, 1), (driver.GPU_DIRECT_RDMA_SUPPORTED, 1)):
        made.attribute(which, value)
    yield made
    made.close()


def machine(name: str) -> Answers:
    """A recorded one, see tests/gpudirect."""
    return msgspec.json.decode(RECORDED.read_bytes(), type=dict[str, Answers])[name]


def test_gpus_are_listed_with_what_their_driver_offers(standin: Standin) -> None:
    found = cuda.probe()

    assert found.version == "12.4"
    assert [(g.name, g.bus, g.dma_buf, g.gpu_direct) for g in found.gpus] == [
        ("Stand-in 0", "0000:17:00.0", True, True),
        ("Stand-in 1", "0000:18:00.0", True, True),
    ]
    for ladder in ladders.gpu(found):
        assert ladder.taken is not None
        assert ladder.taken.name == "pinned staging"
        assert [r.name for r in ladder.rungs] == [
            "dma-buf",
            "nvidia-peermem",
            "pinned staging",
            "host memory",
        ]
        assert all(r.why for r in ladder.rungs)
    assert not any(s.startswith("retain") for s in standin.log()), "no context for the asking"


def test_get_and_put_have_a_rung_each_and_each_gpu_its_own(
    bare: None, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LIBRARY", standin.path)
    monkeypatch.setattr(cuda, "ask", lambda fabric, index, at: machine((SLOW, H100)[index]))

    report = json.loads(doctor("--json").output)
    shown = doctor().output

    assert report["ladders"]["gpu_get"]["taken"] == "dma-buf"
    assert report["ladders"]["gpu_put"]["taken"] == "pinned staging"
    second = report["gpus"]["gpus"][1]
    assert (second["decision"]["get"]["name"], second["decision"]["put"]["name"]) == ("dma-buf", "dma-buf")
    assert second["answers"]["host"]["gbps"] > 40
    for words in (
        "gpu_put: pinned staging",
        "✗ dma-buf: slow, 1.40 GB/s (host memory: 24.80)",
        "GPU 0 Stand-in 0 (0000:17:00.0)",
        "put → staged: dma-buf: slow",
        "GPU 1 Stand-in 1 (0000:18:00.0)",
        "put → dma-buf: READs out of",
    ):
        assert words in shown, words


def test_what_to_do_about_a_rung_that_is_not_there() -> None:
    answers = machine("driver of 2021")
    gpu = cuda.Gpu(0, "V100", "", False, False, "call", answers, decide(answers))
    get, _ = ladders.gpu(cuda.Cuda("11.2", (gpu,), ""))
    assert get.rungs[0].do == "NVIDIA's open kernel modules, driver 515 or later"
    assert get.rungs[1].do == "modprobe nvidia_peermem"


def test_driver_without_a_gpu_says_so(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_loaded", {})
    standin.fail("cuInit", 100)
    assert (cuda.probe().gpus, cuda.probe().why) == ((), "cuInit: CUDA_ERROR_NO_DEVICE (100)")


def test_library_that_is_no_driver_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("no gcc to make a stand-in for libcuda")
    subprocess.run([gcc, "-shared", "-o", tmp_path / "libempty.so", "-xc", "/dev/null"], check=True)
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "libempty.so"))

    assert "is no CUDA driver" in cuda.probe().why


def test_gpu_on_the_bus_without_a_driver(tmp_path: Path) -> None:
    for slot, kind in (("0000:01:00.0", "0x030200"), ("0000:01:00.1", "0x040300")):
        (tmp_path / "sys/bus/pci/devices" / slot).mkdir(parents=True)
        (tmp_path / "sys/bus/pci/devices" / slot / "vendor").write_text("0x10de\n")
        (tmp_path / "sys/bus/pci/devices" / slot / "class").write_text(kind + "\n")

    assert cuda.on_bus(tmp_path) == 1


# --- a real device ---


@pytest.fixture
def device() -> str:
    if not devices.names():
        pytest.skip(NO_DEVICE)
    if _pv.missing():
        pytest.skip(_pv.missing())
    return devices.names()[0]


@pytest.mark.verbs
def test_device_is_taken_explained_and_proved(device: str) -> None:
    done = doctor("--json")

    report = json.loads(done.output)
    assert done.exit_code == 0
    assert report["ladders"]["fabric"]["taken"] == "verbs"
    assert report["verdict"] == "a node can run here, over verbs"
    (only,) = report["self_tests"]
    assert (only["fabric"], only["ok"]) == ("verbs", True)
    shown = next(d for d in report["devices"] if d["name"] == device)
    port = next(p for p in shown["ports"] if p["active"])
    assert port["mtu"] >= 256
    assert port["max_msg"] >= MIB
    taken = next(g for g in port["gids"] if g["index"] == port["gid"]["taken"])
    assert taken["rejected"] is None
    assert all(g["rejected"] for g in port["gids"] if g is not taken)
    assert set(shown["notes"]) == {"dma-buf", "odp"}


@pytest.mark.verbs
def test_gid_index_that_is_not_there_sends_a_node_to_tcp(device: str) -> None:
    done = doctor("--gid-index", "9999")

    assert done.exit_code == 0
    assert "there is no GID with index 9999" in done.output
    assert "a node can run here, over tcp" in done.output


@pytest.mark.verbs
def test_tcp_can_be_asked_for_all_the_same(device: str) -> None:
    done = doctor("--fabric", "tcp")

    assert done.exit_code == 0
    assert "✓ tcp" in done.output
    assert "✓ verbs" not in done.output


@pytest.mark.verbs
def test_gpu_beside_soft_roce_is_staged_and_told_why(device: str, standin: Standin) -> None:
    if devices.probe(device).dma_buf:
        pytest.skip("this device takes dma-bufs")
    report = json.loads(doctor("--json").output)

    first = report["gpus"]["gpus"][0]
    assert first["answers"]["fabric"] == "verbs"
    for direction in ("get", "put"):
        assert first["decision"][direction]["name"] == "staged"
        assert f"{device} (" in first["decision"][direction]["reason"]
        assert report["ladders"][f"gpu_{direction}"]["taken"] == "pinned staging"
