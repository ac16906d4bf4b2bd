/* flash_barrier.c: when what was written, and what was wiped out, is on stable media.
 *
 * Flushes. A device has at most one flush under way, and each covers all writes whose callback had run when
 * it was queued. A cell keeps the number of the first flush that is queued after its image was written; the
 * block is durable when that flush is over. So any number of blocks, of any number of puts, share one flush,
 * and the next is queued while it runs only by those who need it.
 *
 * Barriers. A barrier is asked for after a deletion, and is over when the block cannot come back. Its images
 * may be on the medium in several places: in the cell that was just doomed; in cells that it was evicted from
 * in the past and that were not zeroed yet (STALE); in one that is written over right now, with the outcome
 * not known; in one that the write-behind was still filling when the block was deleted. Instead of looking
 * for them, a barrier sees to everything that is of this kind. Barriers are carried out in rounds, one at a
 * time, each for all barriers that had been asked for when it began:
 *
 *   BEGINNING   blocks that somebody demanded durable before are submitted              (urgent ones move to
 * MUST) SETTLING    all writes begun until now are over: what was written for deleted blocks is doomed by now
 *   ZEROING     all cells that are doomed or stale now are submitted to be zeroed
 *   ZEROED      those writes are over; if one failed, again from SETTLING (a device that fails too often is
 * out) FLUSHING    every device on which something was written is flushed
 *
 * Writes get increasing tickets per device, and a device's writes under way form a list in that order: "all
 * writes begun until now are over" is one comparison.
 *
 * A device that has been taken out holds up nothing: what it has is not served any more. Whether it may come
 * back at the next start, with what was deleted meanwhile, is for whoever writes superblocks to prevent.
 */
#include "flash_ns.h"

#include <errno.h>
#include <stddef.h>

/* --- flushes --- */

static void flushed(struct mkv_io *io);

/* flash's lock is held. */
static void queue_flush(struct mkv_flash *f, struct mkv_drive *d) {
    d->flushing = 1;
    d->unflushed = 0;
    d->flush_queued++;
    f->calls++;
    d->flush = (struct mkv_io){.op = MKV_IO_FLUSH, .device = (uint32_t)(d - f->drive), .done = flushed};
    struct mkv_io *io = &d->flush;
    mkv_flashio_submit(f->io, &io, 1);
}

/* flash's lock is held. */
static void want_flush(struct mkv_flash *f, struct mkv_drive *d, uint64_t number) {
    if (d->flush_wanted < number)
        d->flush_wanted = number;
    if (!d->flushing && !d->failed && d->flush_wanted > d->flush_queued)
        queue_flush(f, d);
}

static void flushed(struct mkv_io *io) {
    struct mkv_drive *d = (struct mkv_drive *)io;
    struct mkv_flash *f = d->f;
    int result = io->result;
    pthread_mutex_lock(&f->lock);
    d->flushing = 0;
    if (!result) {
        d->flush_done = d->flush_queued;
        want_flush(f, d, 0);
    } else {
        d->write_errors++;
    }
    pthread_mutex_unlock(&f->lock);
    if (result)
        (void)mkv_flash_device_fail(f,
                                    io->device); /* the io may be in use again: but not of a failed drive */
    else
        MKV_COUNT(f, flushes, 1);
    mkv_callback_end(f);
}

uint64_t mkv_flush_next(struct mkv_flash *f, uint32_t device) {
    pthread_mutex_lock(&f->lock);
    uint64_t number = f->drive[device].flush_queued + 1;
    pthread_mutex_unlock(&f->lock);
    return number;
}

int mkv_flush_over(struct mkv_flash *f, uint32_t device, uint64_t number) {
    struct mkv_drive *d = &f->drive[device];
    pthread_mutex_lock(&f->lock);
    int over = d->flush_done >= number;
    if (!over)
        want_flush(f, d, number);
    pthread_mutex_unlock(&f->lock);
    return over;
}

/* --- rounds --- */

/* Calls `each` for every namespace, with its lock; whether any of the answers was not 0. */
static int any(struct mkv_flash *f, int (*each)(struct mkv_ns *ns)) {
    int all = 0;
    for (struct mkv_ns_flash *nf = f->all; nf; nf = nf->next) {
        pthread_mutex_lock(&nf->ns->lock);
        all |= each(nf->ns);
        pthread_mutex_unlock(&nf->ns->lock);
    }
    return all;
}

static int hasten_urgent(struct mkv_ns *ns) {
    mkv_dirty_hasten(ns, MKV_URGENT, MKV_MUST);
    mkv_write_pump(ns);
    return 0;
}

static int hasten_all(struct mkv_ns *ns) {
    mkv_dirty_hasten(ns, MKV_DIRTY, MKV_MUST);
    return hasten_urgent(ns);
}

/* An older image that the scan has yet to come upon could be of a deleted block. */
static int not_begun(struct mkv_ns *ns) {
    return ns->flash->must || (ns->flash->unknown && ns->flash->tombs.used);
}

