/* index.c: the hash table that peers read while it changes.
 *
 * Who writes: one thread at a time, under the namespace's lock. Who reads: that thread, and any number of
 * peers by READs of whole buckets, which may sample the eight words of two slots in any order.
 *
 * Why a stale or torn read is harmless. A slot is only a hint: before a peer posts, it checks slab and offset
 * against the slab table, and the block's live line must then repeat key, length and generation. So a torn
 * slot costs one wasted READ. To make even that rare, an entry is written into an *empty* slot, location word
 * last, and taken away by zeroing the location word; a location word is never changed from one block's to
 * another's without having been zero. Two changes are made in place, each within the one word: the moved bit,
 * which does not change where the word points, and the step between LIVE and FLASH of the same block. When a
 * block becomes LIVE its new generation is written first: together with the old location, which says FLASH,
 * it means nothing, and the old generation with the new location agrees with no line, for it never recurs.
 *
 * Why displacement causes no false miss. An entry is written into its other bucket before the old slot is
 * marked, and the old slot stays readable until the tick that ends its grace period. A reader whose two
 * bucket READs both lie within the grace period therefore sees the key in at least one of them, in whatever
 * order they were sampled.
 */
#include "index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SEARCH_MAX 256        /* buckets that a search for room looks at */
#define COPIES_MAX (1u << 20) /* moved copies at a time, in large tables */
#define COPIES_MIN 64u        /* and in small ones */
#define PAGE_ROUND 4095ull

typedef uint64_t __attribute__((may_alias)) word; /* a slot as four words, whatever its fields are */

static inline void store_word(void *at, uint64_t value) {
    __atomic_store_n((word *)at, value, __ATOMIC_RELAXED);
}
static inline void store_word_last(void *at, uint64_t value) {
    __atomic_store_n((word *)at, value, __ATOMIC_RELEASE);
}

static void write_slot(struct mkv_slot *s, const struct mkv_slot *entry) {
    word from[4];
    memcpy(from, entry, sizeof from);
    for (int i = 0; i < 3; i++)
        store_word((word *)s + i, from[i]);
    store_word_last(&s->location, from[3]);
}

static inline int is_empty(const struct mkv_slot *s) {
    return s->location == 0;
}
static inline int is_moved(const struct mkv_slot *s) {
    return (s->location & MKV_LOCATION_MOVED) != 0;
}
static inline int has_key(const struct mkv_slot *s, const uint8_t key[16]) {
    return !memcmp(s->key, key, 16);
}

static inline void candidates(const struct mkv_index *ix, const uint8_t key[16], uint64_t out[2]) {
    mkv_candidates(key, ix->salt, ix->buckets, out);
}

/* The bucket in which the entry of slot `s`, now in bucket `b`, could be as well. */
static uint64_t other_bucket(const struct mkv_index *ix, const struct mkv_slot *s, uint64_t b) {
    uint64_t at[2];
    candidates(ix, s->key, at);
    return at[0] == b ? at[1] : at[0];
}

static unsigned empties(const struct mkv_bucket *b) {
    unsigned n = 0;
    for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++)
        n += is_empty(&b->slot[i]);
    return n;
}

static struct mkv_slot *find_empty(struct mkv_bucket *b) {
    for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++)
        if (is_empty(&b->slot[i]))
            return &b->slot[i];
    return NULL;
}

static int holds_copy(const struct mkv_bucket *b) {
    for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++)
        if (is_moved(&b->slot[i]))
            return 1;
    return 0;
}

static const struct mkv_slot *find(const struct mkv_index *ix, const uint8_t key[16], const uint64_t at[2]) {
    for (int c = 0; c < 2; c++) {
        const struct mkv_bucket *b = &ix->bucket[at[c]];
        for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++)
            if (!is_empty(&b->slot[i]) && !is_moved(&b->slot[i]) && has_key(&b->slot[i], key))
                return &b->slot[i];
    }
    return NULL;
}

/* --- making and freeing --- */

