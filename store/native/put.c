/* put.c: pulls a batch of blocks out of a peer's memory into extents, verifies and publishes them.
 *
 * Places: every put under way has one. A place is free, or its READ is under way, or its payload is verified
 * and waits for a slot of the index:
 *
 *    FREE ──begin──► READING ──complete──► (published) FREE
 *                       │                └─ no slot ──► WAITING ──again──► (published) FREE
 *                       └ failed, differs: abandoned ─► FREE
 *
 * In a durable job what is published, and what exists already, goes on to FLUSHING, where its block is looked
 * after until it is on stable media. Such a place holds no extent any more. In any job the same is done with
 * what exists as a header that a scan found, until its payload is verified. If what existed turns out to be
 * torn by a crash, or was deleted, the place goes to AGAIN, and once through all of this: its source is still
 * there.
 *
 * An extent is given back only from a place whose READ has completed, because until then a device may write
 * into it. If the device keeps a READ beyond all patience, the job ends `undrained` with its places as they
 * are, and whoever owns the queue pair destroys it before calling mkv_putjob_abandon.
 *
 * step() is bounded: so many begins, so many checksummed bytes, then the next job has its turn.
 */
#include <stdlib.h>
#include <string.h>

#include "flash.h"
#include "put.h"

#define BEGINS_A_STEP   64u
#define SUMMED_A_STEP   (4ull << 20) /* bytes; the block that reaches it is still finished */
#define POLL            4
#define RETRY_MIN_NS    1000000ull  /* between attempts to find room: doubles from this … */
#define RETRY_MAX_NS    32000000ull /* … to this */
#define FLUSH_CHECK_NS  1000000ull
#define CANCEL_CHECK_NS 100000000ull

enum { FREE, READING, WAITING, FLUSHING, AGAIN };

struct place {
    struct mkv_fill fill;
    uint64_t checksum;
    uint32_t index; /* which put of the batch */
    uint32_t state;
    uint32_t next;  /* in the list of free ones */
    uint8_t status; /* FLUSHING: what it will be */
    uint8_t second; /* begun again */
};

struct mkv_putjob {
    struct mkv_job job; /* first */
    struct mkv_ns *ns;
    const uint8_t *keys;
    const uint32_t *lengths;
    const uint32_t *regions;
    const uint64_t *offsets;
    const uint64_t *checksums;
    uint8_t *status;
    uint32_t n;
    uint32_t begun;   /* puts 0 … begun-1 have a status or a place */
    uint32_t reading; /* places by state */
    uint32_t waiting;
    uint32_t flushing;
    uint32_t again;
    uint32_t free; /* head of the list; `window`: empty */
    uint32_t window;
    uint32_t cancelled; /* set by another thread */
    uint32_t no_room;   /* put `begun` was told that no extent is free */
    uint64_t credit;
    uint64_t set_aside; /* bytes */
    uint64_t retry_ns;  /* when to look for room again; 0: not waiting */
    uint64_t backoff_ns;
    uint64_t flush_ns; /* when to look after what is FLUSHING */
    uint64_t stored_bytes;
    uint64_t read_bytes;
    int durable;
    struct place place[];
};

static const uint8_t *key_of(const struct mkv_putjob *pj, uint32_t i) {
    return pj->keys + (size_t)i * MKV_KEY_BYTES;
}

static struct place *take_place(struct mkv_putjob *pj) {
    struct place *p = &pj->place[pj->free];
    pj->free = p->next;
    return p;
}

static void free_place(struct mkv_putjob *pj, struct place *p, int status) {
    pj->status[p->index] = (uint8_t)status;
    pj->set_aside -= p->fill.length;
    p->state = FREE;
    p->next = pj->free;
    pj->free = (uint32_t)(p - pj->place);
}

/* What existed does not any more: nothing was promised yet, and its source is still there. */
static int gone(const struct place *p, int status, int durable) {
    return durable == MKV_MISS && status == MKV_EXISTS && !p->second;
}

