/* flashio.c: the flash engine's queues, places and thread.
 *
 * The thread's round: take what was submitted, give free places to what waits, hand it to the rung and sleep
 * there until something has ended or been submitted. A submitter wakes the thread only where it sleeps, so a
 * busy engine costs its callers no system call, and an idle one is never awake.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clock.h"
#include "flashio_ops.h"

#define MAX_TRIES       1000u /* a device that is never ready is broken */
#define DEFAULT_THREADS 8u
#define READ_TURNS      4u /* one of so many places goes to a write while reads wait too */
#define WINDOW_BYTES    (8ull << 20)

/* --- the end of a request --- */

static void finish(struct mkv_flashio *f, struct mkv_io *io, int result) {
    struct mkv_flashio_stats *s = &f->stats;
    if (result) {
        mkv_count(&s->errors, 1);
    } else if (io->op == MKV_IO_READ) {
        mkv_count(&s->reads, 1);
        mkv_count(&s->read_bytes, io->length);
    } else if (io->op == MKV_IO_WRITE) {
        mkv_count(&s->writes, 1);
        mkv_count(&s->write_bytes, io->length);
    } else {
        mkv_count(io->op == MKV_IO_FLUSH ? &s->flushes : &s->discards, 1);
    }
    io->result = result;
    io->done_ns = mkv_now_ns();
    io->done(io);
}

static int is_write(const struct mkv_io *io) {
    return io->op == MKV_IO_WRITE || io->op == MKV_IO_DISCARD;
}

/* What a device has: sign 1 when a request starts, -1 when it is over. */
static void account(struct mkv_device *dev, const struct mkv_io *io, int sign) {
    uint64_t bytes = sign < 0 ? -io->length : io->length;
    if (is_write(io))
        dev->writing += (uint32_t)sign;
    if (io->op == MKV_IO_READ)
        dev->read_bytes += bytes;
    else if (io->op == MKV_IO_WRITE)
        dev->write_bytes += bytes;
}

void mkv_task_over(struct mkv_flashio *f, struct mkv_task *t, int result) {
    struct mkv_device *dev = &f->devices[t->device];
    struct mkv_io *io = t->io;
    account(dev, io, -1);
    if (io->op == MKV_IO_FLUSH)
        dev->flushing = 0;
    mkv_count(&f->stats.under_way, -1ull);
    __atomic_store_n(&t->started_ns, 0, __ATOMIC_RELAXED);
    t->next = dev->free;
    dev->free = t;
    while (io) {
        struct mkv_io *next = io->next;
        finish(f, io, result);
        io = next;
    }
}

void mkv_task_ended(struct mkv_flashio *f, struct mkv_task *t, int64_t result) {
    const struct mkv_io *io = t->io;
    if ((result == -EINTR || result == -EAGAIN) && t->tries++ < MAX_TRIES) {
        f->rung->ops->start(f->rung, t);
        return;
    }
    if (io->op == MKV_IO_READ || io->op == MKV_IO_WRITE) {
        if (result > 0) {
            t->moved += (uint64_t)result;
            if (t->moved < io->length && result % MKV_SECTOR == 0) {
                f->rung->ops->start(f->rung, t);
                return;
            }
        }
        if (result >= 0)
            result = t->moved == io->length ? 0 : -EIO; /* the file ends here */
    }
    if (io->op == MKV_IO_DISCARD && (result == -EOPNOTSUPP || result == -ENOSYS || result == -ENODEV))
        result = 0;
    if (f->faults)
        result = mkv_faults_ended(f, t, (int)result);
    mkv_task_over(f, t, (int)result);
}

/* --- from the queues to the places --- */

static struct mkv_io *next_io(struct mkv_device *dev) {
    if (dev->flushes.head && !dev->flushing) {
        struct mkv_io *all = dev->flushes.head;
        dev->flushes.head = 0;
        return all;
    }
    int read = dev->reads.head != 0 && dev->read_bytes < WINDOW_BYTES;
    int write = dev->writes.head != 0 && dev->write_bytes < WINDOW_BYTES &&
                dev->writing < dev->places - dev->places / 4;
    if (read && write)
        read = ++dev->turn % READ_TURNS != 0;
    return read ? mkv_pop(&dev->reads) : write ? mkv_pop(&dev->writes) : 0;
}

