"""What a node tells of itself over HTTP and over the control connection."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memkv.store import messages as m
from memkv.store.native._store import lib
from memkv.store.node import NodeThread

from .raw import RawPeer, keys_of
from .test_puts import BLOCK, ready

Start = Callable[..., NodeThread]
Connect = Callable[..., RawPeer]


def fetch(node: NodeThread, path: str) -> tuple[int, bytes]:
    assert node.metrics_address
    host, port = node.metrics_address
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture
def busy(start_node: Start, connect: Connect) -> NodeThread:
    """A node that has stored three blocks, refused one, and has one session."""
    node = start_node(metrics=("127.0.0.1", 0), name="node-7")
    peer = connect(node)
    info, source, _ = ready(peer, 3)
    peer.statuses(peer.put(info, keys_of(1, 2, 3, 4), source, BLOCK))
    return node


def test_prometheus_can_read_the_metrics(busy: NodeThread) -> None:
    code, body = fetch(busy, "/metrics")
    assert code == 200
    samples = {
        (s.name, *sorted(s.labels.values())): s.value
        for family in text_string_to_metric_families(body.decode())
        for s in family.samples
    }
    assert samples[("memkv_namespace_blocks", "test")] == 3
    assert samples[("memkv_namespace_puts_total", "test")] == 3
    assert samples[("memkv_put_blocks_total", "stored")] == 3
    assert samples[("memkv_put_blocks_total", "error_bounds")] == 1
    assert samples[("memkv_put_stored_bytes_total",)] == 3 * BLOCK
    assert samples[("memkv_put_seconds_count",)] == 1
    assert samples[("memkv_put_seconds_bucket", "+Inf")] == 1
    assert samples[("memkv_sessions",)] == 1
    assert samples[("memkv_up",)] == 1
    assert samples[("memkv_requests_total", "Put")] == 1


def test_the_rung_of_the_fabric_and_its_reason_are_shown(busy: NodeThread, fabric_name: str) -> None:
    text = fetch(busy, "/metrics")[1].decode()
    info = next(line for line in text.splitlines() if line.startswith("memkv_fabric_info"))
    assert f'fabric="{fabric_name}"' in info
    assert 'reason="' in info


def test_health(busy: NodeThread) -> None:
    code, body = fetch(busy, "/health")
    health = json.loads(body)
    assert code == 200
    assert health["ok"] is True
    assert health["reason"] == "serving"
    assert health["sessions"] == 1
    assert health["memory"]["slabs"] == 8
    busy.node.stopping = True
    code, body = fetch(busy, "/health")
    busy.node.stopping = False
    assert (code, json.loads(body)["reason"]) == (503, "going down")


def test_status_and_stats_say_the_same(busy: NodeThread, connect: Connect, fabric_name: str) -> None:
    status: dict[str, Any] = json.loads(fetch(busy, "/status")[1])
    sections = connect(busy).ask(m.Stats).sections
    assert status["node"] == sections["node"]["node"] == "node-7"
    assert status["fabric"] == sections["fabric"]
    assert status["fabric"]["fabric"] == fabric_name
    assert status["namespaces"]["test"]["blocks"] == sections["namespace:test"]["blocks"] == 3
    assert status["puts"] == sections["puts"] == {"stored": 3, "error_bounds": 1}
    assert status["incarnation"] == f"{busy.node.incarnation:016x}"


@pytest.mark.parametrize(("path", "code"), [("/", 404), ("/metrics?x=1", 200), ("/status/", 404)])
def test_other_paths(busy: NodeThread, path: str, code: int) -> None:
    assert fetch(busy, path)[0] == code


def test_every_status_of_a_put_has_a_name() -> None:
    from memkv.store.metrics import STATUS_NAMES

    assert STATUS_NAMES[lib.MKV_STORED] == "stored"
    assert STATUS_NAMES[lib.MKV_ERROR_INTERNAL] == "error_internal"
