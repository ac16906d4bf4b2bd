/* store.h: the node's data structures, as Python (through cffi) and put.c see them.
 *
 *   mkv_arena   one mapping of the node's memory, cut into slabs of equal size
 *     └─ mkv_ns   a namespace: an index, slabs that it holds, SIEVE queues per size class, quarantine
 *
 * Every call takes a batch and may be made from any thread (a namespace has one mutex; checksums are computed
 * outside it). Peers READ the index and the slabs meanwhile and take no lock: what keeps them safe stands at
 * the head of quarantine.c. Nothing here allocates per block after a namespace and its slabs are made.
 */
#ifndef MKV_STORE_H
#define MKV_STORE_H

#include <stddef.h>
#include <stdint.h>
#include "layout.h"

/* cdef */
struct mkv_arena;
struct mkv_ns;

/* --- checksum.c --- XXH3-64 over fixed chunks: see docs/layout.md, "Checksum". */
#define MKV_CHUNK_BYTES 16384u
uint64_t mkv_checksum(const void *data, uint64_t length);

/* --- arena.c: the arena, its slabs, the timer --- */

/* Cuts `bytes` at `base` (page-aligned, zeroed, the caller's mapping, which must outlive the arena) into
 * slabs of `slab_bytes` (a multiple of 4096, at most MKV_SLAB_MAX_BYTES). `incarnation`: of the node, random,
 * not 0. Starts the timer thread. NULL with errno on error. */
struct mkv_arena *mkv_arena_new(void *base, uint64_t bytes, uint64_t slab_bytes, uint64_t incarnation);
void mkv_arena_free(struct mkv_arena *a); /* after all its namespaces; joins the timer thread */

/* An eventfd that becomes readable when Python has housekeeping to do (mkv_ns_chores says what). */
int mkv_arena_eventfd(const struct mkv_arena *a);
uint64_t mkv_arena_free_slabs(const struct mkv_arena *a);
/* Where the slab lies that would be taken after i others. 0, or -ENOENT: there are not so many. */
int mkv_arena_next(struct mkv_arena *a, uint64_t i, uint64_t *address);

/* --- namespace.c: one tenant's blocks --- */

/* block_bytes: the longest payload (up to what one extent in one slab can hold); align: 512 or 4096;
 * grace_ns: G, the time that an extent spends in quarantine; salt: of the index hash. The timer ticks the
 * namespace every grace_ns/4, never sooner after the last tick. NULL with errno on error. */
struct mkv_ns *mkv_ns_new(struct mkv_arena *a, uint32_t id, uint32_t block_bytes, uint32_t align,
                          uint64_t grace_ns, uint64_t salt);
void mkv_ns_free(struct mkv_ns *ns); /* its slabs go back to the arena (zeroed), its tables are unmapped */

/* Housekeeping that needs Python, because memory must be registered or sessions must agree. Bits: */
#define MKV_CHORE_SLAB   1u /* extents of some class run out: take a slab, register it, say ready */
#define MKV_CHORE_RETIRE 2u /* a retired slab has served its quarantine: deregister it, say released */
#define MKV_CHORE_TABLE  4u /* the index is nearly full: prepare, register, switch */
uint32_t mkv_ns_chores(struct mkv_ns *ns);

struct mkv_span { /* a slab or a table, as Python registers it */
    uint64_t id;  /* slab id, or table version */
    uint64_t address;
    uint64_t bytes;
    uint64_t buckets; /* tables only */
};
/* A free slab for the class that wants one. 0; -ENOENT: none wanted; -ENOMEM: the arena has none (then a slab
 * of another class of this namespace is retired if that class has more than its share, and CHORE_RETIRE
 * follows in time). After registration and announcement `ready` lets blocks be stored in it. */
int mkv_ns_slab_take(struct mkv_ns *ns, struct mkv_span *out);
int mkv_ns_slab_ready(struct mkv_ns *ns, uint64_t id);
/* Full retirement: every block of the slab is unpublished at once; pinned blocks too. After the grace period
 * it is reported by mkv_ns_slab_retired (0, or -ENOENT), and after mkv_ns_slab_released the memory, zeroed,
 * is the arena's again under a new id. mkv_ns_slab_retire(id 0) picks the slab with the fewest live blocks.
 */
