/* flashio_threads.c: the lower rung of the flash engine: a thread for every place at a device, pread and
 * pwrite.
 *
 * Every device has threads of its own, since one that hangs takes all of them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "flashio_ops.h"

#define STACK_BYTES (256u << 10)

struct list {
    struct mkv_task *head, *tail;
};

struct pool { /* of one device */
    struct threads *rung;
    int fd;
    pthread_cond_t work;
    struct list todo;
    pthread_t *threads;
    uint32_t count;
};

struct threads {
    struct mkv_rung base;
    struct mkv_flashio *f;
    pthread_mutex_t lock; /* of all below */
    pthread_cond_t news;  /* for the engine's thread */
    struct list ended;
    int woken, stop;
    struct pool pools[MKV_MAX_DEVICES];
};

static void append(struct list *l, struct mkv_task *t) {
    t->next = 0;
    if (l->head)
        l->tail->next = t;
    else
        l->head = t;
    l->tail = t;
}

static struct mkv_task *take(struct list *l) {
    struct mkv_task *t = l->head;
    if (t)
        l->head = t->next;
    return t;
}

static int64_t transfer(int fd, const struct mkv_task *t) {
    const struct mkv_io *io = t->io;
    void *at = (void *)(uintptr_t)(io->address + t->moved);
    off_t offset = (off_t)(io->offset + t->moved);
    int64_t rc;
    if (io->op == MKV_IO_READ)
        rc = pread(fd, at, mkv_task_part(t), offset);
    else if (io->op == MKV_IO_WRITE)
        rc = pwrite(fd, at, mkv_task_part(t), offset);
    else if (io->op == MKV_IO_FLUSH)
        rc = fdatasync(fd);
    else
        rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, (off_t)io->length);
    return rc < 0 ? -errno : rc;
}

static void *worker(void *arg) {
    struct pool *p = arg;
    struct threads *r = p->rung;
    pthread_mutex_lock(&r->lock);
    for (;;) {
        struct mkv_task *t = take(&p->todo);
        if (!t) {
            if (r->stop)
                break;
            pthread_cond_wait(&p->work, &r->lock);
            continue;
        }
        pthread_mutex_unlock(&r->lock);
        t->result = transfer(p->fd, t);
        pthread_mutex_lock(&r->lock);
        append(&r->ended, t);
        mkv_count(&r->base.enters, 1);
        pthread_cond_signal(&r->news);
    }
    pthread_mutex_unlock(&r->lock);
    return 0;
}

static int threads_memory(struct mkv_rung *base, uint64_t address, uint64_t bytes) {
    (void)base, (void)address, (void)bytes;
    return 0; /* nothing to prepare */
}

static void end_pool(struct pool *p) {
    for (uint32_t i = 0; i < p->count; i++)
        pthread_join(p->threads[i], 0);
    free(p->threads);
    pthread_cond_destroy(&p->work);
    p->threads = 0;
    p->count = 0;
}

static int threads_device(struct mkv_rung *base, uint32_t index, int fd, uint32_t places) {
    struct threads *r = (struct threads *)base;
    struct pool *p = &r->pools[index];
    pthread_attr_t attr;
    int rc = 0;
    *p = (struct pool){.rung = r, .fd = fd, .threads = calloc(places, sizeof *p->threads)};
    if (!p->threads)
        return -ENOMEM;
    pthread_cond_init(&p->work, 0);
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    while (p->count < places && !(rc = pthread_create(&p->threads[p->count], &attr, worker, p)))
        pthread_setname_np(p->threads[p->count++], "memkv-flash-io");
    pthread_attr_destroy(&attr);
    if (p->count)
        return 0; /* fewer than asked for: some wait a little longer */
    end_pool(p);
    return -rc;
}

static void threads_start(struct mkv_rung *base, struct mkv_task *t) {
    struct threads *r = (struct threads *)base;
    struct pool *p = &r->pools[t->device];
    pthread_mutex_lock(&r->lock);
    append(&p->todo, t);
    pthread_cond_signal(&p->work);
    pthread_mutex_unlock(&r->lock);
}

static void threads_wait(struct mkv_rung *base) {
    struct threads *r = (struct threads *)base;
    pthread_mutex_lock(&r->lock);
    while (!r->ended.head && !r->woken)
        pthread_cond_wait(&r->news, &r->lock);
    struct list ended = r->ended;
    r->ended.head = 0;
    r->woken = 0;
    pthread_mutex_unlock(&r->lock);
    for (struct mkv_task *t; (t = take(&ended));)
        mkv_task_ended(r->f, t, t->result);
}

static void threads_wake(struct mkv_rung *base) {
    struct threads *r = (struct threads *)base;
    pthread_mutex_lock(&r->lock);
    r->woken = 1;
    pthread_cond_signal(&r->news);
    pthread_mutex_unlock(&r->lock);
}

static void threads_free(struct mkv_rung *base) {
    struct threads *r = (struct threads *)base;
    pthread_mutex_lock(&r->lock);
    r->stop = 1;
    for (uint32_t i = 0; i < MKV_MAX_DEVICES; i++)
        if (r->pools[i].count)
            pthread_cond_broadcast(&r->pools[i].work);
    pthread_mutex_unlock(&r->lock);
    for (uint32_t i = 0; i < MKV_MAX_DEVICES; i++)
        if (r->pools[i].count)
            end_pool(&r->pools[i]);
    pthread_cond_destroy(&r->news);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

static const struct mkv_rung_ops threads_ops = {
    .name = "threads",
    .memory = threads_memory,
    .device = threads_device,
    .start = threads_start,
    .wait = threads_wait,
    .wake = threads_wake,
    .free = threads_free,
};

struct mkv_rung *mkv_threads_new(struct mkv_flashio *f) {
    struct threads *r = calloc(1, sizeof *r);
    if (!r)
        return 0;
    r->base.ops = &threads_ops;
    r->f = f;
    pthread_mutex_init(&r->lock, 0);
    pthread_cond_init(&r->news, 0);
    return &r->base;
}
