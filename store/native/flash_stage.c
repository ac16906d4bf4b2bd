/* flash_stage.c: from flash to DRAM, for those who ask.
 *
 * A staged block is *private* at first. Its payload is read into an extent that nobody could know, is
 * verified, and gets a live line with a new generation; but the index goes on saying FLASH, and only who
 * asked is told the location. Most blocks that are asked for once are not asked for again, so they leave no
 * trace where every peer looks. The second use (another request, a touch) makes the slot LIVE, in place.
 * Until then the peer that was told may say that it has READ the block and will not do so again: that makes
 * it idle, and its extent can be taken at once ("The one exception" in quarantine.c), so that what comes from
 * flash flows through memory at the device's pace, and not at that of quarantines.
 *
 * Who writes what. The device writes the payload, into an extent in state STAGING: its live line's generation
 * is zero, no slot names it, and it is in no list from which it could be taken; it stays so until the request
 * is over, whatever becomes of the block or of those who wait. The header page is never read: neither the
 * cold record nor, above all, the live line of some earlier life may appear in memory that peers read
 * (premise (b) of quarantine.c). This CPU writes the live line after the payload has been verified against
 * the checksum that is kept in memory since the block was written or scanned. So every block that a peer sees
 * was verified, also after a crash that left a header whole and a payload torn.
 *
 * Who waits. Each key of a request is an item, in exactly one list until it is answered: that of the read
 * that will bring its block (which any number of requests join), or that of the namespace, if there was no
 * extent or no op for it. The latter is looked through when a read ends and at every tick, when quarantines
 * end.
 * A staged block is not evicted for some ticks: else a request that is larger than what DRAM can spare would
 * drive out its own blocks before they are read, and nobody would get anything.
 */
#include "flash_ns.h"
#include "list.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "clock.h"

#define SPARED_TICKS 3    /* a staged block is not evicted before whoever asked has had time to READ it */
#define KEYS_AT_ONCE 256u /* between which the lock is free for others */

struct mkv_stage {
    struct mkv_ns *ns;
    struct mkv_stage *prev, *next; /* of the namespace */
    uint64_t deadline_ns;
    uint32_t n, begun, answered, collected;
    int prefetch;
    uint32_t *order; /* of the answers: indices */
    struct mkv_item item[];
};

/* --- items --- */

static void join(struct mkv_items *l, struct mkv_item *it) {
    it->in = l;
    it->next = NULL;
    it->prev = l->tail;
    *(l->tail ? &l->tail->next : &l->head) = it;
    l->tail = it;
    l->count++;
}

static void leave(struct mkv_item *it) {
    struct mkv_items *l = it->in;
    if (!l)
        return;
    *(it->prev ? &it->prev->next : &l->head) = it->next;
    *(it->next ? &it->next->prev : &l->tail) = it->prev;
    it->in = NULL;
    l->count--;
}

static void answer(struct mkv_item *it, uint8_t status, const struct mkv_slot *slot) {
    struct mkv_stage *s = it->stage;
    leave(it);
    it->status = status;
    if (slot)
        it->slot = *slot;
    if (s->answered == s->collected || s->answered + 1 == s->n) /* else somebody has been told already */
        mkv_flash_signal(s->ns->flash->f);
    s->order[s->answered] = (uint32_t)(it - s->item);
    __atomic_store_n(&s->answered, s->answered + 1, __ATOMIC_RELEASE);
}

static struct mkv_slot slot_of(struct mkv_ns *ns, const struct mkv_extent *e) {
    const struct mkv_slab *s = mkv_slab_of(ns, e);
    struct mkv_slot slot = {.generation = (uint32_t)e->generation,
                            .length = e->length,
                            .location =
                                mkv_location(MKV_SLOT_LIVE, s->id, mkv_extent_offset(s, e) + ns->align)};
    memcpy(slot.key, e->key, sizeof slot.key);
    return slot;
}

void mkv_promote(struct mkv_ns *ns, struct mkv_extent *e) {
    struct mkv_slot slot = slot_of(ns, e);
    mkv_ns_change(ns, &slot);
    e->state = MKV_EXTENT_LIVE;
    ns->flash->n.staged--;
    if (e->idle) {
        mkv_settled_leave(ns, e);
        mkv_settled_join(ns, e);
    }
}

