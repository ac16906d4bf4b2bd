/* retire.c: slabs come and go.
 *
 *              take          ready          retire            five ticks         retired
 *   the arena ─────► TAKEN ────────► READY ────────► RETIRING ──────────► RETIRED ─────► REPORTED
 *      ▲               └────────────── retire (never used) ──────────────────┘              │
 *      └────────────────────────── released: zeroed, its id gone ───────────────────────────┘
 *
 * Python registers between take and ready and deregisters between retired and released, when every session
 * has agreed to forget the slab. This is the only way in which memory changes hands, or size class: the place
 * of a live line never becomes payload (premise (d) in quarantine.c), for the memory is zeroed and its next
 * id is a new one.
 */
#include "list.h"

#include <errno.h>
#include <stdlib.h>

#include "arena.h"

/* --- coming --- */

/* The slabs that a class should have, by its part in what is being put, times 256; `total` slabs are shared
 * out. */
static uint64_t share256(const struct mkv_ns *ns, const struct mkv_class *c, uint64_t total) {
    uint64_t all = 0, mine = 0;
    for (uint32_t i = 0; i < ns->nclasses; i++) {
        const struct mkv_class *k = &ns->cls[i];
        uint64_t bytes = (k->demand256 + 256 * k->asked) * (k->extent / MKV_OFFSET_UNIT);
        all += bytes;
        if (k == c)
            mine = bytes;
    }
    return all ? (uint64_t)((unsigned __int128)mine * total * 256 / all) : 0;
}

static uint64_t total_slabs(const struct mkv_ns *ns) {
    uint64_t n = 0;
    for (uint32_t i = 0; i < ns->nclasses; i++)
        n += ns->cls[i].slabs;
    return n;
}

/* The wanting class that is furthest below its share; classes without a slab first. */
static struct mkv_class *most_wanting(struct mkv_ns *ns) {
    struct mkv_class *best = NULL;
    uint64_t most = 0, total = total_slabs(ns) + 1;
    for (uint32_t i = 0; i < ns->nclasses; i++) {
        struct mkv_class *c = &ns->cls[i];
        if (c->wants && c->free.count >= mkv_class_need(c))
            c->wants = 0; /* deletions have helped */
        if (!c->wants)
            continue;
        uint64_t score = c->slabs ? share256(ns, c, total) / (c->slabs + 1) : UINT64_MAX;
        if (!best || score > most) {
            best = c;
            most = score;
        }
    }
    return best;
}

int mkv_ns_slab_take(struct mkv_ns *ns, struct mkv_span *out) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_class *c = most_wanting(ns);
    struct mkv_slab *s = NULL;
    int rc = c ? 0 : -ENOENT;
    if (!rc) {
        s = calloc(1, sizeof *s);
        if (s)
            s->extent = calloc(c->per_slab, sizeof *s->extent);
        rc = s && s->extent ? mkv_arena_take(ns->arena, s) : -ENOMEM;
        if (rc)
            mkv_rebalance(ns, c);
    }
    if (!rc) {
        s->ns = ns;
        s->cls = c;
        s->count = (uint32_t)c->per_slab;
        s->next = ns->slabs;
        if (s->next)
            s->next->prev = s;
        ns->slabs = s;
        c->coming++;
        c->wants = 0;
        *out = (struct mkv_span){.id = s->id, .address = (uint64_t)s->base, .bytes = ns->arena->slab_bytes};
    } else if (s) {
        free(s->extent);
        free(s);
    }
    pthread_mutex_unlock(&ns->lock);
    return rc;
}

int mkv_ns_slab_ready(struct mkv_ns *ns, uint64_t id) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_slab *s = mkv_slab_by_id(ns, id);
    int rc = !s ? -ENOENT : s->state != MKV_SLAB_TAKEN ? -EALREADY : 0;
    if (!rc) {
        struct mkv_class *c = s->cls;
        for (uint32_t i = s->count; i-- > 0;) { /* so that the first is the first to be used */
            s->extent[i].slab = s->id;
            mkv_list_push_head(&c->free, &s->extent[i]);
        }
        s->state = MKV_SLAB_READY;
        c->coming--;
        c->slabs++;
        c->extents += s->count;
        if (ns->flash)
            mkv_flash_room(ns);
    }
    pthread_mutex_unlock(&ns->lock);
    return rc;
}

/* --- going --- */

