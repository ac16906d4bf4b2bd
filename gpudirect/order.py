"""What has to be waited for around a NIC's access to GPU memory. Nothing here synchronises a device.

Before
    Nothing on the GPU may be writing a range that is READ from, nor using one that is READ into. So an event
    is recorded where the application's stream is now, and no request is posted before it is reached
    (:class:`Before`). It has a deadline: a kernel that hangs costs a TIMEOUT, not the caller.

After
    A completion says that the bytes have left the NIC, not that a kernel sees them. Devices that do not order
    a NIC's writes before what is launched later need one call per batch that flushes them (:func:`flush`);
    after it, work launched on any stream sees the bytes. A kernel that already runs and polls does not:
    launch after the call has returned. Where bytes came by a copy instead, the consumer's stream waits for
    the copy's event (:func:`after_copy`), and the host for nothing.

Always
    ``SYNC_MEMOPS`` is set on memory that is registered (:mod:`.registry`): without it a synchronous
    ``cudaMemcpy`` may return before a NIC would see its bytes.

``stream=`` is a CuPy stream (``ptr``), a torch stream (``cuda_stream``), anything that speaks
``__cuda_stream__``, or the handle as an integer, of which 0 and 1 are the legacy default stream and 2 the
per-thread one. None says that nothing is under way: the caller has synchronised, or the memory is not in use.
Pass the stream that last touched the memory, e.g. ``torch.cuda.current_stream()``. An array that names a
stream in its ``__cuda_array_interface__`` (``Memory.stream``) is to be waited for on that one as well.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from ..rdma.errors import DeadlineError
from .copier import stream_handle
from .driver import FLUSH_HOST, ORDERING_OWNER, Driver

Flush = Literal["none", "call", "impossible"]

_FIRST_NAP, _LONGEST_NAP = 20e-6, 1e-3  # seconds between looks at an event


def flush(ordering: int, options: int) -> Flush:
    """What makes a NIC's writes visible to the device's own kernels: nothing is needed, one call does it, or
    nothing can.

    :param ordering: of CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING.
    :param options: of CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS.
    """
    if ordering >= ORDERING_OWNER:
        return "none"
    return "call" if options & FLUSH_HOST else "impossible"


class Before:
    """Places in the application's streams that have to be reached before anything is posted.

    :param device: its ordinal.
    :param streams: see the module; None among them: nothing to wait for there.
    """

    def __init__(self, cuda: Driver, device: int, *streams: Any) -> None:
        self._cuda = cuda
        self._device = device
        self._events: list[int] = []
        handles = {stream_handle(s) for s in streams if s is not None}
        try:
            for handle in sorted(handles):
                with cuda.on(device):
                    self._events.append(cuda.event_create())
                    cuda.event_record(self._events[-1], handle)
        except BaseException:
            self.close()
            raise

    def reached(self) -> bool:
        """Whether all are. :raises DriverError: they never will be: the context is lost."""
        if not self._events:
            return True
        with self._cuda.on(self._device):
            return all(self._cuda.event_query(e) for e in self._events)

    def wait(self, seconds: float) -> None:
        """:raises DeadlineError: it was not reached within so many seconds."""
        until = time.monotonic() + seconds
        nap = _FIRST_NAP
        while not self.reached():
            if time.monotonic() >= until:
                raise DeadlineError(
                    f"the stream did not come as far within {seconds:g} s",
                    "a longer timeout; does a kernel hang?",
                )
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)

    def close(self) -> None:
        while self._events:
            with self._cuda.on(self._device):
                self._cuda.event_destroy(self._events.pop())

    def __enter__(self) -> Before:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class After:
    """Making what a NIC has written visible to a device, once a batch, after the last completion."""

    def __init__(self, cuda: Driver, device: int) -> None:
        facts = cuda.facts(device)
        self._cuda = cuda
        self._device = device
        self.needed = flush(facts.ordering, facts.flush_options)

    def visible(self) -> None:
        """Returns when it is. :raises DriverError: it cannot be known."""
        if self.needed == "none":
            return
        with self._cuda.on(self._device):
            self._cuda.flush_gpu_direct_rdma_writes()


def after_copy(cuda: Driver, device: int, stream: Any, event: int) -> None:
    """What the application puts into ``stream`` from now on waits for a copy of ours (its event); the host
    does not wait.
    """
    with cuda.on(device):
        cuda.stream_wait_event(stream_handle(stream), event)
