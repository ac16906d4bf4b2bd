/* get.c: finds, READs and verifies a batch of blocks.
 *
 * One READ, one clock: why a verified block cannot be wrong
 *
 * Whoever takes a block out of use on the node first unpublishes it: the slot goes, and the generation in its
 * live line is overwritten. From then on, for a grace period G, nobody changes the bytes of the extent. We
 * READ live line and payload by one READ, and accept only if
 *   1. the line carries the key, the length and the generation that we expected, and
 *   2. that READ took less than G/2 from its post to its completion.
 * By (1) the block was published at some moment after the post. So it was unpublished, if at all, later than
 * the post, and its bytes could not change before post + G. By (2) all of them were sampled before post +
 * G/2. In which order the device sampled them does not matter, nor what any bus reorders. The four premises:
 *   (a) nothing writes an extent between its publication and the end of its quarantine;
 *   (b) a live line appears only by a store of the node's CPU after the fill has completed;
 *   (c) our clock counts real time;
 *   (d) the place of a live line never becomes payload.
 * (a), (b) and (d) are the node's to keep (store/native). (c) fails in a virtual machine that is paused: the
 * clock stands while the node's goes on. *Strict* readers therefore use the node's own: its epoch, which the
 * quarantine timer itself advances, an extent being free again only five ticks after it was unpublished.
 * Knowing that the epoch was e0 before the post, we READ the epoch line again after the completion, and
 * accept if it has moved by three at most: the bytes were sampled before tick e0 + 4, and could change at e0
 * + 5 at the earliest. On tcp the responder itself says how long it was at it from the first byte to the
 * last, by the clock that also times the quarantine; that is exact, and the reader's clock is not asked at
 * all.
 *
 * A key under way is a "flight" and takes at most two READs at once; the channel must carry 2 · nflights + 1
 * (the epoch line), so that posting never finds it full. Nothing here waits or allocates.
 */
#include <string.h>

#include "store.h"
#include "get.h"

enum { LOOKUP, BLOCK };
enum { EPOCH_UNKNOWN, EPOCH_ASKED, EPOCH_KNOWN, EPOCH_CONFIRMING };

#define COOKIE_EPOCH UINT64_MAX
#define EPOCH_BATCH  512 /* provisional hits that make us ask for the epoch although more is to come */
#define MIN_WINDOW   (256u << 10)
#define START_WINDOW (16u << 20)
#define STRICT_MOVES 3u

static inline uint32_t key_of(const struct mkv_getjob *g, uint32_t position) {
    return g->index ? g->index[position] : position;
}

static inline const uint8_t *key_bytes(const struct mkv_getjob *g, uint32_t position) {
    return g->keys + (uint64_t)key_of(g, position) * MKV_KEY_BYTES;
}

static inline uint8_t *flight_scratch(const struct mkv_getjob *g, uint32_t f) {
    return g->scratch + (uint64_t)f * MKV_FLIGHT_SCRATCH;
}

static inline uint64_t scratch_at(const struct mkv_getjob *g, const uint8_t *p) {
    return g->scratch_offset + (uint64_t)(p - g->scratch);
}

static inline uint8_t *epoch_scratch(const struct mkv_getjob *g) {
    return flight_scratch(g, g->nflights);
}

/* Number i of the keys whose payload is here and whose epoch is not judged yet. A ring: a key may come by
 * twice, but never while it is in it, so that there is room for n. */
static inline uint32_t *provisional_at(const struct mkv_getjob *g, uint32_t i) {
    return &g->strict_scratch[i % g->n];
}
static inline uint32_t *provisional_epoch(const struct mkv_getjob *g) {
    return g->strict_scratch + g->n;
}
static inline uint32_t *redo_list(const struct mkv_getjob *g) {
    return g->strict_scratch + 2 * (uint64_t)g->n;
}

static void count(uint64_t *counter, uint64_t by) {
    __atomic_fetch_add(counter, by, __ATOMIC_RELAXED);
}