void mkv_slab_retire_locked(struct mkv_ns *ns, struct mkv_slab *s) {
    struct mkv_class *c = s->cls;
    ns->retiring++;
    ns->n.slabs_retired++;
    if (s->state == MKV_SLAB_TAKEN) { /* no block was ever there */
        s->state = MKV_SLAB_RETIRED;
        c->coming--;
        return;
    }
    s->state = MKV_SLAB_RETIRING;
    s->until = ns->epoch + MKV_GRACE_TICKS;
    c->slabs--;
    c->extents -= s->count;
    c->filling -= s->filling; /* those end in publish or abandon, and the slab waits for them */
    for (uint32_t i = 0; i < s->count; i++) {
        struct mkv_extent *e = &s->extent[i];
        switch (e->state) {
        case MKV_EXTENT_LIVE:
        case MKV_EXTENT_STAGED:
            if (e->write == MKV_CLEAN)
                mkv_evict(ns, e);
            else /* the slab waits until it is on flash */
                mkv_flash_hasten(ns, e);
            break;
        case MKV_EXTENT_BUSY:
            e->state = MKV_EXTENT_DEAD;
            break;
        case MKV_EXTENT_FREE:
            mkv_list_unlink(&c->free, e);
            e->state = MKV_EXTENT_DEAD;
            break;
        case MKV_EXTENT_QUARANTINE:
            mkv_list_unlink(&c->quarantine, e);
            e->state = MKV_EXTENT_DEAD;
            break;
        }
    }
}

/* The ready slab (of class c, or of any if that is NULL) that costs least: pinned blocks count most, then
 * live ones. */
static struct mkv_slab *cheapest(struct mkv_ns *ns, const struct mkv_class *c) {
    struct mkv_slab *best = NULL;
    for (struct mkv_slab *s = ns->slabs; s; s = s->next)
        if (s->state == MKV_SLAB_READY && (!c || s->cls == c) &&
            (!best || s->pinned < best->pinned || (s->pinned == best->pinned && s->live < best->live)))
            best = s;
    return best;
}

/* Class c has run out and the arena has no slab. It gets one from the class that has most, if c has less than
 * its share and the other has more; and in any case if it has nothing at all and no larger class can help
 * out. One slab at a time, for a retirement takes a grace period and its outcome should be seen before the
 * next is decided. */
void mkv_rebalance(struct mkv_ns *ns, struct mkv_class *c) {
    uint64_t total = total_slabs(ns);
    int nothing = !c->slabs && !c->coming;
    if (ns->retiring || c->coming)
        return;
    for (const struct mkv_class *larger = c; nothing && larger-- > ns->cls;)
        nothing = !larger->slabs;
    if (!nothing && share256(ns, c, total) < 256 * (c->slabs + 1))
        return;
    struct mkv_class *donor = NULL;
    for (uint32_t i = 0; i < ns->nclasses; i++) {
        struct mkv_class *d = &ns->cls[i];
        int may_give = nothing ? d->slabs > 0 : d->slabs > 1 && share256(ns, d, total) < 256 * d->slabs;
        if (d != c && may_give && (!donor || d->slabs > donor->slabs))
            donor = d;
    }
    struct mkv_slab *s = donor ? cheapest(ns, donor) : NULL;
    if (s) {
        c->wants = 1;
        mkv_slab_retire_locked(ns, s);
    }
}

int mkv_ns_slab_retire(struct mkv_ns *ns, uint64_t id) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_slab *s = id ? mkv_slab_by_id(ns, id) : cheapest(ns, NULL);
    int rc = !s ? -ENOENT : s->state > MKV_SLAB_READY ? -EALREADY : 0;
    if (!rc)
        mkv_slab_retire_locked(ns, s);
    pthread_mutex_unlock(&ns->lock);
    return rc;
}

int mkv_ns_slab_retired(struct mkv_ns *ns, uint64_t *id) {
    int rc = -ENOENT;
    pthread_mutex_lock(&ns->lock);
    for (struct mkv_slab *s = ns->slabs; s && rc; s = s->next)
        if (s->state == MKV_SLAB_RETIRED) {
            s->state = MKV_SLAB_REPORTED;
            *id = s->id;
            rc = 0;
        }
    pthread_mutex_unlock(&ns->lock);
    return rc;
}

int mkv_ns_slab_released(struct mkv_ns *ns, uint64_t id) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_slab *s = mkv_slab_by_id(ns, id);
    int rc = !s ? -ENOENT : s->state != MKV_SLAB_REPORTED ? -EBUSY : 0;
    if (!rc) {
        s->state = MKV_SLAB_ZEROING;
        mkv_slab_unlink(ns, s);
    }
    pthread_mutex_unlock(&ns->lock);
    if (rc)
        return rc;
    struct mkv_arena *a = ns->arena;
    mkv_slab_destroy(s); /* up to a gigabyte to zero: not under the lock */
    pthread_mutex_lock(&ns->lock);
    ns->retiring--;
    for (uint32_t i = 0; i < ns->nclasses; i++)
        if (ns->cls[i].wants)
            mkv_arena_signal(a);
    pthread_mutex_unlock(&ns->lock);
    return 0;
}
