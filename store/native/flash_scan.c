/* flash_scan.c: which blocks are on flash, after a stop that left no snapshot.
 *
 * The header page of every cell of a segment is read, at the depth that the pool of ops allows and from
 * segment to segment in turn, so that all devices are busy. A header is believed if all of this holds:
 *
 *   magic, version                else it is no header, or damaged if the rest of it is ours
 *   keyed check                   else it is damaged; or foreign, if it does not name this device: of another
 *                                 store, or of this device before it was formatted, with another secret
 *   slab epoch, namespace         else it is of an earlier assignment of this span, or planted: a copy of a
 *                                 true header, in a payload; but nobody has one with an epoch of the future
 *   device, offset                else it was meant for another place
 *   sequence                      the highest of several images of a key; the others are KEPT (flash_kept.c)
 *
 * What is believed is the header only. The payload behind it may be torn, since nothing orders the sectors of
 * one write: it is verified when it is first staged, or by mkv_ns_scrub, and before that no peer sees it. Nor
 * is it durable before: until then its cell is doubtful, and who asks for durability has it verified.
 *
 * While the scan goes on, the namespace works: cells become free and blocks appear one by one, and a key
 * that has not been found yet is a miss. A block that is put meanwhile wins over what is found of it later,
 * for its sequence is of this boot. A block that is deleted meanwhile must not come back with an older image
 * that is found later: until the scan is over, deleted keys are kept in a set, and barriers wait for its end.
 */
#include "flash_ns.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"

/* --- the set of deleted keys --- */

static uint64_t hash(const uint8_t key[16]) {
    uint64_t at[2];
    mkv_candidates(key, 0, 1ull << 63, at);
    return at[0];
}

static uint8_t *tomb_place(const struct mkv_tombs *t, const uint8_t key[16]) {
    static const uint8_t empty[16];
    uint64_t i = hash(key);
    while (memcmp(t->key[i & (t->size - 1)], empty, 16) && memcmp(t->key[i & (t->size - 1)], key, 16))
        i++;
    return t->key[i & (t->size - 1)];
}

static int tombs_grow(struct mkv_tombs *t) {
    struct mkv_tombs more = {.size = t->size ? 2 * t->size : 64, .used = t->used};
    more.key = calloc(more.size, sizeof *more.key);
    if (!more.key)
        return -ENOMEM;
    for (uint64_t i = 0; i < t->size; i++)
        memcpy(tomb_place(&more, t->key[i]), t->key[i], 16);
    free(t->key);
    *t = more;
    return 0;
}

/* The key of zeros is never stored: it is remembered by being counted only, and always found. */
int mkv_tomb_add(struct mkv_ns *ns, const uint8_t key[16]) {
    struct mkv_tombs *t = &ns->flash->tombs;
    if (2 * t->used >= t->size && tombs_grow(t))
        return -ENOMEM;
    memcpy(tomb_place(t, key), key, 16);
    t->used++;
    return 0;
}

int mkv_is_tomb(struct mkv_ns *ns, const uint8_t key[16]) {
    const struct mkv_tombs *t = &ns->flash->tombs;
    return t->used && !memcmp(tomb_place(t, key), key, 16);
}

void mkv_tombs_clear(struct mkv_ns *ns) {
    free(ns->flash->tombs.key);
    ns->flash->tombs = (struct mkv_tombs){0};
}

/* --- what a header says --- */

enum verdict { GOOD, EMPTY, TORN, FOREIGN, MISPLACED };

static enum verdict judge(struct mkv_ns *ns, const struct mkv_cell *cell, const struct mkv_cold *cold) {
    struct mkv_ns_flash *nf = ns->flash;
    const struct mkv_seg *s = mkv_seg_of(ns, cell);
    int ours = cold->slab_epoch == s->is.epoch && cold->namespace_id == ns->id;
    int here = cold->device == nf->f->drive[s->is.device].identity;
    if (cold->magic != MKV_COLD_MAGIC || cold->version != MKV_LAYOUT_VERSION)
        return ours ? TORN : EMPTY; /* a payload of earlier days may be here: nothing is wrong with that */
    if (cold->check != mkv_cold_check(cold, nf->f->secret))
        return here ? TORN : FOREIGN;
    if (!ours || cold->incarnation != nf->incarnation)
        return FOREIGN;
    if (!here || cold->offset != mkv_cell_offset(ns, cell))
        return MISPLACED;
    return cold->length && cold->length <= s->is.payload ? GOOD : TORN;
}