static void start(struct mkv_flashio *f, uint32_t device, struct mkv_io *io) {
    struct mkv_device *dev = &f->devices[device];
    struct mkv_task *t = dev->free;
    dev->free = t->next;
    t->io = io;
    t->moved = 0;
    t->tries = 0;
    t->device = device;
    __atomic_store_n(&t->started_ns, mkv_now_ns(), __ATOMIC_RELAXED);
    for (const struct mkv_io *each = io; each; each = each->next)
        mkv_count(&f->stats.waiting, -1ull);
    account(dev, io, 1);
    if (io->op == MKV_IO_FLUSH)
        dev->flushing = 1;
    mkv_count(&f->stats.under_way, 1);
    if (f->stats.under_way > f->stats.deepest)
        mkv_count(&f->stats.deepest, f->stats.under_way - f->stats.deepest);
    if (!f->faults || !mkv_faults_start(f, t))
        f->rung->ops->start(f->rung, t);
}

static void fill_places(struct mkv_flashio *f) {
    for (uint32_t i = 0; i < f->device_count; i++) {
        struct mkv_device *dev = &f->devices[i];
        struct mkv_io *io;
        while (dev->free && (io = next_io(dev)))
            start(f, i, io);
    }
}

/* --- from the inbox to the queues --- */

static int check(const struct mkv_flashio *f, const struct mkv_io *io) {
    if (io->device >= f->device_count)
        return -ENODEV;
    if (io->op == MKV_IO_FLUSH)
        return 0;
    if (io->op < MKV_IO_READ || io->op > MKV_IO_DISCARD)
        return -EINVAL;
    if (!io->length || io->length > INT64_MAX || io->offset > INT64_MAX - io->length)
        return -EINVAL;
    if ((io->offset | io->length) % f->devices[io->device].align)
        return -EINVAL;
    if (io->op != MKV_IO_DISCARD && io->address % MKV_SECTOR)
        return -EINVAL;
    return 0;
}

static void queue(struct mkv_flashio *f, struct mkv_io *io) {
    int rc = check(f, io);
    /* To punch a hole into a file would change its metadata, now and at the next write. */
    if (rc || (io->op == MKV_IO_DISCARD && !f->devices[io->device].is_block)) {
        finish(f, io, rc);
        return;
    }
    struct mkv_device *dev = &f->devices[io->device];
    mkv_push(io->op == MKV_IO_READ ? &dev->reads : io->op == MKV_IO_FLUSH ? &dev->flushes : &dev->writes, io);
    mkv_count(&f->stats.waiting, 1);
}

static void take_inbox(struct mkv_flashio *f) {
    pthread_mutex_lock(&f->lock);
    struct mkv_queue inbox = f->inbox;
    struct mkv_call *calls = f->calls;
    f->inbox.head = 0;
    f->calls = 0;
    f->sleeping = 0;
    pthread_mutex_unlock(&f->lock);

    f->begun |= inbox.head != 0;
    for (struct mkv_io *io; (io = mkv_pop(&inbox));)
        queue(f, io);
    while (calls) {
        struct mkv_call *call = calls;
        calls = call->next;
        int result = call->run(f, call->arg);
        pthread_mutex_lock(&f->lock);
        call->result = result;
        call->over = 1; /* it is gone from now on */
        pthread_cond_broadcast(&f->told);
        pthread_mutex_unlock(&f->lock);
    }
}

/* Whether to go on. Something that came meanwhile is not waited for; but what was started is handed over and
 * what has ended is reported all the same, so the wait is made short rather than left out: else callers in a
 * hurry could keep the thread from the devices for ever. */
static int wait_round(struct mkv_flashio *f) {
    pthread_mutex_lock(&f->lock);
    int pending = f->inbox.head || f->calls;
    int over = f->stop && !pending && !f->stats.under_way && !f->stats.waiting;
    f->sleeping = !pending && !over;
    pthread_mutex_unlock(&f->lock);
    if (over)
        return 0;
    if (pending)
        f->rung->ops->wake(f->rung);
    f->rung->ops->wait(f->rung);
    return 1;
}

