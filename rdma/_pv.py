"""pyverbs, under one set of names, whichever version is installed.

Debian 12 has 44 (flat names in ``pyverbs.enums``), 50 and later keep them in enum classes of
``pyverbs.libibverbs_enums``. Nothing else in memkv imports pyverbs, and importing this module never fails:
ask :func:`missing` first.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import SimpleNamespace
from typing import Any

from .native._rdma import lib

HINT = "apt install python3-pyverbs ibverbs-providers, and an environment made with --system-site-packages"

_ENUMS = {
    "IBV_ACCESS_LOCAL_WRITE": "ibv_access_flags",
    "IBV_ACCESS_REMOTE_READ": "ibv_access_flags",
    "IBV_QPT_RC": "ibv_qp_type",
    "IBV_QPS_ERR": "ibv_qp_state",
    "IBV_QPS_RTS": "ibv_qp_state",
    "IBV_PORT_ACTIVE": "ibv_port_state",
    "IBV_ODP_SUPPORT": "ibv_odp_general_caps",
}


@functools.cache
def _load() -> tuple[SimpleNamespace | None, str]:
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        names: dict[str, Any] = {}
        for module, wanted in {
            "pyverbs.device": ["Context", "get_device_list"],
            "pyverbs.pd": ["PD"],
            "pyverbs.mr": ["MR", "DmaBufMR"],
            "pyverbs.cq": ["CQ", "CompChannel"],
            "pyverbs.qp": ["QP", "QPInitAttr", "QPAttr", "QPCap"],
            "pyverbs.addr": ["AHAttr", "GlobalRoute", "GID"],
            "pyverbs.base": ["PyverbsCM"],
            "pyverbs.pyverbs_error": ["PyverbsRDMAError", "PyverbsError"],
        }.items():
            loaded = importlib.import_module(module)
            names.update({name: getattr(loaded, name) for name in wanted})
        # From 60 on: registration of a dma-buf under addresses of our choice.
        names["MREx"] = getattr(importlib.import_module("pyverbs.mr"), "MREx", None)
        try:
            flat = importlib.import_module("pyverbs.enums")
            names.update({name: getattr(flat, name) for name in _ENUMS})
        except ImportError:
            classes = importlib.import_module("pyverbs.libibverbs_enums")
            names.update({name: getattr(getattr(classes, cls), name) for name, cls in _ENUMS.items()})
    except (ImportError, AttributeError) as exc:
        return None, f"pyverbs cannot be used: {exc}"
    finally:
        for handler in root.handlers[:]:  # its base module calls logging.basicConfig
            if handler not in before:
                root.removeHandler(handler)
    return SimpleNamespace(**names), ""


def missing() -> str:
    """Why pyverbs cannot be used, or an empty string."""
    if not lib.mkv_verbs_built():
        return "memkv was built without verbs (MEMKV_WITHOUT=verbs)"
    return _load()[1]


def pv() -> Any:
    """The namespace of classes and constants. Call only after :func:`missing` returned nothing."""
    names, why = _load()
    if names is None:
        raise ImportError(f"{why} ({HINT})")
    return names