static void make_idle(struct mkv_ns *ns, struct mkv_extent *e) {
    struct mkv_class *c = mkv_slab_of(ns, e)->cls;
    mkv_settled_leave(ns, e);
    e->idle = 1;
    mkv_list_push_tail(&c->idle, e);
    c->taken -= c->taken > 0; /* it has come back: nobody need be evicted for it */
}

/* --- reading --- */

/* Ends a read that was in vain: the extent was never visible, so it is free at once. */
static void put_back(struct mkv_ns *ns, struct mkv_op *op) {
    if (op->cell) {
        op->cell->dram = NULL;
        op->e->cell = NULL;
    }
    mkv_put_back(ns, op->e);
}

static void answer_all(struct mkv_op *op, uint8_t status, const struct mkv_slot *slot) {
    while (op->waiters.head)
        answer(op->waiters.head, status, slot);
}

static void wait_again(struct mkv_ns *ns, struct mkv_op *op) {
    while (op->waiters.head) {
        struct mkv_item *it = op->waiters.head;
        leave(it);
        join(&ns->flash->waiting, it);
    }
}

static void appear(struct mkv_ns *ns, struct mkv_op *op) {
    struct mkv_extent *e = op->e;
    struct mkv_slab *s = mkv_slab_of(ns, e);
    e->generation = mkv_arena_generation(ns->arena);
    mkv_write_line(s, e);
    e->state = MKV_EXTENT_STAGED;
    e->until = ns->epoch + SPARED_TICKS;
    e->write = MKV_CLEAN;
    op->cell->doubtful = 0;
    s->filling--;
    s->cls->filling--;
    s->live++;
    ns->n.blocks++;
    ns->n.bytes += e->length;
    ns->flash->n.staged++;
    mkv_settled_join(ns, e);
    if (op->publish || op->uses > 1)
        mkv_promote(ns, e);
    else if (!op->waiters.head) /* nobody will be told */
        make_idle(ns, e);
    struct mkv_slot slot = slot_of(ns, e);
    answer_all(op, MKV_HIT, &slot);
    MKV_COUNT(op->f, staged_blocks, 1);
    MKV_COUNT(op->f, staged_bytes, e->length);
}

static void finish(struct mkv_ns *ns, struct mkv_op *op, uint64_t sum) {
    struct mkv_cell *cell = op->cell;
    int retired = mkv_slab_of(ns, op->e)->state != MKV_SLAB_READY;
    if (op->dropped || op->again) {
        put_back(ns, op);
        if (op->again)
            wait_again(ns, op);
        answer_all(op, op->dropped, NULL);
    } else if (op->io.result || sum != op->checksum) {
        uint8_t status = op->io.result ? MKV_ERROR_DEVICE : MKV_CORRUPT;
        if (status == MKV_CORRUPT)
            mkv_drive_corrupt(op->f, op->io.device);
        put_back(ns, op);
        if (mkv_cell_lost(ns, cell, op->io.result != 0, status))
            wait_again(ns, op);
        answer_all(op, status, NULL);
    } else if (retired) {
        put_back(ns, op);
        wait_again(ns, op);
    } else {
        appear(ns, op);
    }
}

static void staged(struct mkv_io *io) {
    struct mkv_op *op = (struct mkv_op *)io;
    struct mkv_flash *f = op->f;
    struct mkv_ns *ns = op->ns;
    mkv_drive_result(f, io->device, MKV_OP_STAGE, io->result);
    uint64_t sum = io->result ? 0 : mkv_checksum((const void *)(uintptr_t)io->address, op->length);
    pthread_mutex_lock(&ns->lock);
    mkv_extent_io_end(ns, op->e);
    finish(ns, op, sum);
    mkv_op_end(op);
    mkv_zero_pump(ns);
    mkv_stage_pump(ns, 64);
    pthread_mutex_unlock(&ns->lock);
    mkv_callback_end(f);
}

void mkv_stage_drop(struct mkv_ns *ns, struct mkv_cell *cell, uint8_t status) {
    struct mkv_extent *e = cell->dram;
    struct mkv_op *op = &ns->flash->f->op[e->op - 1];
    op->cell = NULL;
    op->dropped = status;
    op->again = status == MKV_PENDING;
    e->cell = NULL;
    cell->dram = NULL;
}

/* Begins to read the block of a cell for an item, or for nobody (NULL). 0: there is no extent, or no op.
 * `tried`: classes that have no extent now, as bits. */
