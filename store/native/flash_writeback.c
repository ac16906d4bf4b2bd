/* flash_writeback.c: from DRAM to flash, behind the back of whoever put the block.
 *
 * A published block is dirty until its image is on a device. It waits in a list of its class, in the order of
 * publication (blocks that somebody demanded durable before the others), and is in no SIEVE queue: what is
 * dirty is not evicted. The image is written by one request straight from the extent: header page and payload
 * as they lie there. So the cold record is completed in place, under the namespace's lock, while the block is
 * live. This does not break premise (a) of quarantine.c: no READ of a peer that is accepted covers the cold
 * record, and neither the live line nor the payload is touched. The live line goes along to the device as it
 * is, and what stands there means nothing to anybody: staging reads the payload only.
 *
 * A block deleted while it is written leaves its cell to be doomed at the end of the write, and its extent is
 * not freed before (quarantine.c): until then the device reads it.
 *
 * A write that failed leaves a cell of which nobody knows what stands there: it is zeroed and not used again,
 * and the block goes elsewhere, to another device if there is one. If all attempts fail, or no cell will ever
 * come free, the block stays in DRAM as in a namespace without flash: it can be evicted, and then is lost.
 */
#include "flash_ns.h"
#include "list.h"

#include <stddef.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define TRIES_MAX 8

/* --- dirty lists --- */

static struct mkv_list *dirty_list(struct mkv_ns *ns, const struct mkv_extent *e) {
    return &mkv_flash_class_of(ns, e->length)->dirty[e->write - MKV_DIRTY];
}

void mkv_dirty_add(struct mkv_ns *ns, struct mkv_extent *e, int urgency) {
    struct mkv_flash *f = ns->flash->f;
    e->write = (uint8_t)urgency;
    mkv_list_push_tail(dirty_list(ns, e), e);
    ns->flash->must += urgency == MKV_MUST;
    ns->flash->n.dirty++;
    __atomic_add_fetch(&f->dirty_bytes, e->length, __ATOMIC_RELAXED);
    __atomic_add_fetch(&f->dirty_blocks, 1, __ATOMIC_RELAXED);
}

/* Out of the list, but dirty still. */
static void unlist(struct mkv_ns *ns, struct mkv_extent *e) {
    mkv_list_unlink(dirty_list(ns, e), e);
    ns->flash->must -= e->write == MKV_MUST;
}

/* Is dirty no more; or was deleted, and e belongs to another block by now. */
static void not_dirty(struct mkv_ns *ns, uint32_t length) {
    struct mkv_flash *f = ns->flash->f;
    ns->flash->n.dirty--;
    __atomic_sub_fetch(&f->dirty_bytes, length, __ATOMIC_RELAXED);
    __atomic_sub_fetch(&f->dirty_blocks, 1, __ATOMIC_RELAXED);
}

void mkv_dirty_remove(struct mkv_ns *ns, struct mkv_extent *e) {
    unlist(ns, e);
    e->write = MKV_CLEAN;
    not_dirty(ns, e->length);
}

void mkv_write_drop(struct mkv_ns *ns, struct mkv_extent *e) {
    if (e->write == MKV_BEING_WRITTEN) {
        ns->flash->f->op[e->op - 1].dropped = 1;
        e->write = MKV_CLEAN;
    } else {
        mkv_dirty_remove(ns, e);
    }
}

static void hasten(struct mkv_ns *ns, struct mkv_extent *e, int to) {
    unlist(ns, e);
    e->write = (uint8_t)to;
    mkv_list_push_tail(dirty_list(ns, e), e);
    ns->flash->must += to == MKV_MUST;
}

void mkv_dirty_hasten(struct mkv_ns *ns, int from, int to) {
    for (uint32_t i = 0; i < ns->nclasses; i++) {
        struct mkv_list *l = &ns->flash->cls[i].dirty[from - MKV_DIRTY];
        while (l->head)
            hasten(ns, l->head, to);
    }
}

/* --- the ends of writes --- */

/* The block is clean, or will never be: from now on it may be evicted. */
static void settle(struct mkv_ns *ns, struct mkv_extent *e) {
    e->write = MKV_CLEAN;
    mkv_settled_join(ns, e);
    if (mkv_slab_of(ns, e)->state != MKV_SLAB_READY) /* which waited for it */
        mkv_evict(ns, e);
}

/* e is in no list. */
static void give_up(struct mkv_ns *ns, struct mkv_extent *e) {
    MKV_COUNT(ns->flash->f, lost_memory_acks, 1);
    ns->flash->unbacked = 1;
    settle(ns, e);
}