static int make_rung(struct mkv_flashio *f) {
    if (f->threads)
        snprintf(f->reason, sizeof f->reason, "threads were demanded");
    else
        f->rung = mkv_uring_new(f, f->reason, sizeof f->reason);
    if (f->rung)
        return 0;
    if (!f->threads)
        f->threads = DEFAULT_THREADS;
    f->rung = mkv_threads_new(f);
    return f->rung ? 0 : -ENOMEM;
}

static void *engine(void *arg) {
    struct mkv_flashio *f = arg;
    int rc = make_rung(f);
    pthread_mutex_lock(&f->lock);
    f->error = rc;
    f->ready = 1;
    pthread_cond_broadcast(&f->told);
    pthread_mutex_unlock(&f->lock);
    if (rc)
        return 0;
    do {
        take_inbox(f);
        fill_places(f);
    } while (wait_round(f));
    f->rung->ops->free(f->rung);
    return 0;
}

/* --- the callers' side --- */

/* The lock is held; whether the thread is to be woken. It is awake where it asks itself, in a callback. */
static int rouse(struct mkv_flashio *f) {
    int asleep = f->sleeping && !pthread_equal(pthread_self(), f->thread);
    f->sleeping = 0;
    return asleep;
}

void mkv_flashio_submit(struct mkv_flashio *f, struct mkv_io *const *io, uint32_t n) {
    if (!n)
        return;
    uint64_t now = mkv_now_ns();
    pthread_mutex_lock(&f->lock);
    for (uint32_t i = 0; i < n; i++) {
        io[i]->queued_ns = now;
        mkv_push(&f->inbox, io[i]);
    }
    int wake = rouse(f);
    pthread_mutex_unlock(&f->lock);
    if (wake)
        f->rung->ops->wake(f->rung);
}

int mkv_engine_call(struct mkv_flashio *f, int (*run)(struct mkv_flashio *f, void *arg), void *arg) {
    if (pthread_equal(pthread_self(), f->thread))
        return run(f, arg);
    struct mkv_call call = {.run = run, .arg = arg};
    pthread_mutex_lock(&f->lock);
    struct mkv_call **last = &f->calls;
    while (*last)
        last = &(*last)->next;
    *last = &call;
    int wake = rouse(f);
    pthread_mutex_unlock(&f->lock);
    if (wake)
        f->rung->ops->wake(f->rung);
    pthread_mutex_lock(&f->lock);
    while (!call.over)
        pthread_cond_wait(&f->told, &f->lock);
    pthread_mutex_unlock(&f->lock);
    return call.result;
}

struct span {
    uint64_t address, bytes;
};

static int add_memory(struct mkv_flashio *f, void *arg) {
    const struct span *s = arg;
    if (f->begun)
        return -EBUSY;
    return f->rung->ops->memory(f->rung, s->address, s->bytes);
}

int mkv_flashio_memory(struct mkv_flashio *f, uint64_t address, uint64_t bytes) {
    struct span s = {address, bytes};
    return bytes ? mkv_engine_call(f, add_memory, &s) : -EINVAL;
}

static int add_device(struct mkv_flashio *f, void *arg) {
    int fd = *(int *)arg, sector = MKV_SECTOR, rc;
    struct stat st;
    if (f->device_count == MKV_MAX_DEVICES)
        return -ENFILE;
    if (fstat(fd, &st) || lseek(fd, 0, SEEK_CUR) < 0)
        return -errno;
    if (S_ISBLK(st.st_mode) && ioctl(fd, BLKSSZGET, &sector))
        return -errno;
    struct mkv_device *dev = &f->devices[f->device_count];
    uint32_t places = f->threads && f->threads < f->depth ? f->threads : f->depth;
    struct mkv_task *tasks = calloc(places, sizeof *tasks);
    if (!tasks)
        return -ENOMEM;
    rc = f->rung->ops->device(f->rung, f->device_count, fd, places);
    if (rc) {
        free(tasks);
        return rc;
    }
    *dev = (struct mkv_device){.fd = fd,
                               .is_block = S_ISBLK(st.st_mode),
                               .align = (uint32_t)sector < MKV_SECTOR ? MKV_SECTOR : (uint32_t)sector,
                               .places = places,
                               .tasks = tasks};
    for (uint32_t i = 0; i < places; i++) {
        tasks[i].next = dev->free;
        dev->free = &tasks[i];
    }
    __atomic_store_n(&f->device_count, f->device_count + 1, __ATOMIC_RELEASE);
    return (int)f->device_count - 1;
}