static void begin_again(struct mkv_putjob *pj, struct place *p) {
    pj->set_aside -= p->fill.length;
    p->fill.length = 0;
    p->state = AGAIN;
    p->second = 1;
    pj->again++;
}

/* Whether what was promised holds of a block with this status (mkv_ns_durable, mkv_ns_verified). */
static int holds(const struct mkv_putjob *pj, const struct place *p, int status) {
    if (pj->durable && (status == MKV_STORED || status == MKV_EXISTS))
        return mkv_ns_durable(pj->ns, key_of(pj, p->index));
    return status == MKV_EXISTS ? mkv_ns_verified(pj->ns, key_of(pj, p->index)) : MKV_DONE;
}

/* The block is in the arena, or exists: the put is over, or waits for flash as well. */
static void settle(struct mkv_putjob *pj, struct place *p, int status) {
    int s = holds(pj, p, status);
    if (gone(p, status, s)) {
        begin_again(pj, p);
        return;
    }
    if (s != MKV_PENDING) {
        free_place(pj, p, s == MKV_DONE ? status : s);
        return;
    }
    pj->set_aside -= p->fill.length;
    p->fill.length = 0;
    p->state = FLUSHING;
    p->status = (uint8_t)status;
    pj->flushing++;
}

static int settle_some(struct mkv_putjob *pj, uint64_t now) {
    int progress = 0;
    pj->flush_ns = now + FLUSH_CHECK_NS;
    for (uint32_t k = 0; k < pj->window && pj->flushing; k++) {
        struct place *p = &pj->place[k];
        int s = p->state == FLUSHING ? holds(pj, p, p->status) : MKV_PENDING;
        if (s == MKV_PENDING)
            continue;
        if (gone(p, p->status, s))
            begin_again(pj, p);
        else
            free_place(pj, p, s == MKV_DONE ? p->status : s);
        pj->flushing--;
        progress = 1;
    }
    return progress;
}

static void abandon(struct mkv_putjob *pj, struct place *p, int status) {
    mkv_fill_abandon(pj->ns, &p->fill);
    free_place(pj, p, status);
}

static void wait_for_room(struct mkv_putjob *pj, uint64_t now) {
    if (!pj->retry_ns) {
        pj->backoff_ns = pj->backoff_ns ? pj->backoff_ns * 2 : RETRY_MIN_NS;
        if (pj->backoff_ns > RETRY_MAX_NS)
            pj->backoff_ns = RETRY_MAX_NS;
        pj->retry_ns = now + pj->backoff_ns;
    }
}

/* Whether the span that the peer names lies in a region that it offered: looked at before an extent is set
 * aside, so that nobody's block is evicted for a put that cannot be. */
static int within(const struct mkv_putjob *pj, uint32_t i) {
    const struct mkv_region *r = mkv_table_get(pj->job.ch->remote, pj->regions[i]);
    return r && pj->offsets[i] <= r->length && pj->lengths[i] <= r->length - pj->offsets[i];
}

/* Posts the READ of a place; a status other than MKV_PENDING if it cannot be. */
static int post(struct mkv_putjob *pj, const struct place *p) {
    struct mkv_read r = {
        .cookie = (uint64_t)(p - pj->place),
        .offset = pj->offsets[p->index],
        .region = pj->regions[p->index],
        .nseg = 1,
        .seg = {{.offset = p->fill.offset, .region = (uint32_t)p->fill.slab, .length = p->fill.length}}};
    switch (pj->job.ch->ops->post(pj->job.ch, &r)) {
    case 0:
        return MKV_PENDING;
    case -ERANGE:
    case -ENOENT:
        return MKV_ERROR_BOUNDS;
    case -EPIPE:
        return MKV_ERROR_LINK;
    default: /* -EACCES: the slab is not registered for this; -EAGAIN was excluded */
        return MKV_ERROR_INTERNAL;
    }
}

