/* flashio_uring.c: the upper rung of the flash engine: io_uring, from Linux 5.10 on.
 *
 * One system call a round: it hands over all that was started and sleeps until something has ended. A wake-up
 * is a completion like the others, of a read of an eventfd that is always in the ring. On Linux before 5.13,
 * buffers can only be registered while no request is in a ring; so that read is not armed before the first
 * request, and the thread sleeps in a plain read of the eventfd until then.
 *
 * The ring's memory is counted against RLIMIT_MEMLOCK before Linux 5.12, that of registered buffers always.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "flashio_ops.h"

#if defined(MKV_LIBURING) && __has_include(<liburing.h>)
#include <liburing.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

/* Younger than some headers that we build with. */
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1u << 8)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1u << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1u << 13)
#endif

#define BUFFER_BYTES  (1ull << 30) /* the most that one registered buffer may have */
#define LEAST_ENTRIES 256u
#define REAP_BATCH    64u
/* The youngest feature flag that every Linux 5.10 has; all operations that we use are older. */
#define NEEDED_FEATURES (IORING_FEAT_NODROP | IORING_FEAT_FAST_POLL | IORING_FEAT_POLL_32BITS)

struct uring {
    struct mkv_rung base;
    struct mkv_flashio *f;
    struct io_uring ring;
    int wake_fd;
    uint64_t wake_value;
    int armed, fixed_files;
    uint32_t handed;       /* started and not yet over */
    struct iovec *buffers; /* registered, by address */
    uint32_t buffer_count;
};

static void doze(void) {
    struct timespec ts = {.tv_nsec = 1000000};
    nanosleep(&ts, 0);
}

/* --- requests --- */

/* Makes room in the submission queue where there is none. */
static struct io_uring_sqe *next_sqe(struct uring *r) {
    struct io_uring_sqe *sqe;
    while (!(sqe = io_uring_get_sqe(&r->ring))) {
        mkv_count(&r->base.enters, 1);
        int rc = io_uring_submit(&r->ring);
        if (rc < 0 && rc != -EINTR)
            doze(); /* the kernel is short of memory; the completion queue has room for all that can be
                       started */
    }
    return sqe;
}

/* The registered buffer that the span lies in, or -1. */
static int find_buffer(const struct uring *r, uint64_t address, uint64_t bytes) {
    uint32_t low = 0, high = r->buffer_count;
    while (low < high) {
        uint32_t mid = (low + high) / 2;
        if ((uint64_t)(uintptr_t)r->buffers[mid].iov_base <= address)
            low = mid + 1;
        else
            high = mid;
    }
    if (!low)
        return -1;
    const struct iovec *b = &r->buffers[low - 1];
    uint64_t skip = address - (uint64_t)(uintptr_t)b->iov_base;
    return skip < b->iov_len && bytes <= b->iov_len - skip ? (int)low - 1 : -1;
}

static void prepare(struct uring *r, struct io_uring_sqe *sqe, int fd, const struct mkv_task *t) {
    const struct mkv_io *io = t->io;
    uint64_t address = io->address + t->moved, offset = io->offset + t->moved;
    void *at = (void *)(uintptr_t)address;
    unsigned part = (unsigned)mkv_task_part(t);
    int buffer = io->op <= MKV_IO_WRITE ? find_buffer(r, address, part) : -1;
    if (io->op == MKV_IO_FLUSH)
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
    else if (io->op == MKV_IO_DISCARD)
        io_uring_prep_fallocate(sqe, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                                (off_t)io->length);
    else if (io->op == MKV_IO_READ && buffer >= 0)
        io_uring_prep_read_fixed(sqe, fd, at, part, offset, buffer);
    else if (io->op == MKV_IO_READ)
        io_uring_prep_read(sqe, fd, at, part, offset);
    else if (buffer >= 0)
        io_uring_prep_write_fixed(sqe, fd, at, part, offset, buffer);
    else
        io_uring_prep_write(sqe, fd, at, part, offset);
}

static void uring_start(struct mkv_rung *base, struct mkv_task *t) {
    struct uring *r = (struct uring *)base;
    struct io_uring_sqe *sqe = next_sqe(r);
    prepare(r, sqe, r->fixed_files ? (int)t->device : r->f->devices[t->device].fd, t);
    if (r->fixed_files)
        sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, t);
    r->handed++;
}

