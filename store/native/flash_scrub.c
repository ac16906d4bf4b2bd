/* flash_scrub.c: reads what nobody asks for, so that damage is found while there may still be a better copy.
 *
 * The caller's thread reads one block after the other, header and payload, into memory of its own; nothing is
 * locked meanwhile. What is found wrong counts only if the cell still holds the very image (same sequence).
 */
#include "flash_ns.h"

#include <stdlib.h>
#include <string.h>

struct subject {    /* what is read, as it was when the lock was let go */
    uint64_t place; /* segment << 32 | cell */
    uint8_t key[16];
    uint64_t sequence, checksum, offset;
    uint32_t device, length;
};

/* The first HELD cell from the cursor on; the cursor is then behind it. 0: there is none. */
static int next(struct mkv_ns *ns, uint64_t *cursor, struct subject *out) {
    int found = 0;
    pthread_mutex_lock(&ns->lock);
    uint64_t i = *cursor >> 32, k = (uint32_t)*cursor;
    for (; !found && ns->flash && i < ns->flash->segs; i++, k = 0)
        for (const struct mkv_seg *s = ns->flash->seg[i]; !found && !s->gone && k < s->count; k++) {
            const struct mkv_cell *cell = &s->cell[k];
            if (cell->state != MKV_CELL_HELD)
                continue;
            *out = (struct subject){.place = i << 32 | k,
                                    .sequence = cell->sequence,
                                    .checksum = cell->checksum,
                                    .offset = mkv_cell_offset(ns, cell),
                                    .device = s->is.device,
                                    .length = cell->length};
            memcpy(out->key, cell->key, sizeof out->key);
            *cursor = i << 32 | (k + 1);
            found = 1;
        }
    pthread_mutex_unlock(&ns->lock);
    return found;
}

static int is_good(struct mkv_ns *ns, const struct subject *x, const uint8_t *image) {
    const struct mkv_cold *cold = (const struct mkv_cold *)image;
    return cold->magic == MKV_COLD_MAGIC && cold->sequence == x->sequence && !memcmp(cold->key, x->key, 16) &&
           cold->check == mkv_cold_check(cold, ns->flash->f->secret) &&
           mkv_checksum(image + ns->align, x->length) == x->checksum;
}

/* Its cell, if that still holds the very image; else NULL. */
static struct mkv_cell *still(struct mkv_ns *ns, const struct subject *x) {
    struct mkv_seg *s = ns->flash->seg[x->place >> 32];
    uint32_t k = (uint32_t)x->place;
    struct mkv_cell *cell = k < s->count ? &s->cell[k] : NULL; /* it may have been given up */
    return cell && cell->state == MKV_CELL_HELD && cell->sequence == x->sequence ? cell : NULL;
}

static void believe(struct mkv_ns *ns, const struct subject *x) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_cell *cell = still(ns, x);
    if (cell)
        cell->doubtful = 0;
    pthread_mutex_unlock(&ns->lock);
}

/* Whether the block was dropped (or is written anew). */
static int drop(struct mkv_ns *ns, const struct subject *x, int result) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_cell *cell = still(ns, x);
    if (cell) {
        if (!result)
            mkv_drive_corrupt(ns->flash->f, x->device);
        (void)mkv_cell_lost(ns, cell, result != 0, result ? MKV_ERROR_DEVICE : MKV_CORRUPT);
        mkv_zero_pump(ns);
        mkv_write_pump(ns);
    }
    pthread_mutex_unlock(&ns->lock);
    return cell != NULL;
}

uint64_t mkv_ns_scrub(struct mkv_ns *ns, uint64_t cursor, uint32_t max, uint64_t *checked, uint64_t *bad) {
    struct subject x;
    void *image = NULL;
    *checked = *bad = 0;
    if (!ns->flash || posix_memalign(&image, MKV_PAGE, mkv_image_bytes(ns, ns->cls[0].payload)))
        return 0;
    int more = 1;
    while (max-- && (more = next(ns, &cursor, &x))) {
        struct mkv_io io = {.op = MKV_IO_READ,
                            .device = x.device,
                            .offset = x.offset,
                            .address = (uint64_t)image,
                            .length = mkv_image_bytes(ns, x.length)};
        int result = mkv_flashio_run(ns->flash->f->io, &io);
        mkv_drive_result(ns->flash->f, x.device, MKV_OP_STAGE, result);
        ++*checked;
        if (result || !is_good(ns, &x, image))
            *bad += (uint64_t)drop(ns, &x, result);
        else
            believe(ns, &x);
    }
    free(image);
    mkv_flash_after(ns->flash->f);
    return more ? cursor : 0;
}
