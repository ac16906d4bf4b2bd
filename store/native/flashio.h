/* flashio.h: asynchronous I/O between registered arena memory and flash, and nothing else.
 *
 *   submit(io, …) ─► queues ─► io_uring (fixed files, fixed buffers, O_DIRECT)  ─► done callback
 *                          └─► or a few threads with pread/pwrite                  on the engine's thread
 *
 * The engine knows devices by index, memory by address; it knows nothing of blocks. One thread of its own
 * submits and completes; callers only queue. A request is over when its callback runs, and not before: then
 * no device has its memory any more. There is no cancellation. What has been started is on the device's own
 * time, which can be watched (mkv_flashio_stuck).
 *
 * Order. Requests have none among them: whoever needs one waits for the callback. Every device has `depth`
 * places of its own, so that a device that hangs stalls nobody else; what finds no place waits, reads and
 * writes in a queue each. While both wait, three of four places that become free go to reads and one to a
 * write; and writes (discards with them) never hold more than three quarters of the places, so that a burst
 * of write-behind leaves room for a read that comes late. Flushes go first, and one flush serves all that
 * waited for it.
 *
 * A device is given no more than 8 MiB of reads at once, and as much of writes (but one of each in any case):
 * what the fastest drive of today moves in half a millisecond. It works on all that it has at the same time,
 * so with more it would be no quicker, and the first to have asked would be answered when the last is: no
 * block could cross the wire while others are being read.
 */
#ifndef MKV_FLASHIO_H
#define MKV_FLASHIO_H

#include <stdint.h>

/* cdef */
#define MKV_IO_READ  1
#define MKV_IO_WRITE 2
#define MKV_IO_FLUSH                                                                                         \
    3 /* everything that had completed on the device before it was queued is on stable media */
#define MKV_IO_DISCARD 4 /* the span's content is of no use any more; no error where the device cannot */

#define MKV_MAX_DEVICES 64
#define MKV_MAX_DEPTH   1000

struct mkv_flashio;

struct mkv_io { /* the caller's; untouched by it between submit and callback */
    uint32_t op;
    uint32_t device;
    uint64_t offset;  /* on the device; a multiple of 512 and of a block device's logical block */
    uint64_t address; /* a multiple of 512; discards and flushes need none */
    uint64_t length;  /* likewise a multiple, and not 0; a flush covers the device whatever its span */
    int32_t result;   /* when done: 0, or a negative errno */
    uint32_t spare;
    void (*done)(struct mkv_io *io); /* on the engine's thread; short, and may submit more */
    struct mkv_io *next;             /* the engine's; the caller's again in the callback */
    uint64_t queued_ns, done_ns;
};
/* Errors that the engine itself finds: -ENODEV (no such device), -EINVAL (op, alignment, length), -EIO (the
 * file ends inside the span; or see mkv_flashio_power_cut). All others are the kernel's. -EINTR and -EAGAIN
 * are tried again, transfers that stop short are continued. After an error the span's content is undefined.
 */

struct mkv_flashio_stats {
    uint64_t reads, read_bytes, writes, write_bytes, flushes, discards,
        errors;                  /* over; errors in none but it */
    uint64_t waiting;            /* requests that found no place at a device yet */
    uint64_t under_way, deepest; /* requests at the devices now, and the most so far */
    uint64_t enters;             /* system calls that submitted, transferred or reaped */
    uint64_t oldest_ns;          /* age of the oldest request at any device; 0: none */
};

/* An engine; nothing is open yet. depth (1 to MKV_MAX_DEPTH): requests at each device at once. `threads`
 * nonzero demands the lower rung, with so many threads a device (never more than depth; 8 where it is not by
 * demand). NULL with errno. */
struct mkv_flashio *mkv_flashio_new(uint32_t depth, uint32_t threads);
/* "io_uring", or "threads"; and why, or what of the higher rung is missing. They live as long as the engine.
 */
const char *mkv_flashio_rung(const struct mkv_flashio *f);
const char *mkv_flashio_reason(const struct mkv_flashio *f);
/* Memory that requests may name: registered as fixed buffers where that is possible, in pieces of 1 GiB from
 * `address` on (a request across two pieces goes unregistered). Before the first submit, or -EBUSY. 0 or
 * -errno (RLIMIT_MEMLOCK: -ENOMEM): then the engine works without, and the reason says so. Must stay mapped
 * until free. */
int mkv_flashio_memory(struct mkv_flashio *f, uint64_t address, uint64_t bytes);
/* An open, seekable descriptor (O_DIRECT if the file system knows it), the engine's from now on, unless an
 * error is returned. A device index, or -errno. */
int mkv_flashio_device(struct mkv_flashio *f, int fd);
/* Queues n requests and wakes the engine once. From any thread, also from callbacks. */
void mkv_flashio_submit(struct mkv_flashio *f, struct mkv_io *const *io, uint32_t n);
void mkv_flashio_stats(struct mkv_flashio *f, struct mkv_flashio_stats *out);
/* Age in ns of the oldest request at one device; 0: none. */
uint64_t mkv_flashio_stuck(struct mkv_flashio *f, uint32_t device);
/* Waits for all that was submitted, closes the devices, joins the thread. */
void mkv_flashio_free(struct mkv_flashio *f);
/* Synchronously, for set-up and tests, never from a callback: n requests and their ends. `done` is not
 * called. The result of the first that failed, or 0. */
int mkv_flashio_run(struct mkv_flashio *f, struct mkv_io *io);
int mkv_flashio_run_many(struct mkv_flashio *f, struct mkv_io *io, uint32_t n);

/* --- flashio_fault.c: bad devices and power cuts, for tests --- */
#define MKV_FAULT_ERROR 1 /* fails with `error`; nothing is transferred */
#define MKV_FAULT_TORN                                                                                       \
    2 /* a write: only the first k*512 bytes, not all, reach the device; `error`, or 0: unnoticed */
#define MKV_FAULT_LOST 3 /* a write or flush: reported as done, and was not */
#define MKV_FAULT_HELD 4 /* not over until the faults are cleared: a device that hangs */
#define MKV_FAULT_FLIP 5 /* a read: one bit of what it brought is wrong */

struct mkv_fault {
    uint32_t kind;
    uint32_t op;          /* 0: any that the kind applies to */
    uint32_t device;      /* UINT32_MAX: any */
    int32_t error;        /* negative errno */
    uint64_t from, to;    /* requests that touch this span; to 0: all. A flush is anywhere */
    uint32_t per_million; /* chance of a request to be hit; 0: certain */
    uint32_t times;       /* ends after so many hits; 0: never */
};
/* Adds a fault; the first that hits a request acts. 0, -EINVAL, -ENOMEM. */
int mkv_flashio_fault(struct mkv_flashio *f, const struct mkv_fault *fault);
void mkv_flashio_fault_clear(struct mkv_flashio *f); /* forgets all faults; what was held goes on */
/* From now on every device has a volatile cache: a write is over when it is in memory, and reaches the file
 * at a flush that was queued after its end. Reads see it. Spans beyond the end of a file are refused with
 * -ENOSPC. `seed` drives faults and power cuts. -EBUSY after the first submit. */
int mkv_flashio_volatile(struct mkv_flashio *f, uint64_t seed);
/* The power goes. Every write that no flush covered, or that is not over yet, reaches the file wholly, not at
 * all, or in some of its sectors; the same seed and history leave the same file. Everything not yet
 * over, and everything after, ends with -EIO. -EINVAL without mkv_flashio_volatile. */
int mkv_flashio_power_cut(struct mkv_flashio *f, uint64_t seed);
/* end cdef */

#endif