int mkv_flashio_device(struct mkv_flashio *f, int fd) {
    return mkv_engine_call(f, add_device, &fd);
}

const char *mkv_flashio_rung(const struct mkv_flashio *f) {
    return f->rung->ops->name;
}

const char *mkv_flashio_reason(const struct mkv_flashio *f) {
    return f->reason;
}

uint64_t mkv_flashio_stuck(struct mkv_flashio *f, uint32_t device) {
    uint64_t oldest = UINT64_MAX, now = mkv_now_ns();
    if (device >= __atomic_load_n(&f->device_count, __ATOMIC_ACQUIRE))
        return 0;
    const struct mkv_device *dev = &f->devices[device];
    for (uint32_t i = 0; i < dev->places; i++) {
        uint64_t at = __atomic_load_n(&dev->tasks[i].started_ns, __ATOMIC_RELAXED);
        if (at && at < oldest)
            oldest = at;
    }
    return oldest < now ? now - oldest : 0;
}

void mkv_flashio_stats(struct mkv_flashio *f, struct mkv_flashio_stats *out) {
    const uint64_t *from = (const uint64_t *)&f->stats;
    uint64_t *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    out->enters = __atomic_load_n(&f->rung->enters, __ATOMIC_RELAXED);
    out->oldest_ns = 0;
    for (uint32_t i = 0; i < MKV_MAX_DEVICES; i++) {
        uint64_t age = mkv_flashio_stuck(f, i);
        if (age > out->oldest_ns)
            out->oldest_ns = age;
    }
}

static void destroy(struct mkv_flashio *f) {
    for (uint32_t i = 0; i < f->device_count; i++) {
        close(f->devices[i].fd);
        free(f->devices[i].tasks);
    }
    mkv_faults_free(f->faults);
    pthread_cond_destroy(&f->told);
    pthread_mutex_destroy(&f->lock);
    free(f);
}

struct mkv_flashio *mkv_flashio_new(uint32_t depth, uint32_t threads) {
    if (!depth || depth > MKV_MAX_DEPTH || threads > MKV_MAX_DEPTH) {
        errno = EINVAL;
        return 0;
    }
    struct mkv_flashio *f = calloc(1, sizeof *f);
    if (!f)
        return 0;
    f->depth = depth;
    f->threads = threads;
    pthread_mutex_init(&f->lock, 0);
    pthread_cond_init(&f->told, 0);

    sigset_t all, before; /* signals are for the threads of the program, not for this one and its workers */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&f->thread, 0, engine, f);
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (!rc) {
        pthread_setname_np(f->thread, "memkv-flash");
        pthread_mutex_lock(&f->lock);
        while (!f->ready)
            pthread_cond_wait(&f->told, &f->lock);
        rc = -f->error;
        pthread_mutex_unlock(&f->lock);
        if (rc)
            pthread_join(f->thread, 0);
    }
    if (rc) {
        destroy(f);
        errno = rc;
        return 0;
    }
    return f;
}

void mkv_flashio_free(struct mkv_flashio *f) {
    if (!f)
        return;
    mkv_flashio_fault_clear(f);
    pthread_mutex_lock(&f->lock);
    f->stop = 1;
    int wake = rouse(f);
    pthread_mutex_unlock(&f->lock);
    if (wake)
        f->rung->ops->wake(f->rung);
    pthread_join(f->thread, 0);
    destroy(f);
}
