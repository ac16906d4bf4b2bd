/* get.h: the job behind get, exists and match: find blocks by one-sided READs, READ them, verify them.
 *
 *                      staged for us, or cached ─────┐
 *   key ─► cache ─┤                                  ├─► READ live line + payload ─► verify ─► HIT
 *                      not ─► READ both buckets ─► found        │ fails once: look up again
 *                                               ├► in flash: COLD  └ fails twice: STALE
 *                                               └► MISS
 *
 * The argument for "verify" stands at the head of get.c.
 */
#ifndef MKV_GET_H
#define MKV_GET_H

#include "cache.h"
#include "job.h"
#include "layout.h"

#define MKV_FLIGHT_SCRATCH 640      /* per key under way: live line 64, spare 64, two buckets 512 */
#define MKV_TABLE_REGION   0x100000 /* region id of an index table: this plus its version */

/* For tests that prove that the attack tests can fail. */
#define MKV_TEST_NO_TIME_CHECK 1
#define MKV_TEST_FROZEN_CLOCK  2 /* the reader's clock stands still, as in a paused virtual machine */

struct mkv_view { /* a namespace on one node, as the jobs of one peer see it */
    uint64_t salt;
    uint64_t grace_ns;
    uint64_t incarnation; /* of the node */
    uint64_t table;       /* in force: version << 8 | log2(buckets); replaced as one word */
    uint64_t epoch;       /* newest seen */
    uint64_t epoch_ns;    /* when, by our clock: a hint, never proof */
    uint64_t rate;        /* bytes per second lately */
    struct mkv_cache *cache;
    uint32_t strict;        /* verify by epochs, not by our clock */
    uint32_t test;          /* MKV_TEST_* */
    uint32_t table_changed; /* an epoch line named another table: ask the node */
    uint32_t spare;
    uint64_t hits, misses, stale, corrupt, errors, bytes, lookups, cached; /* relaxed counters */
};

struct mkv_slice { /* where a block goes, or comes from */
    uint64_t offset;
    uint32_t region; /* id of a registered buffer */
    uint32_t length; /* room */
};

/* What the job notes about each key under way. */
struct mkv_flight {
    struct mkv_slot slot; /* the location that is being tried */
    uint64_t posted_ns;   /* of its first READ */
    uint32_t position;    /* in the job's list; links free flights */
    uint32_t epoch;
    uint8_t phase, failures, reads_left, broken;
};

struct mkv_getjob {
    struct mkv_job job;
    struct mkv_view *view;
    const uint8_t *keys;            /* 16 bytes each */
    const uint32_t *index;          /* which of them are ours; NULL: the first n */
    const struct mkv_slice *slices; /* by key; NULL: only look up, do not READ payloads */
    const struct mkv_slot *places;  /* by key: where the node said that a block was staged, for us alone; with
                                       location 0 it said nothing; NULL: about none */
    uint8_t *status;                /* by key, MKV_*; MKV_PENDING remains where a slab is not known yet */
    uint32_t *lengths;              /* by key: payload bytes of a HIT; may be NULL */
    uint64_t *checksums;            /* by key: of a HIT, from its live line; may be NULL */
    uint32_t *elapsed_us;           /* by key: from its first READ to its verdict; may be NULL */
    uint32_t *strict_scratch;       /* 3 n words if view->strict, else NULL */
    struct mkv_flight *flights;
    uint8_t *scratch;        /* nflights * MKV_FLIGHT_SCRATCH + 64 bytes, registered for local writes … */
    uint64_t scratch_offset; /* … in this region */
    uint32_t scratch_region;
    uint32_t nflights; /* the channel's depth is at least 2 nflights + 1 */
    uint32_t n;
    uint32_t checksum; /* nonzero: verify payload checksums (host memory only) */
    uint32_t fresh;    /* nonzero: do not trust the location cache */
    /* state */
    uint32_t next, finished, free_flights, unknown, cold;
    uint32_t provisional, confirmed, confirming, redo, redone;
    uint32_t epoch_state, epoch;
    uint32_t hits, misses;
    uint64_t bytes;
};

/* Prepares a job whose fields above "state" are set; the deadline is timeout_ns from now. */
void mkv_getjob_init(struct mkv_getjob *g, struct mkv_channel *ch, uint64_t timeout_ns);

/* For benchmarks: a prepared job `count` times back to back, as perftest does it, by `run` (mkv_run_one).
 * What each took goes into took_ns; returns how many of them had all their keys. */
uint32_t mkv_getjob_repeat(struct mkv_getjob *g, void (*run)(struct mkv_job *), uint64_t timeout_ns,
                           uint32_t count, uint64_t *took_ns);

#endif