/* --- verdicts --- */

static void settle(struct mkv_getjob *g, uint32_t position, uint8_t status, uint64_t posted_ns) {
    uint32_t k = key_of(g, position);
    g->status[k] = status;
    if (g->elapsed_us)
        g->elapsed_us[k] = posted_ns ? (uint32_t)((mkv_now_ns() - posted_ns) / 1000) : 0;
    g->finished++;
    g->hits += status == MKV_HIT;
    g->misses += status == MKV_MISS;
}

static void release(struct mkv_getjob *g, uint32_t f) {
    g->flights[f].position = g->free_flights;
    g->free_flights = f + 1;
}

static void land(struct mkv_getjob *g, uint32_t f, uint8_t status) {
    settle(g, g->flights[f].position, status, g->flights[f].posted_ns);
    release(g, f);
}

static uint8_t why_ended(const struct mkv_getjob *g, uint64_t now) {
    return now >= g->job.deadline_ns ? MKV_TIMEOUT : MKV_ERROR_LINK;
}

/* --- READs --- */

static int post_bucket(struct mkv_getjob *g, uint32_t f, int which, uint64_t bucket, uint32_t region) {
    uint8_t *into = flight_scratch(g, f) + 128 + which * sizeof(struct mkv_bucket);
    struct mkv_read r = {
        .cookie = (uint64_t)f,
        .offset = MKV_INDEX_HEADER + bucket * sizeof(struct mkv_bucket),
        .region = region,
        .nseg = 1,
        .seg = {{scratch_at(g, into), g->scratch_region, sizeof(struct mkv_bucket)}},
    };
    return g->job.ch->ops->post(g->job.ch, &r);
}

static void begin_lookup(struct mkv_getjob *g, uint32_t f) {
    struct mkv_flight *fl = &g->flights[f];
    uint64_t table = __atomic_load_n(&g->view->table, __ATOMIC_ACQUIRE), at[2];
    uint32_t region = MKV_TABLE_REGION + (uint32_t)(table >> 8);
    mkv_candidates(key_bytes(g, fl->position), g->view->salt, 1ull << (table & 0xff), at);
    fl->phase = LOOKUP;
    fl->reads_left = 0;
    fl->broken = 0;
    count(&g->view->lookups, 1);
    for (int i = 0; i < 2; i++) {
        int rc = post_bucket(g, f, i, at[i], region);
        if (!rc)
            fl->reads_left++;
        else if (rc == -ENOENT || rc == -ERANGE)
            __atomic_store_n(&g->view->table_changed, 1, __ATOMIC_RELAXED);
    }
    if (!fl->reads_left) /* broken channel, or a table that is gone: not known for this key */
        land(g, f, g->job.ch->broken ? MKV_ERROR_LINK : MKV_MISS);
    else if (fl->reads_left == 1)
        fl->broken = 1;
}

/* `cached`: the location is not of a look-up made just now. */
static void failed(struct mkv_getjob *g, uint32_t f);

