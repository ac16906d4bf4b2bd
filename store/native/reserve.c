/* reserve.c: evicting ahead of need, so that a put seldom has to wait for a quarantine.
 *
 * An evicted extent is of use only a grace period later. Each class therefore keeps some extents free or on
 * their way to being free: as many as are filled, at the recent rate, while an extent passes through
 * quarantine; at least a small share of the class, so that work which begins after a pause finds some, and at
 * most half of it, for a block that is evicted too early is a block lost.
 *
 * Idle extents (staged from flash, READ once, and of interest to nobody now) are as good as free ones. A
 * share of the class may stay as they are, for a second use in time makes them ordinary blocks; what there is
 * more of is taken again, the oldest first. So a long scan through what lies in flash passes through a few
 * extents and drives nothing else out of memory.
 *
 * Eviction begins when the arena has no more slabs. Until then the same measure says when to ask for another
 * slab.
 */
#include "list.h"

#include "arena.h"

#define RESERVE_SHARE  32 /* a 32nd of a class is always free or nearly so */
#define IDLE_SHARE     10 /* a tenth of it may be idle: S3-FIFO's small queue (Yang et al., SOSP 2023) */
#define RESERVE_TICKS  (MKV_GRACE_TICKS + 1) /* the quarantine, and the tick in which the need arises */
#define EVICT_PER_TAKE 2    /* a put pays for itself and works off a deficit, but not all at once */
#define EVICT_PER_TICK 4096 /* the lock is held meanwhile */

/* Whether extents can come from a slab rather than from an eviction. */
int mkv_class_may_grow(struct mkv_ns *ns, const struct mkv_class *c) {
    return c->coming || mkv_arena_free_slabs(ns->arena);
}

/* How many extents should be free or nearly so, by the recent rate. */
static uint64_t need(const struct mkv_class *c) {
    uint64_t n = (c->rate16 * RESERVE_TICKS + 15) / 16;
    return n ? n : 1;
}

static uint64_t reserve(const struct mkv_class *c) {
    uint64_t n = need(c);
    if (n < c->extents / RESERVE_SHARE)
        n = c->extents / RESERVE_SHARE;
    return n < c->extents / 2 ? n : c->extents / 2;
}

/* Idle extents beyond their share. */
static uint64_t surplus(const struct mkv_class *c) {
    uint64_t share = c->extents / IDLE_SHARE;
    return c->idle.count > share ? c->idle.count - share : 0;
}

/* How many should be free before a further slab is due. A burst counts before the tick has made a rate of it:
 * memory that lies idle costs nothing, and it takes Python a while to register a slab. */
uint64_t mkv_class_need(const struct mkv_class *c) {
    return need(c) > c->taken ? need(c) : c->taken;
}

static void ask_for_slab(struct mkv_ns *ns, struct mkv_class *c) {
    if (c->wants || c->coming)
        return;
    c->wants = 1;
    if (mkv_arena_free_slabs(ns->arena))
        mkv_arena_signal(ns->arena);
}

static void evict(struct mkv_ns *ns, struct mkv_extent *e) {
    ns->n.evictions++;
    ns->n.evicted_bytes += e->length;
    mkv_evict(ns, e);
}

static int evict_one(struct mkv_ns *ns, struct mkv_class *c) {
    struct mkv_extent *e = mkv_sieve_victim(&c->sieve, ns->epoch);
    if (e)
        evict(ns, e);
    return e != NULL;
}

static void evict_ahead(struct mkv_ns *ns, struct mkv_class *c, unsigned max) {
    uint64_t want = reserve(c);
    while (max-- && c->free.count + c->quarantine.count + surplus(c) < want && evict_one(ns, c))
        ;
}

/* A free extent of the class, or NULL. Either way it sees to it that there will be more. */
static struct mkv_extent *take(struct mkv_ns *ns, struct mkv_class *c) {
    c->taken++;
    if (!c->free.head && c->idle.head)
        evict(ns, c->idle.head);
    struct mkv_extent *e = c->free.head; /* none after that if a device still has it */
    if (e)
        mkv_list_unlink(&c->free, e);
    if (mkv_class_may_grow(ns, c)) {
        if (c->free.count < mkv_class_need(c))
            ask_for_slab(ns, c);
        return e;
    }
    evict_ahead(ns, c, EVICT_PER_TAKE);
    if (!e) { /* the reserve was too small: one more, unless half of the class is on its way already */
        if (c->quarantine.count < c->extents / 2 || !c->quarantine.count)
            evict_one(ns, c);
        ask_for_slab(ns, c); /* in case one comes free */
    }
    return e;
}

/* An extent for a payload of class c. Where that has no slab and can get none, a larger class helps out: to
 * retire a slab for the sake of a few odd blocks would cost more than the space that they waste. */
struct mkv_extent *mkv_extent_take(struct mkv_ns *ns, struct mkv_class *c) {
    c->asked++;
    struct mkv_extent *e = take(ns, c);
    if (!e && !mkv_class_may_grow(ns, c)) {
        mkv_rebalance(ns, c);
        if (!c->slabs)
            for (struct mkv_class *larger = c; !e && larger-- > ns->cls;)
                if (larger->slabs)
                    e = take(ns, larger);
    }
    return e;
}

/* Once per tick: what was asked for becomes the rate. A single burst of n leaves a reserve of about one and a
 * half n, a steady n per tick one of six n, and when puts end so does the reserve. */
void mkv_class_tick(struct mkv_ns *ns, struct mkv_class *c) {
    uint64_t now16 = 16 * c->taken, now256 = 256 * c->asked;
    if (now16 > c->rate16)
        c->rate16 += (now16 - c->rate16 + 3) / 4;
    else
        c->rate16 -= (c->rate16 - now16 + 7) / 8;
    if (now256 > c->demand256)
        c->demand256 += (now256 - c->demand256 + 31) / 32;
    else
        c->demand256 -= (c->demand256 - now256 + 31) / 32;
    c->taken = c->asked = 0;
    if (!c->extents)
        return;
    if (!mkv_class_may_grow(ns, c))
        evict_ahead(ns, c, EVICT_PER_TICK);
    else if (c->free.count + c->quarantine.count < mkv_class_need(c))
        ask_for_slab(ns, c);
}
