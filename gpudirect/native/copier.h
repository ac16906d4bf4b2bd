/* copier.h: copies between host slots and device memory, many at a time, by one thread for each way.
 *
 *   submit(transfer) ─► waiting ─────────► issued: copy, copy, …, record(event) ──► done list + eventfd
 *                        for an event;      adjacent copies become one               when the event is
 * reached not for ever
 *
 * A *transfer* is an array of copies, all one way. The lane's thread calls the driver through pointers
 * (struct mkv_copy_driver): those of libcuda, or those of hostcopy.h, which stand in for them where there is
 * no GPU. It never waits inside the driver: it asks for events, and sleeps POLL_NS between the questions, so
 * that what comes meanwhile is issued at once.
 *
 * `done` is set only when no copy of the transfer can be under way any more. Once a copy has been issued
 * there is no taking it back: it is waited for whatever the deadline says. A driver that reports an error for
 * an event or for a whole stream has given that context up and runs nothing of it any more.
 */
#ifndef MKV_COPIER_H
#define MKV_COPIER_H

#include <stddef.h>
#include <stdint.h>

#define MKV_COPY_NOT_READY 600    /* CUDA_ERROR_NOT_READY */
#define MKV_COPY_LATE      (-110) /* the deadline passed before the first copy was issued */
#define MKV_COPY_CLOSED    (-108)

/* The driver's functions. All return 0 or an error of the driver's, which is positive. */
struct mkv_copy_driver {
    int (*set_context)(void *context);
    int (*copy)(uint64_t dst, uint64_t src, size_t nbytes, void *stream); /* asynchronous */
    int (*record)(void *event, void *stream);
    int (*query)(void *event); /* 0: reached, or never recorded; MKV_COPY_NOT_READY */
    int (*synchronize)(void *stream);
};

struct mkv_copy { /* 24 B */
    uint64_t dst;
    uint64_t src;
    uint64_t nbytes;
};

struct mkv_transfer { /* kept alive by whoever submitted it, with all that it points to, until it is done */
    const struct mkv_copy *copies;
    uint8_t *ok;          /* n bytes, zeroed; when done: 1 where the copy is in place */
    uint64_t deadline_ns; /* mkv_now_ns: after that nothing of it is issued */
    uint32_t n;
    uint32_t good; /* when done: how many copies are in place */
    int32_t rc;    /* when done: why not all of them; 0, the driver's error, or MKV_COPY_LATE, _CLOSED */
    int32_t done;
    /* the lane's own */
    void *event;
    struct mkv_transfer *next;
};

struct mkv_lane_stats {
    uint64_t bytes;     /* in place */
    uint64_t blocks;    /* copies in place */
    uint64_t calls;     /* of the driver's copy function: fewer, where copies were adjacent */
    uint64_t errors;    /* copies that failed */
    uint64_t transfers; /* done */
    int64_t last_error; /* the driver's, of the newest failure */
};

struct mkv_lane;

/* Starts a lane over one stream of the driver's. At most `nevents` transfers are in the stream at once; the
 * events are the lane's until it is freed. NULL: no memory, or no thread. */
struct mkv_lane *mkv_lane_new(const struct mkv_copy_driver *driver, void *context, void *stream,
                              void *const *events, uint32_t nevents);
/* Readable while mkv_lane_reap has something. */
int mkv_lane_eventfd(const struct mkv_lane *lane);
void mkv_lane_submit(struct mkv_lane *lane, struct mkv_transfer *transfer);
/* Collects up to max transfers that are done, in the order of their ends. */
uint32_t mkv_lane_reap(struct mkv_lane *lane, struct mkv_transfer **out, uint32_t max);
void mkv_lane_stats(struct mkv_lane *lane, struct mkv_lane_stats *out);
/* Waits for what has been issued; what has not been is done with MKV_COPY_CLOSED. Reap before this. `final`
 * receives the last of its counters; it may be NULL. */
void mkv_lane_free(struct mkv_lane *lane, struct mkv_lane_stats *final);

/* The functions of a libcuda, which must be loaded already; `into_device` chooses the copy. 0; -ENOENT: no
 * such library, or it lacks one of them. */
int mkv_copy_cuda(struct mkv_copy_driver *out, const char *library, int into_device);

#endif
