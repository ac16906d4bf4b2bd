/* copier.c: see copier.h. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "clock.h"
#include "copier.h"

#define POLL_NS  30000 /* between two looks at events: short beside the time of a slot's copy */
#define PATIENCE 64    /* looks in vain, after which the pauses grow, five times twofold */
#define SLACK_NS 2000  /* how much later than asked for the kernel may wake us */

struct list {
    struct mkv_transfer *head, *tail;
};

struct mkv_lane {
    struct mkv_copy_driver driver;
    void *context, *stream;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct list inbox, outbox; /* under the lock */
    int stop;                  /* under the lock */
    int done_fd;
    struct list waiting, issued; /* the thread's own */
    void **events;               /* those that are free */
    uint32_t free_events;
    uint32_t in_vain;            /* looks since something happened */
    struct mkv_lane_stats stats; /* relaxed */
};

static void append(struct list *l, struct mkv_transfer *t) {
    t->next = 0;
    if (l->head)
        l->tail->next = t;
    else
        l->head = t;
    l->tail = t;
}

static void move(struct list *to, struct list *from) {
    if (!from->head)
        return;
    if (to->head)
        to->tail->next = from->head;
    else
        to->head = from->head;
    to->tail = from->tail;
    from->head = from->tail = 0;
}

static void count(uint64_t *counter, uint64_t by) {
    __atomic_fetch_add(counter, by, __ATOMIC_RELAXED);
}

