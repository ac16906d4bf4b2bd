"""``memkv-node doctor``: why does it not work here? Every ladder, the rung taken, why, and what to do."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from .. import __version__
from ..rdma import devices, gid
from ..rdma.errors import LocalError, MemKVError
from ..rdma.fabric import Fabric
from ..store.config import NodeConfig
from . import cuda, host, ladders, selftest
from .ladders import Ladder
from .selftest import Outcome


@dataclass(slots=True)
class Gids:
    """A port's choice of GID: the one taken, and every other with what spoke against it."""

    device: str
    port: int
    taken: gid.Gid | None
    why: str
    rejected: tuple[tuple[gid.Gid, str], ...] = ()


@dataclass(slots=True)
class Report:
    """Everything that doctor found; :meth:`as_json` and :func:`show` are its two faces."""

    facts: dict[str, str]
    ladders: list[Ladder]
    devices: list[devices.Device] = field(default_factory=list)
    broken_devices: dict[str, str] = field(default_factory=dict)
    gids: list[Gids] = field(default_factory=list)
    gpus: cuda.Cuda | None = None
    self_tests: list[Outcome] = field(default_factory=list)
    fault: str = ""  # why no node can run here

    @property
    def ok(self) -> bool:
        """Whether a node can run here at all."""
        return not self.fault and any(t.ok for t in self.self_tests)

    @property
    def verdict(self) -> str:
        if not self.ok:
            return "no node can run here: " + (
                self.fault or "; ".join(f"{t.fabric}: {t.why}" for t in self.self_tests)
            )
        first = self.self_tests[0]
        if first.ok:
            return f"a node can run here, over {first.fabric}"
        working = next(t for t in self.self_tests if t.ok)
        return (
            f"a node would take {first.fabric}, which does not work ({first.why}); "
            f"it can run over {working.fabric}: --fabric {working.fabric}"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "memkv": __version__,
            "ok": self.ok,
            "verdict": self.verdict,
            "facts": self.facts,
            "ladders": {
                rung.name: {
                    "decides": rung.decides,
                    "taken": rung.taken.name if rung.taken else None,
                    "rungs": [asdict(r) for r in rung.rungs],
                }
                for rung in self.ladders
            },
            "devices": [_device_json(d, self.gids) for d in self.devices],
            "broken_devices": self.broken_devices,
            "gpus": asdict(self.gpus) if self.gpus else None,
            "self_tests": [asdict(t) for t in self.self_tests],
        }


def examine(config: NodeConfig) -> Report:
    """Looks at everything, for a node with these settings. Raises for nothing that is merely absent."""
    report = Report(host.facts(), [])
    _look_at_devices(report, config)
    why, usable = _verbs_of(config)
    fabric = ladders.fabric(why, usable, config.fabric)
    over_verbs = fabric.taken is not None and fabric.taken.name == "verbs"
    report.gpus = _look_at_gpus(config)
    report.ladders = [
        fabric,
        *ladders.gpu(report.gpus),
        ladders.pages(config.memory, config.huge),
        ladders.memlock(config.memory, over_verbs),
        ladders.flash(),
        ladders.clock(),
    ]
    _test(report, config)
    return report


def _look_at_gpus(config: NodeConfig) -> cuda.Cuda:
    """With READs into and out of them, over the fabric that a node would take."""
    found = cuda.probe()
    if not found.gpus:
        return found
    try:
        fabric = _open_fabric(config)
    except (ImportError, MemKVError, OSError):  # the self-tests tell
        return found
    try:
        return cuda.probe(fabric, _address(config))
    finally:
        fabric.close()


def _open_fabric(config: NodeConfig) -> Fabric:
    """:raises ImportError: the C core is not built."""
    from ..store.node import open_fabric

    return open_fabric(replace(config, data_port=0))  # its own may be in use by the node that this is about


def _address(config: NodeConfig) -> str:
    """Where a fabric that a node would open can be reached from here."""
    at = config.listen[0] if config.listen[0] not in ("0.0.0.0", "::") else ""
    return at or ("::1" if config.listen[0] == "::" else "127.0.0.1")