static int start(struct mkv_ns *ns, struct mkv_cell *cell, struct mkv_item *it, struct mkv_batch *batch,
                 uint64_t *tried) {
    struct mkv_class *c = mkv_class_of(ns, cell->length);
    uint64_t bit = 1ull << (c - ns->cls);
    uint64_t offset = mkv_cell_offset(ns, cell) + ns->align;
    if (*tried & bit)
        return 0;
    struct mkv_op *op = mkv_op_begin(ns, MKV_OP_STAGE, mkv_seg_of(ns, cell)->is.device,
                                     mkv_image_bytes(ns, cell->length) - ns->align);
    if (!op) {
        *tried = UINT64_MAX;
        return 0;
    }
    op->cell = cell;
    struct mkv_extent *e = mkv_extent_take(ns, c); /* evicts in DRAM only: the cell stays */
    if (!e) {
        *tried |= bit;
        mkv_op_cancel(op);
        return 0;
    }
    struct mkv_slab *s = mkv_slab_of(ns, e);
    e->state = MKV_EXTENT_STAGING;
    e->length = cell->length;
    e->checksum = cell->checksum;
    memcpy(e->key, cell->key, sizeof e->key);
    e->cell = cell;
    e->tries = e->avoid = 0;
    cell->dram = e;
    s->filling++;
    s->cls->filling++;
    op->e = e;
    op->length = cell->length;
    op->checksum = cell->checksum;
    op->publish = it && it->stage->prefetch;
    op->uses = it && !it->stage->prefetch;
    op->io.op = MKV_IO_READ;
    op->io.offset = offset;
    op->io.address = (uint64_t)s->base + mkv_extent_offset(s, e) + ns->align;
    op->io.done = staged;
    mkv_extent_io_begin(ns, e, op->number);
    if (it) {
        leave(it);
        join(&op->waiters, it);
    }
    mkv_batch_add(op->f, batch, op);
    return 1;
}

/* --- asking --- */

/* 1: answered, or its block is being read. 0: it has to wait. */
static int try_item(struct mkv_ns *ns, struct mkv_item *it, struct mkv_batch *batch, uint64_t *tried) {
    struct mkv_place p;
    struct mkv_slot slot;
    if (!mkv_ns_where(ns, it->key, &p)) {
        answer(it, MKV_MISS, NULL);
        return 1;
    }
    if (p.cell)
        p.cell->visited = 1;
    if (p.e && p.e->state == MKV_EXTENT_STAGING) {
        struct mkv_op *op = &ns->flash->f->op[p.e->op - 1];
        op->publish |= it->stage->prefetch != 0;
        op->uses += !it->stage->prefetch;
        MKV_COUNT(op->f, stage_joined, 1);
        leave(it);
        join(&op->waiters, it);
        return 1;
    }
    if (p.e) {
        if (p.e->state == MKV_EXTENT_STAGED)
            mkv_promote(ns, p.e);
        p.e->visited = 1;
        slot = slot_of(ns, p.e);
        answer(it, MKV_HIT, &slot);
        return 1;
    }
    if (mkv_drive_failed(ns->flash->f, mkv_seg_of(ns, p.cell)->is.device)) {
        if (mkv_cell_lost(ns, p.cell, 1, MKV_ERROR_DEVICE))
            return 0;
        answer(it, MKV_ERROR_DEVICE, NULL);
        return 1;
    }
    return start(ns, p.cell, it, batch, tried);
}

void mkv_stage_verify(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_batch batch = {.n = 0};
    uint64_t tried = 0;
    if (!cell->dram && !mkv_drive_failed(ns->flash->f, mkv_seg_of(ns, cell)->is.device))
        (void)start(ns, cell, NULL, &batch, &tried);
    mkv_batch_send(ns->flash->f, &batch);
}

/* Looks at up to `max` of those who wait for an extent. */
void mkv_stage_pump(struct mkv_ns *ns, uint64_t max) {
    struct mkv_batch batch = {.n = 0};
    uint64_t tried = 0;
    for (struct mkv_item *it = ns->flash->waiting.head, *next; it && max-- && tried != UINT64_MAX;
         it = next) {
        next = it->next;
        (void)try_item(ns, it, &batch, &tried);
    }
    mkv_batch_send(ns->flash->f, &batch);
}