/* --- sleeping and waking --- */

static void arm(struct uring *r) {
    struct io_uring_sqe *sqe = next_sqe(r);
    io_uring_prep_read(sqe, r->wake_fd, &r->wake_value, sizeof r->wake_value, 0);
    io_uring_sqe_set_data(sqe, 0);
    r->armed = 1;
}

/* Reports what has ended; how many completions there were. */
static unsigned reap(struct uring *r) {
    struct io_uring_cqe *cqes[REAP_BATCH];
    struct {
        struct mkv_task *task;
        int result;
    } ended[REAP_BATCH];
    unsigned n, all = 0;
    while ((n = io_uring_peek_batch_cqe(&r->ring, cqes, REAP_BATCH))) {
        for (unsigned i = 0; i < n; i++) {
            ended[i].task = io_uring_cqe_get_data(cqes[i]);
            ended[i].result = cqes[i]->res;
        }
        io_uring_cq_advance(&r->ring, n);
        all += n;
        for (unsigned i = 0; i < n; i++) {
            if (ended[i].task) {
                r->handed--;
                mkv_task_ended(r->f, ended[i].task, ended[i].result);
            } else {
                r->armed = 0;
            }
        }
    }
    return all;
}

static void uring_wait(struct mkv_rung *base) {
    struct uring *r = (struct uring *)base;
    if (!r->armed && !r->handed) {
        while (read(r->wake_fd, &r->wake_value, sizeof r->wake_value) < 0 && errno == EINTR)
            ;
        return;
    }
    if (!r->armed)
        arm(r);
    mkv_count(&base->enters, 1);
    int rc = io_uring_submit_and_wait(&r->ring, 1);
    if (!reap(r) && rc < 0 && rc != -EINTR)
        doze(); /* -EAGAIN: the kernel is short of memory; what could not be handed over is still in the ring
                 */
}

