"""The few functions of the CUDA driver that memkv calls itself: libcuda through cffi, opened when asked for.

CuPy lacks some of them (dma-buf export, SYNC_MEMOPS, flushing of GPUDirect writes), and none of them should
need CuPy. Importing this module touches no library: :func:`available` says why there is no CUDA, :func:`load`
raises it. Methods carry the names of the functions without ``cu``, in snake_case; handles of streams, events
and contexts are plain integers. Numbers come from cuda.h of CUDA 12.9 (``CUDA_VERSION`` 12090) and have not
changed since they came.

Nothing here synchronises a device, and nothing makes a context but the primary one, which libraries share.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from dataclasses import dataclass
from typing import Any

import cffi

from ..rdma.errors import DeviceError, LocalError

LIBRARY = "libcuda.so.1"

# CUresult
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
NO_DEVICE = 100
INVALID_CONTEXT = 201
NOT_READY = 600
NOT_SUPPORTED = 801

# CUdevice_attribute
INTEGRATED = 18
PCI_BUS_ID, PCI_DEVICE_ID, PCI_DOMAIN_ID = 33, 34, 50
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED = 110
GPU_DIRECT_RDMA_SUPPORTED = 116
GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS = 117
GPU_DIRECT_RDMA_WRITES_ORDERING = 118
DMA_BUF_SUPPORTED = 124

# CUpointer_attribute
_MEMORY_TYPE = 2
_SYNC_MEMOPS = 6
_BUFFER_ID = 7
_IS_MANAGED = 8
_DEVICE_ORDINAL = 9
_IS_LEGACY_CUDA_IPC_CAPABLE = 10
_RANGE_START_ADDR = 11
_RANGE_SIZE = 12
_MAPPED = 13
_ALLOWED_HANDLE_TYPES = 14
_IS_GPU_DIRECT_RDMA_CAPABLE = 15
_MEMPOOL_HANDLE = 17

HOST, DEVICE = 1, 2  # CUmemorytype
ORDERING_NONE, ORDERING_OWNER, ORDERING_ALL = (
    0,
    100,
    200,
)  # CUGPUDirectRDMAWritesOrdering, and scopes of a flush
FLUSH_HOST, FLUSH_MEMOPS = 1, 2  # CUflushGPUDirectRDMAWritesOptions
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2  # CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
_DMA_BUF_FD = 1  # CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
_MAPPING_PCIE = 1  # CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE, from 12.8 on
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_CTX_SYNC_MEMOPS = 0x80  # CU_CTX_SYNC_MEMOPS, with cuCtxSetFlags from 12.1 on
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTALLOC_PORTABLE: pinned for every context

_ERRNO = {  # for callers that decide by errno; CUDA's own number is in DriverError.code
    INVALID_VALUE: errno.EINVAL,
    OUT_OF_MEMORY: errno.ENOMEM,
    NOT_INITIALIZED: errno.ENODEV,
    NO_DEVICE: errno.ENODEV,
    NOT_READY: errno.EAGAIN,
    NOT_SUPPORTED: errno.EOPNOTSUPP,
}

# Pointers are declared as integers: that is what Python holds, and where there is CUDA both are passed alike.
# cuMemcpyBatchAsync is left out: CUDA 13 changed its arguments under the same name.
_CDEF = """
typedef int CUdevice;
typedef uintptr_t CUptr;

int cuInit(unsigned int flags);
int cuDriverGetVersion(int *version);
int cuGetErrorName(int error, const char **text);

int cuDeviceGetCount(int *count);
int cuDeviceGet(CUdevice *device, int ordinal);
int cuDeviceGetName(char *name, int len, CUdevice device);
int cuDeviceGetPCIBusId(char *id, int len, CUdevice device);
int cuDeviceGetAttribute(int *value, int attribute, CUdevice device);
int cuDeviceTotalMem_v2(size_t *bytes, CUdevice device);
int cuDevicePrimaryCtxRetain(CUptr *context, CUdevice device);