static int unstage(struct mkv_ns *ns, const uint8_t key[16], uint64_t generation) {
    struct mkv_place p;
    if (!mkv_ns_where(ns, key, &p) || !p.e || p.e->state != MKV_EXTENT_STAGED || p.e->idle ||
        (uint32_t)p.e->generation != generation || mkv_slab_of(ns, p.e)->state != MKV_SLAB_READY)
        return 0;
    make_idle(ns, p.e);
    return 1;
}

uint32_t mkv_ns_unstage(struct mkv_ns *ns, const uint8_t *keys, const uint32_t *generations, uint32_t n) {
    uint32_t good = 0;
    for (uint32_t i = 0; ns->flash && i < n;) {
        uint64_t came = 0;
        pthread_mutex_lock(&ns->lock);
        for (uint32_t end = n - i < KEYS_AT_ONCE ? n : i + KEYS_AT_ONCE; i < end; i++)
            came += (uint64_t)unstage(ns, keys + 16ull * i, generations[i]);
        if (came)
            mkv_stage_pump(ns, 2 * came);
        pthread_mutex_unlock(&ns->lock);
        good += (uint32_t)came;
    }
    return good;
}

static void expire(struct mkv_stage *s) {
    for (uint32_t i = 0; i < s->begun && s->answered < s->begun; i++)
        if (s->item[i].in)
            answer(&s->item[i], MKV_TIMEOUT, NULL);
}

void mkv_stage_tick(struct mkv_ns *ns) {
    uint64_t now = ns->flash->stages ? mkv_now_ns() : 0;
    for (struct mkv_stage *s = ns->flash->stages; s; s = s->next)
        if (now >= s->deadline_ns)
            expire(s);
    mkv_stage_pump(ns, UINT64_MAX);
}

struct mkv_stage *mkv_stage_new(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint64_t deadline_ns,
                                int prefetch) {
    struct mkv_stage *s = ns->flash ? calloc(1, sizeof *s + n * sizeof *s->item) : NULL;
    uint32_t *order = s ? malloc((n ? n : 1) * sizeof *order) : NULL;
    if (!order) {
        free(s);
        errno = ns->flash ? ENOMEM : EINVAL;
        return NULL;
    }
    s->ns = ns;
    s->deadline_ns = deadline_ns;
    s->n = n;
    s->prefetch = prefetch;
    s->order = order;
    struct mkv_batch batch = {.n = 0};
    uint64_t tried = 0;
    for (uint32_t i = 0; i < n || !i;) {
        pthread_mutex_lock(&ns->lock);
        if (!i) {
            s->next = ns->flash->stages;
            if (s->next)
                s->next->prev = s;
            ns->flash->stages = s;
        }
        for (uint32_t end = n - i < KEYS_AT_ONCE ? n : i + KEYS_AT_ONCE; i < end; i++) {
            struct mkv_item *it = &s->item[i];
            it->stage = s;
            memcpy(it->key, keys + 16ull * i, sizeof it->key);
            s->begun = i + 1;
            if (!try_item(ns, it, &batch, &tried))
                join(&ns->flash->waiting, it);
        }
        pthread_mutex_unlock(&ns->lock);
        if (!n)
            break;
    }
    mkv_batch_send(ns->flash->f, &batch);
    return s;
}

uint32_t mkv_stage_collect(struct mkv_stage *s, uint32_t *index, uint8_t *status, struct mkv_slot *slots,
                           uint32_t max) {
    uint32_t k = 0;
    pthread_mutex_lock(&s->ns->lock);
    if (s->answered < s->n && mkv_now_ns() >= s->deadline_ns)
        expire(s);
    for (; k < max && s->collected < s->answered; k++) {
        const struct mkv_item *it = &s->item[s->order[s->collected++]];
        index[k] = (uint32_t)(it - s->item);
        status[k] = it->status;
        slots[k] = it->slot;
    }
    pthread_mutex_unlock(&s->ns->lock);
    return k;
}

int mkv_stage_done(const struct mkv_stage *s) {
    return __atomic_load_n(&s->answered, __ATOMIC_ACQUIRE) == s->n;
}

void mkv_stage_free(struct mkv_stage *s) {
    if (!s)
        return;
    struct mkv_ns *ns = s->ns;
    pthread_mutex_lock(&ns->lock);
    for (uint32_t i = 0; i < s->n; i++)
        leave(&s->item[i]);
    *(s->prev ? &s->prev->next : &ns->flash->stages) = s->next;
    if (s->next)
        s->next->prev = s->prev;
    pthread_mutex_unlock(&ns->lock);
    free(s->order);
    free(s);
}
