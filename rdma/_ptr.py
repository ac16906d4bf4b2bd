"""The ``ibv_qp *`` behind a pyverbs QP, proven before anybody uses it.

pyverbs 61 and later have an integer property. Before that every class keeps its C pointer as the first field
after those of ``PyverbsCM``, so it lies at ``id(obj) + PyverbsCM.__basicsize__``. Either way C checks what it
finds against the number, type and protection domain that pyverbs reports; on a mismatch we raise, we never
guess.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ._pv import pv
from .errors import DeviceError
from .native._rdma import lib


def qp_pointer(qp: Any, pd: Any) -> int:
    """The address of the ``struct ibv_qp`` that ``qp`` wraps.

    :raises DeviceError: if what lies there is not that queue pair.
    """
    pointer = getattr(qp, "qp", None)
    if not isinstance(pointer, int):
        pointer = ctypes.c_void_p.from_address(id(qp) + pv().PyverbsCM.__basicsize__).value or 0
    rc = lib.mkv_verbs_prove(pointer, qp.qp_num, int(pv().IBV_QPT_RC), _pd_handle(pd))
    if rc:
        raise DeviceError(
            "the queue pair's pointer could not be verified",
            -rc,
            "this pyverbs lays its objects out differently; versions 44 to 64 are known to work",
        )
    return pointer


def _pd_handle(pd: Any) -> int:
    """pyverbs 44 has no ``PD.handle``; the struct's own field follows the context pointer."""
    handle = getattr(pd, "handle", None)
    if isinstance(handle, int):
        return handle
    pointer = ctypes.c_void_p.from_address(id(pd) + pv().PyverbsCM.__basicsize__).value or 0
    return ctypes.c_uint32.from_address(pointer + ctypes.sizeof(ctypes.c_void_p)).value