int cuCtxPushCurrent_v2(CUptr context);
int cuCtxPopCurrent_v2(CUptr *context);
int cuCtxGetCurrent(CUptr *context);
int cuCtxGetFlags(unsigned int *flags);
int cuCtxSetFlags(unsigned int flags);

int cuPointerGetAttribute(void *data, int attribute, CUptr pointer);
int cuPointerGetAttributes(unsigned int n, int *attributes, void **data, CUptr pointer);
int cuPointerSetAttribute(const void *value, int attribute, CUptr pointer);
int cuMemGetAddressRange_v2(CUptr *base, size_t *size, CUptr pointer);
int cuMemGetHandleForAddressRange(void *handle, CUptr pointer, size_t size, int type,
                                  unsigned long long flags);
int cuFlushGPUDirectRDMAWrites(int target, int scope);

int cuMemGetInfo_v2(size_t *free, size_t *total);
int cuMemAlloc_v2(CUptr *pointer, size_t bytes);
int cuMemFree_v2(CUptr pointer);
int cuMemHostAlloc(CUptr *pointer, size_t bytes, unsigned int flags);
int cuMemFreeHost(CUptr pointer);
int cuMemHostRegister_v2(CUptr pointer, size_t bytes, unsigned int flags);
int cuMemHostUnregister(CUptr pointer);

typedef struct {
    size_t srcXInBytes, srcY;
    int srcMemoryType;
    CUptr srcHost, srcDevice, srcArray;
    size_t srcPitch;
    size_t dstXInBytes, dstY;
    int dstMemoryType;
    CUptr dstHost, dstDevice, dstArray;
    size_t dstPitch;
    size_t WidthInBytes, Height;
} CUDA_MEMCPY2D;

int cuMemcpyHtoDAsync_v2(CUptr dst, CUptr src, size_t bytes, CUptr stream);
int cuMemcpyDtoHAsync_v2(CUptr dst, CUptr src, size_t bytes, CUptr stream);
int cuMemcpyDtoDAsync_v2(CUptr dst, CUptr src, size_t bytes, CUptr stream);
int cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *copy, CUptr stream);
int cuMemsetD8Async(CUptr dst, unsigned char value, size_t bytes, CUptr stream);

int cuStreamCreate(CUptr *stream, unsigned int flags);
int cuStreamDestroy_v2(CUptr stream);
int cuStreamQuery(CUptr stream);
int cuStreamSynchronize(CUptr stream);
int cuStreamWaitEvent(CUptr stream, CUptr event, unsigned int flags);

int cuEventCreate(CUptr *event, unsigned int flags);
int cuEventDestroy_v2(CUptr event);
int cuEventRecord(CUptr event, CUptr stream);
int cuEventQuery(CUptr event);
int cuEventSynchronize(CUptr event);
int cuEventElapsedTime(float *milliseconds, CUptr start, CUptr end);
"""

_ffi: Any = cffi.FFI()
_ffi.cdef(_CDEF)


class DriverError(DeviceError):
    """The driver refused. ``code`` is CUDA's number (0: there is no such function), ``errno`` the nearest."""

    def __init__(self, message: str, code: int = 0, hint: str = "") -> None:
        super().__init__(message, _ERRNO.get(code, errno.EIO) if code else errno.ENOSYS, hint)
        self.code = code