def _look_at_devices(report: Report, config: NodeConfig) -> None:
    addresses = devices.local_addresses()
    toward = _toward(config)
    for name in devices.names():
        try:
            device = devices.probe(name)
        except (MemKVError, OSError) as exc:
            report.broken_devices[name] = str(exc)
            continue
        report.devices.append(device)
        for port in device.ports:
            report.gids.append(_choose(name, port, addresses, config, toward))


def _choose(
    name: str, port: devices.Port, addresses: list[str], config: NodeConfig, toward: str | None
) -> Gids:
    index = config.gid_index if config.gid_index >= 0 and name in (config.devices or (name,)) else None
    try:
        choice = gid.choose(port.gids, addresses, index=index, toward=toward)
    except MemKVError as exc:
        return Gids(name, port.number, None, str(exc))
    rejected = choice.rejected or tuple((g, "another was asked for") for g in port.gids if g != choice.gid)
    return Gids(name, port.number, choice.gid, choice.reason, rejected)


def _verbs_of(config: NodeConfig) -> tuple[str, bool]:
    """Why verbs would be taken, or why not: the same choice that the node makes."""
    index = None if config.gid_index < 0 else config.gid_index
    names: tuple[str | None, ...] = config.devices or (None,)
    try:
        chosen = [devices.select(n, config.ib_port or None, index, _toward(config)) for n in names]
    except (MemKVError, OSError) as exc:
        # what to do about it has a place of its own
        return (str(exc).removesuffix(f" ({exc.hint})") if isinstance(exc, MemKVError) else str(exc)), False
    return "; ".join(s.reason for s in chosen), True


def _toward(config: NodeConfig) -> str | None:
    """The address that a node would listen on, if a device could carry it."""
    try:
        address = str(socket.getaddrinfo(config.listen[0], None)[0][4][0]).split("%")[0]
    except OSError:
        return None
    ip = ipaddress.ip_address(address)
    return None if ip.is_loopback or ip.is_unspecified else address


def _test(report: Report, config: NodeConfig) -> None:
    """Self-tests over the fabric that a node would take, and over tcp too if that one fails."""
    probing = config
    while True:
        try:
            fabric = _open_fabric(probing)
        except ImportError as exc:
            do = "pip install ., or setup.py build_ext --inplace"
            report.fault = f"the C core cannot be loaded: {exc} ({do})"
            return
        except (MemKVError, OSError) as exc:
            report.fault = report.fault or str(exc)
            return
        try:
            outcome = selftest.run(fabric, _address(config))
        finally:
            fabric.close()
        report.self_tests.append(outcome)
        if outcome.ok or fabric.name == "tcp" or config.fabric == "verbs":
            return
        probing = replace(probing, fabric="tcp", devices=())


def _device_json(device: devices.Device, gids: list[Gids]) -> dict[str, Any]:
    mine = {g.port: g for g in gids if g.device == device.name}
    out = asdict(device)
    out["advice"] = ladders.device_advice(device)
    for port in out["ports"]:
        chosen = mine[port["number"]]
        port["gid"] = {"taken": chosen.taken.index if chosen.taken else None, "why": chosen.why}
        against = {g.index: why for g, why in chosen.rejected}
        port["gids"] = [
            {
                "index": g["index"],
                "value": str(g["value"]),
                "kind": g["kind"],
                "netdev": g["netdev"],
                "rejected": against.get(g["index"]),
            }
            for g in port["gids"]
        ]
    return out


# --- for people ---


