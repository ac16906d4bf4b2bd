/* fill.c: how a block comes in: an extent is set aside, somebody brings the payload, the block becomes
 * visible.
 *
 * Until it is published an extent belongs to its filler alone: its live line's generation is zero and no slot
 * names it. Publishing writes, in this order, the cold record (plain memory that peers do not read), the live
 * line, its generation as the last word, and the slot. A reader that comes upon any part of it earlier finds
 * no generation, or no slot.
 */
#include "list.h"

#include <errno.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "arena.h"

int mkv_fill_begin(struct mkv_ns *ns, const uint8_t key[16], uint32_t length, struct mkv_fill *out) {
    if (!length)
        return MKV_ERROR_LENGTH;
    if (length > ns->block_bytes)
        return MKV_ERROR_TOO_LARGE;
    pthread_mutex_lock(&ns->lock);
    struct mkv_place held;
    if (mkv_ns_where(ns, key, &held)) {
        mkv_place_touch(ns, &held);
        ns->n.duplicates++;
        *out = (struct mkv_fill){.doubtful = (uint32_t)mkv_place_doubtful(&held)};
        pthread_mutex_unlock(&ns->lock);
        return MKV_EXISTS;
    }
    struct mkv_extent *e = NULL;
    if (!ns->flash || !mkv_flash_full(ns, length))
        e = mkv_extent_take(ns, mkv_class_of(ns, length));
    if (!e) {
        ns->n.full++;
        pthread_mutex_unlock(&ns->lock);
        return MKV_ERROR_FULL;
    }
    struct mkv_slab *s = mkv_slab_of(ns, e);
    e->state = MKV_EXTENT_FILLING;
    e->length = length;
    s->filling++;
    s->cls->filling++;
    uint64_t offset = mkv_extent_offset(s, e) + ns->align;
    *out = (struct mkv_fill){.slab = s->id,
                             .offset = offset,
                             .address = (uint64_t)s->base + offset,
                             .extent = (uint32_t)(e - s->extent),
                             .length = length};
    pthread_mutex_unlock(&ns->lock);
    return MKV_PENDING;
}

/* The extent of a fill, or NULL if there is no such fill (any more). */
static struct mkv_extent *filling(struct mkv_ns *ns, const struct mkv_fill *fill) {
    struct mkv_slab *s = mkv_slab_by_id(ns, fill->slab);
    if (!s || fill->extent >= s->count || s->extent[fill->extent].state != MKV_EXTENT_FILLING)
        return NULL;
    return &s->extent[fill->extent];
}

/* The extent was never visible, so nobody can be reading it: it is free at once. */
void mkv_put_back(struct mkv_ns *ns, struct mkv_extent *e) {
    struct mkv_slab *s = mkv_slab_of(ns, e);
    s->filling--;
    if (s->state == MKV_SLAB_READY) {
        s->cls->filling--;
        e->state = MKV_EXTENT_FREE;
        mkv_list_push_head(&s->cls->free, e);
    } else {
        e->state = MKV_EXTENT_DEAD;
    }
}

/* Without flash nothing outlives the process, and this says so. */
static void write_cold(struct mkv_ns *ns, const struct mkv_slab *s, const struct mkv_extent *e) {
    struct mkv_cold *cold = (struct mkv_cold *)(s->base + mkv_extent_offset(s, e));
    *cold = (struct mkv_cold){.magic = MKV_COLD_MAGIC,
                              .version = MKV_LAYOUT_VERSION,
                              .length = e->length,
                              .namespace_id = ns->id,
                              .incarnation = ns->arena->incarnation,
                              .sequence = ++ns->sequence,
                              .checksum = e->checksum,
                              .slab_epoch = s->id};
    memcpy(cold->key, e->key, sizeof cold->key);
    cold->check = XXH3_64bits_withSeed(cold, offsetof(struct mkv_cold, check), ns->arena->incarnation);
}

void mkv_write_line(const struct mkv_slab *s, const struct mkv_extent *e) {
    struct mkv_line *line = mkv_extent_line(s, e); /* its generation is zero */
    line->magic = MKV_LINE_MAGIC;
    line->version = MKV_LAYOUT_VERSION;
    line->flags = 0;
    memcpy(line->key, e->key, sizeof line->key);
    line->length = e->length;
    line->checksum = e->checksum;
    __atomic_store_n(&line->generation, e->generation, __ATOMIC_RELEASE);
}

int mkv_fill_publish(struct mkv_ns *ns, const struct mkv_fill *fill, const uint8_t key[16],
                     uint64_t checksum) {
    int rc = MKV_STORED;
    pthread_mutex_lock(&ns->lock);
    struct mkv_extent *e = filling(ns, fill);
    struct mkv_slab *s = e ? mkv_slab_of(ns, e) : NULL;
    struct mkv_place other;
    if (!e) {
        rc = MKV_ERROR_INTERNAL;
    } else if (mkv_ns_where(ns, key, &other)) {
        mkv_place_touch(ns, &other);
        ns->n.duplicates++;
        mkv_put_back(ns, e);
        rc = MKV_EXISTS;
    } else if (s->state != MKV_SLAB_READY) {
        rc = MKV_ERROR_REFUSED;
    } else if (mkv_ns_room(ns, key)) {
        ns->n.full++;
        rc = MKV_ERROR_FULL;
    } else {
        memcpy(e->key, key, sizeof e->key);
        e->checksum = checksum;
        e->generation = mkv_arena_generation(ns->arena);
        if (!ns->flash)
            write_cold(ns, s, e);
        mkv_write_line(s, e);
        struct mkv_slot slot = {.generation = (uint32_t)e->generation,
                                .length = e->length,
                                .location = mkv_location(MKV_SLOT_LIVE, s->id, fill->offset)};
        memcpy(slot.key, key, sizeof slot.key);
        mkv_ns_insert(ns, &slot);
        e->state = MKV_EXTENT_LIVE;
        s->filling--;
        s->cls->filling--;
        s->live++;
        if (ns->flash)
            mkv_flash_published(ns, e);
        else
            mkv_sieve_add(&s->cls->sieve, e);
        ns->n.blocks++;
        ns->n.bytes += e->length;
        ns->n.puts++;
        ns->n.put_bytes += e->length;
    }
    pthread_mutex_unlock(&ns->lock);
    return rc;
}

void mkv_fill_abandon(struct mkv_ns *ns, const struct mkv_fill *fill) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_extent *e = filling(ns, fill);
    if (e)
        mkv_put_back(ns, e);
    if (e && ns->flash)
        mkv_flash_room(ns);
    pthread_mutex_unlock(&ns->lock);
}
