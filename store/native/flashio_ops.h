/* flashio_ops.h: what the parts of the flash engine know of one another; nobody else includes it.
 *
 *   flashio.c          queues, places, the thread, statistics      calls   ops->start, ops->wait, ops->wake
 *   flashio_uring.c    the upper rung                              calls   mkv_task_ended
 *   flashio_threads.c  the lower rung                              calls   mkv_task_ended
 *   flashio_fault.c    stands between them while a test wants it   calls   mkv_task_over
 *
 * All of it but ops->wake runs on the engine's thread: that is what SINGLE_ISSUER and DEFER_TASKRUN ask for,
 * and why nothing here but the inbox has a lock.
 */
#ifndef MKV_FLASHIO_OPS_H
#define MKV_FLASHIO_OPS_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "flashio.h"

#define MKV_SECTOR 512u
#define MKV_PART_BYTES                                                                                       \
    (1ull << 30) /* the most that one system call moves; the kernel's own limit is 2 GiB                     \
                  */

struct mkv_task {        /* one place at a device */
    struct mkv_io *io;   /* a flush: all that it serves, chained */
    uint64_t moved;      /* bytes so far */
    uint64_t started_ns; /* 0: the place is free. Read by other threads */
    uint32_t device, tries;
    int64_t result; /* the lower rung's, on its way to the engine's thread */
    struct mkv_task *next;
};

static inline uint64_t mkv_task_part(const struct mkv_task *t) {
    uint64_t left = t->io->length - t->moved;
    return left < MKV_PART_BYTES ? left : MKV_PART_BYTES;
}

struct mkv_rung {
    const struct mkv_rung_ops *ops;
    uint64_t enters; /* see mkv_flashio_stats; written with atomics, read by other threads */
};

struct mkv_rung_ops {
    const char *name;
    /* 0 or -errno; nothing is under way. */
    int (*memory)(struct mkv_rung *r, uint64_t address, uint64_t bytes);
    int (*device)(struct mkv_rung *r, uint32_t index, int fd, uint32_t places);
    /* Begins the rest of a transfer, or a flush or discard. It may be put off until `wait`. */
    void (*start)(struct mkv_rung *r, struct mkv_task *t);
    /* Hands over what was started, sleeps until something has ended or somebody woke, reports what has ended.
     */
    void (*wait)(struct mkv_rung *r);
    void (*wake)(struct mkv_rung *r); /* from any thread; a wait that begins later returns at once */
    void (*free)(struct mkv_rung *r); /* nothing is under way */
};

struct mkv_queue {
    struct mkv_io *head, *tail;
};

struct mkv_device {
    int fd;
    int is_block;
    uint32_t align; /* of spans */
    uint32_t places, writing, turn;
    uint64_t read_bytes, write_bytes; /* of what is under way */
    int flushing;
    struct mkv_queue reads, writes, flushes; /* waiting */
    struct mkv_task *tasks, *free;
};

struct mkv_call { /* something to be done on the engine's thread */
    int (*run)(struct mkv_flashio *f, void *arg);
    void *arg;
    int result, over;
    struct mkv_call *next;
};

struct mkv_faults;

struct mkv_flashio {
    uint32_t depth, threads;
    char reason[192];
    struct mkv_rung *rung;
    pthread_t thread;

    pthread_mutex_t lock; /* from here … */
    pthread_cond_t told;  /* a call is over, or the engine is ready */
    struct mkv_queue inbox;
    struct mkv_call *calls;
    int ready, error, sleeping, stop; /* … to here */

    struct mkv_device devices[MKV_MAX_DEVICES];
    uint32_t device_count; /* stored with release */
    int begun;             /* something was submitted */
    struct mkv_faults *faults;
    struct mkv_flashio_stats stats; /* stored with atomics */
};

/* A rung, or NULL with the exact reason written. */
struct mkv_rung *mkv_uring_new(struct mkv_flashio *f, char *reason, size_t size);
struct mkv_rung *mkv_threads_new(struct mkv_flashio *f);

/* A rung says what came of the part that it was given: bytes, or 0, or -errno. */
void mkv_task_ended(struct mkv_flashio *f, struct mkv_task *t, int64_t result);
/* The whole request is over. */
void mkv_task_over(struct mkv_flashio *f, struct mkv_task *t, int result);
/* Runs something on the engine's thread and waits for it; at once if this is that thread. */
int mkv_engine_call(struct mkv_flashio *f, int (*run)(struct mkv_flashio *f, void *arg), void *arg);

/* A fault or the volatile cache has taken the task over (nonzero), or it is to be started as ever. */
int mkv_faults_start(struct mkv_flashio *f, struct mkv_task *t);
/* The last word on what a request that was started ends with. */
int mkv_faults_ended(struct mkv_flashio *f, struct mkv_task *t, int result);
void mkv_faults_free(struct mkv_faults *x);

/* One writer, readers on other threads. */
static inline void mkv_count(uint64_t *counter, uint64_t by) {
    __atomic_store_n(counter, *counter + by, __ATOMIC_RELAXED);
}

static inline void mkv_push(struct mkv_queue *q, struct mkv_io *io) {
    io->next = 0;
    if (q->head)
        q->tail->next = io;
    else
        q->head = io;
    q->tail = io;
}

static inline struct mkv_io *mkv_pop(struct mkv_queue *q) {
    struct mkv_io *io = q->head;
    if (io) {
        q->head = io->next;
        io->next = 0;
    }
    return io;
}

#endif