/* Nothing of this transfer is under way: whoever submitted it may have it back. rc: of all of it. */
static void finish(struct mkv_lane *lane, struct mkv_transfer *t, int rc) {
    uint64_t one = 1, bytes = 0;
    if (rc) {
        t->rc = rc;
        t->good = 0;
        memset(t->ok, 0, t->n);
    }
    for (uint32_t i = 0; i < t->n; i++)
        bytes += t->ok[i] ? t->copies[i].nbytes : 0;
    count(&lane->stats.bytes, bytes);
    count(&lane->stats.blocks, t->good);
    count(&lane->stats.transfers, 1);
    if (t->rc > 0) {
        count(&lane->stats.errors, t->n - t->good);
        __atomic_store_n(&lane->stats.last_error, t->rc, __ATOMIC_RELAXED);
    }
    pthread_mutex_lock(&lane->lock);
    t->done = 1;
    append(&lane->outbox, t);
    pthread_mutex_unlock(&lane->lock);
    while (write(lane->done_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* Hands copies [from, to), which are adjacent, to the stream as one. */
static int issue_run(struct mkv_lane *lane, struct mkv_transfer *t, uint32_t from, uint32_t to) {
    const struct mkv_copy *c = &t->copies[from];
    uint64_t nbytes = 0;
    for (uint32_t i = from; i < to; i++)
        nbytes += t->copies[i].nbytes;
    int rc = nbytes ? lane->driver.copy(c->dst, c->src, nbytes, lane->stream) : 0;
    count(&lane->stats.calls, 1);
    if (rc) {
        t->rc = rc;
        return rc;
    }
    memset(t->ok + from, 1, to - from);
    t->good += to - from;
    return 0;
}

/* Hands all copies to the stream; those that it refuses are left out, and no others. */
static void issue(struct mkv_lane *lane, struct mkv_transfer *t) {
    const struct mkv_copy *c = t->copies;
    for (uint32_t i = 0, end; i < t->n; i = end) {
        for (end = i + 1; end < t->n; end++)
            if (c[end].dst != c[end - 1].dst + c[end - 1].nbytes ||
                c[end].src != c[end - 1].src + c[end - 1].nbytes)
                break;
        if (issue_run(lane, t, i, end) && end - i > 1)
            for (uint32_t k = i; k < end; k++)
                issue_run(lane, t, k, k + 1);
    }
    if (!t->good) {
        finish(lane, t, t->rc);
        return;
    }
    t->event = lane->events[--lane->free_events];
    int rc = lane->driver.record(t->event, lane->stream);
    if (rc) { /* no event will tell: wait here, or hear that the context is no more */
        lane->events[lane->free_events++] = t->event;
        lane->driver.synchronize(lane->stream);
        finish(lane, t, rc);
        return;
    }
    append(&lane->issued, t);
}

/* Issues what may be issued, oldest first; 1 if anything changed. */
static int start(struct mkv_lane *lane, int stop) {
    struct mkv_transfer *t;
    int any = 0;
    while ((t = lane->waiting.head)) {
        int late = mkv_now_ns() >= t->deadline_ns;
        if (!late && !stop && !lane->free_events)
            break; /* who comes later may be late already, and hears of it when it is its turn */
        lane->waiting.head = t->next;
        if (late || stop)
            finish(lane, t, stop ? MKV_COPY_CLOSED : MKV_COPY_LATE);
        else
            issue(lane, t);
        any = 1;
    }
    return any;
}

/* Takes back what the stream is done with; 1 if anything was. */
static int collect(struct mkv_lane *lane) {
    struct mkv_transfer *t;
    int any = 0;
    while ((t = lane->issued.head)) {
        int rc = lane->driver.query(t->event);
        if (rc == MKV_COPY_NOT_READY)
            break;
        lane->issued.head = t->next;
        lane->events[lane->free_events++] = t->event;
        finish(lane, t, rc);
        any = 1;
    }
    return any;
}

/* Sleeps until something is submitted, or for a moment if there are events to look at. */
static int rest(struct mkv_lane *lane, int any) {
    pthread_mutex_lock(&lane->lock);
    lane->in_vain = any || lane->inbox.head ? 0 : lane->in_vain + 1;
    if (lane->in_vain) {
        if (lane->waiting.head || lane->issued.head) {
            struct timespec ts;
            clock_gettime(CLOCK_MONOTONIC, &ts);
            uint32_t grown = lane->in_vain / PATIENCE;
            ts.tv_nsec += POLL_NS << (grown < 5 ? grown : 5);
            if (ts.tv_nsec >= 1000000000) {
                ts.tv_nsec -= 1000000000;
                ts.tv_sec++;
            }
            pthread_cond_timedwait(&lane->wake, &lane->lock, &ts);
        } else {
            while (!lane->stop && !lane->inbox.head)
                pthread_cond_wait(&lane->wake, &lane->lock);
        }
    }
    move(&lane->waiting, &lane->inbox);
    int stop = lane->stop;
    pthread_mutex_unlock(&lane->lock);
    return stop;
}

static void *lane_main(void *arg) {
    struct mkv_lane *lane = arg;
    int any = 0, stop;
    prctl(PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0);
    int rc = lane->driver.set_context(lane->context);
    do {
        stop = rest(lane, any);
        if (rc) {
            struct mkv_transfer *t;
            while ((t = lane->waiting.head)) {
                lane->waiting.head = t->next;
                finish(lane, t, rc);
            }
        }
        any = start(lane, stop);
        any |= collect(lane);
    } while (!stop || lane->waiting.head || lane->issued.head);
    return 0;
}

static void release(struct mkv_lane *lane) {
    if (lane->done_fd >= 0)
        close(lane->done_fd);
    pthread_cond_destroy(&lane->wake);
    pthread_mutex_destroy(&lane->lock);
    free(lane->events);
    free(lane);
}

struct mkv_lane *mkv_lane_new(const struct mkv_copy_driver *driver, void *context, void *stream,
                              void *const *events, uint32_t nevents) {
    struct mkv_lane *lane = calloc(1, sizeof *lane);
    pthread_condattr_t attr;
    if (!lane)
        return 0;
    lane->driver = *driver;
    lane->context = context;
    lane->stream = stream;
    lane->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    lane->events = calloc(nevents, sizeof *lane->events);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&lane->wake, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&lane->lock, 0);
    for (uint32_t i = 0; lane->events && i < nevents; i++)
        lane->events[i] = events[i];
    lane->free_events = nevents;
    if (lane->done_fd < 0 || !lane->events || pthread_create(&lane->thread, 0, lane_main, lane)) {
        release(lane);
        return 0;
    }
    pthread_setname_np(lane->thread, "memkv-copy");
    return lane;
}

int mkv_lane_eventfd(const struct mkv_lane *lane) {
    return lane->done_fd;
}

void mkv_lane_submit(struct mkv_lane *lane, struct mkv_transfer *t) {
    t->good = 0;
    t->rc = t->done = 0;
    pthread_mutex_lock(&lane->lock);
    append(&lane->inbox, t);
    pthread_cond_signal(&lane->wake);
    pthread_mutex_unlock(&lane->lock);
}

uint32_t mkv_lane_reap(struct mkv_lane *lane, struct mkv_transfer **out, uint32_t max) {
    uint32_t n = 0;
    pthread_mutex_lock(&lane->lock);
    while (n < max && lane->outbox.head) {
        out[n++] = lane->outbox.head;
        lane->outbox.head = lane->outbox.head->next;
    }
    if (!lane->outbox.head) {
        uint64_t value;
        while (read(lane->done_fd, &value, sizeof value) < 0 && errno == EINTR)
            ;
    }
    pthread_mutex_unlock(&lane->lock);
    return n;
}

void mkv_lane_stats(struct mkv_lane *lane, struct mkv_lane_stats *out) {
    out->bytes = __atomic_load_n(&lane->stats.bytes, __ATOMIC_RELAXED);
    out->blocks = __atomic_load_n(&lane->stats.blocks, __ATOMIC_RELAXED);
    out->calls = __atomic_load_n(&lane->stats.calls, __ATOMIC_RELAXED);
    out->errors = __atomic_load_n(&lane->stats.errors, __ATOMIC_RELAXED);
    out->transfers = __atomic_load_n(&lane->stats.transfers, __ATOMIC_RELAXED);
    out->last_error = __atomic_load_n(&lane->stats.last_error, __ATOMIC_RELAXED);
}

void mkv_lane_free(struct mkv_lane *lane, struct mkv_lane_stats *final) {
    if (!lane)
        return;
    pthread_mutex_lock(&lane->lock);
    lane->stop = 1;
    pthread_cond_signal(&lane->wake);
    pthread_mutex_unlock(&lane->lock);
    pthread_join(lane->thread, 0);
    if (final)
        mkv_lane_stats(lane, final);
    release(lane);
}

int mkv_copy_cuda(struct mkv_copy_driver *out, const char *library, int into_device) {
    void *cuda = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    if (!cuda)
        return -ENOENT;
    /* A CUdeviceptr and a host pointer are passed alike, so that one type serves both copies. */
    out->set_context = (int (*)(void *))dlsym(cuda, "cuCtxSetCurrent");
    out->copy = (int (*)(uint64_t, uint64_t, size_t, void *))dlsym(
        cuda, into_device ? "cuMemcpyHtoDAsync_v2" : "cuMemcpyDtoHAsync_v2");
    out->record = (int (*)(void *, void *))dlsym(cuda, "cuEventRecord");
    out->query = (int (*)(void *))dlsym(cuda, "cuEventQuery");
    out->synchronize = (int (*)(void *))dlsym(cuda, "cuStreamSynchronize");
    return out->set_context && out->copy && out->record && out->query && out->synchronize ? 0 : -ENOENT;
}
