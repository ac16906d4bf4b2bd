/* index.h: the hash table that peers read, in the layout of docs/layout.md.
 *
 * Two candidate buckets of eight slots for each key. A full pair of buckets is relieved by *displacement*: an
 * entry goes to its other bucket, and its old slot keeps a copy, marked as moved, for the grace period.
 * Without the copy, a reader that saw the one bucket before the move and the other bucket after it would take
 * a block that was there all the time for a miss.
 *
 * The price is that a displacement does not make room at once but after the grace period. So buckets are
 * relieved ahead of need (when they become full), and an insertion that finds both of its buckets full starts
 * a displacement and says -EAGAIN. Up to five eighths of full this does not happen, and there the namespace
 * asks for a larger table; random keys fill a table to more than nine tenths if somebody waits for the room.
 *
 * One writer at a time (the namespace's lock); readers take no lock. An index allocates when it is made,
 * never later.
 */
#ifndef MKV_INDEX_H
#define MKV_INDEX_H

#include "layout.h"

/* Ticks from taking something out of sight to using its memory again: five ticks of a quarter of the grace
 * period span at least four whole intervals, whenever in the first one they began. See quarantine.c. */
#define MKV_GRACE_TICKS 5

/* cdef */
struct mkv_index; /* fields below, for C only */

/* An empty table. buckets: a power of two, at least 2. NULL with errno on error. */
struct mkv_index *mkv_index_new(uint64_t buckets, uint64_t salt, uint64_t version, uint64_t incarnation);
/* Unmaps it: nobody may read it any more. This function can't fail. */
void mkv_index_free(struct mkv_index *ix);
/* The region that peers read. */
uint8_t *mkv_index_base(const struct mkv_index *ix);
uint64_t mkv_index_bytes(const struct mkv_index *ix);

/* The entry of a key into `out`: 1, or 0 if there is none. */
int mkv_index_find(const struct mkv_index *ix, const uint8_t key[16], struct mkv_slot *out);
/* Whether an insertion of that key would succeed now: 0; -EEXIST: the key is there; -EAGAIN: no, but room
 * will be made (ask again after the grace period); -ENOSPC: no, and nothing can be displaced: the table must
 * grow. */
int mkv_index_room(struct mkv_index *ix, const uint8_t key[16]);
/* Inserts an entry, whose location must not be zero or moved. Errors as above. */
int mkv_index_insert(struct mkv_index *ix, const struct mkv_slot *entry);
/* Changes the entry of that key in place, between LIVE and FLASH or to another place on flash; its location
 * must not be moved. 0 or -ENOENT. */
int mkv_index_change(struct mkv_index *ix, const struct mkv_slot *entry);
/* Takes an entry and its moved copies out of sight. 0 or -ENOENT. */
int mkv_index_remove(struct mkv_index *ix, const uint8_t key[16]);

/* One tick: writes the epoch line and, unless `keep`, empties the slots of moved copies that have served the
 * grace period. Returns how many. This function can't fail. */
uint64_t mkv_index_tick(struct mkv_index *ix, uint64_t epoch, uint64_t table, int keep);

uint64_t mkv_index_entries(const struct mkv_index *ix);       /* keys */
uint64_t mkv_index_copies(const struct mkv_index *ix);        /* slots that hold moved copies */
uint64_t mkv_index_displacements(const struct mkv_index *ix); /* since it was made */

/* Every invariant of the table: 0, or the line number of the check that failed. */
int mkv_index_check(const struct mkv_index *ix);
/* end cdef */

struct mkv_moved { /* a moved copy that waits for its grace period to end */
    uint64_t slot; /* bucket * 8 + place */
    uint64_t epoch;
    uint64_t
        generation; /* of the copy: if the slot has another one, it was emptied and used again meanwhile */
};

struct mkv_index {
    struct mkv_epoch *epoch; /* the region starts with it */
    struct mkv_bucket *bucket;
    uint64_t bytes;
    uint64_t buckets;
    uint64_t salt;
    uint64_t version;
    uint64_t entries;
    uint64_t copies;
    uint64_t displacements;
    struct mkv_moved *ring; /* oldest first, from `first` to `next`; a power of two long */
    uint64_t ring_mask;
    uint64_t first;
    uint64_t next;
};

/* Asks for the cache lines in which the locations of both candidate buckets begin. */
static inline void mkv_index_prefetch(const struct mkv_index *ix, const uint8_t key[16]) {
    uint64_t at[2];
    mkv_candidates(key, ix->salt, ix->buckets, at);
    for (int i = 0; i < 2; i++)
        for (int line = 0; line < 4; line++)
            __builtin_prefetch((const char *)&ix->bucket[at[i]] + 64 * line);
}

#endif