static void begin_block(struct mkv_getjob *g, uint32_t f, int cached) {
    struct mkv_flight *fl = &g->flights[f];
    uint32_t k = key_of(g, fl->position), slab = mkv_location_slab(fl->slot.location);
    uint64_t payload = mkv_location_offset(fl->slot.location);
    uint8_t *line = flight_scratch(g, f);
    const struct mkv_slice *to = &g->slices[k];
    const struct mkv_region *known = mkv_table_get(g->job.ch->remote, slab);
    if (!known && cached) { /* it was retired since, most likely; the block may be elsewhere by now */
        mkv_cache_drop(g->view->cache, key_bytes(g, fl->position));
        count(&g->view->stale, 1);
        begin_lookup(g, f);
        return;
    }
    if (!known) {
        g->unknown++;
        land(g, f, MKV_PENDING);
        return;
    }
    if (payload < MKV_LINE_BYTES || !fl->slot.length || payload + fl->slot.length > known->length) {
        failed(g, f); /* a torn slot */
        return;
    }
    if (fl->slot.length > to->length) {
        land(g, f, MKV_ERROR_LENGTH);
        return;
    }
    memset(line, 0, MKV_LINE_BYTES);
    struct mkv_read r = {
        .cookie = (uint64_t)f,
        .offset = payload - MKV_LINE_BYTES,
        .region = slab,
        .nseg = 2,
        .seg = {{scratch_at(g, line), g->scratch_region, MKV_LINE_BYTES},
                {to->offset, to->region, fl->slot.length}},
    };
    fl->phase = BLOCK;
    fl->broken = 0;
    fl->reads_left = 1;
    fl->epoch = g->epoch;
    int rc = g->job.ch->ops->post(g->job.ch, &r);
    if (!rc)
        return;
    if (rc == -EPIPE)
        land(g, f, MKV_ERROR_LINK);
    else if (!mkv_table_get(g->job.ch->remote, slab)) /* withdrawn just now */
        failed(g, f);
    else
        land(g, f, MKV_ERROR_BOUNDS);
}

static void ask_epoch(struct mkv_getjob *g, uint32_t state) {
    uint64_t table = __atomic_load_n(&g->view->table, __ATOMIC_ACQUIRE);
    struct mkv_read r = {
        .cookie = COOKIE_EPOCH,
        .region = MKV_TABLE_REGION + (uint32_t)(table >> 8),
        .nseg = 1,
        .seg = {{scratch_at(g, epoch_scratch(g)), g->scratch_region, sizeof(struct mkv_epoch)}},
    };
    memset(epoch_scratch(g), 0, sizeof(struct mkv_epoch));
    if (!g->job.ch->ops->post(g->job.ch, &r)) {
        g->epoch_state = state;
        g->confirming = g->provisional;
    }
}

/* --- what came back --- */

static void failed(struct mkv_getjob *g, uint32_t f) {
    struct mkv_flight *fl = &g->flights[f];
    mkv_cache_drop(g->view->cache, key_bytes(g, fl->position));
    count(&g->view->stale, 1);
    if (fl->failures++ || g->job.ch->broken)
        land(g, f, MKV_STALE);
    else
        begin_lookup(g, f);
}

static int line_matches(const struct mkv_getjob *g, uint32_t f) {
    const struct mkv_flight *fl = &g->flights[f];
    struct mkv_line line;
    memcpy(&line, flight_scratch(g, f), sizeof line);
    return line.magic == MKV_LINE_MAGIC && line.version == MKV_LAYOUT_VERSION &&
           !memcmp(line.key, key_bytes(g, fl->position), MKV_KEY_BYTES) && line.length == fl->slot.length &&
           line.generation && (uint32_t)line.generation == fl->slot.generation;
}

static void note_checksum(const struct mkv_getjob *g, uint32_t f) {
    struct mkv_line line;
    memcpy(&line, flight_scratch(g, f), sizeof line);
    g->checksums[key_of(g, g->flights[f].position)] = line.checksum;
}

/* Whether one READ was quick enough: by the responder's clock, or ours. */
static int in_time(const struct mkv_getjob *g, const struct mkv_done *d) {
    uint64_t took = d->sample_ns != UINT64_MAX ? d->sample_ns : d->done_ns - d->posted_ns;
    if (g->view->test & MKV_TEST_NO_TIME_CHECK)
        return 1;
    if (g->view->test & MKV_TEST_FROZEN_CLOCK && d->sample_ns == UINT64_MAX)
        took = 0;
    return took < g->view->grace_ns / 2;
}

static int checksum_agrees(const struct mkv_getjob *g, uint32_t f) {
    const struct mkv_flight *fl = &g->flights[f];
    const struct mkv_slice *to = &g->slices[key_of(g, fl->position)];
    const struct mkv_region *region = mkv_table_get(g->job.ch->local, to->region);
    struct mkv_line line;
    memcpy(&line, flight_scratch(g, f), sizeof line);
    return region && region->base &&
           mkv_checksum((const void *)(uintptr_t)(region->base + to->offset), line.length) == line.checksum;
}