int mkv_ns_slab_retire(struct mkv_ns *ns, uint64_t id);
int mkv_ns_slab_retired(struct mkv_ns *ns, uint64_t *id);
int mkv_ns_slab_released(struct mkv_ns *ns, uint64_t id);

/* The index. prepare maps an empty table twice the size; switch rehashes into it and puts its version in
 * force (in the epoch line of every table that still exists); the old one stays readable, frozen, its epoch
 * line still ticking, until drop. */
int mkv_ns_table(struct mkv_ns *ns, struct mkv_span *out); /* the one in force */
int mkv_ns_table_prepare(struct mkv_ns *ns, struct mkv_span *out);
int mkv_ns_table_switch(struct mkv_ns *ns, uint64_t version);
int mkv_ns_table_drop(struct mkv_ns *ns, uint64_t version);

/* Batches of n keys of 16 bytes. Statuses are written per key; the return value counts the good ones. */
uint32_t mkv_ns_lookup(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint8_t *status);
uint32_t mkv_ns_match(struct mkv_ns *ns, const uint8_t *keys, uint32_t n); /* longest prefix that is held */
uint32_t mkv_ns_touch(struct mkv_ns *ns, const uint8_t *keys, uint32_t n);
uint32_t mkv_ns_pin(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint64_t ttl_ns, uint8_t *status);
uint32_t mkv_ns_unpin(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint8_t *status);
uint32_t mkv_ns_delete(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint8_t *status);

/* --- filling an extent: begin, bring the payload, publish or abandon --- */
struct mkv_fill {
    uint64_t slab;   /* region id */
    uint64_t offset; /* of the payload in the slab */
    uint64_t address;
    uint32_t extent; /* the namespace's own handle */
    uint32_t length;
    uint32_t doubtful; /* MKV_EXISTS: on flash, where a scan found it; it may be torn (mkv_ns_verified) */
    uint32_t spare;
};
/* MKV_PENDING: an extent is set aside (one more eviction may have been started); MKV_EXISTS: the key is held
 * already (and counts as touched); MKV_ERROR_FULL: no extent is free *now* (ask again after a tick);
 * MKV_ERROR_TOO_LARGE, MKV_ERROR_LENGTH (0). */
int mkv_fill_begin(struct mkv_ns *ns, const uint8_t key[16], uint32_t length, struct mkv_fill *out);
/* The payload is in place and its checksum is `checksum`: writes cold record, live line and slot, in that
 * order. MKV_STORED; MKV_EXISTS (another put was faster; the extent is free again at once, it was never
 * visible); MKV_ERROR_FULL (no slot, index in need of growth). */
int mkv_fill_publish(struct mkv_ns *ns, const struct mkv_fill *fill, const uint8_t key[16],
                     uint64_t checksum);
/* Nothing may still be writing into it. */
void mkv_fill_abandon(struct mkv_ns *ns, const struct mkv_fill *fill);

struct mkv_ns_stats { /* gauges, then counters since the namespace was made */
    uint64_t blocks, bytes, slots, buckets, table_version, slabs, extents, extents_free, extents_filling,
        extents_quarantine, extents_idle, extents_pinned, pinned_bytes, epoch;
    uint64_t puts, put_bytes, duplicates, evictions, evicted_bytes, deletes, touches, lookups, lookup_hits,
        full, displacements, grows, slabs_retired;
};
void mkv_ns_stats(struct mkv_ns *ns, struct mkv_ns_stats *out);

/* Checks every invariant that the property tests rely on (counts, lists, each slot's extent, no extent in two
 * places): 0, or a line number of the check that failed. */
int mkv_ns_check(struct mkv_ns *ns);

/* For tests: a tick at once, whatever the time. It breaks the promise that five ticks span a grace period, so
 * it is for namespaces that nobody reads, made with a grace period so long that the timer's own ticks never
 * come. */
void mkv_ns_tick_now(struct mkv_ns *ns);
/* end cdef */

#endif
