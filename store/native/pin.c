/* pin.c: blocks that may not be evicted for a while.
 *
 * A pin has a time to live, because whoever set it may die; the latest one counts for all pins of a block. A
 * pinned block is in no SIEVE queue but in the namespace's list of pinned ones, so the hand never meets it;
 * when the last pin goes it joins the queue as if it were new. Pinned blocks may be deleted, and go with
 * their slab. At most half of the namespace's extents can be pinned, by bytes, so that there is always
 * something to evict.
 */
#include "list.h"

#include "clock.h"

/* Forgets the pins of an extent and takes it off the list. */
void mkv_pin_drop(struct mkv_ns *ns, struct mkv_extent *e) {
    struct mkv_slab *s = mkv_slab_of(ns, e);
    mkv_list_unlink(&ns->pinned, e);
    ns->pinned_bytes -= s->cls->extent;
    s->cls->pinned--;
    s->pinned--;
    e->pins = 0;
    e->until = 0;
}

static void unpin(struct mkv_ns *ns, struct mkv_extent *e) {
    mkv_pin_drop(ns, e);
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
        mkv_sieve_remove(&s->cls->sieve, e);
        mkv_list_push_tail(&ns->pinned, e);
        ns->pinned_bytes += s->cls->extent;
        s->cls->pinned++;
        s->pinned++;
    }
    if (e->pins < UINT32_MAX)
        e->pins++;
    if (e->until < expiry)
        e->until = expiry;
    return MKV_DONE;
}

uint32_t mkv_ns_pin(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint64_t ttl_ns, uint8_t *status) {
    uint64_t now = mkv_now_ns();
    uint64_t expiry = ttl_ns < UINT64_MAX - now ? now + ttl_ns : UINT64_MAX;
    uint32_t good = 0;
    int expired = 0;
    pthread_mutex_lock(&ns->lock);
    for (uint32_t i = 0; i < n; i++) {
        struct mkv_extent *e = ttl_ns ? mkv_ns_find(ns, keys + 16ull * i) : NULL;
        status[i] = !ttl_ns ? MKV_ERROR_REFUSED : !e ? MKV_MISS : pin(ns, e, expiry, &expired);
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
        struct mkv_extent *e = mkv_ns_find(ns, keys + 16ull * i);
        status[i] = e && e->pins ? MKV_DONE : MKV_MISS;
        if (status[i] != MKV_DONE)
            continue;
        good++;
        if (e->pins == 1)
            unpin(ns, e);
        else
            e->pins--;
    }
    pthread_mutex_unlock(&ns->lock);
    return good;
}