static void hit(struct mkv_getjob *g, uint32_t position, uint32_t length) {
    if (g->lengths)
        g->lengths[key_of(g, position)] = length;
    g->bytes += length;
}

static void block_done(struct mkv_getjob *g, uint32_t f, const struct mkv_done *d) {
    struct mkv_flight *fl = &g->flights[f];
    int strict = g->strict_scratch && d->sample_ns == UINT64_MAX;
    if (!line_matches(g, f) || (!strict && !in_time(g, d))) {
        failed(g, f);
        return;
    }
    if (g->checksum && !checksum_agrees(g, f)) {
        mkv_cache_drop(g->view->cache, key_bytes(g, fl->position));
        count(&g->view->corrupt, 1);
        land(g, f, MKV_CORRUPT);
        return;
    }
    if (g->checksums)
        note_checksum(g, f);
    if (strict) { /* a HIT if the epoch agrees */
        uint32_t last_try = fl->failures ? 1u << 31 : 0;
        *provisional_at(g, g->provisional++) = fl->position | last_try;
        provisional_epoch(g)[fl->position] = fl->epoch;
        hit(g, fl->position, fl->slot.length);
        release(g, f);
        return;
    }
    hit(g, fl->position, fl->slot.length);
    land(g, f, MKV_HIT);
}

/* The slot of a key in the buckets that were READ; a copy that a displacement left behind only if there is no
 * other. */
static int find(const struct mkv_getjob *g, uint32_t f, struct mkv_slot *out) {
    const uint8_t *key = key_bytes(g, g->flights[f].position);
    const uint8_t *buckets = flight_scratch(g, f) + 128;
    int found = 0;
    for (uint32_t i = 0; i < 2 * MKV_BUCKET_SLOTS; i++) {
        struct mkv_slot slot;
        memcpy(&slot, buckets + i * sizeof slot, sizeof slot);
        if (mkv_location_state(slot.location) == MKV_SLOT_EMPTY || memcmp(slot.key, key, MKV_KEY_BYTES))
            continue;
        *out = slot;
        found = 1;
        if (!mkv_location_moved(slot.location))
            break;
    }
    return found;
}

static void lookup_done(struct mkv_getjob *g, uint32_t f) {
    struct mkv_flight *fl = &g->flights[f];
    struct mkv_slot slot;
    if (fl->broken || !find(g, f, &slot)) {
        land(g, f, fl->broken ? MKV_ERROR_LINK : MKV_MISS);
        return;
    }
    slot.location &= ~MKV_LOCATION_MOVED;
    int live = mkv_location_state(slot.location) == MKV_SLOT_LIVE;
    if (live)
        mkv_cache_put(g->view->cache, &slot);
    if (!g->slices) {
        hit(g, fl->position, slot.length);
        land(g, f, MKV_HIT);
    } else if (!live) {
        g->cold++;
        land(g, f, MKV_COLD);
    } else {
        fl->slot = slot;
        begin_block(g, f, 0);
    }
}

/* The epoch line is here: it starts the batch, or judges the hits that were complete when it was asked for.
 */