static void count(struct mkv_flash *f, enum verdict v) {
    MKV_COUNT(f, dropped_torn, v == TORN);
    MKV_COUNT(f, dropped_foreign, v == FOREIGN);
    MKV_COUNT(f, dropped_misplaced, v == MISPLACED);
}

/* --- blocks appear --- */

void mkv_scan_forget(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_ns_flash *nf = ns->flash;
    mkv_seg_of(ns, cell)->unknown--;
    MKV_COUNT(nf->f, scanned, 1);
    if (--nf->unknown)
        return;
    if (!nf->kept.count)
        mkv_tombs_clear(ns);
    mkv_flash_signal(nf->f);
}

/* The image in a cell (in no list) is a block: without the index. */
void mkv_cell_adopt(struct mkv_ns *ns, struct mkv_cell *cell, const struct mkv_flash_record *r) {
    memcpy(cell->key, r->key, sizeof cell->key);
    cell->checksum = r->checksum;
    cell->sequence = r->sequence;
    cell->length = r->length;
    cell->covered =
        mkv_flush_next(ns->flash->f, mkv_seg_of(ns, cell)->is.device); /* who knows what was flushed */
    mkv_cell_hold(ns, cell);
    cell->visited = r->flags & 1;
    cell->doubtful = r->flags >> 1 & 1;
    MKV_COUNT(ns->flash->f, recovered, 1);
}

static struct mkv_slot slot_of(struct mkv_ns *ns, const struct mkv_cell *cell) {
    struct mkv_slot slot = {.generation =
                                (uint32_t)mkv_arena_generation(ns->arena), /* no line will have it */
                            .length = cell->length,
                            .location = mkv_cell_location(ns, cell)};
    memcpy(slot.key, cell->key, sizeof slot.key);
    return slot;
}

void mkv_cell_insert(struct mkv_ns *ns, const struct mkv_cell *cell) {
    struct mkv_slot slot = slot_of(ns, cell);
    mkv_ns_insert(ns, &slot);
}

void mkv_cell_change(struct mkv_ns *ns, const struct mkv_cell *cell) {
    struct mkv_slot slot = slot_of(ns, cell);
    mkv_ns_change(ns, &slot);
}

/* A newer image of a block that was found before. */
static void replace(struct mkv_ns *ns, const struct mkv_place *p, struct mkv_cell *cell,
                    const struct mkv_flash_record *r) {
    struct mkv_cell *older = p->cell;
    if (p->e && p->e->state == MKV_EXTENT_STAGING)
        mkv_stage_drop(ns, older, MKV_PENDING);
    else if (p->e)
        mkv_evict(ns, p->e);
    uint32_t pins = older->pins;
    uint64_t until = older->until;
    mkv_cell_adopt(ns, cell, r);
    mkv_cell_change(ns, cell);
    mkv_cell_unhold(ns, older);
    mkv_kept_push(ns, older);
    if (pins)
        mkv_cell_pin(ns, cell, pins, until);
}

void mkv_cell_keep(struct mkv_ns *ns, struct mkv_cell *cell, const struct mkv_flash_record *r) {
    memcpy(cell->key, r->key, sizeof cell->key);
    cell->checksum = r->checksum;
    cell->sequence = r->sequence;
    cell->length = r->length;
    mkv_kept_push(ns, cell);
}

