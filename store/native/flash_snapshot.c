/* flash_snapshot.c: the blocks on flash as records, out and in again: a start in no time after a clean stop.
 *
 * Python keeps the records (store/flash/format.py) and decides whether they may be trusted: only if nothing
 * was written to the device since they were exported. A cell that no record names is free, and its header is
 * known to be of no block: mkv_flash_sync, which comes before the export, has zeroed what was STALE. So
 * nothing may happen to the namespace between the end of that and the export.
 */
#include "flash_ns.h"

#include <string.h>

uint64_t mkv_ns_flash_export(struct mkv_ns *ns, struct mkv_flash_record *out, uint64_t max) {
    uint64_t n = 0;
    pthread_mutex_lock(&ns->lock);
    for (uint32_t i = 0; ns->flash && i < ns->flash->segs; i++) {
        const struct mkv_seg *s = ns->flash->seg[i];
        for (uint32_t k = 0; k < s->count; k++) {
            const struct mkv_cell *cell = &s->cell[k];
            int kept = cell->state == MKV_CELL_KEPT;
            if (cell->state != MKV_CELL_HELD && !kept)
                continue;
            if (n < max) {
                out[n] = (struct mkv_flash_record){.checksum = cell->checksum,
                                                   .sequence = cell->sequence,
                                                   .offset = mkv_cell_offset(ns, cell),
                                                   .device = s->is.device,
                                                   .length = cell->length,
                                                   .flags = kept ? 4 : cell->visited | cell->doubtful << 1,
                                                   .namespace_id = ns->id};
                memcpy(out[n].key, cell->key, sizeof out[n].key);
            }
            n++;
        }
    }
    pthread_mutex_unlock(&ns->lock);
    return n;
}

static int covers(const struct mkv_seg *s, const struct mkv_flash_record *r) {
    return s->is.device == r->device && r->offset >= s->is.offset && r->offset - s->is.offset < s->is.bytes;
}

/* The cell that a record names, if it may be filled from one. `hint`: the segment of the record before. */
static struct mkv_cell *cell_of(struct mkv_ns *ns, const struct mkv_flash_record *r, uint32_t *hint) {
    struct mkv_ns_flash *nf = ns->flash;
    uint32_t i = *hint, tried = 0;
    while (tried < nf->segs && !covers(nf->seg[i], r)) {
        i = i + 1 < nf->segs ? i + 1 : 0;
        tried++;
    }
    if (tried == nf->segs)
        return NULL;
    *hint = i;
    struct mkv_seg *s = nf->seg[i];
    uint64_t stride = ns->align + s->is.payload, at = r->offset - s->is.offset;
    if (!s->import || s->gone || at % stride || at / stride >= s->count || !r->length ||
        r->length > s->is.payload)
        return NULL;
    struct mkv_cell *cell = &s->cell[at / stride];
    return cell->state == MKV_CELL_UNKNOWN ? cell : NULL;
}

uint64_t mkv_ns_flash_import(struct mkv_ns *ns, const struct mkv_flash_record *in, uint64_t n) {
    uint64_t i = 0;
    uint32_t hint = 0;
    pthread_mutex_lock(&ns->lock);
    for (; ns->flash && i < n; i++) {
        struct mkv_place p;
        struct mkv_cell *cell = cell_of(ns, &in[i], &hint);
        if (cell && in[i].flags & 4) {
            mkv_cell_keep(ns, cell, &in[i]);
            continue;
        }
        if (!cell || mkv_ns_where(ns, in[i].key, &p))
            continue;
        if (mkv_ns_room(ns, in[i].key))
            break;
        mkv_cell_adopt(ns, cell, &in[i]);
        mkv_cell_insert(ns, cell);
    }
    pthread_mutex_unlock(&ns->lock);
    return i;
}

void mkv_ns_flash_imported(struct mkv_ns *ns) {
    pthread_mutex_lock(&ns->lock);
    for (uint32_t i = 0; ns->flash && i < ns->flash->segs; i++) {
        struct mkv_seg *s = ns->flash->seg[i];
        for (uint32_t k = s->count; s->import && k-- > 0;)
            if (s->cell[k].state == MKV_CELL_UNKNOWN)
                mkv_cell_free(ns, &s->cell[k], MKV_CELL_FREE);
        s->import = 0;
    }
    if (ns->flash)
        mkv_write_pump(ns);
    pthread_mutex_unlock(&ns->lock);
}
