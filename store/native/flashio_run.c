/* flashio_run.c: requests to the flash engine, waited for. */
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>

#include "flashio.h"

struct run {
    pthread_mutex_t lock;
    pthread_cond_t over;
    uint32_t left;
};

struct item { /* a copy of the caller's request, so that its `done` stays its own */
    struct mkv_io io;
    struct run *run;
};

static void item_done(struct mkv_io *io) {
    struct run *run = ((struct item *)io)->run;
    pthread_mutex_lock(&run->lock);
    if (!--run->left)
        pthread_cond_signal(&run->over);
    pthread_mutex_unlock(&run->lock);
}

static int run_items(struct mkv_flashio *f, struct mkv_io *io, uint32_t n, struct item *items,
                     struct mkv_io **list) {
    struct run run = {.left = n};
    pthread_mutex_init(&run.lock, 0);
    pthread_cond_init(&run.over, 0);
    for (uint32_t i = 0; i < n; i++) {
        items[i] = (struct item){.io = io[i], .run = &run};
        items[i].io.done = item_done;
        list[i] = &items[i].io;
    }
    mkv_flashio_submit(f, list, n);
    pthread_mutex_lock(&run.lock);
    while (run.left)
        pthread_cond_wait(&run.over, &run.lock);
    pthread_mutex_unlock(&run.lock);
    pthread_cond_destroy(&run.over);
    pthread_mutex_destroy(&run.lock);

    int result = 0;
    for (uint32_t i = 0; i < n; i++) {
        io[i].result = items[i].io.result;
        io[i].queued_ns = items[i].io.queued_ns;
        io[i].done_ns = items[i].io.done_ns;
        if (!result)
            result = io[i].result;
    }
    return result;
}

int mkv_flashio_run_many(struct mkv_flashio *f, struct mkv_io *io, uint32_t n) {
    if (!n)
        return 0;
    struct item *items = calloc(n, sizeof *items);
    struct mkv_io **list = calloc(n, sizeof *list);
    int result = items && list ? run_items(f, io, n, items, list) : -ENOMEM;
    free(items);
    free(list);
    return result;
}

int mkv_flashio_run(struct mkv_flashio *f, struct mkv_io *io) {
    return mkv_flashio_run_many(f, io, 1);
}