/* 0, or -EAGAIN: the index has no room for it now. */
static int found(struct mkv_ns *ns, struct mkv_cell *cell, const struct mkv_cold *cold) {
    struct mkv_flash_record r = {
        .checksum = cold->checksum, .sequence = cold->sequence, .length = cold->length, .flags = 2};
    struct mkv_place p;
    memcpy(r.key, cold->key, sizeof r.key);
    int deleted = mkv_is_tomb(ns, r.key);
    int held = mkv_ns_where(ns, r.key, &p);
    if (!held && !deleted && mkv_ns_room(ns, r.key))
        return -EAGAIN;
    mkv_scan_forget(ns, cell);
    if (deleted) {
        mkv_cell_doom(ns, cell, 0);
    } else if (!held) {
        mkv_cell_adopt(ns, cell, &r);
        mkv_cell_insert(ns, cell);
    } else {
        MKV_COUNT(ns->flash->f, dropped_superseded, 1);
        if (p.cell && p.cell->state == MKV_CELL_HELD && p.cell->sequence < r.sequence)
            replace(ns, &p, cell, &r);
        else
            mkv_cell_keep(ns, cell, &r);
    }
    return 0;
}

/* 0: the op is over. */
static int take(struct mkv_ns *ns, struct mkv_op *op) {
    struct mkv_cell *cell = op->cell;
    const struct mkv_cold *cold = (const struct mkv_cold *)op->page;
    if (cell->state != MKV_CELL_UNKNOWN) /* its device has failed */
        return 0;
    if (op->io.result) {
        mkv_scan_forget(ns, cell);
        mkv_cell_doom(ns, cell, 1);
        return 0;
    }
    enum verdict v = judge(ns, cell, cold);
    if (v == GOOD)
        return found(ns, cell, cold);
    count(ns->flash->f, v);
    mkv_scan_forget(ns, cell);
    mkv_cell_free(ns, cell, MKV_CELL_FREE);
    return 0;
}

static void scanned(struct mkv_io *io) {
    struct mkv_op *op = (struct mkv_op *)io;
    struct mkv_flash *f = op->f;
    struct mkv_ns *ns = op->ns;
    mkv_drive_result(f, io->device, MKV_OP_SCAN, io->result);
    pthread_mutex_lock(&ns->lock);
    if (ns->flash->closing || !take(ns, op)) {
        mkv_op_end(op);
    } else {
        op->next = ns->flash->parked;
        ns->flash->parked = op;
    }
    mkv_scan_pump(ns);
    if (ns->flash->n.dirty)
        mkv_write_pump(ns);
    mkv_zero_pump(ns);
    pthread_mutex_unlock(&ns->lock);
    mkv_callback_end(f);
}

/* Tries again with what found no slot in the index. */
void mkv_scan_unpark(struct mkv_ns *ns) {
    struct mkv_op *op = ns->flash->parked;
    ns->flash->parked = NULL;
    while (op) {
        struct mkv_op *next = op->next;
        if (ns->flash->closing || !take(ns, op)) {
            mkv_op_end(op);
        } else {
            op->next = ns->flash->parked;
            ns->flash->parked = op;
        }
        op = next;
    }
}

void mkv_scan_pump(struct mkv_ns *ns) {
    struct mkv_ns_flash *nf = ns->flash;
    struct mkv_batch batch = {.n = 0};
    for (uint32_t idle = 0; nf->unknown && idle < nf->segs; nf->scan_at++) {
        struct mkv_seg *s = nf->seg[nf->scan_at % nf->segs];
        idle++;
        if (s->next == s->count || s->gone)
            continue;
        struct mkv_op *op = mkv_op_begin(ns, MKV_OP_SCAN, s->is.device, ns->align);
        if (!op)
            break;
        idle = 0;
        op->cell = &s->cell[s->next++];
        op->io.op = MKV_IO_READ;
        op->io.offset = mkv_cell_offset(ns, op->cell);
        op->io.address = (uint64_t)op->page;
        op->io.done = scanned;
        mkv_batch_add(nf->f, &batch, op);
    }
    mkv_batch_send(nf->f, &batch);
}

uint64_t mkv_ns_scanning(struct mkv_ns *ns) {
    pthread_mutex_lock(&ns->lock);
    uint64_t n = ns->flash ? ns->flash->unknown : 0;
    pthread_mutex_unlock(&ns->lock);
    return n;
}
