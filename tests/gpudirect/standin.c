/* standin.c: a library with the names of libcuda's functions, for tests without a GPU.
 *
 * It proves the plumbing of gpudirect/driver.py (names, arguments, errors, what is asked in which order) and
 * nothing about CUDA. "Device memory" is a memfd of this host, so that bytes really move, and so that a real
 * dma-buf of it can be had where /dev/udmabuf is. Copies are done when the call returns; events are reached
 * when the test says so. Built with -DOLD it lacks what old drivers lack.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <linux/udmabuf.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX 64
typedef uintptr_t P;

static struct allocation {
    P start;
    size_t size, mapped;
    int fd;
    uint64_t device, type, managed, mapped_at_all, legacy, id, rdma, pool, handles;
} table[MAX];

static struct {
    char name[64];
    int rc;
} failing[MAX];

static char logged[1 << 16];
static uint64_t next_id = 100, next_handle = 0x1000;
static int held, plain, initialised, attribute[200], context_flags;
static P context[2] = {0xc0, 0xc1};
static __thread P stack[16];
static __thread int depth;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void note(const char *format, ...) {
    va_list args;
    pthread_mutex_lock(&lock);
    size_t n = strlen(logged);
    va_start(args, format);
    vsnprintf(logged + n, sizeof logged - n, format, args);
    va_end(args);
    pthread_mutex_unlock(&lock);
}

static int fails(const char *name) {
    for (int i = 0; i < MAX; i++)
        if (!strcmp(failing[i].name, name))
            return failing[i].rc;
    return 0;
}
#define ENTER(name)                                                                                          \
    do {                                                                                                     \
        int rc_ = fails(name);                                                                               \
        if (rc_)                                                                                             \
            return rc_;                                                                                      \
    } while (0)

static struct allocation *find(P p) {
    for (int i = 0; i < MAX; i++)
        if (table[i].start && p >= table[i].start && p < table[i].start + table[i].size)
            return &table[i];
    return 0;
}

/* --- for the test --- */

void standin_fail(const char *name, int rc) {
    for (int i = 0; i < MAX; i++)
        if (!failing[i].name[0] || !strcmp(failing[i].name, name)) {
            snprintf(failing[i].name, sizeof failing[i].name, "%s", name);
            failing[i].rc = rc;
            return;
        }
}
void standin_reset(void) {
    for (int i = 0; i < MAX; i++)
        if (table[i].start) {
            munmap((void *)table[i].start, table[i].mapped);
            close(table[i].fd);
        }
    memset(table, 0, sizeof table);
    memset(failing, 0, sizeof failing);
    memset(attribute, 0, sizeof attribute);
    logged[0] = 0;
    held = plain = context_flags = 0;
}
const char *standin_log(void) {
    return logged;
}
void standin_clear(void) {
    logged[0] = 0;
}
void standin_plain(int on) {
    plain = on;
}
void standin_hold(int on) {
    held = on;
}
void standin_attribute(int which, int value) {
    attribute[which] = value;
}
int standin_depth(void) {
    return depth;
}
void standin_set(P p, const char *what, uint64_t value) {
    struct allocation *a = find(p);
    if (!strcmp(what, "managed"))
        a->managed = value;
    else if (!strcmp(what, "type"))
        a->type = value;
    else if (!strcmp(what, "mapped"))
        a->mapped_at_all = value;
    else if (!strcmp(what, "legacy"))
        a->legacy = value;
    else if (!strcmp(what, "rdma"))
        a->rdma = value;
    else if (!strcmp(what, "pool"))
        a->pool = value;
    else if (!strcmp(what, "id"))
        a->id = value;
    else if (!strcmp(what, "device"))
        a->device = value;
}

/* --- devices and contexts --- */

int cuDriverGetVersion(int *version) {
#ifdef OLD
    *version = 11020;
#else
    *version = 12040;
#endif
    return 0;
}
int cuInit(unsigned flags) {
    ENTER("cuInit");
    initialised = 1;
    return flags ? 1 : 0;
}
int cuGetErrorName(int rc, const char **text) {
    *text = rc == 1     ? "CUDA_ERROR_INVALID_VALUE"
            : rc == 100 ? "CUDA_ERROR_NO_DEVICE"
            : rc == 801 ? "CUDA_ERROR_NOT_SUPPORTED"
                        : 0;
    return *text ? 0 : 1;
}
int cuDeviceGetCount(int *n) {
    ENTER("cuDeviceGetCount");
    *n = 2;
    return initialised ? 0 : 3;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}