def show(report: Report, console: Console) -> None:
    """Prints a report: one section per ladder, an arrow at the rung that is taken."""

    def line(text: str = "", style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    line(f"memkv-node doctor, memkv {__version__}", "bold")
    for name, value in report.facts.items():
        line(f"  {name:<11} {value}")
    for ladder, same in _merged(report.ladders):
        line()
        taken = ladder.taken
        what = " and ".join(s.decides for s in same)
        names = ", ".join(s.name for s in same)
        line(f"{names}: {taken.name if taken else 'NONE'}   ({what})", "bold" if taken else "bold red")
        for rung in ladder.rungs:
            mark = "→" if rung is taken else ("·" if rung.usable else "✗")
            line(f"  {mark} {rung.name}: {rung.why}", "green" if rung is taken else "")
            if rung.do and not (taken and ladder.rungs.index(rung) > ladder.rungs.index(taken)):
                line(f"      do: {rung.do}", "yellow")
        if ladder.name == "fabric":
            _show_devices(report, line)
        if same[-1].name == "gpu_put" and report.gpus:
            _show_gpus(report.gpus, line)
    line()
    line("self-test: one process READs 1 MiB from itself", "bold")
    for test in report.self_tests:
        timing = (
            f"; first {_ms(test.first_s)}, best {_ms(test.best_s)} ({_rate(test.best_s)})" if test.ok else ""
        )
        line(f"  {'✓' if test.ok else '✗'} {test.fabric}: {test.why}{timing}", "green" if test.ok else "red")
    if report.fault:
        line(f"  ✗ {report.fault}", "red")
    line()
    line(report.verdict, "bold green" if report.ok else "bold red")


def _merged(all_: list[Ladder]) -> list[tuple[Ladder, list[Ladder]]]:
    """Each ladder with those right behind it that say the same."""
    out: list[tuple[Ladder, list[Ladder]]] = []
    for ladder in all_:
        if out and out[-1][0].rungs == ladder.rungs:
            out[-1][1].append(ladder)
        else:
            out.append((ladder, [ladder]))
    return out


def _show_devices(report: Report, line: Any) -> None:
    for name, why in report.broken_devices.items():
        line(f"    {name}: cannot be used: {why}", "red")
    for device in report.devices:
        line(
            f"    {device.name} ({device.driver}): per queue pair {device.max_rd_atomic} READs served, "
            f"{device.max_init_rd_atomic} under way, {device.max_qp_wr} requests of {device.max_sge} segments"
        )
        line(f"      dma-buf {_yes(device.dma_buf)}: {device.notes.get('dma-buf', '')}")
        line(f"      ODP {_yes(device.odp)}: {device.notes.get('odp', '')}")
        for port in device.ports:
            state = "active" if port.active else "not active"
            line(
                f"      port {port.number}: {state}, {port.link}, packets of {port.mtu} bytes, "
                f"messages up to {port.max_msg >> 10} KiB"
            )
            chosen = next(g for g in report.gids if (g.device, g.port) == (device.name, port.number))
            line(f"        {'→' if chosen.taken else '✗'} {chosen.why}", "green" if chosen.taken else "red")
            for other, why in chosen.rejected:
                line(f"        ✗ GID index {other.index}, {other.address} ({other.kind}): {why}")
        for advice in ladders.device_advice(device):
            line(f"      do: {advice}", "yellow")
    if not report.devices and not report.broken_devices:
        line("    no RDMA device")


def _show_gpus(found: cuda.Cuda, line: Any) -> None:
    visible = {"none": "need no flush", "call": "are flushed once a batch", "impossible": "may stay unseen"}
    for gpu in found.gpus:
        can = f"dma-buf {_yes(gpu.dma_buf)}, GPUDirect {_yes(gpu.gpu_direct)}"
        line(f"    GPU {gpu.index} {gpu.name} ({gpu.bus}): {can}, a NIC's writes {visible[gpu.flush]}")
        line(f"      get → {gpu.decision.get.name}: {gpu.decision.get.reason}", "green")
        line(f"      put → {gpu.decision.put.name}: {gpu.decision.put.reason}", "green")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _rate(seconds: float) -> str:
    return f"{(1 << 20) / seconds / 1e9:.2f} GB/s"


def check_named(config: NodeConfig) -> None:
    """LocalError if the user named a device that does not exist: a slip, nothing to diagnose."""
    for name in config.devices:
        if name not in devices.names():
            raise LocalError(
                f"there is no RDMA device {name}", f"--devices: this machine has {devices.names() or 'none'}"
            )