static void epoch_done(struct mkv_getjob *g, const struct mkv_done *d) {
    struct mkv_epoch e;
    memcpy(&e, epoch_scratch(g), sizeof e);
    int good = !d->status && e.magic == MKV_EPOCH_MAGIC && e.incarnation == g->view->incarnation;
    if (good && e.table != __atomic_load_n(&g->view->table, __ATOMIC_RELAXED) >> 8)
        __atomic_store_n(&g->view->table_changed, 1, __ATOMIC_RELAXED);
    for (; g->confirmed < g->confirming; g->confirmed++) {
        uint32_t entry = *provisional_at(g, g->confirmed), position = entry & ~(1u << 31);
        if (good && (uint32_t)e.epoch - provisional_epoch(g)[position] <= STRICT_MOVES) {
            settle(g, position, MKV_HIT, d->posted_ns);
            continue;
        }
        mkv_cache_drop(g->view->cache, key_bytes(g, position));
        count(&g->view->stale, 1);
        if (good && !(entry >> 31))
            redo_list(g)[g->redo++] = position;
        else
            settle(g, position, good ? MKV_STALE : MKV_ERROR_LINK, d->posted_ns);
    }
    g->epoch_state = good ? EPOCH_KNOWN : EPOCH_UNKNOWN;
    if (!good && !g->job.ch->broken) /* not the node that we connected to */
        g->job.ch->ops->abort(g->job.ch);
    if (good) {
        g->epoch = (uint32_t)e.epoch;
        __atomic_store_n(&g->view->epoch, e.epoch, __ATOMIC_RELAXED);
        __atomic_store_n(&g->view->epoch_ns, d->posted_ns, __ATOMIC_RELAXED);
    }
}

static void read_done(struct mkv_getjob *g, const struct mkv_done *d) {
    if (d->cookie == COOKIE_EPOCH) {
        epoch_done(g, d);
        return;
    }
    uint32_t f = (uint32_t)d->cookie;
    struct mkv_flight *fl = &g->flights[f];
    if (!fl->posted_ns)
        fl->posted_ns = d->posted_ns;
    fl->broken |= d->status && d->status != -ENOENT;
    if (--fl->reads_left)
        return;
    if (d->status == -ENOENT && !fl->broken) /* its slab or table was withdrawn while the READ was queued */
        failed(g, f);
    else if (fl->broken)
        land(g, f, why_ended(g, d->done_ns));
    else if (fl->phase == LOOKUP)
        lookup_done(g, f);
    else
        block_done(g, f, d);
}

/* --- the job --- */

static void start_key(struct mkv_getjob *g, uint32_t position, int again) {
    uint32_t f = g->free_flights - 1;
    struct mkv_flight *fl = &g->flights[f];
    g->free_flights = fl->position;
    fl->position = position;
    fl->failures = (uint8_t)again;
    fl->posted_ns = 0;
    if (g->places && !again && g->places[key_of(g, position)].location) {
        fl->slot = g->places[key_of(g, position)];
        begin_block(g, f, 0);
    } else if (g->slices && !again && !g->fresh &&
               mkv_cache_get(g->view->cache, key_bytes(g, position), &fl->slot)) {
        count(&g->view->cached, 1);
        begin_block(g, f, 1);
    } else {
        begin_lookup(g, f);
    }
}

static int start_keys(struct mkv_getjob *g) {
    int any = 0;
    if (g->strict_scratch && g->epoch_state == EPOCH_UNKNOWN) {
        ask_epoch(g, EPOCH_ASKED);
        any = g->epoch_state == EPOCH_ASKED; /* to be flushed, like the rest */
    }
    while (g->free_flights && (g->epoch_state >= EPOCH_KNOWN || !g->strict_scratch)) {
        if (g->redone < g->redo)
            start_key(g, redo_list(g)[g->redone++], 1);
        else if (g->next < g->n)
            start_key(g, g->next++, 0);
        else
            break;
        any = 1;
    }
    return any;
}

/* Nothing is under way any more and the job has to end: what is left gets the reason. */
static void give_up(struct mkv_getjob *g, uint64_t now) {
    uint8_t why = why_ended(g, now);
    for (; g->confirmed < g->provisional; g->confirmed++)
        settle(g, *provisional_at(g, g->confirmed) & ~(1u << 31), why, 0);
    for (; g->redone < g->redo; g->redone++)
        settle(g, redo_list(g)[g->redone], why, 0);
    for (; g->next < g->n; g->next++)
        settle(g, g->next, why, 0);
}

