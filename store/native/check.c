/* check.c: every invariant of a namespace, for the tests (and for a node that has reason to doubt itself).
 *
 * That no extent is in two places follows from what is checked here: each has one pair of links and one
 * state, each list holds only extents of its own state with links that agree, and the counts of all lists add
 * up to all extents.
 */
#include "list.h"

#include <string.h>

#include "arena.h"

#define CHECK(ok)                                                                                            \
    do {                                                                                                     \
        if (!(ok))                                                                                           \
            return __LINE__;                                                                                 \
    } while (0)

static int is_state(const struct mkv_extent *e, int state) {
    return e->state == state || (state == MKV_EXTENT_LIVE && e->state == MKV_EXTENT_STAGED);
}

static int check_list(struct mkv_ns *ns, const struct mkv_list *l, const struct mkv_class *c, int state,
                      int pinned) {
    const struct mkv_extent *prev = NULL;
    uint64_t n = 0;
    for (const struct mkv_extent *e = l->head; e; prev = e, e = e->next) {
        CHECK(++n <= l->count && e->prev == prev);
        CHECK(is_state(e, state) && !!e->pins == pinned && e->write == MKV_CLEAN);
        const struct mkv_slab *s = mkv_slab_by_id(ns, e->slab);
        CHECK(s && s->state == MKV_SLAB_READY && (!c || s->cls == c));
        if (state == MKV_EXTENT_QUARANTINE) {
            CHECK(e->until > ns->epoch && e->until <= ns->epoch + MKV_GRACE_TICKS);
            CHECK(!prev || prev->until <= e->until);
        }
    }
    CHECK(n == l->count && l->tail == prev);
    return 0;
}

/* Pinned blocks in slabs that are being retired and wait until they are on flash. */
static uint64_t pinned_going(struct mkv_ns *ns, const struct mkv_class *c) {
    uint64_t n = 0;
    for (const struct mkv_slab *s = ns->slabs; s; s = s->next)
        if (s->cls == c && s->state > MKV_SLAB_READY)
            n += s->pinned;
    return n;
}

static int check_class(struct mkv_ns *ns, const struct mkv_class *c) {
    int bad = check_list(ns, &c->free, c, MKV_EXTENT_FREE, 0);
    bad = bad ? bad : check_list(ns, &c->quarantine, c, MKV_EXTENT_QUARANTINE, 0);
    bad = bad ? bad : check_list(ns, &c->sieve.queue, c, MKV_EXTENT_LIVE, 0);
    bad = bad ? bad : check_list(ns, &c->idle, c, MKV_EXTENT_STAGED, 0);
    if (bad)
        return bad;
    for (const struct mkv_extent *e = c->sieve.queue.head; e; e = e->next)
        CHECK(!e->idle);
    for (const struct mkv_extent *e = c->idle.head; e; e = e->next)
        CHECK(e->idle && !e->pins);
    uint64_t pinned = 0, dirty = 0, dirty_pinned = 0, busy = 0;
    for (const struct mkv_extent *e = ns->pinned.head; e; e = e->next)
        pinned += mkv_slab_of(ns, e)->cls == c;
    for (const struct mkv_slab *s = ns->slabs; s; s = s->next)
        for (uint32_t i = 0; s->cls == c && s->state == MKV_SLAB_READY && i < s->count; i++) {
            const struct mkv_extent *e = &s->extent[i];
            int is_dirty = e->state == MKV_EXTENT_LIVE && e->write != MKV_CLEAN;
            dirty += (uint64_t)is_dirty;
            dirty_pinned += is_dirty && e->pins;
            busy += e->state == MKV_EXTENT_BUSY;
        }
    CHECK(!busy || ns->flash);
    CHECK(pinned + dirty_pinned == c->pinned - pinned_going(ns, c));
    CHECK(c->extents == c->free.count + c->quarantine.count + c->sieve.queue.count + c->idle.count + pinned +
                            dirty + busy + c->filling);
    const struct mkv_extent *hand = c->sieve.hand, *e = c->sieve.queue.head;
    while (hand && e && e != hand)
        e = e->next;
    CHECK(!hand || e == hand);
    return 0;
}

