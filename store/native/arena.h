/* arena.h: the arena, for the files that implement store.h. */
#ifndef MKV_ARENA_H
#define MKV_ARENA_H

#include <pthread.h>

#include "ns.h"

struct mkv_arena {
    uint8_t *base;
    uint64_t slab_bytes;
    uint64_t incarnation;
    uint64_t generation; /* the last one given out (atomic) */
    int event;

    pthread_mutex_t lock; /* guards the next four */
    uint32_t *free_place; /* a stack */
    uint64_t nfree;       /* (read without the lock as well) */
    uint64_t next_id;
    struct mkv_slab **by_id; /* lazily zeroed memory; an entry is read under its namespace's lock */

    pthread_mutex_t timer_lock; /* guards the rest; held while namespaces are ticked */
    pthread_cond_t timer_wake;
    pthread_t timer;
    struct mkv_ns *watched;
    int stopping;
};

/* Gives the slab a place, its address and a new id: 0, or -ENOMEM. */
int mkv_arena_take(struct mkv_arena *a, struct mkv_slab *s);
/* Zeroes its memory (holding no lock) and makes its place free again. */
void mkv_arena_give(struct mkv_arena *a, struct mkv_slab *s);
/* A generation that was never used before. Its low half is not zero. */
uint64_t mkv_arena_generation(struct mkv_arena *a);
void mkv_arena_signal(struct mkv_arena *a);
/* Has the timer tick a namespace; -EEXIST if there is one of that id. */
int mkv_arena_watch(struct mkv_arena *a, struct mkv_ns *ns);
void mkv_arena_unwatch(struct mkv_arena *a, struct mkv_ns *ns);

#endif