/* Sets an extent aside for a put, or says why not; MKV_ERROR_FULL also while too much is under way. */
static int set_aside(struct mkv_putjob *pj, uint32_t i, struct mkv_fill *fill, uint64_t now) {
    uint32_t length = pj->lengths[i];
    if (pj->job.ch->busy >= pj->job.ch->depth || (pj->set_aside && pj->set_aside + length > pj->credit))
        return MKV_ERROR_FULL;
    int s = within(pj, i) ? mkv_fill_begin(pj->ns, key_of(pj, i), length, fill) : MKV_ERROR_BOUNDS;
    pj->no_room = s == MKV_ERROR_FULL;
    if (pj->no_room)
        wait_for_room(pj, now);
    return s;
}

/* The place has an extent (MKV_PENDING), or its block exists. */
static void go_on(struct mkv_putjob *pj, struct place *p, int s, const struct mkv_fill *fill) {
    if (s == MKV_EXISTS) {
        p->fill.length = 0;
        settle(pj, p, s);
        return;
    }
    p->fill = *fill;
    p->state = READING;
    pj->set_aside += fill->length;
    s = post(pj, p);
    if (s == MKV_PENDING)
        pj->reading++;
    else
        abandon(pj, p, s);
}

/* Begins the next put: 1 if it was dealt with, 0 if it has to wait. */
static int begin(struct mkv_putjob *pj, uint64_t now) {
    uint32_t i = pj->begun;
    struct mkv_fill fill;
    if (pj->free == pj->window)
        return 0;
    int s = set_aside(pj, i, &fill, now);
    if (s == MKV_ERROR_FULL)
        return 0;
    pj->begun++;
    if (s != MKV_PENDING && !(s == MKV_EXISTS && (pj->durable || fill.doubtful))) {
        pj->status[i] = (uint8_t)s;
        return 1;
    }
    struct place *p = take_place(pj);
    p->index = i;
    p->second = 0;
    go_on(pj, p, s, &fill);
    return 1;
}

/* The same for places that are in state AGAIN: how many were dealt with. */
static int resume(struct mkv_putjob *pj, uint64_t now) {
    struct mkv_fill fill;
    int n = 0;
    for (uint32_t k = 0; k < pj->window && pj->again; k++) {
        struct place *p = &pj->place[k];
        int s = p->state == AGAIN ? set_aside(pj, p->index, &fill, now) : MKV_ERROR_FULL;
        if (s == MKV_ERROR_FULL)
            continue;
        pj->again--;
        n++;
        if (s == MKV_PENDING || s == MKV_EXISTS)
            go_on(pj, p, s, &fill);
        else
            free_place(pj, p, s);
    }
    return n;
}

static int begin_some(struct mkv_putjob *pj, uint64_t now) {
    int progress = resume(pj, now) > 0;
    for (uint32_t k = 0; k < BEGINS_A_STEP && pj->begun < pj->n && begin(pj, now); k++)
        progress = 1;
    if (progress) {
        pj->backoff_ns = 0;
        pj->job.ch->ops->flush(pj->job.ch);
    }
    return progress;
}

/* The slab of a verified place is being retired: takes the payload to an extent elsewhere. A status as of
 * publishing; MKV_ERROR_FULL: the place still has an extent. */
static int move_payload(struct mkv_putjob *pj, struct place *p) {
    struct mkv_fill to;
    int s = mkv_fill_begin(pj->ns, key_of(pj, p->index), p->fill.length, &to);
    if (s == MKV_EXISTS)
        mkv_fill_abandon(pj->ns, &p->fill);
    if (s != MKV_PENDING)
        return s;
    memcpy((void *)(uintptr_t)to.address, (const void *)(uintptr_t)p->fill.address, to.length);
    mkv_fill_abandon(pj->ns, &p->fill);
    p->fill = to;
    return mkv_fill_publish(pj->ns, &p->fill, key_of(pj, p->index), p->checksum);
}