int cuDeviceGetName(char *name, int n, int device) {
    snprintf(name, n, "Stand-in %d", device);
    return 0;
}
int cuDeviceGetPCIBusId(char *id, int n, int device) {
    snprintf(id, n, "0000:%02X:00.0", device + 0x17);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = (size_t)80 << 30;
    return device < 0;
}
int cuDeviceGetAttribute(int *value, int which, int device) {
    if (device < 0 || which >= 200 || attribute[which] < 0)
        return 1;
    *value = attribute[which];
    return 0;
}
int cuDevicePrimaryCtxRetain(P *out, int device) {
    note("retain %d\n", device);
    *out = context[device];
    return 0;
}
int cuCtxSetCurrent(P c) {
    depth += !depth;
    stack[depth - 1] = c;
    return 0;
}
int cuCtxPushCurrent_v2(P c) {
    stack[depth++] = c;
    return 0;
}
int cuCtxPopCurrent_v2(P *out) {
    *out = stack[--depth];
    return 0;
}
int cuCtxGetCurrent(P *out) {
    *out = depth ? stack[depth - 1] : 0;
    return 0;
}

/* --- pointers --- */

int cuPointerGetAttribute(void *data, int which, P p) {
    struct allocation *a = find(p);
    uint64_t *out = data;
    if (!a)
        return 1;
#ifdef OLD
    if (which >= 14)
        return 1;
#endif
    switch (which) {
    case 7:
        *out = a->id;
        return 0;
    case 14:
        *out = a->handles;
        return 0;
    case 15:
        *(char *)data = (char)a->rdma;
        return 0;
    case 17:
        *out = a->pool;
        return 0;
    default:
        return 1;
    }
}
int cuPointerGetAttributes(unsigned n, int *which, void **data, P p) {
    struct allocation *a = find(p);
    ENTER("cuPointerGetAttributes");
    for (unsigned i = 0; i < n; i++)
        switch (which[i]) {
        case 2:
            *(uint32_t *)data[i] = a ? (uint32_t)a->type : 0;
            break;
        case 7:
            *(uint64_t *)data[i] = a ? a->id : 0;
            break;
        case 8:
            *(char *)data[i] = a ? (char)a->managed : 0;
            break;
        case 9:
            *(int *)data[i] = a ? (int)a->device : -2;
            break;
        case 10:
            *(char *)data[i] = a ? (char)a->legacy : 0;
            break;
        case 11:
            *(P *)data[i] = a ? a->start : 0;
            break;
        case 12:
            *(size_t *)data[i] = a ? a->size : 0;
            break;
        case 13:
            *(char *)data[i] = a ? (char)a->mapped_at_all : 0;
            break;
        default:
            return 1;
        }
    return 0;
}
int cuPointerSetAttribute(const void *value, int which, P p) {
    ENTER("cuPointerSetAttribute");
    note("set %d=%d in %#lx\n", which, *(const int *)value, (long)(depth ? stack[depth - 1] : 0));
    return find(p) ? 0 : 1;
}
int cuMemGetAddressRange_v2(P *base, size_t *size, P p) {
    struct allocation *a = find(p);
    ENTER("cuMemGetAddressRange");
    if (!a || !depth)
        return depth ? 1 : 201;
    *base = a->start;
    *size = a->size;
    return 0;
}
#ifndef OLD
int cuCtxGetFlags(unsigned *flags) {
    *flags = context_flags;
    return 0;
}
int cuCtxSetFlags(unsigned flags) {
    ENTER("cuCtxSetFlags");
    note("flags %#x\n", flags);
    context_flags = flags;
    return 0;
}
int cuMemGetHandleForAddressRange(void *handle, P p, size_t size, int type, unsigned long long flags) {
    struct allocation *a = find(p);
    struct udmabuf_create create = {.flags = UDMABUF_FLAGS_CLOEXEC, .size = size};
    ENTER("cuMemGetHandleForAddressRange");
    note("export +%#zx %#zx flags %llu\n", a ? (size_t)(p - a->start) : 0, size, flags);
    if (!a || type != 1 || p % 4096 || size % 4096 || p + size > a->start + a->mapped)
        return 1;
    if (plain) { /* a file descriptor, and no dma-buf: for tests that register it nowhere */
        *(int *)handle = dup(a->fd);
        return 0;
    }
    int device = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return 801;
    create.memfd = a->fd;
    create.offset = p - a->start;
    int fd = ioctl(device, UDMABUF_CREATE, &create);
    close(device);
    if (fd < 0)
        return 801;
    *(int *)handle = fd;
    return 0;
}
int cuFlushGPUDirectRDMAWrites(int target, int scope) {
    note("flush %d %d in %#lx\n", target, scope, (long)(depth ? stack[depth - 1] : 0));
    return 0;
}
#endif

