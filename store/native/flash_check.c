/* flash_check.c: every invariant of a namespace's flash, for the tests; check.c calls it. */
#include "flash_ns.h"
#include "list.h"

#include <string.h>

#define CHECK(ok)                                                                                            \
    do {                                                                                                     \
        if (!(ok))                                                                                           \
            return 100000 + __LINE__;                                                                        \
    } while (0)

static int check_cells(struct mkv_ns *ns, const struct mkv_cells *l, uint32_t cls, int64_t device,
                       int state) {
    const struct mkv_cell *prev = NULL;
    uint64_t n = 0;
    for (const struct mkv_cell *cell = l->head; cell; prev = cell, cell = cell->next) {
        CHECK(++n <= l->count && cell->prev == prev && cell->state == state);
        const struct mkv_seg *s = mkv_seg_of(ns, cell);
        CHECK(!s->gone && (cls == UINT32_MAX || s->cls == cls));
        CHECK(device < 0 || s->is.device == device);
    }
    CHECK(n == l->count && l->tail == prev);
    return 0;
}

static int check_dirty(struct mkv_ns *ns, uint32_t cls, int write, uint64_t *dirty) {
    const struct mkv_list *l = &ns->flash->cls[cls].dirty[write - MKV_DIRTY];
    const struct mkv_extent *prev = NULL;
    uint64_t n = 0;
    for (const struct mkv_extent *e = l->head; e; prev = e, e = e->next) {
        CHECK(++n <= l->count && e->prev == prev && e->write == write && !e->cell && !e->op);
        CHECK(e->state == MKV_EXTENT_LIVE && mkv_class_of(ns, e->length) == &ns->cls[cls]);
    }
    CHECK(n == l->count && l->tail == prev);
    *dirty += n;
    return 0;
}

static int check_class(struct mkv_ns *ns, uint32_t i, uint64_t *dirty, uint64_t *must) {
    const struct mkv_flash_class *c = &ns->flash->cls[i];
    uint64_t room = 0;
    int bad = check_cells(ns, &c->queue, i, -1, MKV_CELL_HELD);
    for (uint32_t d = 0; !bad && d < MKV_MAX_DEVICES; d++) {
        bad = check_cells(ns, &c->free[d], i, d, MKV_CELL_FREE);
        bad = bad ? bad : check_cells(ns, &c->stale[d], i, d, MKV_CELL_STALE);
        room += c->free[d].count + c->stale[d].count;
    }
    for (int write = MKV_DIRTY; !bad && write <= MKV_MUST; write++)
        bad = check_dirty(ns, i, write, dirty);
    if (bad)
        return bad;
    CHECK(room == c->room);
    *must += c->dirty[MKV_MUST - MKV_DIRTY].count;
    const struct mkv_cell *hand = c->hand, *cell = c->queue.head;
    while (hand && cell && cell != hand)
        cell = cell->next;
    CHECK(!hand || cell == hand);
    return 0;
}

struct sums {
    uint64_t by_state[MKV_CELL_DEAD + 1];
    uint64_t bytes, in_flash_only, staged, staging, writing, pinned, pinned_bytes, cell_bytes;
};

static int check_held(struct mkv_ns *ns, const struct mkv_cell *cell, struct sums *sum) {
    const struct mkv_extent *e = cell->dram;
    struct mkv_slot slot;
    CHECK(mkv_index_find(ns->index, cell->key, &slot) && slot.length == cell->length && slot.generation);
    if (mkv_location_state(slot.location) == MKV_SLOT_FLASH) {
        CHECK(slot.location == mkv_cell_location(ns, cell));
        CHECK(!e || e->state == MKV_EXTENT_STAGED || e->state == MKV_EXTENT_STAGING);
        sum->in_flash_only++;
        sum->staged += e && e->state == MKV_EXTENT_STAGED;
        sum->staging += e && e->state == MKV_EXTENT_STAGING;
    } else {
        CHECK(e && e->state == MKV_EXTENT_LIVE && e->write == MKV_CLEAN);
    }
    CHECK(!e || (e->cell == cell && !memcmp(e->key, cell->key, 16) && e->length == cell->length));
    CHECK(!e || e->checksum == cell->checksum);
    CHECK(!cell->doubtful || !e || e->state == MKV_EXTENT_STAGING);
    CHECK(cell->length && cell->length <= mkv_seg_of(ns, cell)->is.payload && cell->sequence);
    return 0;
}

