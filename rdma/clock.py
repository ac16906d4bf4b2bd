"""Whether this machine's clock may stand still: virtual machines are paused and migrated, clocks and all.

A reader that measures time (the *plain* clock) accepts a block because its READ took less than half of the
grace period. Under a hypervisor that measurement may miss a pause, so there readers count the node's epochs
instead (*strict*).
"""

from __future__ import annotations

from pathlib import Path

_DMI = {  # what firmware says of itself, in lower case -> the hypervisor's name
    "qemu": "QEMU",
    "bochs": "QEMU",
    "kvm": "KVM",
    "vmware": "VMware",
    "virtualbox": "VirtualBox",
    "innotek": "VirtualBox",
    "virtual machine": "Hyper-V",  # the product; Microsoft also makes real machines
    "google compute engine": "Google Compute Engine",
    "amazon ec2": "Amazon EC2",
    "alibaba cloud ecs": "Alibaba Cloud",
    "openstack": "OpenStack",
    "nutanix ahv": "Nutanix AHV",
    "parallels": "Parallels",
    "xen": "Xen",
    "bhyve": "bhyve",
}


def hypervisor(root: Path = Path("/")) -> str | None:
    """The name of the hypervisor that this kernel runs under, "unknown" if it does not say, or None.

    :param root: where ``proc`` and ``sys`` are (tests).
    """
    cpu = _read(root / "proc/cpuinfo")
    if "user mode linux" in cpu.lower():
        return "User-mode Linux"
    kind = _read(root / "sys/hypervisor/type").strip()
    if kind:
        return {"xen": "Xen"}.get(kind, kind)
    firmware = [
        _read(root / "sys/class/dmi/id" / f).strip().lower()
        for f in ("sys_vendor", "product_name", "bios_vendor")
    ]
    named = next((name for text in firmware for word, name in _DMI.items() if word in text), None)
    if any(line.startswith("flags") and " hypervisor" in line for line in cpu.splitlines()):
        return named or "unknown"
    tree = _read(root / "proc/device-tree/hypervisor/compatible").strip("\0 \n")
    if tree:  # ARM: no CPU flag, but the device tree says so
        return tree.split("\0")[0]
    # An x86 processor without the flag is a real one; elsewhere the firmware's name decides, and some clouds
    # write theirs into real machines too.
    x86 = any(line.startswith("flags") for line in cpu.splitlines())
    return None if x86 or any(".metal" in text for text in firmware) else named


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
