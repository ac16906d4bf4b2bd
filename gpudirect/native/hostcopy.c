/* hostcopy.c: see hostcopy.h. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "hostcopy.h"

#define NEVER UINT64_MAX

struct mkv_hostevent {
    uint64_t recorded, reached; /* how often (atomic) */
    int rc;                     /* of the stream, when it was last reached */
    int refs;                   /* its owner's and those of records under way (atomic) */
};

struct op {
    struct op *next;
    struct mkv_hostevent *event; /* NULL: a copy */
    uint64_t dst, src, nbytes;
};

struct mkv_hoststream {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    struct op *head, *tail;
    uint64_t delay_ns, taken, done, refuse_at, lose_at;
    int held, stop, running, refuse_rc, lose_rc, lost;
};

static void perform(struct mkv_hoststream *s, struct op *op) {
    if (op->event) {
        op->event->rc = s->lost;
        __atomic_fetch_add(&op->event->reached, 1, __ATOMIC_RELEASE);
        mkv_hostevent_free(op->event);
        return;
    }
    if (s->done == s->lose_at)
        s->lost = s->lose_rc;
    if (s->lost)
        return;
    uint64_t ns = s->delay_ns;
    pthread_mutex_unlock(&s->lock);
    if (ns) {
        struct timespec ts = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
        nanosleep(&ts, 0);
    }
    memcpy((void *)(uintptr_t)op->dst, (const void *)(uintptr_t)op->src, op->nbytes);
    pthread_mutex_lock(&s->lock);
    s->done++;
}

static void *stream_main(void *arg) {
    struct mkv_hoststream *s = arg;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (!s->stop && (!s->head || (s->held && !s->head->event)))
            pthread_cond_wait(&s->wake, &s->lock);
        struct op *op = s->head;
        if (!op)
            break;
        s->head = op->next;
        s->running = 1;
        perform(s, op);
        s->running = 0;
        free(op);
        pthread_cond_broadcast(&s->idle);
    }
    pthread_mutex_unlock(&s->lock);
    return 0;
}

struct mkv_hoststream *mkv_hoststream_new(void) {
    struct mkv_hoststream *s = calloc(1, sizeof *s);
    if (!s)
        return 0;
    pthread_mutex_init(&s->lock, 0);
    pthread_cond_init(&s->wake, 0);
    pthread_cond_init(&s->idle, 0);
    s->refuse_at = s->lose_at = NEVER;
    if (pthread_create(&s->thread, 0, stream_main, s)) {
        free(s);
        return 0;
    }
    pthread_setname_np(s->thread, "memkv-hostcopy");
    return s;
}

void mkv_hoststream_free(struct mkv_hoststream *s) {
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    s->stop = 1;
    pthread_cond_signal(&s->wake);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, 0);
    pthread_cond_destroy(&s->wake);
    pthread_cond_destroy(&s->idle);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

void mkv_hoststream_delay(struct mkv_hoststream *s, uint64_t ns_per_copy) {
    pthread_mutex_lock(&s->lock);
    s->delay_ns = ns_per_copy;
    pthread_mutex_unlock(&s->lock);
}

void mkv_hoststream_hold(struct mkv_hoststream *s, int held) {
    pthread_mutex_lock(&s->lock);
    s->held = held;
    pthread_cond_signal(&s->wake);
    pthread_mutex_unlock(&s->lock);
}

void mkv_hoststream_refuse(struct mkv_hoststream *s, uint64_t good, int rc) {
    pthread_mutex_lock(&s->lock);
    s->refuse_at = rc ? s->taken + good : NEVER;
    s->refuse_rc = rc;
    pthread_mutex_unlock(&s->lock);
}

void mkv_hoststream_lose(struct mkv_hoststream *s, uint64_t good, int rc) {
    pthread_mutex_lock(&s->lock);
    s->lose_at = rc ? s->done + good : NEVER;
    s->lose_rc = rc;
    if (!rc)
        s->lost = 0;
    pthread_mutex_unlock(&s->lock);
}

void mkv_hoststream_counts(struct mkv_hoststream *s, uint64_t *taken, uint64_t *done) {
    pthread_mutex_lock(&s->lock);
    *taken = s->taken;
    *done = s->done;
    pthread_mutex_unlock(&s->lock);
}

struct mkv_hostevent *mkv_hostevent_new(void) {
    struct mkv_hostevent *e = calloc(1, sizeof *e);
    if (e)
        e->refs = 1;
    return e;
}

/* Like cuEventDestroy, also while a record of it is under way. */
void mkv_hostevent_free(struct mkv_hostevent *e) {
    if (e && !__atomic_sub_fetch(&e->refs, 1, __ATOMIC_ACQ_REL))
        free(e);
}

/* --- the driver's functions --- */

static int enqueue(struct mkv_hoststream *s, struct op op) {
    struct op *kept = malloc(sizeof *kept);
    if (!kept)
        return 2; /* CUDA_ERROR_OUT_OF_MEMORY */
    *kept = op;
    kept->next = 0;
    if (s->head)
        s->tail->next = kept;
    else
        s->head = kept;
    s->tail = kept;
    pthread_cond_signal(&s->wake);
    return 0;
}

static int set_context(void *context) {
    (void)context;
    return 0;
}

static int copy(uint64_t dst, uint64_t src, size_t nbytes, void *stream) {
    struct mkv_hoststream *s = stream;
    pthread_mutex_lock(&s->lock);
    int rc = s->lost;
    if (s->taken == s->refuse_at) {
        rc = s->refuse_rc;
        s->refuse_at = NEVER;
    }
    if (!rc)
        rc = enqueue(s, (struct op){.dst = dst, .src = src, .nbytes = nbytes});
    s->taken += !rc;
    pthread_mutex_unlock(&s->lock);
    return rc;
}

static int record(void *event, void *stream) {
    struct mkv_hoststream *s = stream;
    struct mkv_hostevent *e = event;
    pthread_mutex_lock(&s->lock);
    int rc = enqueue(s, (struct op){.event = e});
    if (!rc) {
        __atomic_fetch_add(&e->refs, 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&e->recorded, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

static int query(void *event) {
    struct mkv_hostevent *e = event;
    if (__atomic_load_n(&e->reached, __ATOMIC_ACQUIRE) != __atomic_load_n(&e->recorded, __ATOMIC_RELAXED))
        return MKV_COPY_NOT_READY;
    return e->rc;
}

static int synchronize(void *stream) {
    struct mkv_hoststream *s = stream;
    pthread_mutex_lock(&s->lock);
    while (s->head || s->running)
        pthread_cond_wait(&s->idle, &s->lock);
    int rc = s->lost;
    pthread_mutex_unlock(&s->lock);
    return rc;
}

void mkv_copy_host(struct mkv_copy_driver *out) {
    *out = (struct mkv_copy_driver){set_context, copy, record, query, synchronize};
}