/* Publishes a verified place: 1, or 0 if there is no room for it now, in the index or in another slab. */
static int publish(struct mkv_putjob *pj, struct place *p) {
    int s = mkv_fill_publish(pj->ns, &p->fill, key_of(pj, p->index), p->checksum);
    if (s == MKV_ERROR_REFUSED)
        s = move_payload(pj, p);
    if (s == MKV_ERROR_FULL || s == MKV_ERROR_REFUSED)
        return 0;
    if (s == MKV_STORED)
        pj->stored_bytes += p->fill.length;
    settle(pj, p, s);
    return 1;
}

/* The READ of a place has arrived. */
static void arrived(struct mkv_putjob *pj, struct place *p, uint64_t now) {
    pj->read_bytes += p->fill.length;
    p->checksum = mkv_checksum((const void *)(uintptr_t)p->fill.address, p->fill.length);
    if (pj->checksums && pj->checksums[p->index] != p->checksum) {
        abandon(pj, p, MKV_CORRUPT);
        return;
    }
    if (!publish(pj, p)) {
        p->state = WAITING;
        pj->waiting++;
        wait_for_room(pj, now);
    }
}

static int complete_some(struct mkv_putjob *pj, uint64_t now) {
    struct mkv_channel *ch = pj->job.ch;
    struct mkv_done done[POLL];
    uint64_t summed = 0;
    int n, progress = 0;
    while (summed < SUMMED_A_STEP && (n = ch->ops->poll(ch, done, POLL)) > 0) {
        progress = 1;
        for (int i = 0; i < n; i++) {
            struct place *p = &pj->place[done[i].cookie];
            pj->reading--;
            if (!done[i].status) {
                summed += p->fill.length;
                arrived(pj, p, now);
            } else {
                abandon(pj, p, now >= pj->job.deadline_ns ? MKV_TIMEOUT : MKV_ERROR_LINK);
            }
        }
    }
    return progress;
}

/* Tries again to find slots for what waits for one. */
static int publish_waiting(struct mkv_putjob *pj) {
    int progress = 0;
    for (uint32_t k = 0; k < pj->window && pj->waiting; k++) {
        if (pj->place[k].state == WAITING && publish(pj, &pj->place[k])) {
            pj->waiting--;
            progress = 1;
        }
    }
    return progress;
}

/* The job has to end: says so of everything that was not begun, gives back what no device can reach. */
static int end(struct mkv_putjob *pj, uint64_t now) {
    struct mkv_channel *ch = pj->job.ch;
    int late = now >= pj->job.deadline_ns;
    int status = !late ? MKV_ERROR_LINK : pj->no_room ? MKV_ERROR_FULL : MKV_TIMEOUT;
    while (pj->begun < pj->n)
        pj->status[pj->begun++] = (uint8_t)status;
    for (uint32_t k = 0; k < pj->window && pj->waiting; k++) {
        if (pj->place[k].state == WAITING) {
            abandon(pj, &pj->place[k], MKV_ERROR_FULL);
            pj->waiting--;
        }
    }
    for (uint32_t k = 0; k < pj->window && pj->flushing; k++) {
        if (pj->place[k].state == FLUSHING) {
            free_place(pj, &pj->place[k], late ? MKV_TIMEOUT : MKV_ERROR_LINK);
            pj->flushing--;
        }
    }
    for (uint32_t k = 0; k < pj->window && pj->again; k++) {
        if (pj->place[k].state == AGAIN) {
            free_place(pj, &pj->place[k], late ? MKV_TIMEOUT : MKV_ERROR_LINK);
            pj->again--;
        }
    }
    if (ch->busy && !pj->job.undrained)
        return 0;
    for (uint32_t k = 0; k < pj->window && pj->reading; k++)
        if (pj->place[k].state == READING)
            pj->status[pj->place[k].index] = (uint8_t)(late ? MKV_TIMEOUT : MKV_ERROR_LINK);
    mkv_job_finish(&pj->job, late ? -ETIMEDOUT : ch->broken ? ch->broken : -ECANCELED);
    return 1;
}

