/* flash_cell.c: cells, the places on flash: who gets one, and which block has to go.
 *
 * A segment is a span of a device, all of one size class, assigned by Python, which has written that down
 * before it adds the segment here; it may be given back (flash_drain.c). Consecutive images of a class go to
 * the devices in turn (striping), and within a device preferably into cells whose old image has not been
 * zeroed, since that then need not be done.
 *
 * When a class has no cell left and has been told that there is no segment for it now, it evicts by SIEVE, as
 * sieve.c does in DRAM, but not before the scan is over: until then most cells only seem to be taken. Pinned
 * blocks are in no queue, and those whose extent is pinned or being read into are passed over, as are those
 * that a durable put still waits for. What goes from flash goes from DRAM too. No grace period is needed on
 * flash itself: peers never see it, and a cell whose image is being read is not evicted.
 */
#include "flash_ns.h"
#include "list.h"

#include "arena.h"
#include "clock.h"

#define ASK_BELOW    32u   /* cells free: time for a further segment */
#define HAND_MAX     4096u /* steps in one go: the lock is held meanwhile */
#define DEMAND_MASK  0x7fu /* of the epoch that a demanded cell remembers, beside a bit that is always set */
#define DEMAND_TICKS 2u

/* --- lists of cells --- */

static void push_head(struct mkv_cells *l, struct mkv_cell *c) {
    c->prev = NULL;
    c->next = l->head;
    *(l->head ? &l->head->prev : &l->tail) = c;
    l->head = c;
    l->count++;
}

static void unlink_cell(struct mkv_cells *l, struct mkv_cell *c) {
    *(c->prev ? &c->prev->next : &l->head) = c->next;
    *(c->next ? &c->next->prev : &l->tail) = c->prev;
    c->prev = c->next = NULL;
    l->count--;
}

/* --- where things are --- */

struct mkv_seg *mkv_seg_of(struct mkv_ns *ns, const struct mkv_cell *cell) {
    return ns->flash->seg[cell->segment];
}

static uint64_t stride(const struct mkv_ns *ns, const struct mkv_seg *s) {
    return ns->align + s->is.payload;
}

struct mkv_cell *mkv_cell_at(struct mkv_ns *ns, uint64_t location) {
    struct mkv_seg *s = ns->flash->seg[mkv_location_slab(location)];
    return &s->cell[mkv_location_offset(location) / MKV_OFFSET_UNIT];
}

struct mkv_extent *mkv_cell_dram(const struct mkv_cell *cell) {
    return cell->dram;
}

uint64_t mkv_cell_location(struct mkv_ns *ns, const struct mkv_cell *cell) {
    uint64_t place = (uint64_t)(cell - mkv_seg_of(ns, cell)->cell);
    return mkv_location(MKV_SLOT_FLASH, cell->segment, place * MKV_OFFSET_UNIT);
}

uint64_t mkv_cell_offset(struct mkv_ns *ns, const struct mkv_cell *cell) {
    const struct mkv_seg *s = mkv_seg_of(ns, cell);
    return s->is.offset + (uint64_t)(cell - s->cell) * stride(ns, s);
}

struct mkv_flash_class *mkv_flash_class_of(struct mkv_ns *ns, uint64_t length) {
    return &ns->flash->cls[mkv_class_of(ns, length) - ns->cls];
}

uint64_t mkv_image_bytes(const struct mkv_ns *ns, uint64_t length) {
    return ns->align + (length + ns->align - 1) / ns->align * ns->align;
}

static struct mkv_flash_class *class_of_cell(struct mkv_ns *ns, const struct mkv_cell *cell) {
    return &ns->flash->cls[mkv_seg_of(ns, cell)->cls];
}

/* --- changes of state --- */

void mkv_kept_push(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_cells *l = &ns->flash->kept;
    cell->state = MKV_CELL_KEPT;
    cell->prev = l->tail;
    cell->next = NULL;
    *(l->tail ? &l->tail->next : &l->head) = cell;
    l->tail = cell;
    l->count++;
}

void mkv_kept_take(struct mkv_ns *ns, struct mkv_cell *cell) {
    unlink_cell(&ns->flash->kept, cell);
}

void mkv_cell_free(struct mkv_ns *ns, struct mkv_cell *cell, int state) {
    struct mkv_flash_class *c = class_of_cell(ns, cell);
    uint32_t d = mkv_seg_of(ns, cell)->is.device;
    if (mkv_seg_of(ns, cell) == ns->flash->draining) {
        if (state == MKV_CELL_STALE)
            mkv_cell_doom(ns, cell, 1);
        else
            mkv_cell_kill(ns, cell);
        return;
    }
    cell->state = (uint8_t)state;
    push_head(state == MKV_CELL_STALE ? &c->stale[d] : &c->free[d], cell);
    c->room++;
}