/* The index names a better one, if it names any. */
static int check_kept(struct mkv_ns *ns, const struct mkv_cell *cell) {
    struct mkv_place p;
    return cell->length && cell->length <= mkv_seg_of(ns, cell)->is.payload && cell->sequence &&
           (!mkv_ns_where(ns, cell->key, &p) || !p.cell || p.cell->state != MKV_CELL_HELD ||
            p.cell->sequence > cell->sequence);
}

static int check_seg(struct mkv_ns *ns, const struct mkv_seg *s, struct sums *sum) {
    uint64_t unknown = 0, live_bytes = 0;
    for (uint32_t k = 0; k < s->count; k++) {
        const struct mkv_cell *cell = &s->cell[k];
        CHECK(cell->segment == s->handle && cell->state <= MKV_CELL_DEAD);
        sum->by_state[cell->state]++;
        if (cell->state == MKV_CELL_HELD) {
            int bad = check_held(ns, cell, sum);
            if (bad)
                return bad;
            live_bytes += cell->length;
            sum->pinned += cell->pins > 0;
            sum->pinned_bytes += cell->pins ? ns->align + s->is.payload : 0;
        } else if (cell->state == MKV_CELL_WRITING) {
            const struct mkv_extent *e = cell->dram;
            CHECK(!e || (e->cell == cell && e->write == MKV_BEING_WRITTEN && e->op));
            sum->writing += e != NULL;
        } else {
            CHECK(!cell->dram);
            CHECK(cell->state != MKV_CELL_KEPT || check_kept(ns, cell));
        }
        unknown += cell->state == MKV_CELL_UNKNOWN;
        sum->cell_bytes += cell->state != MKV_CELL_DEAD ? ns->align + s->is.payload : 0;
    }
    CHECK(s->import || unknown == s->unknown);
    CHECK(live_bytes == s->live_bytes);
    sum->bytes += live_bytes;
    return 0;
}

/* live, staged: extents in those states. */
int mkv_flash_check(struct mkv_ns *ns, uint64_t live, uint64_t staged) {
    const struct mkv_ns_flash *nf = ns->flash;
    struct sums sum = {0};
    uint64_t dirty = 0, must = 0, queued = 0, room = 0;
    int bad = check_cells(ns, &nf->pinned, UINT32_MAX, -1, MKV_CELL_HELD);
    bad = bad ? bad : check_cells(ns, &nf->doomed, UINT32_MAX, -1, MKV_CELL_DOOMED);
    bad = bad ? bad : check_cells(ns, &nf->kept, UINT32_MAX, -1, MKV_CELL_KEPT);
    for (uint32_t i = 0; !bad && i < ns->nclasses; i++) {
        bad = check_class(ns, i, &dirty, &must);
        queued += nf->cls[i].queue.count;
        room += nf->cls[i].room;
    }
    for (uint32_t i = 0; !bad && i < nf->segs; i++)
        bad = check_seg(ns, nf->seg[i], &sum);
    if (bad)
        return bad;
    CHECK(sum.by_state[MKV_CELL_HELD] == queued + nf->pinned.count && sum.pinned == nf->pinned.count);
    CHECK(sum.by_state[MKV_CELL_FREE] + sum.by_state[MKV_CELL_STALE] == room);
    CHECK(sum.by_state[MKV_CELL_DOOMED] == nf->doomed.count && sum.by_state[MKV_CELL_ZEROING] == nf->zeroing);
    CHECK(sum.by_state[MKV_CELL_HELD] == nf->n.blocks && sum.bytes == nf->n.bytes);
    CHECK(sum.pinned_bytes == nf->pinned_bytes && sum.cell_bytes == nf->cell_bytes);
    CHECK(sum.staged == staged && staged == nf->n.staged);
    CHECK(must == nf->must && dirty + sum.by_state[MKV_CELL_WRITING] == nf->n.dirty);
    CHECK(live + sum.in_flash_only == ns->index->entries);
    CHECK(sum.by_state[MKV_CELL_KEPT] == nf->kept.count);
    CHECK(nf->doom_in - nf->doom_out == nf->doomed.count);
    return 0;
}
