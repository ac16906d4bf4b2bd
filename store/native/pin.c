/* pin.c: blocks that may not be evicted for a while.
 *
 * A pin has a time to live, because whoever set it may die; the latest one counts for all pins of a block. A
 * pinned block is in no SIEVE queue but in the namespace's list of pinned ones, so the hand never meets it;
 * when the last pin goes it joins the queue as if it were new. (While a block is dirty it is in a list of
 * those instead, pinned or not.) Pinned blocks may be deleted, and go with their slab, or to flash if there
 * is one. A block that is in flash only is pinned there. At most half of the namespace's extents can be
 * pinned, by bytes, so that there is always something to evict.
 */
#include "list.h"

#include "clock.h"

void mkv_settled_join(struct mkv_ns *ns, struct mkv_extent *e) {
    uint8_t visited = e->visited;
    if (e->pins)
        mkv_list_push_tail(&ns->pinned, e);
    else
        mkv_sieve_add(&mkv_slab_of(ns, e)->cls->sieve, e);
    e->visited = visited;
}

void mkv_settled_leave(struct mkv_ns *ns, struct mkv_extent *e) {
    struct mkv_class *c = mkv_slab_of(ns, e)->cls;
    if (e->pins)
        mkv_list_unlink(&ns->pinned, e);
    else if (e->idle)
        mkv_list_unlink(&c->idle, e);
    else
        mkv_sieve_remove(&c->sieve, e);
    e->idle = 0;
}

void mkv_pin_add(struct mkv_ns *ns, struct mkv_extent *e, uint32_t pins, uint64_t until) {
    struct mkv_slab *s = mkv_slab_of(ns, e);
    if (!e->pins) {
        ns->pinned_bytes += s->cls->extent;
        s->cls->pinned++;
        s->pinned++;
    }
    e->pins = pins < UINT32_MAX - e->pins ? e->pins + pins : UINT32_MAX;
    if (e->until < until)
        e->until = until;
}

/* Forgets the pins of an extent and takes it off the list, if it is in it. */
void mkv_pin_drop(struct mkv_ns *ns, struct mkv_extent *e) {
    struct mkv_slab *s = mkv_slab_of(ns, e);
    if (e->write == MKV_CLEAN)
        mkv_list_unlink(&ns->pinned, e);
    ns->pinned_bytes -= s->cls->extent;
    s->cls->pinned--;
    s->pinned--;
    e->pins = 0;
    e->until = 0;
}

static void unpin(struct mkv_ns *ns, struct mkv_extent *e) {
    mkv_pin_drop(ns, e);
    if (e->write == MKV_CLEAN)
        mkv_sieve_add(&mkv_slab_of(ns, e)->cls->sieve, e);
}

/* Looks at up to `max` pinned blocks and lets go of those whose time is over; the rest go to the end of the
 * list, so that all have their turn. */
void mkv_pins_expire(struct mkv_ns *ns, uint64_t max) {
    uint64_t n = ns->pinned.count < max ? ns->pinned.count : max;
    uint64_t now = n ? mkv_now_ns() : 0;
    while (n--) {
        struct mkv_extent *e = ns->pinned.head;
        if (e->until <= now) {
            unpin(ns, e);
        } else {
            mkv_list_unlink(&ns->pinned, e);
            mkv_list_push_tail(&ns->pinned, e);
        }
    }
    if (ns->flash)
        mkv_cell_pins_expire(ns, max, now ? now : mkv_now_ns());
}

static int within_limit(const struct mkv_ns *ns, uint64_t bytes) {
    uint64_t all = 0;
    for (uint32_t i = 0; i < ns->nclasses; i++)
        all += ns->cls[i].extents * ns->cls[i].extent;
    return ns->pinned_bytes + bytes <= all / 2;
}

static uint8_t pin(struct mkv_ns *ns, struct mkv_extent *e, uint64_t expiry, int *expired) {
    struct mkv_slab *s = mkv_slab_of(ns, e);
    if (!e->pins) {
        if (!within_limit(ns, s->cls->extent) && !*expired) {
            mkv_pins_expire(ns, UINT64_MAX); /* once in a call */
            *expired = 1;
        }
        if (!within_limit(ns, s->cls->extent))
            return MKV_ERROR_FULL;
        if (e->write == MKV_CLEAN) {
            mkv_sieve_remove(&s->cls->sieve, e);
            mkv_list_push_tail(&ns->pinned, e);
        }
        e->until = 0; /* of its last quarantine */
    }
    mkv_pin_add(ns, e, 1, expiry);
    return MKV_DONE;
}

static uint8_t pin_place(struct mkv_ns *ns, const struct mkv_place *p, uint64_t expiry, int *expired) {
    if (p->e && p->e->state == MKV_EXTENT_LIVE)
        return pin(ns, p->e, expiry, expired);
    return mkv_cell_pin_status(ns, p->cell, expiry);
}

static uint8_t unpin_place(struct mkv_ns *ns, const struct mkv_place *p) {
    struct mkv_extent *e = p->e;
    if (!e || !e->pins)
        return p->cell ? mkv_cell_unpin_status(ns, p->cell) : MKV_MISS;
    if (e->pins == 1)
        unpin(ns, e);
    else
        e->pins--;
    return MKV_DONE;
}

uint32_t mkv_ns_pin(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint64_t ttl_ns, uint8_t *status) {
    uint64_t now = mkv_now_ns();
    uint64_t expiry = ttl_ns < UINT64_MAX - now ? now + ttl_ns : UINT64_MAX;
    uint32_t good = 0;
    int expired = 0;
    pthread_mutex_lock(&ns->lock);
    for (uint32_t i = 0; i < n; i++) {
        struct mkv_place p;
        int found = ttl_ns && mkv_ns_where(ns, keys + 16ull * i, &p);
        status[i] = !ttl_ns ? MKV_ERROR_REFUSED : !found ? MKV_MISS : pin_place(ns, &p, expiry, &expired);
        good += status[i] == MKV_DONE;
    }
    pthread_mutex_unlock(&ns->lock);
    return good;
}

/* A block that is not pinned (any more) is a MISS. */
uint32_t mkv_ns_unpin(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint8_t *status) {
    uint32_t good = 0;
    pthread_mutex_lock(&ns->lock);
    for (uint32_t i = 0; i < n; i++) {
        struct mkv_place p;
        status[i] = mkv_ns_where(ns, keys + 16ull * i, &p) ? unpin_place(ns, &p) : MKV_MISS;
        good += status[i] == MKV_DONE;
    }
    pthread_mutex_unlock(&ns->lock);
    return good;
}