static void succeeded(struct mkv_ns *ns, struct mkv_op *op) {
    struct mkv_flash *f = op->f;
    struct mkv_cell *cell = op->cell;
    MKV_COUNT(f, written_blocks, 1);
    MKV_COUNT(f, written_bytes, op->io.length);
    if (op->dropped) {
        mkv_cell_doom(ns, cell, 0);
        return;
    }
    mkv_cell_hold(ns, cell);
    cell->visited = op->e->visited;
    if (op->demanded)
        mkv_cell_demand(ns, cell);
    cell->covered = mkv_flush_next(f, op->io.device);
    settle(ns, op->e);
}

static void failed(struct mkv_ns *ns, struct mkv_op *op) {
    struct mkv_extent *e = op->e;
    op->cell->dram = NULL;
    if (mkv_drive_failed(op->f, op->io.device))
        mkv_cell_kill(ns, op->cell);
    else
        mkv_cell_doom(ns, op->cell, 1);
    if (op->dropped)
        return;
    e->cell = NULL;
    e->avoid = (uint8_t)(op->io.device + 1);
    if (++e->tries < TRIES_MAX) {
        mkv_dirty_add(ns, e, MKV_MUST);
    } else {
        give_up(ns, e);
    }
}

static void written(struct mkv_io *io) {
    struct mkv_op *op = (struct mkv_op *)io;
    struct mkv_flash *f = op->f;
    struct mkv_ns *ns = op->ns;
    mkv_drive_result(f, io->device, MKV_OP_WRITE, io->result);
    pthread_mutex_lock(&ns->lock);
    mkv_extent_io_end(ns, op->e);
    not_dirty(ns, op->length);
    if (!io->result && !mkv_drive_failed(f, io->device))
        succeeded(ns, op);
    else
        failed(ns, op);
    mkv_op_end(op);
    mkv_zero_pump(ns);
    mkv_write_pump(ns);
    pthread_mutex_unlock(&ns->lock);
    mkv_callback_end(f);
}

/* --- and their beginnings --- */

uint64_t mkv_cold_check(const struct mkv_cold *cold, uint64_t secret) {
    return XXH3_64bits_withSeed(cold, offsetof(struct mkv_cold, check), secret);
}

static void write_cold(struct mkv_ns *ns, struct mkv_extent *e, const struct mkv_op *op) {
    struct mkv_flash *f = op->f;
    struct mkv_slab *s = mkv_slab_of(ns, e);
    struct mkv_cold *cold = (struct mkv_cold *)(s->base + mkv_extent_offset(s, e));
    *cold = (struct mkv_cold){.magic = MKV_COLD_MAGIC,
                              .version = MKV_LAYOUT_VERSION,
                              .length = e->length,
                              .namespace_id = ns->id,
                              .incarnation = ns->flash->incarnation,
                              .sequence = op->cell->sequence,
                              .checksum = e->checksum,
                              .slab_epoch = mkv_seg_of(ns, op->cell)->is.epoch,
                              .device = f->drive[op->io.device].identity,
                              .offset = op->io.offset};
    memcpy(cold->key, e->key, sizeof cold->key);
    cold->check = mkv_cold_check(cold, f->secret);
}

/* Begins to write the block, or returns NULL. */
static struct mkv_op *start(struct mkv_ns *ns, struct mkv_flash_class *c, struct mkv_extent *e) {
    struct mkv_op *op = mkv_cell_take(ns, c, mkv_image_bytes(ns, e->length), (int)e->avoid - 1);
    if (!op)
        return NULL;
    struct mkv_cell *cell = op->cell;
    const struct mkv_slab *s = mkv_slab_of(ns, e);
    memcpy(cell->key, e->key, sizeof cell->key);
    cell->checksum = e->checksum;
    cell->length = e->length;
    cell->sequence = mkv_flash_sequence(op->f);
    cell->dram = e;
    unlist(ns, e);
    op->demanded = e->write != MKV_DIRTY;
    e->write = MKV_BEING_WRITTEN;
    e->cell = cell;
    op->e = e;
    op->length = e->length;
    op->io.op = MKV_IO_WRITE;
    op->io.address = (uint64_t)s->base + mkv_extent_offset(s, e);
    op->io.done = written;
    mkv_extent_io_begin(ns, e, op->number);
    write_cold(ns, e, op);
    return op;
}

