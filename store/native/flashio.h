/* flashio.h: asynchronous I/O between registered arena memory and flash, and nothing else.
 *
 *   submit(io, …) ─► queue ─► io_uring (fixed files, fixed buffers, O_DIRECT)  ─► done callback
 *                         └─► or a few threads with preadv/pwritev                on the engine's thread
 *
 * The engine knows devices by index, memory by address; it knows nothing of blocks. One thread of its own submits
 * and completes; callers only queue. A request is over when its callback runs, and not before: then no device has
 * its memory any more. There is no cancellation. What has been submitted is on the device's own time, which is
 * watched (mkv_flashio_stuck).
 */
#ifndef MKV_FLASHIO_H
#define MKV_FLASHIO_H

#include <stdint.h>

/* cdef */
#define MKV_IO_READ    1
#define MKV_IO_WRITE   2
#define MKV_IO_FLUSH   3 /* everything that had completed on the device before it was queued is on stable media */
#define MKV_IO_DISCARD 4 /* the span's content is of no use any more; no error where the device cannot */

#define MKV_MAX_DEVICES 64

struct mkv_flashio;

struct mkv_io { /* the caller's; untouched by it between submit and callback */
    uint32_t op;
    uint32_t device;
    uint64_t offset; /* on the device; a multiple of 512 and of the device's logical block */
    uint64_t address;
    uint64_t length; /* likewise a multiple */
    int32_t result;  /* when done: 0, or a negative errno (-EIO for a short transfer at the end of a file) */
    uint32_t spare;
    void (*done)(struct mkv_io *io); /* on the engine's thread; short, and may submit more */
    struct mkv_io *next;             /* the engine's */
    uint64_t queued_ns, done_ns;
};

struct mkv_flashio_stats {
    uint64_t reads, read_bytes, writes, write_bytes, flushes, discards, errors;
    uint64_t under_way, deepest; /* requests at the devices now, and the most so far */
    uint64_t enters;             /* system calls that submitted or reaped */
    uint64_t oldest_ns;          /* age of the oldest request under way; 0: none */
};

/* An engine; nothing is open yet. depth: requests at the devices at once. `threads` nonzero demands the fallback.
 * NULL with errno. */
struct mkv_flashio *mkv_flashio_new(uint32_t depth, uint32_t threads);
/* "io_uring", or "threads"; and why. Static strings. */
const char *mkv_flashio_rung(const struct mkv_flashio *f);
const char *mkv_flashio_reason(const struct mkv_flashio *f);
/* Memory that requests may name: registered as fixed buffers where that is possible (each at most 1 GiB; larger
 * spans are cut). Before the first submit. 0 or -errno (memlock: -ENOMEM; the engine then works without). */
int mkv_flashio_memory(struct mkv_flashio *f, uint64_t address, uint64_t bytes);
/* An open descriptor (O_DIRECT if the file system knows it), the engine's from now on. A device index or -errno. */
int mkv_flashio_device(struct mkv_flashio *f, int fd);
/* Queues n requests and wakes the engine once. From any thread, also from callbacks. */
void mkv_flashio_submit(struct mkv_flashio *f, struct mkv_io *const *io, uint32_t n);
void mkv_flashio_stats(struct mkv_flashio *f, struct mkv_flashio_stats *out);
/* Waits for all that is under way, closes the devices, joins the thread. */
void mkv_flashio_free(struct mkv_flashio *f);
/* Synchronously, for set-up and tests: a request and its end. */
int mkv_flashio_run(struct mkv_flashio *f, struct mkv_io *io);
/* end cdef */

#endif
