/* namespace.c: making and freeing a namespace, and the batches that look blocks up, touch and delete them. */
#include "ns.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "clock.h"

#define KEYS_AT_ONCE 256u /* between which the lock is free for others: prefix queries can be very long */
#define KEYS_AHEAD   8u   /* whose buckets are on their way from memory */
#define BUCKETS_MIN  64u
#define GRACE_MIN_NS 1000000u

static void release(struct mkv_ns *ns) {
    for (int i = 0; i < MKV_MAX_TABLES; i++)
        mkv_index_free(ns->table[i]);
    while (ns->slabs) {
        struct mkv_slab *s = ns->slabs;
        mkv_slab_unlink(ns, s);
        mkv_slab_destroy(s);
    }
    pthread_mutex_destroy(&ns->lock);
    free(ns);
}

/* Room for the blocks of one slab at half load: a namespace that stays small never has to grow its table. */
static uint64_t first_buckets(const struct mkv_ns *ns) {
    uint64_t want = 2 * ns->cls[0].per_slab / MKV_BUCKET_SLOTS, buckets = BUCKETS_MIN;
    while (buckets < want)
        buckets *= 2;
    return buckets;
}

struct mkv_ns *mkv_ns_new(struct mkv_arena *a, uint32_t id, uint32_t block_bytes, uint32_t align,
                          uint64_t grace_ns, uint64_t salt) {
    struct mkv_ns *ns = calloc(1, sizeof *ns);
    if (!ns)
        return NULL;
    pthread_mutex_init(&ns->lock, NULL);
    ns->arena = a;
    ns->id = id;
    ns->block_bytes = block_bytes;
    ns->align = align;
    ns->salt = salt;
    ns->epoch = 1;
    ns->tick_ns = grace_ns / 4 + 1;
    ns->ticked_ns = mkv_now_ns();
    int rc = 0;
    if (!block_bytes || (align != 512 && align != 4096) || grace_ns < GRACE_MIN_NS)
        rc = EINVAL;
    else if (!(ns->nclasses = mkv_classes_make(ns->cls, block_bytes, align, a->slab_bytes)))
        rc = EINVAL;
    if (!rc) {
        ns->index = mkv_index_new(first_buckets(ns), salt, ++ns->versions, a->incarnation);
        rc = ns->index ? 0 : errno;
    }
    if (!rc) {
        ns->table[0] = ns->index;
        mkv_tables_tick(ns);
        ns->cls[0].wants = 1; /* the first put should find a slab */
        rc = -mkv_arena_watch(a, ns);
    }
    if (rc) {
        release(ns);
        errno = rc;
        return NULL;
    }
    mkv_arena_signal(a);
    return ns;
}

void mkv_ns_free(struct mkv_ns *ns) {
    if (!ns)
        return;
    mkv_arena_unwatch(ns->arena, ns);
    if (ns->flash)
        mkv_ns_flash_detach(ns);
    release(ns);
}

/* Where the block with that key is; 0: nowhere. */
int mkv_ns_where(struct mkv_ns *ns, const uint8_t key[16], struct mkv_place *out) {
    struct mkv_slot slot;
    *out = (struct mkv_place){0};
    if (!mkv_index_find(ns->index, key, &slot))
        return 0;
    if (mkv_location_state(slot.location) == MKV_SLOT_FLASH) {
        out->cell = mkv_cell_at(ns, slot.location);
        out->e = mkv_cell_dram(out->cell);
    } else {
        out->e = mkv_extent_at(ns, slot.location);
        out->cell = out->e->cell;
    }
    return 1;
}

void mkv_place_touch(struct mkv_ns *ns, const struct mkv_place *p) {
    if (p->e)
        p->e->visited = 1;
    if (p->cell)
        mkv_cell_touch(ns, p);
}

/* --- batches: `each` is done to the keys in order, under the lock, until it says to stop --- */

typedef int each_fn(struct mkv_ns *ns, const uint8_t key[16], uint8_t *status); /* 1: good */

