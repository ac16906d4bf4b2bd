/* flash_drain.c: a namespace gives a segment back, for a size class or a namespace that has none.
 *
 * Segments are handed out as they are asked for, so whoever comes first may have them all, and a class that
 * comes later cannot write a single block. Python sees that (mkv_ns_segment_wanted, and no segment is free)
 * and decides whose turn it is to give one up. The blocks of that segment are evicted, and the headers zeroed
 * as those of deleted blocks are: the next owner's epoch would hide them, but until Python has written that
 * down they would be found again, and some of them may be older images of blocks that are deleted meanwhile.
 * What is pinned, being written, or being read by somebody is waited for. After a sync nothing is emptied any
 * more, as flash_kept.c has it: a header that is being zeroed while a snapshot is taken would be in neither.
 */
#include "flash_ns.h"

#include <errno.h>
#include <stdlib.h>

#include "arena.h"

static int may_go(struct mkv_ns *ns, const struct mkv_seg *s, uint64_t devices) {
    return !s->gone && !s->import && !s->unknown && ns->flash->cls[s->cls].segments > 1 &&
           devices >> s->is.device & 1;
}

/* What it costs to give it: pinned blocks first, then bytes. */
static uint64_t cost(const struct mkv_seg *s) {
    uint64_t sum = s->live_bytes;
    for (uint32_t k = 0; k < s->count; k++)
        sum += s->cell[k].state == MKV_CELL_HELD && s->cell[k].pins ? s->is.bytes : 0;
    return sum;
}

/* Of the class that has most segments the one that costs least. */
static struct mkv_seg *cheapest(struct mkv_ns *ns, uint64_t devices) {
    struct mkv_ns_flash *nf = ns->flash;
    struct mkv_seg *best = NULL;
    uint64_t most = 0, least = UINT64_MAX;
    for (uint32_t i = 0; i < nf->segs; i++) {
        struct mkv_seg *s = nf->seg[i];
        uint64_t segments = nf->cls[s->cls].segments;
        if (!may_go(ns, s, devices) || segments < most)
            continue;
        uint64_t this = cost(s);
        if (segments > most || this < least) {
            most = segments;
            least = this;
            best = s;
        }
    }
    return best;
}

/* What can go, goes; and what comes free in the segment later dies at once (mkv_cell_free). The segment is
 * empty when all of its cells are DEAD. */
void mkv_drain_pump(struct mkv_ns *ns) {
    struct mkv_ns_flash *nf = ns->flash;
    struct mkv_seg *s = nf->draining;
    if (!s || s->drained || nf->frozen)
        return;
    uint32_t dead = 0;
    for (uint32_t k = 0; k < s->count; k++) {
        struct mkv_cell *cell = &s->cell[k];
        if (cell->state == MKV_CELL_HELD && !cell->pins && mkv_cell_evictable(ns, cell))
            mkv_cell_evict(ns, cell);
        if (cell->state == MKV_CELL_KEPT) {
            mkv_kept_take(ns, cell);
            mkv_cell_doom(ns, cell, 1);
        }
        if (cell->state == MKV_CELL_STALE || cell->state == MKV_CELL_FREE) {
            int stale = cell->state == MKV_CELL_STALE;
            mkv_cell_take_out(ns, cell);
            if (stale)
                mkv_cell_doom(ns, cell, 1);
            else
                mkv_cell_kill(ns, cell);
        }
        dead += cell->state == MKV_CELL_DEAD;
    }
    mkv_zero_pump(ns);
    if (dead < s->count)
        return;
    s->drained = 1;
    mkv_flash_signal(nf->f);
    mkv_arena_signal(ns->arena);
}

int mkv_ns_segment_give_up(struct mkv_ns *ns, uint64_t devices) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_ns_flash *nf = ns->flash;
    int rc = !nf ? -ENOENT : nf->draining ? -EBUSY : 0;
    struct mkv_seg *s = rc ? NULL : cheapest(ns, devices);
    if (!rc && !s)
        rc = -ENOENT;
    if (!rc) {
        nf->draining = s;
        mkv_drain_pump(ns);
    }
    pthread_mutex_unlock(&ns->lock);
    return rc;
}

int mkv_ns_segment_given_up(struct mkv_ns *ns, struct mkv_segment *out) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_ns_flash *nf = ns->flash;
    struct mkv_seg *s = nf ? nf->draining : NULL;
    int rc = !s ? -ENOENT : !s->drained ? -EAGAIN : 0;
    if (!rc) {
        *out = s->is;
        if (!s->gone) {
            s->gone = 1;
            nf->cls[s->cls].segments--;
            nf->n.segments--;
        }
        nf->draining = NULL;
        s->count = 0; /* the rest stays, for its handle does not recur */
        free(s->cell);
        s->cell = NULL;
    }
    pthread_mutex_unlock(&ns->lock);
    return rc;
}