static void learn_rate(struct mkv_getjob *g) {
    uint64_t took = g->job.ended_ns - g->job.started_ns,
             old = __atomic_load_n(&g->view->rate, __ATOMIC_RELAXED);
    if (g->bytes < MIN_WINDOW || !took)
        return;
    uint64_t now = (uint64_t)((double)g->bytes * 1e9 / (double)took);
    __atomic_store_n(&g->view->rate, old ? (old * 3 + now) / 4 : now, __ATOMIC_RELAXED);
}

static void finish(struct mkv_getjob *g, int32_t rc) {
    count(&g->view->hits, g->hits);
    count(&g->view->misses, g->misses);
    count(&g->view->errors, g->n - g->hits - g->misses - g->cold);
    count(&g->view->bytes, g->bytes);
    g->job.ended_ns = mkv_now_ns();
    learn_rate(g);
    mkv_job_finish(&g->job, rc);
}

static int step(struct mkv_job *job) {
    struct mkv_getjob *g = (struct mkv_getjob *)job;
    struct mkv_channel *ch = job->ch;
    struct mkv_done done[32];
    uint64_t now = mkv_now_ns();
    int end = mkv_job_must_end(job, now), progress = 0, n;
    if (!end && start_keys(g)) {
        ch->ops->flush(ch);
        progress = 1;
    }
    while ((n = ch->ops->poll(ch, done, 32)) > 0) {
        progress = 1;
        for (int i = 0; i < n; i++)
            read_done(g, &done[i]);
        if (!end)
            start_keys(g);
        ch->ops->flush(ch);
    }
    if (!end && g->strict_scratch && g->epoch_state == EPOCH_KNOWN && g->provisional > g->confirmed &&
        (!ch->busy || g->provisional - g->confirmed >= EPOCH_BATCH)) {
        ask_epoch(g, EPOCH_CONFIRMING);
        ch->ops->flush(ch);
        progress = 1;
    }
    if (end || ch->broken) {
        if (ch->busy && !job->undrained)
            return progress;
        if (!job->undrained)
            give_up(g, now);
        finish(g, now >= job->deadline_ns ? -ETIMEDOUT : ch->broken);
        return 1;
    }
    if (g->finished == g->n) {
        finish(g, 0);
        return 1;
    }
    return progress;
}

void mkv_getjob_init(struct mkv_getjob *g, struct mkv_channel *ch, uint64_t timeout_ns) {
    uint64_t now = mkv_now_ns(), rate = __atomic_load_n(&g->view->rate, __ATOMIC_RELAXED);
    uint64_t window = rate ? (uint64_t)((double)rate * (double)g->view->grace_ns / 8e9) : START_WINDOW;
    g->job = (struct mkv_job){.step = step, .ch = ch, .deadline_ns = now + timeout_ns, .started_ns = now};
    ch->window = window < MIN_WINDOW ? MIN_WINDOW : window;
    g->next = g->finished = g->unknown = g->cold = g->hits = g->misses = 0;
    g->provisional = g->confirmed = g->confirming = g->redo = g->redone = 0;
    g->bytes = 0;
    g->epoch_state = EPOCH_UNKNOWN;
    if (g->strict_scratch && now - g->view->epoch_ns < g->view->grace_ns / 8) {
        g->epoch = (uint32_t)__atomic_load_n(&g->view->epoch, __ATOMIC_RELAXED);
        g->epoch_state = EPOCH_KNOWN;
    }
    g->free_flights = 0;
    for (uint32_t f = g->nflights; f-- > 0;)
        release(g, f);
}

uint32_t mkv_getjob_repeat(struct mkv_getjob *g, void (*run)(struct mkv_job *), uint64_t timeout_ns,
                           uint32_t count, uint64_t *took_ns) {
    struct mkv_channel *ch = g->job.ch;
    uint32_t good = 0;
    for (uint32_t i = 0; i < count; i++) {
        mkv_getjob_init(g, ch, timeout_ns);
        run(&g->job);
        took_ns[i] = g->job.ended_ns - g->job.started_ns;
        good += g->hits == g->n;
        if (g->job.rc) /* the channel may be of no more use */
            return good;
    }
    return good;
}