/* --- memory --- */

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *free = (size_t)40 << 30;
    *total = (size_t)80 << 30;
    return 0;
}
int cuMemAlloc_v2(P *out, size_t bytes) {
    ENTER("cuMemAlloc");
    if (!depth || !bytes)
        return depth ? 1 : 201;
    for (int i = 0; i < MAX; i++) {
        struct allocation *a = &table[i];
        if (a->start)
            continue;
        size_t mapped = (bytes + 4095) & ~(size_t)4095;
        int fd = memfd_create("standin", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0 || ftruncate(fd, mapped) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK))
            return 2;
        void *at = mmap(0, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED)
            return 2;
        *a = (struct allocation){.start = (P)at,
                                 .size = bytes,
                                 .mapped = mapped,
                                 .fd = fd,
                                 .device = stack[depth - 1] == context[1],
                                 .type = 2,
                                 .mapped_at_all = 1,
                                 .legacy = 1,
                                 .id = next_id++,
                                 .rdma = 1};
        *out = a->start;
        note("alloc %zu\n", bytes);
        return 0;
    }
    return 2;
}
int cuMemFree_v2(P p) {
    struct allocation *a = find(p);
    if (!a || a->start != p)
        return 1;
    munmap((void *)a->start, a->mapped);
    close(a->fd);
    memset(a, 0, sizeof *a);
    note("free\n");
    return 0;
}
int cuMemHostAlloc(P *out, size_t bytes, unsigned flags) {
    void *at = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *out = (P)at;
    note("host_alloc %zu %u\n", bytes, flags);
    return at == MAP_FAILED ? 2 : 0;
}
int cuMemFreeHost(P p) {
    note("host_free\n");
    return p ? 0 : 1;
}
int cuMemHostRegister_v2(P p, size_t bytes, unsigned flags) {
    note("host_register %zu %u\n", bytes, flags);
    return p ? 0 : 1;
}
int cuMemHostUnregister(P p) {
    note("host_unregister\n");
    return p ? 0 : 1;
}
static int copy(const char *what, P dst, P src, size_t bytes, P stream) {
    ENTER(what);
    memcpy((void *)dst, (const void *)src, bytes);
    note("%s %zu on %#lx\n", what, bytes, (long)stream);
    return 0;
}
int cuMemcpyHtoDAsync_v2(P d, P s, size_t n, P stream) {
    return copy("htod", d, s, n, stream);
}
int cuMemcpyDtoHAsync_v2(P d, P s, size_t n, P stream) {
    return copy("dtoh", d, s, n, stream);
}
int cuMemcpyDtoDAsync_v2(P d, P s, size_t n, P stream) {
    return copy("dtod", d, s, n, stream);
}
int cuMemsetD8Async(P dst, unsigned char value, size_t n, P stream) {
    memset((void *)dst, value, n);
    return stream == 0;
}

struct copy2d { /* CUDA_MEMCPY2D of cuda.h */
    size_t src_x, src_y;
    int src_type;
    P src_host, src_device, src_array;
    size_t src_pitch, dst_x, dst_y;
    int dst_type;
    P dst_host, dst_device, dst_array;
    size_t dst_pitch, width, height;
};
int cuMemcpy2DAsync_v2(const struct copy2d *c, P stream) {
    P from = c->src_type == 1 ? c->src_host : c->src_device;
    P to = c->dst_type == 1 ? c->dst_host : c->dst_device;
    if (c->src_type == c->dst_type || c->src_x || c->src_y || c->dst_x || c->dst_y)
        return 1;
    for (size_t i = 0; i < c->height; i++)
        memcpy((void *)(to + i * c->dst_pitch), (const void *)(from + i * c->src_pitch), c->width);
    note("2d %d>%d on %#lx\n", c->src_type, c->dst_type, (long)stream);
    return 0;
}

/* --- streams and events --- */

int cuStreamCreate(P *out, unsigned flags) {
    *out = next_handle++;
    note("stream %u\n", flags);
    return 0;
}
int cuStreamDestroy_v2(P s) {
    return s < 0x1000;
}
int cuStreamQuery(P s) {
    return s ? (held ? 600 : 0) : 1;
}
int cuStreamSynchronize(P s) {
    note("synchronize %#lx\n", (long)s);
    return 0;
}
int cuStreamWaitEvent(P s, P e, unsigned flags) {
    note("wait %#lx for %#lx\n", (long)s, (long)e);
    return flags;
}
int cuEventCreate(P *out, unsigned flags) {
    *out = next_handle++;
    note("event %u\n", flags);
    return 0;
}
int cuEventDestroy_v2(P e) {
    note("destroy\n");
    return e < 0x1000;
}
int cuEventRecord(P e, P s) {
    ENTER("cuEventRecord");
    note("record on %#lx\n", (long)s);
    return e < 0x1000;
}
int cuEventQuery(P e) {
    ENTER("cuEventQuery");
    return e < 0x1000 ? 1 : held ? 600 : 0;
}
int cuEventSynchronize(P e) {
    note("event_synchronize\n");
    return e < 0x1000;
}
int cuEventElapsedTime(float *ms, P a, P b) {
    *ms = (float)(b - a);
    return 0;
}