void mkv_cell_take_out(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_flash_class *c = class_of_cell(ns, cell);
    uint32_t d = mkv_seg_of(ns, cell)->is.device;
    unlink_cell(cell->state == MKV_CELL_STALE ? &c->stale[d] : &c->free[d], cell);
    c->room--;
}

void mkv_cell_kill(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_seg *s = mkv_seg_of(ns, cell);
    cell->state = MKV_CELL_DEAD;
    cell->dram = NULL;
    ns->flash->cls[s->cls].cells--;
    ns->flash->cell_bytes -= stride(ns, s);
    ns->flash->n.extents--;
}

void mkv_cell_hold(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_ns_flash *nf = ns->flash;
    cell->state = MKV_CELL_HELD;
    cell->visited = 0;
    cell->pins = 0;
    cell->bad = cell->demanded = 0;
    cell->doubtful = 0;
    mkv_seg_of(ns, cell)->live_bytes += cell->length;
    nf->n.blocks++;
    nf->n.bytes += cell->length;
    push_head(&class_of_cell(ns, cell)->queue, cell);
}

static void leave_queue(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_flash_class *c = class_of_cell(ns, cell);
    if (c->hand == cell)
        c->hand = cell->prev;
    unlink_cell(&c->queue, cell);
}

static void leave_pinned(struct mkv_ns *ns, struct mkv_cell *cell) {
    unlink_cell(&ns->flash->pinned, cell);
    ns->flash->pinned_bytes -= stride(ns, mkv_seg_of(ns, cell));
    cell->pins = 0;
    cell->until = 0;
}

void mkv_cell_unhold(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_ns_flash *nf = ns->flash;
    if (cell->pins)
        leave_pinned(ns, cell);
    else
        leave_queue(ns, cell);
    mkv_seg_of(ns, cell)->live_bytes -= cell->length;
    nf->n.blocks--;
    nf->n.bytes -= cell->length;
}

/* --- pins of what is in flash only --- */

void mkv_cell_pin(struct mkv_ns *ns, struct mkv_cell *cell, uint32_t pins, uint64_t until) {
    struct mkv_ns_flash *nf = ns->flash;
    if (!cell->pins) {
        leave_queue(ns, cell);
        push_head(&nf->pinned, cell);
        nf->pinned_bytes += stride(ns, mkv_seg_of(ns, cell));
    }
    cell->pins = pins < UINT32_MAX - cell->pins ? cell->pins + pins : UINT32_MAX;
    if (cell->until < until)
        cell->until = until;
}

static void unpin(struct mkv_ns *ns, struct mkv_cell *cell) {
    leave_pinned(ns, cell);
    push_head(&class_of_cell(ns, cell)->queue, cell);
}

uint8_t mkv_cell_pin_status(struct mkv_ns *ns, struct mkv_cell *cell, uint64_t until) {
    const struct mkv_ns_flash *nf = ns->flash;
    if (!cell->pins && nf->pinned_bytes + stride(ns, mkv_seg_of(ns, cell)) > nf->cell_bytes / 2)
        mkv_cell_pins_expire(ns, UINT64_MAX, mkv_now_ns());
    if (!cell->pins && nf->pinned_bytes + stride(ns, mkv_seg_of(ns, cell)) > nf->cell_bytes / 2)
        return MKV_ERROR_FULL;
    mkv_cell_pin(ns, cell, 1, until);
    return MKV_DONE;
}

uint8_t mkv_cell_unpin_status(struct mkv_ns *ns, struct mkv_cell *cell) {
    if (cell->state != MKV_CELL_HELD || !cell->pins)
        return MKV_MISS;
    if (cell->pins == 1)
        unpin(ns, cell);
    else
        cell->pins--;
    return MKV_DONE;
}

void mkv_cell_pins_expire(struct mkv_ns *ns, uint64_t max, uint64_t now) {
    struct mkv_cells *l = &ns->flash->pinned;
    uint64_t n = l->count < max ? l->count : max;
    while (n--) {
        struct mkv_cell *cell = l->tail;
        if (cell->until <= now) {
            unpin(ns, cell);
        } else {
            unlink_cell(l, cell);
            push_head(l, cell);
        }
    }
}

/* --- eviction --- */

int mkv_cell_evictable(struct mkv_ns *ns, struct mkv_cell *cell) {
    if (cell->dram && (cell->dram->pins || cell->dram->op))
        return 0;
    if (!cell->demanded)
        return 1;
    if (!mkv_flush_over(ns->flash->f, mkv_seg_of(ns, cell)->is.device, cell->covered))
        return 0;
    return ((ns->epoch - cell->demanded) & DEMAND_MASK) > DEMAND_TICKS;
}

