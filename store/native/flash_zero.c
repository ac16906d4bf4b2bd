/* flash_zero.c: headers that are zeroed, so that an image does not come back.
 *
 * What was deleted is zeroed at once, what was evicted a little at every tick (for an evicted block that
 * comes back does no harm) or when a barrier asks for it. A header that cannot be zeroed is tried again at
 * the next tick, and a barrier waits for it; a device that goes on refusing is taken out by its errors.
 */
#include "flash_ns.h"

static void zeroed(struct mkv_io *io) {
    struct mkv_op *op = (struct mkv_op *)io;
    struct mkv_flash *f = op->f;
    struct mkv_ns *ns = op->ns;
    struct mkv_cell *cell = op->cell;
    int result = io->result;
    mkv_drive_result(f, io->device, MKV_OP_ZERO, result);
    pthread_mutex_lock(&ns->lock);
    ns->flash->zeroing--;
    if (mkv_drive_failed(f, io->device)) {
        mkv_cell_kill(ns, cell);
    } else if (result) {
        __atomic_store_n(&f->round.zero_failed, 1, __ATOMIC_RELAXED);
        ns->flash->zero_pause = 1;
        mkv_cell_doom(ns, cell, cell->bad);
    } else {
        MKV_COUNT(f, headers_zeroed, 1);
        if (cell->bad)
            mkv_cell_kill(ns, cell);
        else
            mkv_cell_free(ns, cell, MKV_CELL_FREE);
    }
    mkv_zero_pump(ns);
    mkv_drain_pump(ns);
    if (ns->flash->must) /* it may have waited for a cell */
        mkv_write_pump(ns);
    mkv_op_end(op);
    pthread_mutex_unlock(&ns->lock);
    mkv_callback_end(f);
}

void mkv_cell_doom(struct mkv_ns *ns, struct mkv_cell *cell, int bad) {
    cell->state = MKV_CELL_DOOMED;
    cell->bad = (uint8_t)bad;
    mkv_doomed_push(ns, cell);
}

void mkv_zero_pump(struct mkv_ns *ns) {
    struct mkv_flash *f = ns->flash->f;
    struct mkv_batch batch = {.n = 0};
    while (ns->flash->doomed.head && !ns->flash->zero_pause) {
        struct mkv_cell *cell = ns->flash->doomed.head;
        struct mkv_op *op = mkv_op_begin(ns, MKV_OP_ZERO, mkv_seg_of(ns, cell)->is.device, ns->align);
        if (!op)
            break;
        mkv_doomed_pop(ns);
        cell->state = MKV_CELL_ZEROING;
        ns->flash->zeroing++;
        op->cell = cell;
        op->io.op = MKV_IO_WRITE;
        op->io.offset = mkv_cell_offset(ns, cell);
        op->io.address = (uint64_t)f->pages;
        op->io.done = zeroed;
        mkv_batch_add(f, &batch, op);
    }
    mkv_batch_send(f, &batch);
}
