"""The flash tier's figures for Prometheus, out of what ``/status`` says; there, and empty, without flash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)

GAUGES = {
    "devices": "Devices and files of the flash tier",
    "devices_out": "… that are out of use",
    "dirty_blocks": "Blocks in memory that are not on flash yet",
    "dirty_bytes": "… their bytes",
    "writing_blocks": "… of these on their way",
    "scan_left": "Headers that the scan has yet to look at",
    "stages": "Requests for blocks on flash under way",
}
COUNTERS = {
    "written_blocks": "Blocks written behind",
    "written_bytes": "… their bytes",
    "staged_blocks": "Blocks brought back to memory",
    "staged_bytes": "… their bytes",
    "stage_joined": "Requests for a block that was being brought already",
    "headers_zeroed": "Headers of deleted or evicted blocks",
    "flushes": "Flushes of devices",
    "scanned": "Headers that the scan has looked at",
    "recovered": "Blocks found again at the start",
    "lost_memory_acks": "Blocks lost that were in memory only",
    "segments_lost": "Segments whose assignment could not be taken up at the start",
    "segments_exchanged": "Segments that one size class or namespace has given to another",
}
DEVICE_GAUGES = ("bytes", "segments", "segments_free", "extents", "extents_free", "live_bytes")
DEVICE_COUNTERS = ("read_errors", "write_errors", "corrupt")
NAMESPACE_GAUGES = (
    "flash_blocks",
    "flash_bytes",
    "flash_segments",
    "flash_extents",
    "flash_extents_free",
    "flash_pinned",
    "flash_dirty",
    "flash_staged",
)
NAMESPACE_COUNTERS = ("flash_evictions", "flash_evicted_bytes")


def families(status: Mapping[str, Any]) -> Iterator[Metric]:
    """All of them, whether or not the node has flash."""
    flash, devices = status["flash"], status["flash_devices"]
    info = {"engine": str(flash.get("engine", "none")), "reason": str(flash["reason"])}
    yield InfoMetricFamily("memkv_flash", "How blocks get to flash, and why so", value=info)
    for name, text in GAUGES.items():
        yield GaugeMetricFamily(f"memkv_flash_{name}", text, value=flash.get(name, 0))
    for name, text in COUNTERS.items():
        yield CounterMetricFamily(f"memkv_flash_{name}", text, value=flash.get(name, 0))
    dropped = CounterMetricFamily(
        "memkv_flash_dropped", "Blocks on flash not taken, by reason", labels=["reason"]
    )
    for name, n in flash.items():
        if name.startswith("dropped_"):
            dropped.add_metric([name.removeprefix("dropped_")], n)
    yield dropped
    up = GaugeMetricFamily("memkv_flash_device_up", "1: in use", labels=["path"])
    for path, facts in devices.items():
        up.add_metric([path], float(not facts["failed"]))
    yield up
    for kind, names in ((GaugeMetricFamily, DEVICE_GAUGES), (CounterMetricFamily, DEVICE_COUNTERS)):
        for name in names:
            family = kind(f"memkv_flash_device_{name}", f"Flash device: {name}", labels=["path"])
            for path, facts in devices.items():
                if name in facts:
                    family.add_metric([path], facts[name])
            yield family
