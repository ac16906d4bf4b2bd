/* flash.c: what all namespaces share of the flash tier: requests, devices and what becomes of them.
 *
 * Every request (mkv_op) belongs to a pool that was allocated with the tier: so many images being written, so
 * many headers being zeroed, so many reads. A namespace that finds none waits until one ends, and since each
 * kind has a pool of its own a flood of one never keeps another waiting. Of images, a device gets no more
 * than keep it busy: what waits in our queues can still be dropped, and a read does not wait behind it.
 *
 * A device is taken out (*failed*) after repeated errors, or after one flush that failed: what had been
 * acknowledged to the cache of the device is then of unknown fate, so that nothing it holds can be called
 * durable any more. The blocks that DRAM still has are written elsewhere, the rest are misses.
 */
#include "flash_ns.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define IMAGES       256u
#define ZEROES       256u
#define STAGES       1024u
#define SCANS        256u
#define DRIVE_IMAGES 32u           /* under way at once */
#define DRIVE_BYTES  (32ull << 20) /* of them; one may always be */
#define STRIKES_MAX  16u
#define STRIKE_ENDS  1024u /* so many good requests make up for an error */

static const uint32_t pool_size[MKV_OP_KINDS] = {IMAGES, ZEROES, STAGES, SCANS};

void mkv_flash_signal(struct mkv_flash *f) {
    uint64_t one = 1;
    ssize_t n = write(f->event, &one, sizeof one);
    (void)n; /* it can only fail by being full, and then it is readable */
}

uint64_t mkv_flash_sequence(struct mkv_flash *f) {
    return f->boot << 40 | __atomic_add_fetch(&f->counter, 1, __ATOMIC_RELAXED);
}

int mkv_drive_failed(const struct mkv_flash *f, uint32_t device) {
    return __atomic_load_n(&f->drive[device].failed, __ATOMIC_RELAXED) != 0;
}

uint32_t mkv_drives_good(const struct mkv_flash *f) {
    uint32_t n = 0;
    for (uint32_t d = 0; d < MKV_MAX_DEVICES; d++)
        n += __atomic_load_n(&f->drive[d].known, __ATOMIC_RELAXED) && !mkv_drive_failed(f, d);
    return n;
}

uint32_t mkv_flash_devices_failed(const struct mkv_flash *f) {
    uint32_t n = 0;
    for (uint32_t d = 0; d < MKV_MAX_DEVICES; d++)
        n += (uint32_t)mkv_drive_failed(f, d);
    return n;
}

/* --- making and freeing --- */

static void release(struct mkv_flash *f) {
    if (f->pages)
        munmap(f->pages, (1 + SCANS) * MKV_PAGE);
    if (f->event >= 0)
        close(f->event);
    free(f->op);
    free(f);
}

static void make_pools(struct mkv_flash *f) {
    uint32_t number = 0;
    for (uint32_t kind = 0; kind < MKV_OP_KINDS; kind++)
        for (uint32_t i = 0; i < pool_size[kind]; i++) {
            struct mkv_op *op = &f->op[number];
            *op = (struct mkv_op){.f = f, .kind = (uint8_t)kind, .number = (uint16_t)number};
            if (kind == MKV_OP_SCAN)
                op->page = f->pages + (1 + i) * MKV_PAGE;
            op->next = f->idle[kind];
            f->idle[kind] = op;
            number++;
        }
}

struct mkv_flash *mkv_flash_new(struct mkv_flashio *io, uint64_t secret, uint64_t boot, uint64_t dirty_max) {
    struct mkv_flash *f = calloc(1, sizeof *f);
    if (!f)
        return NULL;
    f->io = io;
    f->secret = secret;
    f->boot = boot;
    f->dirty_max = dirty_max;
    f->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    f->op = calloc(IMAGES + ZEROES + STAGES + SCANS, sizeof *f->op);
    void *pages =
        mmap(NULL, (1 + SCANS) * MKV_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    f->pages = pages == MAP_FAILED ? NULL : pages;
    if (f->event < 0 || !f->op || !f->pages) {
        release(f);
        errno = ENOMEM;
        return NULL;
    }
    pthread_mutex_init(&f->round_lock, NULL);
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->quiet, NULL);
    make_pools(f);
    (void)mkv_flashio_memory(io, (uint64_t)f->pages, (1 + SCANS) * MKV_PAGE); /* it works without as well */
    return f;
}

/* Namespaces have waited for their own requests; flushes can still be under way, and callbacks that have let
 * go of the namespace and not returned. */
void mkv_flash_free(struct mkv_flash *f) {
    if (!f)
        return;
    pthread_mutex_lock(&f->lock);
    while (f->calls)
        pthread_cond_wait(&f->quiet, &f->lock);
    pthread_mutex_unlock(&f->lock);
    pthread_cond_destroy(&f->quiet);
    pthread_mutex_destroy(&f->lock);
    pthread_mutex_destroy(&f->round_lock);
    release(f);
}

int mkv_flash_eventfd(const struct mkv_flash *f) {
    return f->event;
}