/* The memory that peers read says what the extent's record says, and the slot too. */
static int check_extent(struct mkv_ns *ns, const struct mkv_slab *s, const struct mkv_extent *e) {
    const struct mkv_line *line = mkv_extent_line(s, e);
    struct mkv_slot slot;
    CHECK(e->slab == s->id);
    CHECK(!e->op || ns->flash);
    if (!is_state(e, MKV_EXTENT_LIVE)) {
        CHECK(line->generation == 0 && e->write == MKV_CLEAN);
        CHECK(e->state != MKV_EXTENT_BUSY || e->op);
        CHECK(e->state != MKV_EXTENT_STAGING || e->op);
        return 0;
    }
    CHECK((e->write == MKV_BEING_WRITTEN) == !!e->op);
    CHECK(line->magic == MKV_LINE_MAGIC && line->generation == e->generation && line->length == e->length);
    CHECK(line->checksum == e->checksum && !memcmp(line->key, e->key, 16));
    const struct mkv_cold *cold = (const struct mkv_cold *)(s->base + mkv_extent_offset(s, e));
    if (!ns->flash) {
        CHECK(cold->magic == MKV_COLD_MAGIC && cold->length == e->length && cold->checksum == e->checksum);
        CHECK(!memcmp(cold->key, e->key, 16) && cold->sequence <= ns->sequence && cold->slab_epoch == s->id);
    }
    CHECK((uint32_t)e->generation && e->length && e->length <= s->cls->payload);
    CHECK(mkv_index_find(ns->index, e->key, &slot));
    CHECK(e->state == MKV_EXTENT_LIVE ||
          (slot.length == e->length && slot.location == mkv_cell_location(ns, e->cell)));
    if (e->state == MKV_EXTENT_STAGED)
        return 0;
    CHECK(slot.generation == (uint32_t)e->generation && slot.length == e->length);
    CHECK(slot.location == mkv_location(MKV_SLOT_LIVE, s->id, mkv_extent_offset(s, e) + ns->align));
    return 0;
}

static int check_slab(struct mkv_ns *ns, const struct mkv_slab *s) {
    uint64_t live = 0, pinned = 0, filling = 0, io = 0;
    CHECK(s->ns == ns && mkv_slab_by_id(ns, s->id) == s);
    CHECK(s->base == ns->arena->base + s->place * ns->arena->slab_bytes);
    CHECK((s->count == s->cls->per_slab) && s->count * s->cls->extent <= ns->arena->slab_bytes);
    if (s->state == MKV_SLAB_TAKEN)
        return 0;
    for (uint32_t i = 0; i < s->count; i++) {
        const struct mkv_extent *e = &s->extent[i];
        live += is_state(e, MKV_EXTENT_LIVE);
        filling += e->state == MKV_EXTENT_FILLING || e->state == MKV_EXTENT_STAGING;
        io += e->op != 0;
        pinned += e->pins > 0;
        if (s->state == MKV_SLAB_READY) {
            CHECK(e->state != MKV_EXTENT_DEAD);
            int bad = check_extent(ns, s, e);
            if (bad)
                return bad;
        } else {
            int waits = e->state == MKV_EXTENT_LIVE && e->write != MKV_CLEAN;
            CHECK(waits || e->state == MKV_EXTENT_DEAD || e->state == MKV_EXTENT_FILLING ||
                  e->state == MKV_EXTENT_STAGING);
            CHECK(waits || s->extent[0].slab != s->id || mkv_extent_line(s, e)->generation == 0);
        }
    }
    CHECK(live == s->live && pinned == s->pinned && filling == s->filling && io == s->io);
    CHECK(s->state < MKV_SLAB_RETIRED || (!filling && !live && !io));
    return 0;
}

static int check_tables(struct mkv_ns *ns) {
    int in_force = 0;
    for (int i = 0; i < MKV_MAX_TABLES; i++) {
        const struct mkv_index *ix = ns->table[i];
        if (!ix)
            continue;
        in_force += ix == ns->index;
        CHECK(ix->epoch->epoch == ns->epoch && ix->epoch->table == ns->index->version);
        CHECK(ix->epoch->incarnation == ns->arena->incarnation);
    }
    CHECK(in_force == 1);
    return mkv_index_check(ns->index);
}

static int check_all(struct mkv_ns *ns) {
    int bad = check_list(ns, &ns->pinned, NULL, MKV_EXTENT_LIVE, 1);
    uint64_t blocks = 0, staged = 0, bytes = 0, pinned_bytes = 0, slabs = 0, retiring = 0, ready = 0,
             coming = 0;
    for (uint32_t i = 0; !bad && i < ns->nclasses; i++) {
        const struct mkv_class *c = &ns->cls[i];
        bad = check_class(ns, c);
        pinned_bytes += c->pinned * c->extent;
        ready += c->slabs;
        coming += c->coming;
    }
    for (const struct mkv_slab *s = ns->slabs; !bad && s; s = s->next) {
        bad = check_slab(ns, s);
        slabs++;
        retiring += s->state > MKV_SLAB_READY;
        blocks += s->live;
        for (uint32_t i = 0; s->state != MKV_SLAB_TAKEN && i < s->count; i++) {
            bytes += is_state(&s->extent[i], MKV_EXTENT_LIVE) ? s->extent[i].length : 0;
            staged += s->extent[i].state == MKV_EXTENT_STAGED;
        }
    }
    bad = bad ? bad : check_tables(ns);
    if (bad)
        return bad;
    CHECK(blocks == ns->n.blocks && bytes == ns->n.bytes);
    CHECK(ns->flash || blocks == ns->index->entries);
    CHECK(pinned_bytes == ns->pinned_bytes);
    CHECK(slabs == ready + coming + retiring);
    CHECK(retiring <= ns->retiring); /* one may be on its way back to the arena */
    return ns->flash ? mkv_flash_check(ns, blocks - staged, staged) : 0;
}

int mkv_ns_check(struct mkv_ns *ns) {
    pthread_mutex_lock(&ns->lock);
    int bad = check_all(ns);
    pthread_mutex_unlock(&ns->lock);
    return bad;
}