static void uring_wake(struct mkv_rung *base) {
    uint64_t one = 1;
    while (write(((struct uring *)base)->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* --- set-up --- */

static int by_address(const void *a, const void *b) {
    const struct iovec *x = a, *y = b;
    return x->iov_base < y->iov_base ? -1 : x->iov_base > y->iov_base;
}

/* A ring's buffers are registered all at once; a further span means all anew. */
static int uring_memory(struct mkv_rung *base, uint64_t address, uint64_t bytes) {
    struct uring *r = (struct uring *)base;
    uint32_t more = (uint32_t)((bytes + BUFFER_BYTES - 1) / BUFFER_BYTES), n = r->buffer_count;
    struct iovec *all = calloc(n + more, sizeof *all);
    if (!all)
        return -ENOMEM;
    if (n) {
        memcpy(all, r->buffers, n * sizeof *all);
        io_uring_unregister_buffers(&r->ring);
    }
    for (uint64_t at = 0; at < bytes; at += BUFFER_BYTES, n++) {
        all[n].iov_base = (void *)(uintptr_t)(address + at);
        all[n].iov_len = bytes - at < BUFFER_BYTES ? bytes - at : BUFFER_BYTES;
    }
    qsort(all, n, sizeof *all, by_address);
    int rc = io_uring_register_buffers(&r->ring, all, n);
    if (rc >= 0) {
        free(r->buffers);
        r->buffers = all;
        r->buffer_count = n;
        return 0;
    }
    free(all);
    if (r->buffer_count && io_uring_register_buffers(&r->ring, r->buffers, r->buffer_count) < 0)
        r->buffer_count = 0;
    snprintf(r->f->reason, sizeof r->f->reason, "memory is not registered: %s%s", strerror(-rc),
             rc == -ENOMEM ? " (raise RLIMIT_MEMLOCK: ulimit -l)" : "");
    return rc;
}

static int uring_device(struct mkv_rung *base, uint32_t index, int fd, uint32_t places) {
    struct uring *r = (struct uring *)base;
    (void)places;
    if (!r->fixed_files)
        return 0;
    int rc = io_uring_register_files_update(&r->ring, index, &fd, 1);
    return rc < 0 ? rc : 0;
}

/* The read of the eventfd has our memory until it is over. */
static void uring_free(struct mkv_rung *base) {
    struct uring *r = (struct uring *)base;
    while (r->armed) {
        uring_wake(base);
        io_uring_submit_and_wait(&r->ring, 1);
        reap(r);
    }
    /* The kernel takes a ring down later and elsewhere; files and memory are to be free when we return. */
    if (r->fixed_files)
        io_uring_unregister_files(&r->ring);
    if (r->buffer_count)
        io_uring_unregister_buffers(&r->ring);
    io_uring_queue_exit(&r->ring);
    close(r->wake_fd);
    free(r->buffers);
    free(r);
}

static const struct mkv_rung_ops uring_ops = {
    .name = "io_uring",
    .memory = uring_memory,
    .device = uring_device,
    .start = uring_start,
    .wait = uring_wait,
    .wake = uring_wake,
    .free = uring_free,
};

static int sysctl_disabled(void) {
    char value = '0';
    FILE *file = fopen("/proc/sys/kernel/io_uring_disabled", "re");
    if (file) {
        if (fread(&value, 1, 1, file) != 1)
            value = '0';
        fclose(file);
    }
    return value - '0';
}

static void say_why(char *reason, size_t size, int error) {
    const char *why = strerror(error), *hint = "";
    if (error == ENOSYS)
        hint = " (a kernel without io_uring, or a seccomp profile)";
    else if (error == EPERM && sysctl_disabled())
        hint = " (sysctl kernel.io_uring_disabled)";
    else if (error == EPERM)
        hint = " (a seccomp profile, as containers have it)";
    else if (error == ENOMEM)
        hint = " (raise RLIMIT_MEMLOCK: ulimit -l)";
    else if (error == EMFILE || error == ENFILE)
        hint = " (raise RLIMIT_NOFILE: ulimit -n)";
    snprintf(reason, size, "io_uring_setup: %s%s", why, hint);
}

/* The best flags that this kernel knows: completions run when we wait for them and not by interrupting us
 * (6.1), or at least without an inter-processor interrupt (5.19). */
static int set_up(struct uring *r, uint32_t depth) {
    static const unsigned flags[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
                                     IORING_SETUP_COOP_TASKRUN, 0};
    unsigned entries = depth < LEAST_ENTRIES ? LEAST_ENTRIES : depth, all = (depth + 1) * MKV_MAX_DEVICES;
    int rc = -EINVAL;
    for (size_t i = 0; rc == -EINVAL && i < sizeof flags / sizeof *flags; i++) {
        struct io_uring_params p = {.flags = flags[i] | IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE,
                                    .cq_entries = all > 2 * entries ? all : 2 * entries};
        rc = io_uring_queue_init_params(entries, &r->ring, &p);
        if (!rc && (p.features & NEEDED_FEATURES) != NEEDED_FEATURES) {
            io_uring_queue_exit(&r->ring);
            return -ENOSYS;
        }
    }
    return rc;
}

struct mkv_rung *mkv_uring_new(struct mkv_flashio *f, char *reason, size_t size) {
    struct uring *r = calloc(1, sizeof *r);
    if (!r) {
        say_why(reason, size, ENOMEM);
        return 0;
    }
    r->base.ops = &uring_ops;
    r->f = f;
    r->wake_fd = eventfd(0, EFD_CLOEXEC);
    int rc = r->wake_fd < 0 ? -errno : set_up(r, f->depth);
    if (rc) {
        say_why(reason, size, -rc);
        if (r->wake_fd >= 0)
            close(r->wake_fd);
        free(r);
        return 0;
    }
    int none[MKV_MAX_DEVICES];
    memset(none, 0xff, sizeof none);
    rc = io_uring_register_files(&r->ring, none, MKV_MAX_DEVICES);
    r->fixed_files = rc >= 0;
    if (r->fixed_files)
        snprintf(reason, size, "this kernel has it");
    else
        snprintf(reason, size, "files are not registered: %s", strerror(-rc));
    return &r->base;
}

#else

struct mkv_rung *mkv_uring_new(struct mkv_flashio *f, char *reason, size_t size) {
    (void)f;
    snprintf(reason, size, "built without liburing (apt install liburing-dev)");
    return 0;
}

#endif