static int doom_all(struct mkv_ns *ns) {
    const struct mkv_flash *f = ns->flash->f; /* its round_lock is held */
    mkv_kept_barrier(ns, f->sync_upto > f->done);
    mkv_doom_stale(ns, UINT64_MAX);
    ns->flash->doom_mark = ns->flash->doom_in;
    mkv_zero_pump(ns);
    return 0;
}

static int not_zeroed(struct mkv_ns *ns) {
    mkv_zero_pump(ns);
    return ns->flash->doom_out < ns->flash->doom_mark;
}

static void note_tickets(struct mkv_flash *f) {
    pthread_mutex_lock(&f->lock);
    for (uint32_t d = 0; d < MKV_MAX_DEVICES; d++)
        f->round.ticket[d] = f->drive[d].ticket;
    pthread_mutex_unlock(&f->lock);
}

/* Whether writes that had begun when the tickets were noted are still under way. A drive that has failed is
 * no exception: its blocks go elsewhere when the writes end. */
static int under_way(struct mkv_flash *f) {
    int any = 0;
    pthread_mutex_lock(&f->lock);
    for (uint32_t d = 0; d < MKV_MAX_DEVICES; d++)
        any |= f->drive[d].first && f->drive[d].first->ticket <= f->round.ticket[d];
    pthread_mutex_unlock(&f->lock);
    return any;
}

static void flush_all(struct mkv_flash *f) {
    pthread_mutex_lock(&f->lock);
    for (uint32_t d = 0; d < MKV_MAX_DEVICES; d++) {
        struct mkv_drive *drive = &f->drive[d];
        /* What an unfinished flush covers counts as well; the next one is as good and simpler to name. */
        f->round.flush[d] = drive->unflushed ? drive->flush_queued + 1 : drive->flush_queued;
        want_flush(f, drive, f->round.flush[d]);
    }
    pthread_mutex_unlock(&f->lock);
}

static int not_flushed(struct mkv_flash *f) {
    int any = 0;
    pthread_mutex_lock(&f->lock);
    for (uint32_t d = 0; d < MKV_MAX_DEVICES; d++)
        any |= !f->drive[d].failed && f->drive[d].flush_done < f->round.flush[d];
    pthread_mutex_unlock(&f->lock);
    return any;
}

/* One step: 1 if the phase has changed, 0 if there is something to wait for. */
static int step(struct mkv_flash *f) {
    struct mkv_round *r = &f->round;
    switch (r->phase) {
    case MKV_IDLE:
        r->upto = __atomic_load_n(&f->made, __ATOMIC_RELAXED);
        if (r->upto == f->done)
            return 0;
        any(f, f->sync_upto > f->done ? hasten_all : hasten_urgent);
        r->phase = MKV_BEGINNING;
        return 1;
    case MKV_BEGINNING:
        if (any(f, not_begun))
            return 0;
        note_tickets(f);
        r->phase = MKV_SETTLING;
        return 1;
    case MKV_SETTLING:
        if (under_way(f))
            return 0;
        if (any(f, not_begun)) { /* a write failed, and the block goes elsewhere */
            r->phase = MKV_BEGINNING;
            return 1;
        }
        __atomic_store_n(&r->zero_failed, 0, __ATOMIC_RELAXED);
        any(f, doom_all);
        r->phase = MKV_ZEROING;
        return 1;
    case MKV_ZEROING:
        if (any(f, not_zeroed))
            return 0;
        note_tickets(f);
        r->phase = MKV_ZEROED;
        return 1;
    case MKV_ZEROED:
        if (under_way(f))
            return 0;
        if (__atomic_load_n(&r->zero_failed, __ATOMIC_RELAXED)) {
            r->phase = MKV_SETTLING;
            return 1;
        }
        flush_all(f);
        r->phase = MKV_FLUSHING;
        return 1;
    case MKV_FLUSHING:
        if (not_flushed(f))
            return 0;
        __atomic_store_n(&f->done, r->upto, __ATOMIC_RELEASE);
        r->phase = MKV_IDLE;
        mkv_flash_signal(f);
        return 1;
    }
    return 0;
}

void mkv_round_advance(struct mkv_flash *f) {
    while (step(f))
        ;
}

static uint64_t ask(struct mkv_flash *f, int sync) {
    pthread_mutex_lock(&f->round_lock);
    uint64_t number = __atomic_add_fetch(&f->made, 1, __ATOMIC_RELAXED);
    if (sync)
        f->sync_upto = number;
    mkv_round_advance(f);
    pthread_mutex_unlock(&f->round_lock);
    return number;
}

uint64_t mkv_flash_barrier(struct mkv_flash *f) {
    return ask(f, 0);
}

uint64_t mkv_flash_sync(struct mkv_flash *f) {
    return ask(f, 1);
}

uint64_t mkv_flash_barriers(struct mkv_flash *f) {
    return __atomic_load_n(&f->done, __ATOMIC_ACQUIRE);
}