static uint32_t batch(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint8_t *status, each_fn *each,
                      int stop_at_bad) {
    uint32_t good = 0;
    for (uint32_t i = 0; i < n;) {
        uint32_t end = n - i < KEYS_AT_ONCE ? n : i + KEYS_AT_ONCE;
        pthread_mutex_lock(&ns->lock);
        for (uint32_t k = i; k < end && k < i + KEYS_AHEAD; k++)
            mkv_index_prefetch(ns->index, keys + 16ull * k);
        for (; i < end; i++) {
            if (end - i > KEYS_AHEAD)
                mkv_index_prefetch(ns->index, keys + 16ull * (i + KEYS_AHEAD));
            int ok = each(ns, keys + 16ull * i, status ? &status[i] : NULL);
            good += (uint32_t)ok;
            if (!ok && stop_at_bad)
                n = i = end = 0; /* ends both loops */
            if (!n)
                break;
        }
        pthread_mutex_unlock(&ns->lock);
    }
    return good;
}

static int look_up(struct mkv_ns *ns, const uint8_t key[16], uint8_t *status) {
    struct mkv_slot slot;
    int found = mkv_index_find(ns->index, key, &slot);
    ns->n.lookups++;
    ns->n.lookup_hits += (uint64_t)found;
    if (status)
        *status = found ? MKV_HIT : MKV_MISS;
    return found;
}

static int touch(struct mkv_ns *ns, const uint8_t key[16], uint8_t *status) {
    struct mkv_place p;
    int found = mkv_ns_where(ns, key, &p);
    (void)status;
    if (found)
        mkv_place_touch(ns, &p);
    ns->n.touches += (uint64_t)found;
    return found;
}

static int delete (struct mkv_ns *ns, const uint8_t key[16], uint8_t *status) {
    struct mkv_place p;
    int found = mkv_ns_where(ns, key, &p);
    *status = found ? MKV_DONE : MKV_MISS;
    if (ns->flash && mkv_flash_delete(ns, key, &p)) {
        *status = MKV_ERROR_INTERNAL;
        return 0;
    }
    if (found && !ns->flash)
        mkv_unpublish(ns, p.e);
    ns->n.deletes += (uint64_t)found;
    return found;
}

uint32_t mkv_ns_lookup(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint8_t *status) {
    return batch(ns, keys, n, status, look_up, 0);
}

uint32_t mkv_ns_match(struct mkv_ns *ns, const uint8_t *keys, uint32_t n) {
    return batch(ns, keys, n, NULL, look_up, 1);
}

uint32_t mkv_ns_touch(struct mkv_ns *ns, const uint8_t *keys, uint32_t n) {
    return batch(ns, keys, n, NULL, touch, 0);
}

uint32_t mkv_ns_delete(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint8_t *status) {
    uint32_t good = batch(ns, keys, n, status, delete, 0);
    if (ns->flash)
        mkv_flash_deleted(ns);
    return good;
}

void mkv_ns_stats(struct mkv_ns *ns, struct mkv_ns_stats *out) {
    pthread_mutex_lock(&ns->lock);
    *out = ns->n;
    out->slots = ns->index->entries + ns->index->copies;
    out->buckets = ns->index->buckets;
    out->table_version = ns->index->version;
    out->displacements += ns->index->displacements;
    out->epoch = ns->epoch;
    out->pinned_bytes = ns->pinned_bytes;
    for (const struct mkv_slab *s = ns->slabs; s; s = s->next)
        out->slabs++;
    for (uint32_t i = 0; i < ns->nclasses; i++) {
        const struct mkv_class *c = &ns->cls[i];
        out->extents += c->extents;
        out->extents_free += c->free.count;
        out->extents_filling += c->filling;
        out->extents_quarantine += c->quarantine.count;
        out->extents_idle += c->idle.count;
        out->extents_pinned += c->pinned;
    }
    pthread_mutex_unlock(&ns->lock);
}