/* Of urgent blocks first, from class to class in turn, so that none has to wait for all of another. */
static int start_some(struct mkv_ns *ns, struct mkv_batch *batch) {
    int started = 0;
    for (int urgency = MKV_MUST; urgency >= MKV_DIRTY && !started; urgency--)
        for (uint32_t i = 0; i < ns->nclasses; i++) {
            struct mkv_flash_class *c = &ns->flash->cls[i];
            struct mkv_extent *e = c->dirty[urgency - MKV_DIRTY].head;
            struct mkv_op *op = e ? start(ns, c, e) : NULL;
            if (op)
                mkv_batch_add(op->f, batch, op);
            started |= op != NULL;
        }
    return started;
}

static void give_up_class(struct mkv_ns *ns, struct mkv_flash_class *c) {
    for (int u = 0; u < 3; u++)
        while (c->dirty[u].head) {
            struct mkv_extent *e = c->dirty[u].head;
            mkv_dirty_remove(ns, e);
            give_up(ns, e);
        }
}

/* A segment has come: blocks that were given up are dirty again. */
void mkv_write_again(struct mkv_ns *ns) {
    if (!ns->flash->unbacked)
        return;
    ns->flash->unbacked = 0;
    for (struct mkv_slab *s = ns->slabs; s; s = s->next)
        for (uint32_t i = 0; s->state == MKV_SLAB_READY && i < s->count; i++) {
            struct mkv_extent *e = &s->extent[i];
            if (e->state != MKV_EXTENT_LIVE || e->write != MKV_CLEAN || e->cell)
                continue;
            mkv_settled_leave(ns, e);
            e->tries = 0;
            mkv_dirty_add(ns, e, MKV_DIRTY);
        }
}

void mkv_write_pump(struct mkv_ns *ns) {
    struct mkv_batch batch = {.n = 0};
    if (!ns->flash->n.dirty || ns->flash->closing)
        return;
    while (start_some(ns, &batch))
        ;
    mkv_batch_send(ns->flash->f, &batch);
    for (uint32_t i = 0; i < ns->nclasses; i++) {
        struct mkv_flash_class *c = &ns->flash->cls[i];
        if ((c->dirty[0].head || c->dirty[1].head || c->dirty[2].head) && mkv_class_hopeless(ns, c))
            give_up_class(ns, c);
    }
}

void mkv_flash_published(struct mkv_ns *ns, struct mkv_extent *e) {
    e->cell = NULL;
    e->tries = e->avoid = 0;
    e->visited = 0;
    ns->flash->frozen = 0;
    mkv_dirty_add(ns, e, MKV_DIRTY);
    mkv_write_pump(ns);
}

void mkv_flash_hasten(struct mkv_ns *ns, struct mkv_extent *e) {
    if (e->write == MKV_DIRTY)
        hasten(ns, e, MKV_URGENT);
}

/* Where the block stands, and if it has to be, a push. */
static int durable(struct mkv_ns *ns, const struct mkv_place *p) {
    struct mkv_extent *e = p->e;
    if (!ns->flash)
        return MKV_ERROR_DEVICE;
    if (e && e->write != MKV_CLEAN) {
        mkv_flash_hasten(ns, e);
        mkv_write_pump(ns);
        if (e->write == MKV_BEING_WRITTEN)
            ns->flash->f->op[e->op - 1].demanded = 1;
        return MKV_PENDING;
    }
    if (!p->cell)
        return MKV_ERROR_DEVICE;
    if (p->cell->doubtful) {
        mkv_stage_verify(ns, p->cell);
        return MKV_PENDING;
    }
    uint32_t device = mkv_seg_of(ns, p->cell)->is.device;
    if (!mkv_flush_over(ns->flash->f, device, p->cell->covered)) {
        mkv_cell_demand(ns, p->cell);
        return MKV_PENDING;
    }
    p->cell->demanded = 0;
    return MKV_DONE;
}

int mkv_ns_verified(struct mkv_ns *ns, const uint8_t key[16]) {
    struct mkv_place p;
    pthread_mutex_lock(&ns->lock);
    int rc = mkv_ns_where(ns, key, &p) ? MKV_DONE : MKV_MISS;
    if (rc == MKV_DONE && mkv_place_doubtful(&p)) {
        mkv_stage_verify(ns, p.cell);
        rc = MKV_PENDING;
    }
    pthread_mutex_unlock(&ns->lock);
    return rc;
}

int mkv_place_doubtful(const struct mkv_place *p) {
    return p->cell && p->cell->state == MKV_CELL_HELD && p->cell->doubtful;
}

int mkv_ns_durable(struct mkv_ns *ns, const uint8_t key[16]) {
    struct mkv_place p;
    pthread_mutex_lock(&ns->lock);
    int rc = mkv_ns_where(ns, key, &p) ? durable(ns, &p) : MKV_MISS;
    pthread_mutex_unlock(&ns->lock);
    return rc;
}