static int step(struct mkv_job *job) {
    struct mkv_putjob *pj = (struct mkv_putjob *)job;
    uint64_t now = mkv_now_ns();
    int progress = 0;
    if (__atomic_load_n(&pj->cancelled, __ATOMIC_ACQUIRE) && job->deadline_ns > now)
        job->deadline_ns = now;
    int ending = mkv_job_must_end(job, now);
    if (!ending && (!pj->retry_ns || now >= pj->retry_ns)) {
        pj->retry_ns = 0;
        if (pj->waiting) {
            progress |= publish_waiting(pj);
            if (pj->waiting)
                wait_for_room(pj, now);
        }
        progress |= begin_some(pj, now);
    }
    progress |= complete_some(pj, now);
    if (pj->flushing && now >= pj->flush_ns)
        progress |= settle_some(pj, now);
    if (ending || job->ch->broken)
        return end(pj, now) | progress;
    if (pj->begun == pj->n && !pj->reading && !pj->waiting && !pj->flushing && !pj->again) {
        mkv_job_finish(job, 0);
        return 1;
    }
    job->wake_ns = now + CANCEL_CHECK_NS;
    if (pj->retry_ns && pj->retry_ns < job->wake_ns)
        job->wake_ns = pj->retry_ns;
    if (pj->flushing && pj->flush_ns < job->wake_ns)
        job->wake_ns = pj->flush_ns;
    return progress;
}

struct mkv_putjob *mkv_putjob_new(uint32_t window) {
    struct mkv_putjob *pj = calloc(1, sizeof *pj + window * sizeof *pj->place);
    if (pj)
        pj->window = window;
    return pj;
}

void mkv_putjob_free(struct mkv_putjob *pj) {
    free(pj);
}

void mkv_putjob_init(struct mkv_putjob *pj, struct mkv_ns *ns, void *channel, const uint8_t *keys,
                     const uint32_t *lengths, const uint32_t *regions, const uint64_t *offsets,
                     const uint64_t *checksums, uint8_t *status, uint32_t n, uint64_t credit,
                     uint64_t deadline_ns, int durable) {
    uint32_t window = pj->window;
    *pj = (struct mkv_putjob){
        .job = {.step = step, .ch = channel, .deadline_ns = deadline_ns, .started_ns = mkv_now_ns()},
        .ns = ns,
        .keys = keys,
        .lengths = lengths,
        .regions = regions,
        .offsets = offsets,
        .checksums = checksums,
        .status = status,
        .n = n,
        .window = window,
        .credit = credit,
        .durable = durable};
    for (uint32_t k = 0; k < window; k++) {
        pj->place[k].state = FREE;
        pj->place[k].next = k + 1;
    }
}

void mkv_putjob_cancel(struct mkv_putjob *pj) {
    __atomic_store_n(&pj->cancelled, 1, __ATOMIC_RELEASE);
}

void mkv_putjob_outcome(const struct mkv_putjob *pj, struct mkv_put_outcome *out) {
    *out = (struct mkv_put_outcome){.stored_bytes = pj->stored_bytes,
                                    .read_bytes = pj->read_bytes,
                                    .started_ns = pj->job.started_ns,
                                    .ended_ns = pj->job.ended_ns,
                                    .rc = pj->job.rc,
                                    .broken = pj->job.ch->broken,
                                    .undrained = pj->job.undrained,
                                    .held = pj->reading};
}

uint32_t mkv_putjob_abandon(struct mkv_putjob *pj) {
    uint32_t n = 0;
    for (uint32_t k = 0; k < pj->window; k++) {
        if (pj->place[k].state == READING) {
            mkv_fill_abandon(pj->ns, &pj->place[k].fill);
            pj->place[k].state = FREE;
            n++;
        }
    }
    pj->reading = 0;
    return n;
}
