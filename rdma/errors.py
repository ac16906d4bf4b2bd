"""One small tree of errors, shared by every room; each message ends with the knob to turn.

What happens to a single block is a status, never an exception (see :mod:`memkv.status`).
"""

from __future__ import annotations


class MemKVError(Exception):
    """Base of everything that memkv raises. ``hint`` names what the reader can do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.hint = hint


class LocalError(MemKVError, ValueError):
    """The caller's own mistake: a wrong argument, a closed handle, a buffer that is not registered."""


class RemoteError(MemKVError):
    """The other side refused or misbehaved: wrong secret, unknown namespace, malformed frame."""


class DeviceError(MemKVError, OSError):
    """The kernel or a device refused: ``errno`` is set."""

    def __init__(self, message: str, errno: int = 0, hint: str = "") -> None:
        MemKVError.__init__(self, message, hint)
        self.errno = errno


class NotRegistered(DeviceError):
    """Memory that is not the CPU's could not be registered that way: take the next rung. ``errno`` says why:
    EOPNOTSUPP, EPROTONOSUPPORT: kernel, driver or fabric cannot; EFAULT: no module maps GPU addresses.
    """


class DeadlineError(MemKVError, TimeoutError):
    """A call as a whole ran out of time (a single block's lateness is the status TIMEOUT)."""