static void *map(uint64_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

struct mkv_index *mkv_index_new(uint64_t buckets, uint64_t salt, uint64_t version, uint64_t incarnation) {
    if (buckets < 2 || buckets & (buckets - 1) || buckets > 1ull << 40) {
        errno = EINVAL;
        return NULL;
    }
    struct mkv_index *ix = calloc(1, sizeof *ix);
    if (!ix)
        return NULL;
    uint64_t ring = buckets; /* an eighth of the slots */
    ring = ring < COPIES_MIN ? COPIES_MIN : ring > COPIES_MAX ? COPIES_MAX : ring;
    ix->bytes = (MKV_INDEX_HEADER + buckets * sizeof(struct mkv_bucket) + PAGE_ROUND) & ~PAGE_ROUND;
    ix->epoch = map(ix->bytes);
    ix->ring = map(ring * sizeof *ix->ring);
    ix->ring_mask = ring - 1;
    ix->buckets = buckets;
    ix->salt = salt;
    ix->version = version;
    if (!ix->epoch || !ix->ring) {
        mkv_index_free(ix);
        errno = ENOMEM;
        return NULL;
    }
    (void)madvise(ix->epoch, ix->bytes, MADV_HUGEPAGE); /* fewer TLB misses where it is granted */
    ix->bucket = (struct mkv_bucket *)((char *)ix->epoch + MKV_INDEX_HEADER);
    *ix->epoch = (struct mkv_epoch){.magic = MKV_EPOCH_MAGIC,
                                    .version = MKV_LAYOUT_VERSION,
                                    .incarnation = incarnation,
                                    .table = version,
                                    .buckets = buckets};
    return ix;
}

void mkv_index_free(struct mkv_index *ix) {
    if (!ix)
        return;
    if (ix->epoch)
        munmap(ix->epoch, ix->bytes);
    if (ix->ring)
        munmap(ix->ring, (ix->ring_mask + 1) * sizeof *ix->ring);
    free(ix);
}

uint8_t *mkv_index_base(const struct mkv_index *ix) {
    return (uint8_t *)ix->epoch;
}
uint64_t mkv_index_bytes(const struct mkv_index *ix) {
    return ix->bytes;
}
uint64_t mkv_index_entries(const struct mkv_index *ix) {
    return ix->entries;
}
uint64_t mkv_index_copies(const struct mkv_index *ix) {
    return ix->copies;
}
uint64_t mkv_index_displacements(const struct mkv_index *ix) {
    return ix->displacements;
}

/* --- displacement --- */

/* Copies the entry of `from` (in bucket b) to an empty slot of its other bucket and marks the old one as
 * moved. 0, or -EAGAIN if too many copies wait already, or the other bucket is full. */
static int displace(struct mkv_index *ix, struct mkv_slot *from, uint64_t to) {
    struct mkv_slot *room = find_empty(&ix->bucket[to]);
    if (!room || ix->next - ix->first > ix->ring_mask)
        return -EAGAIN;
    write_slot(room, from);
    store_word_last(&from->location, from->location | MKV_LOCATION_MOVED);
    ix->ring[ix->next++ & ix->ring_mask] = (struct mkv_moved){.slot = (uint64_t)(from - ix->bucket[0].slot),
                                                              .epoch = ix->epoch->epoch,
                                                              .generation = from->generation};
    ix->copies++;
    ix->displacements++;
    return 0;
}

/* Bucket b has just become full: moves one entry to a bucket that keeps an empty slot even then, if there is
 * one. */
static void relieve(struct mkv_index *ix, uint64_t b) {
    struct mkv_bucket *full = &ix->bucket[b];
    if (holds_copy(full))
        return; /* room is on its way */
    for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++) {
        uint64_t to = other_bucket(ix, &full->slot[i], b);
        if (empties(&ix->bucket[to]) >= 2) {
            (void)displace(ix, &full->slot[i], to);
            return;
        }
    }
}

/* Breadth-first from the two full buckets in `at`: displaces the entry nearest to them that can be. Only that
 * last step of the path can be made now, since each step needs the room that the one after it makes; the
 * steps before it follow as the caller asks again. */
static int make_room(struct mkv_index *ix, const uint64_t at[2]) {
    uint64_t queue[SEARCH_MAX];
    unsigned end = 2;
    queue[0] = at[0];
    queue[1] = at[1];
    if (holds_copy(&ix->bucket[at[0]]) || holds_copy(&ix->bucket[at[1]]))
        return -EAGAIN;
    for (unsigned k = 0; k < end; k++) {
        struct mkv_bucket *b = &ix->bucket[queue[k]];
        if (holds_copy(b))
            return -EAGAIN; /* a step of a path through here was made before */
        for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++) {
            uint64_t to = other_bucket(ix, &b->slot[i], queue[k]);
            if (empties(&ix->bucket[to])) {
                (void)displace(ix, &b->slot[i], to);
                return -EAGAIN;
            }
            if (end < SEARCH_MAX)
                queue[end++] = to;
        }
    }
    return -ENOSPC;
}

/* --- the operations --- */

int mkv_index_find(const struct mkv_index *ix, const uint8_t key[16], struct mkv_slot *out) {
    uint64_t at[2];
    candidates(ix, key, at);
    const struct mkv_slot *s = find(ix, key, at);
    if (s)
        *out = *s;
    return s != NULL;
}

int mkv_index_room(struct mkv_index *ix, const uint8_t key[16]) {
    uint64_t at[2];
    candidates(ix, key, at);
    if (find(ix, key, at))
        return -EEXIST;
    if (find_empty(&ix->bucket[at[0]]) || find_empty(&ix->bucket[at[1]]))
        return 0;
    return make_room(ix, at);
}