class DriverMissing(DriverError):
    """There is no CUDA here, and why."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """What the driver knows of a pointer. None: this driver is too old to say."""

    memory_type: int  # HOST or DEVICE
    device: int  # its ordinal
    buffer_id: int  # unique to this allocation while the process lives
    range_start: int  # of the address range, which may be reserved and only partly mapped
    range_size: int
    managed: bool
    mapped: bool
    legacy_ipc: bool  # so it comes from cuMemAlloc
    handle_types: int | None  # CUmemAllocationHandleType
    gpu_direct: bool | None  # made so that GPUDirect RDMA can use it
    mempool: int | None  # the handle of the pool that it comes from, or 0


@dataclass(frozen=True, slots=True)
class Facts:
    """A device as the driver shows it; nothing of it needs a context."""

    index: int
    name: str
    bus: str  # PCI address, like "0000:17:00.0"
    capability: tuple[int, int]
    memory: int  # bytes
    integrated: bool
    dma_buf: bool
    gpu_direct: bool
    gpu_direct_vmm: bool
    flush_options: int  # FLUSH_HOST | FLUSH_MEMOPS
    ordering: int  # ORDERING_*: who may consume GPUDirect writes without a flush


class _On:
    """``with``: the primary context of a device is current on this thread."""

    __slots__ = ("_context", "_driver")

    def __init__(self, driver: Driver, context: int) -> None:
        self._driver = driver
        self._context = context

    def __enter__(self) -> None:
        self._driver._call("cuCtxPushCurrent_v2", self._context)

    def __exit__(self, *_: object) -> None:
        self._driver._call("cuCtxPopCurrent_v2", _ffi.new("CUptr *"))


class Driver:
    """libcuda, initialised. Made by :func:`load`. All methods raise :class:`DriverError`."""

    def __init__(self, library: str) -> None:
        try:
            # Not by cffi: when that fails it leaves a cycle behind that holds all the callers' variables.
            self._handle = ctypes.CDLL(library)
        except OSError:
            raise DriverMissing(f"{library} is not installed") from None
        self._lib = _ffi.dlopen(_ffi.cast("void *", self._handle._handle))
        self.library = library
        self._functions: dict[str, Any] = {}
        self._contexts: dict[int, int] = {}
        self._lock = threading.Lock()
        number = _ffi.new("int *")
        try:
            self._call("cuDriverGetVersion", number)
        except DriverError as exc:
            raise DriverMissing(f"{library} is no CUDA driver: {exc}") from None
        self.version: int = number[0]  # like 12090
        try:
            self._call("cuInit", 0)
            self._call("cuDeviceGetCount", number)
        except DriverError as exc:
            raise DriverMissing(str(exc), exc.code) from None
        self.count: int = number[0]
        if not self.count:
            raise DriverMissing("the driver sees no GPU", NO_DEVICE, "CUDA_VISIBLE_DEVICES, nvidia-smi")

    def _function(self, name: str) -> Any:
        found = self._functions.get(name)
        if found is None:
            try:
                found = getattr(self._lib, name)
            except AttributeError:
                raise DriverError(
                    f"this CUDA driver{self._of_version()} has no {name.split('_v2')[0]}",
                    hint="a newer NVIDIA driver",
                ) from None
            self._functions[name] = found
        return found

    def _of_version(self) -> str:
        version = getattr(self, "version", 0)
        return f" ({version // 1000}.{version % 1000 // 10})" if version else ""

    def has(self, function: str) -> bool:
        """Whether this driver has a function, by its C name."""
        try:
            self._function(function)
        except DriverError:
            return False
        return True

    def _call(self, name: str, *args: Any) -> None:
        rc = self._function(name)(*args)
        if rc:
            raise self._failed(name, rc)

    def _failed(self, name: str, rc: int) -> DriverError:
        hint = ""
        if rc == NOT_INITIALIZED:
            hint = "CUDA cannot be used in the child of a fork"
        return DriverError(f"{name.split('_v2')[0]}: {self.error_text(rc)}", rc, hint)

    def error_text(self, rc: int) -> str:
        """An error as text, like ``CUDA_ERROR_NO_DEVICE (100)``."""
        text = _ffi.new("const char **")
        if self.has("cuGetErrorName") and self._lib.cuGetErrorName(rc, text) == 0 and text[0] != _ffi.NULL:
            return f"{_ffi.string(text[0]).decode()} ({rc})"
        return f"error {rc}"

    # --- devices and contexts ---

    def _device(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise LocalError(
                f"there is no cuda:{index}", f"{self.count} GPUs are visible; CUDA_VISIBLE_DEVICES"
            )
        handle = _ffi.new("CUdevice *")
        self._call("cuDeviceGet", handle, index)
        return int(handle[0])

    def attribute(self, device: int, attribute: int) -> int | None:
        """A device attribute; None if the driver is too old to know of it."""
        value = _ffi.new("int *")
        rc = self._function("cuDeviceGetAttribute")(value, attribute, self._device(device))
        if rc == INVALID_VALUE:
            return None
        if rc:
            raise self._failed("cuDeviceGetAttribute", rc)
        return int(value[0])

    def facts(self, device: int) -> Facts:
        """What there is to know of a device, without a context on it."""
        handle = self._device(device)
        name, bus = _ffi.new("char[256]"), _ffi.new("char[32]")
        self._call("cuDeviceGetName", name, 256, handle)
        if self.has("cuDeviceGetPCIBusId"):
            self._call("cuDeviceGetPCIBusId", bus, 32, handle)
        total = _ffi.new("size_t *")
        if self.has("cuDeviceTotalMem_v2"):
            self._call("cuDeviceTotalMem_v2", total, handle)

        def get(attribute: int) -> int:
            return self.attribute(device, attribute) or 0

        return Facts(
            index=device,
            name=_ffi.string(name).decode(errors="replace"),
            bus=_ffi.string(bus).decode(errors="replace").lower(),
            capability=(get(COMPUTE_CAPABILITY_MAJOR), get(COMPUTE_CAPABILITY_MINOR)),
            memory=int(total[0]),
            integrated=bool(get(INTEGRATED)),
            dma_buf=bool(get(DMA_BUF_SUPPORTED)),
            gpu_direct=bool(get(GPU_DIRECT_RDMA_SUPPORTED)),
            gpu_direct_vmm=bool(get(GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED)),
            flush_options=get(GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS),
            ordering=get(GPU_DIRECT_RDMA_WRITES_ORDERING),
        )

    def primary_context(self, device: int) -> int:
        """The context that libraries share on a device; retained, once, for as long as the process lives."""
        with self._lock:
            context = self._contexts.get(device)
            if context is None:
                out = _ffi.new("CUptr *")
                self._call("cuDevicePrimaryCtxRetain", out, self._device(device))
                context = self._contexts[device] = int(out[0])
        return context

    def on(self, device: int) -> _On:
        """``with d.on(0):`` makes the primary context of a device current on this thread, and restores."""
        return _On(self, self.primary_context(device))

    def current_context(self) -> int:
        """The context that is current on this thread, or 0."""
        out = _ffi.new("CUptr *")
        self._call("cuCtxGetCurrent", out)
        return int(out[0])

    def ctx_set_sync_memops(self) -> None:
        """As :meth:`set_sync_memops`, for all memory of the current context: all there is for cuMemMap's."""
        flags = _ffi.new("unsigned int *")
        self._call("cuCtxGetFlags", flags)
        if not flags[0] & _CTX_SYNC_MEMOPS:
            self._call("cuCtxSetFlags", flags[0] | _CTX_SYNC_MEMOPS)

    # --- pointers ---

    def pointer_attributes(self, pointer: int) -> Pointer | None:
        """What is known of a pointer; None if it is no memory of CUDA's (ordinary host memory)."""
        kinds = [
            _MEMORY_TYPE,
            _DEVICE_ORDINAL,
            _IS_MANAGED,
            _MAPPED,
            _IS_LEGACY_CUDA_IPC_CAPABLE,
            _BUFFER_ID,
            _RANGE_START_ADDR,
            _RANGE_SIZE,
        ]
        # Each has 8 bytes of zeroes for itself: the driver writes between 1 and 8 of them.
        values = _ffi.new("long long[]", len(kinds))
        data = _ffi.new("void *[]", [values + i for i in range(len(kinds))])
        rc = self._function("cuPointerGetAttributes")(len(kinds), _ffi.new("int[]", kinds), data, pointer)
        if rc in (INVALID_VALUE, INVALID_CONTEXT) or (rc == 0 and values[0] & 0xFFFFFFFF == 0):
            return None
        if rc:
            raise self._failed("cuPointerGetAttributes", rc)
        rdma = self._pointer_attribute(_IS_GPU_DIRECT_RDMA_CAPABLE, pointer)
        return Pointer(
            memory_type=values[0] & 0xFFFFFFFF,
            device=int(_ffi.cast("int", values[1])),
            managed=values[2] & 0xFF != 0,
            mapped=values[3] & 0xFF != 0,
            legacy_ipc=values[4] & 0xFF != 0,
            buffer_id=values[5] & (1 << 64) - 1,
            range_start=values[6] & (1 << 64) - 1,
            range_size=values[7] & (1 << 64) - 1,
            handle_types=self._pointer_attribute(_ALLOWED_HANDLE_TYPES, pointer),
            gpu_direct=None if rdma is None else bool(rdma & 0xFF),
            mempool=self._pointer_attribute(_MEMPOOL_HANDLE, pointer),
        )

    def _pointer_attribute(self, attribute: int, pointer: int) -> int | None:
        """One attribute that not every driver knows, or not of every pointer."""
        value = _ffi.new("unsigned long long *")
        rc = self._function("cuPointerGetAttribute")(value, attribute, pointer)
        return None if rc else int(value[0])

    def buffer_id(self, pointer: int) -> int:
        """The id of the allocation that a pointer lies in; 0 if it lies in none (any more)."""
        return self._pointer_attribute(_BUFFER_ID, pointer) or 0

    def set_sync_memops(self, pointer: int) -> None:
        """Makes CUDA's synchronous copies of that allocation wait until they are done, as GPUDirect needs."""
        self._call("cuPointerSetAttribute", _ffi.new("int *", 1), _SYNC_MEMOPS, pointer)

    def mem_get_address_range(self, pointer: int) -> tuple[int, int]:
        """(start, bytes) of the allocation, or of the one mapping, that a pointer lies in."""
        base, size = _ffi.new("CUptr *"), _ffi.new("size_t *")
        self._call("cuMemGetAddressRange_v2", base, size, pointer)
        return int(base[0]), int(size[0])

    def export_dma_buf(self, address: int, nbytes: int, *, pcie: bool = False) -> int:
        """A dma-buf file descriptor of a range, the caller's to close.

        :param address: and ``nbytes``: whole pages of the host.
        :param pcie: mapped through BAR1, only for Data Direct; refused by drivers before 12.8 and where it
            makes no sense (801).
        """
        fd = _ffi.new("int *", -1)
        flags = _MAPPING_PCIE if pcie else 0
        self._call("cuMemGetHandleForAddressRange", fd, address, nbytes, _DMA_BUF_FD, flags)
        return int(fd[0])

    def flush_gpu_direct_rdma_writes(self, scope: int = ORDERING_OWNER) -> None:
        """Blocks until what GPUDirect wrote into memory of the current context is visible in ``scope``."""
        self._call("cuFlushGPUDirectRDMAWrites", 0, scope)

    # --- memory ---

    def mem_get_info(self) -> tuple[int, int]:
        """(free, total) bytes of the current context's device."""
        free, total = _ffi.new("size_t *"), _ffi.new("size_t *")
        self._call("cuMemGetInfo_v2", free, total)
        return int(free[0]), int(total[0])

    def mem_alloc(self, nbytes: int) -> int:
        """Device memory on the current context."""
        out = _ffi.new("CUptr *")
        self._call("cuMemAlloc_v2", out, nbytes)
        return int(out[0])

    def mem_free(self, pointer: int) -> None:
        self._call("cuMemFree_v2", pointer)

    def host_alloc(self, nbytes: int) -> int:
        """Pinned host memory, for every context."""
        out = _ffi.new("CUptr *")
        self._call("cuMemHostAlloc", out, nbytes, _PORTABLE)
        return int(out[0])

    def host_free(self, pointer: int) -> None:
        self._call("cuMemFreeHost", pointer)

    def host_register(self, address: int, nbytes: int) -> None:
        """Pins host memory that is there already, for every context."""
        self._call("cuMemHostRegister_v2", address, nbytes, _PORTABLE)

    def host_unregister(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def memcpy_htod_async(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync_v2", dst, src, nbytes, stream)

    def memcpy_dtoh_async(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync_v2", dst, src, nbytes, stream)

    def memcpy_dtod_async(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync_v2", dst, src, nbytes, stream)

    def memcpy_2d_async(
        self,
        dst: int,
        dst_pitch: int,
        src: int,
        src_pitch: int,
        width: int,
        height: int,
        stream: int,
        *,
        into_device: bool,
    ) -> None:
        """``height`` rows of ``width`` bytes whose starts lie ``pitch`` bytes apart, from or to the host."""
        copy = _ffi.new("CUDA_MEMCPY2D *")
        copy.srcPitch, copy.dstPitch, copy.WidthInBytes, copy.Height = src_pitch, dst_pitch, width, height
        if into_device:
            copy.srcMemoryType, copy.srcHost, copy.dstMemoryType, copy.dstDevice = HOST, src, DEVICE, dst
        else:
            copy.srcMemoryType, copy.srcDevice, copy.dstMemoryType, copy.dstHost = DEVICE, src, HOST, dst
        self._call("cuMemcpy2DAsync_v2", copy, stream)

    def memset_d8_async(self, dst: int, value: int, nbytes: int, stream: int) -> None:
        self._call("cuMemsetD8Async", dst, value, nbytes, stream)

    # --- streams and events ---

    def stream_create(self, nonblocking: bool = True) -> int:
        """:param nonblocking: it does not wait for the legacy default stream, nor that for it."""
        out = _ffi.new("CUptr *")
        self._call("cuStreamCreate", out, _NON_BLOCKING if nonblocking else 0)
        return int(out[0])

    def stream_destroy(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def stream_query(self, stream: int) -> bool:
        """Whether everything in it is done."""
        return self._ready("cuStreamQuery", stream)

    def stream_synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def stream_wait_event(self, stream: int, event: int) -> None:
        """What is put into ``stream`` from now on waits for the event; the host does not."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def event_create(self, timing: bool = False) -> int:
        out = _ffi.new("CUptr *")
        self._call("cuEventCreate", out, 0 if timing else _DISABLE_TIMING)
        return int(out[0])

    def event_destroy(self, event: int) -> None:
        self._call("cuEventDestroy_v2", event)

    def event_record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def event_query(self, event: int) -> bool:
        """Whether its stream has come that far; true of an event that was never recorded."""
        return self._ready("cuEventQuery", event)

    def event_synchronize(self, event: int) -> None:
        """Blocks this thread until the event is reached. It has no deadline: see :mod:`.order`."""
        self._call("cuEventSynchronize", event)

    def event_elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two events with timing that have been reached."""
        out = _ffi.new("float *")
        self._call("cuEventElapsedTime", out, start, end)
        return float(out[0])

    def _ready(self, name: str, handle: int) -> bool:
        rc = self._function(name)(handle)
        if rc not in (0, NOT_READY):
            raise self._failed(name, rc)
        return bool(rc == 0)


_loaded: dict[str, Driver] = {}
_loading = threading.Lock()


def load(library: str | None = None) -> Driver:
    """The driver, opened and initialised once. What failed is tried again at the next call.

    :param library: another file than :data:`LIBRARY`.
    :raises DriverMissing: there is no CUDA here, and why.
    """
    name = library or LIBRARY
    with _loading:
        if name not in _loaded:
            _loaded[name] = Driver(name)
        return _loaded[name]


def available() -> str | None:
    """Why CUDA cannot be used here, or None if it can."""
    try:
        load()
    except DriverMissing as exc:
        return str(exc)
    return None


def in_use() -> bool:
    """Whether somebody in this process has initialised CUDA. If nobody has, no pointer can be device memory,
    and we do not do it for the sake of asking: it would break CUDA in children that are forked later.
    """
    if LIBRARY in _loaded:
        return True
    try:
        lib = ctypes.CDLL(LIBRARY, os.RTLD_NOW | os.RTLD_NOLOAD)
        return bool(lib.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != NOT_INITIALIZED)
    except (OSError, AttributeError):
        return False
