/* flash_kept.c: older images of blocks whose newest image may turn out to be no good.
 *
 * A scan comes upon several images of a key: of the newest, which the index names, it has seen the header
 * only; or that is of a put that was made while the scan went on, and has not been written, or not flushed.
 * If that one is lost, by another crash or because its payload is torn, an older one may be whole, and may
 * have been promised. So an older image is kept, neither room nor a block, until the newest is on stable
 * media and verified, for which it is read, a few at every tick. Where the newest is lost the best of the
 * older ones takes its place.
 *
 * Kept images of a deleted key are found by the key's being in the set of deleted keys, which therefore lives
 * until no kept cell can be of one of them, and are doomed at the next tick, or at the latest by the barrier.
 *
 * From a sync on, until something is put or deleted, nothing is let go of: what becomes free between that and
 * the export of a snapshot would have to be zeroed, and would not be. The snapshot has kept images as such.
 */
#include "flash_ns.h"

#include <string.h>

#define READS_PER_TICK 8u

static int is_good(struct mkv_ns *ns, const struct mkv_place *p) {
    return p->cell && p->cell->state == MKV_CELL_HELD && !p->cell->doubtful &&
           mkv_flush_over(ns->flash->f, mkv_seg_of(ns, p->cell)->is.device, p->cell->covered);
}

struct mkv_cell *mkv_kept_best(struct mkv_ns *ns, const uint8_t key[16]) {
    struct mkv_cell *best = NULL;
    if (!ns->flash->kept.count || mkv_is_tomb(ns, key))
        return NULL;
    for (struct mkv_cell *cell = ns->flash->kept.head; cell; cell = cell->next)
        if (!memcmp(cell->key, key, 16) && (!best || cell->sequence > best->sequence) &&
            !mkv_drive_failed(ns->flash->f, mkv_seg_of(ns, cell)->is.device))
            best = cell;
    return best;
}

void mkv_kept_adopt(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_flash_record r = {
        .checksum = cell->checksum, .sequence = cell->sequence, .length = cell->length, .flags = 2};
    memcpy(r.key, cell->key, sizeof r.key);
    mkv_kept_take(ns, cell);
    mkv_cell_adopt(ns, cell, &r);
}

/* Nothing has this key any more: the best kept image is the block, if the index has room. */
static void come_back(struct mkv_ns *ns, const uint8_t key[16]) {
    struct mkv_cell *best = mkv_kept_best(ns, key);
    if (!best || mkv_ns_room(ns, key))
        return;
    mkv_kept_adopt(ns, best);
    mkv_cell_insert(ns, best);
}

/* Looks at one, which was taken out of the list. `reads`: that may be begun. */
static void look(struct mkv_ns *ns, struct mkv_cell *cell, uint32_t *reads) {
    struct mkv_place p;
    if (mkv_is_tomb(ns, cell->key)) {
        mkv_cell_doom(ns, cell, 0);
    } else if (!mkv_ns_where(ns, cell->key, &p)) {
        mkv_kept_push(ns, cell);
        come_back(ns, cell->key);
    } else if (is_good(ns, &p)) {
        mkv_cell_free(ns, cell, MKV_CELL_STALE);
    } else {
        mkv_kept_push(ns, cell);
        if (*reads && p.cell && p.cell->doubtful && !p.e) {
            mkv_stage_verify(ns, p.cell);
            --*reads;
        }
    }
}

static void look_at(struct mkv_ns *ns, uint64_t max, uint32_t reads) {
    struct mkv_cells *l = &ns->flash->kept;
    for (uint64_t n = l->count < max ? l->count : max; n && l->head; n--) {
        struct mkv_cell *cell = l->head;
        mkv_kept_take(ns, cell);
        look(ns, cell, &reads);
    }
}

void mkv_kept_tick(struct mkv_ns *ns, uint64_t max) {
    if (!ns->flash->frozen)
        look_at(ns, max, READS_PER_TICK);
}

void mkv_kept_barrier(struct mkv_ns *ns, int sync) {
    look_at(ns, UINT64_MAX, 0);
    if (!ns->flash->unknown)
        mkv_tombs_clear(ns);
    if (sync)
        ns->flash->frozen = 1;
}
