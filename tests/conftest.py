"""Fixtures for every room: the fabrics that this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from memkv.rdma import devices
from memkv.rdma._pv import missing
from memkv.rdma.fabric import Fabric

from .emulated import REASON, left_out

# The same examples every time, so that a change is judged by what it changed; new ones in the long mode. How
# long one takes says nothing on a busy machine.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None)
hypothesis.settings.load_profile("long" if os.environ.get("MEMKV_TEST_LONG") else "default")

NO_DEVICE = "no RDMA device here: run the tests under script/softroce"


@pytest.fixture(params=["tcp", pytest.param("verbs", marks=pytest.mark.verbs)])
def fabric_name(request: pytest.FixtureRequest) -> str:
    """Each fabric in turn; verbs only where there is a device."""
    name: str = request.param
    if name == "verbs":
        if not devices.names():
            pytest.skip(NO_DEVICE)
        if missing():
            pytest.skip(missing())
    return name


def make_fabric(name: str, *, listen: bool, max_msg: int = 0) -> Fabric:
    """A fabric of either kind, with what tests want to vary."""
    if name == "verbs":
        from memkv.rdma.verbs import VerbsFabric

        return VerbsFabric([devices.select()], max_msg=max_msg)
    from memkv.rdma.tcp import TcpFabric

    return TcpFabric(("127.0.0.1", 0) if listen else None)


@pytest.fixture
def fabrics(fabric_name: str) -> Iterator[tuple[Fabric, Fabric]]:
    """(the serving side's fabric, the reading side's)."""
    serve, read = make_fabric(fabric_name, listen=True), make_fabric(fabric_name, listen=False)
    yield serve, read
    read.close()
    serve.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what tests/emulated.py says."""
    here = Path(__file__).parent
    for item in items:
        if item.get_closest_marker("verbs") is None:
            continue
        file = item.path.relative_to(here).as_posix()
        if left_out(file, getattr(item, "originalname", item.name)):
            item.add_marker(pytest.mark.skip(reason=REASON))
