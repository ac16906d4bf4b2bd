/* table.c: regions by id, for readers that take no lock. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>

#include "table.h"

struct owned { /* regions of a table, chained until it is freed */
    struct mkv_region region;
    struct owned *older;
};

struct table {
    struct mkv_table t;
    struct owned *newest;
};

struct mkv_table *mkv_table_new(uint32_t capacity) {
    struct table *t = calloc(1, sizeof *t);
    if (!t)
        return 0;
    void *slots = mmap(0, capacity * sizeof(struct mkv_region *), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slots == MAP_FAILED) {
        free(t);
        return 0;
    }
    t->t.slot = slots;
    t->t.capacity = capacity;
    return &t->t;
}

void mkv_table_free(struct mkv_table *t) {
    struct table *own = (struct table *)t;
    if (!t)
        return;
    munmap(t->slot, t->capacity * sizeof *t->slot);
    for (struct owned *o = own->newest, *older; o; o = older) {
        older = o->older;
        free(o);
    }
    free(own);
}

int mkv_table_set(struct mkv_table *t, const struct mkv_region *region) {
    struct table *own = (struct table *)t;
    if (region->id >= t->capacity)
        return -ERANGE;
    if (t->slot[region->id])
        return -EEXIST;
    struct owned *o = calloc(1, sizeof *o);
    if (!o)
        return -ENOMEM;
    o->region = *region;
    o->older = own->newest;
    own->newest = o;
    __atomic_store_n(&t->slot[region->id], &o->region, __ATOMIC_RELEASE);
    return 0;
}

int mkv_table_clear(struct mkv_table *t, uint32_t id) {
    if (!mkv_table_get(t, id))
        return -ENOENT;
    __atomic_store_n(&t->slot[id], (struct mkv_region *)0, __ATOMIC_RELEASE);
    return 0;
}

struct mkv_region *mkv_table_at(const struct mkv_table *t, uint32_t id) {
    return mkv_table_get(t, id);
}
