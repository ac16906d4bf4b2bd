"""Requests that are answered with a Refusal, and the code that each kind of error gets."""

from __future__ import annotations

from ..rdma.errors import DeadlineError, DeviceError, LocalError, MemKVError
from . import messages as m
from .framing import LocalProtocolError

ENOMEM = 12


class Refuse(MemKVError):
    """A request that is answered with a Refusal."""

    def __init__(self, code: m.Code, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code
        self.message = message


def code_of(exc: Exception) -> m.Code:
    """What a Refusal says of an error."""
    if isinstance(exc, Refuse):
        return exc.code
    if isinstance(exc, DeadlineError):
        return m.Code.DEADLINE
    if isinstance(exc, LocalError) and not isinstance(exc, LocalProtocolError):
        return m.Code.MISMATCH
    if isinstance(exc, DeviceError | MemoryError):
        return m.Code.FULL if isinstance(exc, MemoryError) or exc.errno == ENOMEM else m.Code.INTERNAL
    return m.Code.INTERNAL