void mkv_cell_demand(struct mkv_ns *ns, struct mkv_cell *cell) {
    cell->demanded = (uint8_t)(ns->epoch & DEMAND_MASK) | (DEMAND_MASK + 1);
}

/* Still in the queue. A hand that has gone HAND_MAX steps takes what it stands on, if that can be had. */
static struct mkv_cell *victim(struct mkv_ns *ns, struct mkv_flash_class *c) {
    struct mkv_cell *cell = c->hand ? c->hand : c->queue.tail;
    uint64_t steps = 2 * c->queue.count < HAND_MAX ? 2 * c->queue.count : HAND_MAX;
    for (uint64_t i = 0; cell && i < steps && (cell->visited || !mkv_cell_evictable(ns, cell)); i++) {
        cell->visited = 0;
        cell = cell->prev ? cell->prev : c->queue.tail;
    }
    c->hand = cell;
    return cell && mkv_cell_evictable(ns, cell) ? cell : NULL;
}

/* Lest what waits to be written wait for ever: the images that are kept for it may have all of the room. */
static void give_up_kept(struct mkv_ns *ns, const struct mkv_flash_class *c) {
    struct mkv_cell *cell = ns->flash->kept.head;
    while (cell && class_of_cell(ns, cell) != c)
        cell = cell->next;
    if (!cell)
        return;
    mkv_kept_take(ns, cell);
    mkv_cell_free(ns, cell, MKV_CELL_STALE);
}

void mkv_cell_evict(struct mkv_ns *ns, struct mkv_cell *cell) {
    ns->flash->n.evictions++;
    ns->flash->n.evicted_bytes += cell->length;
    if (cell->dram)
        mkv_unpublish(ns, cell->dram);
    else
        mkv_ns_remove(ns, cell->key);
    mkv_cell_unhold(ns, cell);
    mkv_cell_free(ns, cell, MKV_CELL_STALE);
}

static void evict_one(struct mkv_ns *ns, struct mkv_flash_class *c) {
    struct mkv_cell *cell = victim(ns, c);
    if (cell)
        mkv_cell_evict(ns, cell);
    else
        give_up_kept(ns, c);
}

/* --- taking a cell --- */

static void ask_for_segment(struct mkv_ns *ns, struct mkv_flash_class *c) {
    if (c->wants || c->promised || ns->epoch < c->ask_again || !mkv_drives_good(ns->flash->f))
        return;
    c->wants = 1;
    mkv_flash_signal(ns->flash->f);
    mkv_arena_signal(ns->arena);
}

static struct mkv_op *take_from(struct mkv_ns *ns, struct mkv_flash_class *c, uint64_t bytes, uint32_t d) {
    struct mkv_cell *cell = c->stale[d].head ? c->stale[d].head : c->free[d].head;
    struct mkv_op *op =
        cell && !mkv_drive_failed(ns->flash->f, d) ? mkv_op_begin(ns, MKV_OP_WRITE, d, bytes) : NULL;
    if (!op)
        return NULL;
    mkv_cell_take_out(ns, cell);
    cell->state = MKV_CELL_WRITING;
    op->cell = cell;
    op->io.offset = mkv_cell_offset(ns, cell);
    c->next = d + 1;
    return op;
}

static struct mkv_op *take(struct mkv_ns *ns, struct mkv_flash_class *c, uint64_t bytes, int avoid) {
    struct mkv_op *op = NULL;
    if (c->room < ASK_BELOW)
        ask_for_segment(ns, c);
    if (!c->room && c->denied && !ns->flash->unknown)
        evict_one(ns, c);
    for (uint32_t k = 0; !op && c->room && k < MKV_MAX_DEVICES; k++) {
        uint32_t d = (c->next + k) % MKV_MAX_DEVICES;
        if ((int)d != avoid)
            op = take_from(ns, c, bytes, d);
    }
    return !op && c->room && avoid >= 0 ? take_from(ns, c, bytes, (uint32_t)avoid) : op;
}

/* Where a class has no segment and gets none, or not yet, a larger one helps out. */
struct mkv_op *mkv_cell_take(struct mkv_ns *ns, struct mkv_flash_class *c, uint64_t bytes, int avoid) {
    struct mkv_op *op = take(ns, c, bytes, avoid);
    if (!op && !c->segments && (c->denied || c->promised))
        for (struct mkv_flash_class *larger = c; !op && larger-- > ns->flash->cls;)
            if (larger->segments)
                op = take(ns, larger, bytes, avoid);
    return op;
}

int mkv_class_hopeless(struct mkv_ns *ns, const struct mkv_flash_class *c) {
    if (!mkv_drives_good(ns->flash->f))
        return 1;
    if (!c->denied)
        return 0;
    for (const struct mkv_flash_class *larger = c; larger >= ns->flash->cls; larger--)
        if (larger->cells)
            return 0;
    return 1;
}