int mkv_flash_device(struct mkv_flash *f, uint32_t device, uint64_t identity) {
    if (device >= MKV_MAX_DEVICES)
        return -EINVAL;
    pthread_mutex_lock(&f->lock);
    struct mkv_drive *d = &f->drive[device];
    int rc = d->known ? -EEXIST : 0;
    if (!rc) {
        d->f = f;
        d->identity = identity;
        __atomic_store_n(&d->known, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&f->lock);
    return rc;
}

/* --- requests --- */

static int has_room(const struct mkv_drive *d, uint64_t bytes) {
    return !d->images || (d->images < DRIVE_IMAGES && d->image_bytes + bytes <= DRIVE_BYTES);
}

/* Writes get their ticket here, under the lock, so that who takes note of the last ticket knows of all writes
 * that he can have caused. */
struct mkv_op *mkv_op_begin(struct mkv_ns *ns, enum mkv_op_kind kind, uint32_t device, uint64_t bytes) {
    struct mkv_flash *f = ns->flash->f;
    struct mkv_drive *d = &f->drive[device];
    pthread_mutex_lock(&f->lock);
    struct mkv_op *op = f->idle[kind];
    if (ns->flash->closing || (kind == MKV_OP_WRITE && !has_room(d, bytes)))
        op = NULL;
    if (op) {
        f->idle[kind] = op->next;
        *op = (struct mkv_op){.io = {.device = device, .length = bytes},
                              .f = f,
                              .ns = ns,
                              .page = op->page,
                              .number = op->number,
                              .kind = (uint8_t)kind};
        if (kind == MKV_OP_WRITE) {
            d->images++;
            d->image_bytes += bytes;
        }
        if (kind == MKV_OP_WRITE || kind == MKV_OP_ZERO) {
            op->ticket = ++d->ticket;
            op->prev = d->last;
            *(d->last ? &d->last->next : &d->first) = op;
            d->last = op;
        }
        ns->flash->ops++;
        f->calls++;
    } else {
        __atomic_store_n(&f->hungry, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&f->lock);
    return op;
}

void mkv_op_end(struct mkv_op *op) {
    struct mkv_flash *f = op->f;
    struct mkv_ns_flash *nf = op->ns->flash;
    struct mkv_drive *d = &f->drive[op->io.device];
    pthread_mutex_lock(&f->lock);
    if (op->ticket) {
        *(op->prev ? &op->prev->next : &d->first) = op->next;
        *(op->next ? &op->next->prev : &d->last) = op->prev;
        d->unflushed = 1;
    }
    if (op->kind == MKV_OP_WRITE) {
        d->images--;
        d->image_bytes -= op->io.length;
    }
    op->next = f->idle[op->kind];
    f->idle[op->kind] = op;
    pthread_mutex_unlock(&f->lock);
    if (!--nf->ops && nf->closing)
        pthread_cond_signal(&nf->quiet);
}

void mkv_op_cancel(struct mkv_op *op) {
    struct mkv_flash *f = op->f;
    mkv_op_end(op);
    pthread_mutex_lock(&f->lock);
    f->calls--; /* never the last: the namespace is there */
    pthread_mutex_unlock(&f->lock);
}

void mkv_batch_add(struct mkv_flash *f, struct mkv_batch *b, struct mkv_op *op) {
    b->io[b->n++] = &op->io;
    if (b->n == sizeof b->io / sizeof *b->io)
        mkv_batch_send(f, b);
}

void mkv_batch_send(struct mkv_flash *f, struct mkv_batch *b) {
    if (b->n)
        mkv_flashio_submit(f->io, b->io, b->n);
    b->n = 0;
}

/* --- faults --- */

/* flash's lock is held. */
static void fail(struct mkv_flash *f, struct mkv_drive *d) {
    if (d->known && !d->failed) {
        __atomic_store_n(&d->failed, 1, __ATOMIC_RELAXED);
        __atomic_store_n(&f->failing, 1, __ATOMIC_RELEASE);
    }
}

void mkv_drive_result(struct mkv_flash *f, uint32_t device, enum mkv_op_kind kind, int result) {
    pthread_mutex_lock(&f->lock);
    struct mkv_drive *d = &f->drive[device];
    if (!result) {
        if (d->strikes && ++d->good >= STRIKE_ENDS) {
            d->strikes--;
            d->good = 0;
        }
    } else {
        if (kind == MKV_OP_WRITE || kind == MKV_OP_ZERO)
            d->write_errors++;
        else
            d->read_errors++;
        d->good = 0;
        if (++d->strikes >= STRIKES_MAX)
            fail(f, d);
    }
    pthread_mutex_unlock(&f->lock);
}

void mkv_drive_corrupt(struct mkv_flash *f, uint32_t device) {
    pthread_mutex_lock(&f->lock);
    f->drive[device].corrupt++;
    pthread_mutex_unlock(&f->lock);
    MKV_COUNT(f, dropped_corrupt, 1);
}

/* Takes what failed drives hold away from the namespaces. round_lock is held. */
static void drop_failed(struct mkv_flash *f) {
    __atomic_store_n(&f->failing, 0, __ATOMIC_RELAXED);
    for (uint32_t d = 0; d < MKV_MAX_DEVICES; d++) {
        if (!mkv_drive_failed(f, d))
            continue;
        for (struct mkv_ns_flash *nf = f->all; nf; nf = nf->next) {
            pthread_mutex_lock(&nf->ns->lock);
            mkv_ns_drive_failed(nf->ns, d);
            pthread_mutex_unlock(&nf->ns->lock);
        }
    }
    mkv_flash_signal(f);
}

int mkv_flash_device_fail(struct mkv_flash *f, uint32_t device) {
    if (device >= MKV_MAX_DEVICES || !f->drive[device].known)
        return -ENODEV;
    pthread_mutex_lock(&f->lock);
    fail(f, &f->drive[device]);
    pthread_mutex_unlock(&f->lock);
    mkv_flash_after(f);
    return 0;
}

/* --- what concerns others --- */

static void feed_all(struct mkv_flash *f) {
    __atomic_store_n(&f->hungry, 0, __ATOMIC_RELAXED);
    for (struct mkv_ns_flash *nf = f->all; nf; nf = nf->next) {
        struct mkv_ns *ns = nf->ns;
        pthread_mutex_lock(&ns->lock);
        mkv_stage_pump(ns, 64);
        mkv_zero_pump(ns);
        mkv_write_pump(ns);
        mkv_scan_pump(ns);
        pthread_mutex_unlock(&ns->lock);
    }
    if (f->all && f->all->next) { /* another is the first next time */
        struct mkv_ns_flash *first = f->all, *last = first;
        while (last->next)
            last = last->next;
        f->all = first->next;
        first->next = NULL;
        last->next = first;
    }
}

void mkv_flash_after(struct mkv_flash *f) {
    int failing = __atomic_load_n(&f->failing, __ATOMIC_ACQUIRE);
    int hungry =
        __atomic_load_n(&f->hungry, __ATOMIC_RELAXED) && __atomic_load_n(&f->spaces, __ATOMIC_RELAXED) > 1;
    int barriers = __atomic_load_n(&f->made, __ATOMIC_RELAXED) != __atomic_load_n(&f->done, __ATOMIC_RELAXED);
    if (!failing && !hungry && !barriers)
        return;
    pthread_mutex_lock(&f->round_lock);
    if (failing)
        drop_failed(f);
    if (hungry)
        feed_all(f);
    mkv_round_advance(f);
    pthread_mutex_unlock(&f->round_lock);
}

void mkv_callback_end(struct mkv_flash *f) {
    mkv_flash_after(f);
    pthread_mutex_lock(&f->lock);
    if (!--f->calls)
        pthread_cond_signal(&f->quiet);
    pthread_mutex_unlock(&f->lock);
}

/* --- statistics --- */

void mkv_flash_stats(struct mkv_flash *f, struct mkv_flash_stats *out) {
    const uint64_t *from = (const uint64_t *)&f->n;
    uint64_t *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    out->dirty_bytes = __atomic_load_n(&f->dirty_bytes, __ATOMIC_RELAXED);
    out->dirty_blocks = __atomic_load_n(&f->dirty_blocks, __ATOMIC_RELAXED);
    out->barriers = __atomic_load_n(&f->done, __ATOMIC_RELAXED);
    pthread_mutex_lock(&f->lock);
    for (uint32_t d = 0; d < MKV_MAX_DEVICES; d++)
        out->writing_blocks += f->drive[d].images;
    pthread_mutex_unlock(&f->lock);
}

int mkv_flash_device_stats(struct mkv_flash *f, uint32_t device, struct mkv_flash_device_stats *out) {
    if (device >= MKV_MAX_DEVICES || !f->drive[device].known)
        return -ENODEV;
    pthread_mutex_lock(&f->lock);
    const struct mkv_drive *d = &f->drive[device];
    *out = (struct mkv_flash_device_stats){.identity = d->identity,
                                           .read_errors = d->read_errors,
                                           .write_errors = d->write_errors,
                                           .corrupt = d->corrupt,
                                           .failed = d->failed};
    pthread_mutex_unlock(&f->lock);
    pthread_mutex_lock(&f->round_lock);
    for (struct mkv_ns_flash *nf = f->all; nf; nf = nf->next) {
        pthread_mutex_lock(&nf->ns->lock);
        for (uint32_t i = 0; i < nf->segs; i++) {
            if (nf->seg[i]->is.device != device || !nf->seg[i]->count)
                continue;
            out->segments++;
            out->extents += nf->seg[i]->count;
            out->bytes_live += nf->seg[i]->live_bytes;
        }
        for (uint32_t i = 0; i < nf->ns->nclasses; i++)
            out->free += nf->cls[i].free[device].count + nf->cls[i].stale[device].count;
        pthread_mutex_unlock(&nf->ns->lock);
    }
    pthread_mutex_unlock(&f->round_lock);
    return 0;
}