int mkv_index_insert(struct mkv_index *ix, const struct mkv_slot *entry) {
    uint64_t at[2];
    candidates(ix, entry->key, at);
    if (find(ix, entry->key, at))
        return -EEXIST;
    unsigned room[2] = {empties(&ix->bucket[at[0]]), empties(&ix->bucket[at[1]])};
    int c = room[1] > room[0]; /* the emptier one: buckets fill evenly */
    if (!room[c])
        return make_room(ix, at);
    write_slot(find_empty(&ix->bucket[at[c]]), entry);
    ix->entries++;
    if (room[c] == 1)
        relieve(ix, at[c]);
    return 0;
}

int mkv_index_remove(struct mkv_index *ix, const uint8_t key[16]) {
    uint64_t at[2];
    int rc = -ENOENT;
    candidates(ix, key, at);
    for (int c = 0; c < 2; c++)
        for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++) {
            struct mkv_slot *s = &ix->bucket[at[c]].slot[i];
            if (is_empty(s) || !has_key(s, key))
                continue;
            if (is_moved(s))
                ix->copies--;
            else
                rc = 0;
            store_word_last(&s->location, 0);
        }
    if (!rc)
        ix->entries--;
    return rc;
}

/* Moved copies follow to FLASH, but not to LIVE: the ring knows a copy by its generation. A copy that goes on
 * saying FLASH is as good as any: whoever follows it asks the node. */
int mkv_index_change(struct mkv_index *ix, const struct mkv_slot *entry) {
    uint64_t at[2];
    int rc = -ENOENT;
    candidates(ix, entry->key, at);
    for (int c = 0; c < 2; c++)
        for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++) {
            struct mkv_slot *s = &ix->bucket[at[c]].slot[i];
            if (is_empty(s) || !has_key(s, entry->key))
                continue;
            if (is_moved(s)) {
                if (mkv_location_state(entry->location) == MKV_SLOT_FLASH)
                    store_word_last(&s->location, entry->location | MKV_LOCATION_MOVED);
                continue;
            }
            word from[4];
            memcpy(from, entry, sizeof from);
            store_word((word *)s + 2, from[2]);
            store_word_last(&s->location, from[3]);
            rc = 0;
        }
    return rc;
}

uint64_t mkv_index_tick(struct mkv_index *ix, uint64_t epoch, uint64_t table, int keep) {
    uint64_t n = 0;
    store_word_last(&ix->epoch->table, table);
    store_word_last(&ix->epoch->epoch, epoch);
    while (!keep && ix->first != ix->next) {
        const struct mkv_moved *m = &ix->ring[ix->first & ix->ring_mask];
        if (epoch - m->epoch < MKV_GRACE_TICKS)
            break;
        struct mkv_slot *s = &ix->bucket[0].slot[m->slot];
        if (is_moved(s) && s->generation == m->generation) {
            store_word_last(&s->location, 0);
            ix->copies--;
            n++;
        }
        ix->first++;
    }
    return n;
}

/* --- checking --- */

#define CHECK(ok)                                                                                            \
    do {                                                                                                     \
        if (!(ok))                                                                                           \
            return __LINE__;                                                                                 \
    } while (0)

int mkv_index_check(const struct mkv_index *ix) {
    uint64_t entries = 0, copies = 0;
    CHECK(ix->epoch->magic == MKV_EPOCH_MAGIC && ix->epoch->buckets == ix->buckets);
    for (uint64_t b = 0; b < ix->buckets; b++)
        for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++) {
            const struct mkv_slot *s = &ix->bucket[b].slot[i];
            if (is_empty(s))
                continue;
            uint64_t at[2];
            candidates(ix, s->key, at);
            CHECK(b == at[0] || b == at[1]);
            CHECK(s->location >> 45 == 0 && mkv_location_state(s->location) != MKV_SLOT_EMPTY);
            const struct mkv_slot *entry = find(ix, s->key, at);
            CHECK(entry);
            if (is_moved(s)) { /* says the same as the entry itself, or that it is on flash */
                if (mkv_location_state(s->location) == MKV_SLOT_LIVE)
                    CHECK(s->generation == entry->generation && s->length == entry->length);
                if (mkv_location_state(s->location) == mkv_location_state(entry->location))
                    CHECK((s->location & ~MKV_LOCATION_MOVED) == entry->location);
                copies++;
            } else {
                CHECK(s == entry); /* and no key is there twice */
                entries++;
            }
        }
    CHECK(entries == ix->entries);
    CHECK(copies == ix->copies);
    CHECK(copies <= ix->next - ix->first && ix->next - ix->first <= ix->ring_mask + 1);
    return 0;
}