/* --- losing what was there --- */

/* The block of a cell that is lost, and of which DRAM has nothing: whether an older image has become it. */
static int fall_back(struct mkv_ns *ns, struct mkv_cell *kept, const struct mkv_cell *cell, uint32_t pins,
                     uint64_t until) {
    if (!kept) {
        mkv_ns_remove(ns, cell->key);
        return 0;
    }
    mkv_kept_adopt(ns, kept);
    mkv_cell_change(ns, kept);
    if (pins)
        mkv_cell_pin(ns, kept, pins, until);
    return 1;
}

int mkv_cell_lost(struct mkv_ns *ns, struct mkv_cell *cell, int bad, uint8_t status) {
    struct mkv_extent *e = cell->dram;
    uint32_t pins = cell->pins;
    uint64_t until = cell->until;
    struct mkv_cell *kept = mkv_kept_best(ns, cell->key);
    int fell_back = 0;
    mkv_cell_unhold(ns, cell);
    if (e && e->state == MKV_EXTENT_STAGING) {
        mkv_stage_drop(ns, cell, kept ? MKV_PENDING : status);
        fell_back = fall_back(ns, kept, cell, pins, until);
    } else if (e) {
        if (e->state == MKV_EXTENT_STAGED)
            mkv_promote(ns, e);
        mkv_settled_leave(ns, e);
        e->cell = NULL;
        cell->dram = NULL;
        if (pins)
            mkv_pin_add(ns, e, pins, until);
        mkv_dirty_add(ns, e, MKV_MUST);
    } else {
        fell_back = fall_back(ns, kept, cell, pins, until);
    }
    if (mkv_drive_failed(ns->flash->f, mkv_seg_of(ns, cell)->is.device))
        mkv_cell_kill(ns, cell);
    else
        mkv_cell_doom(ns, cell, bad);
    return fell_back;
}

static void drop_cell(struct mkv_ns *ns, struct mkv_cell *cell) {
    switch (cell->state) {
    case MKV_CELL_UNKNOWN:
        mkv_scan_forget(ns, cell);
        mkv_cell_kill(ns, cell);
        break;
    case MKV_CELL_FREE:
    case MKV_CELL_STALE:
        mkv_cell_take_out(ns, cell);
        mkv_cell_kill(ns, cell);
        break;
    case MKV_CELL_HELD:
        (void)mkv_cell_lost(ns, cell, 1, MKV_ERROR_DEVICE);
        break;
    case MKV_CELL_KEPT:
        mkv_kept_take(ns, cell);
        mkv_cell_kill(ns, cell);
        break;
    case MKV_CELL_DOOMED:
        unlink_cell(&ns->flash->doomed, cell);
        ns->flash->doom_out++;
        mkv_cell_kill(ns, cell);
        break;
    default: /* WRITING and ZEROING: when that is over */
        break;
    }
}

void mkv_ns_drive_failed(struct mkv_ns *ns, uint32_t device) {
    struct mkv_ns_flash *nf = ns->flash;
    for (uint32_t i = 0; i < nf->segs; i++) {
        struct mkv_seg *s = nf->seg[i];
        if (s->is.device != device || s->gone)
            continue;
        s->gone = 1;
        nf->cls[s->cls].segments--;
        nf->n.segments--;
        for (uint32_t k = 0; k < s->count; k++)
            drop_cell(ns, &s->cell[k]);
    }
    mkv_write_pump(ns);
}

/* --- zeroing: lists only; flash_zero.c has the rest --- */

void mkv_doomed_push(struct mkv_ns *ns, struct mkv_cell *cell) {
    struct mkv_cells *l = &ns->flash->doomed;
    cell->prev = l->tail;
    cell->next = NULL;
    *(l->tail ? &l->tail->next : &l->head) = cell;
    l->tail = cell;
    l->count++;
    ns->flash->doom_in++;
}

struct mkv_cell *mkv_doomed_pop(struct mkv_ns *ns) {
    struct mkv_cell *cell = ns->flash->doomed.head;
    unlink_cell(&ns->flash->doomed, cell);
    ns->flash->doom_out++;
    return cell;
}

/* Dooms up to so many STALE cells of each class and device, the oldest first. */
void mkv_doom_stale(struct mkv_ns *ns, uint64_t max_each) {
    for (uint32_t i = 0; i < ns->nclasses; i++)
        for (uint32_t d = 0; d < MKV_MAX_DEVICES; d++) {
            struct mkv_cells *l = &ns->flash->cls[i].stale[d];
            for (uint64_t n = max_each; n && l->tail; n--) {
                struct mkv_cell *cell = l->tail;
                mkv_cell_take_out(ns, cell);
                mkv_cell_doom(ns, cell, 0);
            }
        }
}
