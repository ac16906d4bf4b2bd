/* layout.h: the bytes that nodes and peers agree on. docs/layout.md draws them and store/layout.py mirrors
 * them; a test holds the three together. Everything is little-endian.
 *
 * Index region (one per namespace and table version), READ by peers:
 *
 *   0        64                    4096        4352        4608
 *   ├────────┼─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─┼───────────┼───────────┼─ ─ ─
 *   │ epoch  │        zero         │ bucket 0  │ bucket 1  │ …        a bucket: 8 slots of 32 bytes
 *   └────────┴─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─┴───────────┴───────────┴─ ─ ─
 *
 * Slot:        0          16             20         24                    32
 *              │ key 16 B │ generation32 │ length32 │ location64          │
 *   location:  bits 0-2 state · 3 moved · 4-23 slab · 24-44 payload offset in 512-byte units · 45-63 zero
 *
 * Extent, one per block, in a slab (a slab is one region):
 *
 *   ├──── header page: `align` bytes (512 or 4096) ────┼──── payload ────┤
 *   │ cold record 128 B │ zero      │ live line 64 B   │ length bytes    │
 *   0                   128         align-64           align
 *
 * The slot's offset is that of the payload; the live line lies right before it, so that one READ from
 * offset - 64 brings both. Who writes what, and why a stale read does no harm, stands in docs/layout.md.
 *
 * The parts between "cdef" and "end cdef" are also what build.py shows to Python: plain declarations only.
 */
#ifndef MKV_LAYOUT_H
#define MKV_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

/* cdef */
#define MKV_KEY_BYTES      16u
#define MKV_BUCKET_SLOTS   8u
#define MKV_INDEX_HEADER   4096u
#define MKV_LINE_BYTES     64u
#define MKV_OFFSET_UNIT    512u
#define MKV_SLAB_MAX_BYTES (1ull << 30)
#define MKV_LAYOUT_VERSION 1u
#define MKV_LINE_MAGIC     0x4c564b4du /* "MKVL" */
#define MKV_COLD_MAGIC     0x43564b4du /* "MKVC" */
#define MKV_EPOCH_MAGIC    0x45564b4du /* "MKVE" */
#define MKV_LOCATION_MOVED 8ull        /* the moved bit of a location */

/* slot states */
enum {
    MKV_SLOT_EMPTY = 0,
    MKV_SLOT_LIVE = 1, /* in the arena: READ it */
    MKV_SLOT_FLASH = 2 /* in flash only: ask the node to stage it */
};

struct mkv_slot { /* 32 B */
    uint8_t key[16];
    uint32_t generation; /* low half of the live line's */
    uint32_t length;     /* payload bytes */
    uint64_t location;
};

struct mkv_bucket { /* 256 B */
    struct mkv_slot slot[MKV_BUCKET_SLOTS];
};

struct mkv_line { /* the live line, 64 B, ends where the payload begins */
    uint32_t magic;
    uint16_t version;
    uint16_t flags;
    uint8_t key[16];
    uint32_t length;
    uint32_t spare0;
    uint64_t checksum;
    uint64_t spare1[2];
    uint64_t generation; /* written last on publishing, zeroed first on unpublishing */
};

struct mkv_cold { /* the cold record, 128 B, starts the header page; never read by peers */
    uint32_t magic;
    uint16_t version;
    uint16_t flags; /* bit 0: pinned (reserved) */
    uint8_t key[16];
    uint32_t length;
    uint32_t namespace_id;
    uint64_t incarnation; /* of the namespace */
    uint64_t sequence;
    uint64_t checksum;
    uint64_t slab_epoch;
    uint64_t device; /* identity of the flash device */
    uint64_t offset; /* of this header page on it */
    uint64_t spare[4];
    uint64_t check; /* keyed, over the 112 bytes before it */
    uint64_t tail;  /* zero */
};

struct mkv_epoch { /* the epoch line, 64 B, starts every index region */
    uint32_t magic;
    uint16_t version;
    uint16_t spare0;
    uint64_t incarnation; /* of the node: a location cache dies with it */
    uint64_t epoch;       /* advanced by the quarantine timer, once per tick */
    uint64_t table;       /* version of the index geometry that is in force */
    uint64_t buckets;     /* of this table */
    uint64_t spare1[3];
};
/* end cdef */

_Static_assert(sizeof(struct mkv_slot) == 32 && sizeof(struct mkv_bucket) == 256, "slot and bucket");
_Static_assert(sizeof(struct mkv_line) == 64 && offsetof(struct mkv_line, generation) == 56, "live line");
_Static_assert(sizeof(struct mkv_cold) == 128 && offsetof(struct mkv_cold, check) == 112, "cold record");
_Static_assert(sizeof(struct mkv_epoch) == 64 && offsetof(struct mkv_epoch, epoch) == 16, "epoch line");

/* Location words. */
static inline uint64_t mkv_location(uint32_t state, uint32_t slab, uint64_t offset) {
    return (uint64_t)state | (uint64_t)slab << 4 | (offset / MKV_OFFSET_UNIT) << 24;
}
static inline uint32_t mkv_location_state(uint64_t loc) {
    return (uint32_t)(loc & 7);
}
static inline uint32_t mkv_location_moved(uint64_t loc) {
    return (uint32_t)(loc >> 3 & 1);
}
static inline uint32_t mkv_location_slab(uint64_t loc) {
    return (uint32_t)(loc >> 4 & 0xfffff);
}
static inline uint64_t mkv_location_offset(uint64_t loc) {
    return (loc >> 24 & 0x1fffff) * MKV_OFFSET_UNIT;
}

/* The two candidate buckets of a key: the salted halves of the key through a 64-bit mixer (Stafford's
 * variant 13, as in SplitMix64). `buckets` is a power of two, at least 2. */
static inline uint64_t mkv_mix64(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}
static inline void mkv_candidates(const uint8_t key[16], uint64_t salt, uint64_t buckets, uint64_t out[2]) {
    uint64_t a, b;
    __builtin_memcpy(&a, key, 8);
    __builtin_memcpy(&b, key + 8, 8);
    uint64_t h = mkv_mix64(mkv_mix64(a ^ salt) + b);
    uint64_t g = mkv_mix64(h ^ (salt << 32 | salt >> 32));
    out[0] = h & (buckets - 1);
    out[1] = g & (buckets - 1);
    if (out[1] == out[0])
        out[1] ^= 1;
}

/* cdef */
/* Per-key statuses; memkv/status.py names them for applications. */
enum {
    MKV_PENDING = 0,
    MKV_HIT = 1,           /* get: verified and in place; exists, match: present */
    MKV_MISS = 2,          /* not there */
    MKV_STALE = 3,         /* changed under the reader twice: to be treated as a miss */
    MKV_TIMEOUT = 4,       /* the deadline passed */
    MKV_CORRUPT = 5,       /* the payload does not agree with its checksum */
    MKV_STORED = 6,        /* put: published */
    MKV_EXISTS = 7,        /* put: the block was there already */
    MKV_DONE = 8,          /* touch, pin, unpin, delete: carried out */
    MKV_COLD = 9,          /* get: held, but in flash only: to be staged by the node first */
    MKV_ERROR = 16,        /* from here on: errors, by reason */
    MKV_ERROR_LINK = 16,   /* the connection to the node broke under way */
    MKV_ERROR_UNREACHABLE, /* the node is not connected */
    MKV_ERROR_LENGTH,      /* the slice is shorter than the block, or a length the namespace refuses */
    MKV_ERROR_BOUNDS,      /* the slice is not inside a registered buffer */
    MKV_ERROR_TOO_LARGE,   /* larger than the namespace's blocks or than the arena */
    MKV_ERROR_FULL,        /* no room, and nothing that may be evicted before the deadline */
    MKV_ERROR_REFUSED,     /* not allowed: a wrong region, a pin without a time to live */
    MKV_ERROR_INTERNAL,
    MKV_ERROR_DEVICE, /* flash could not be read, or the block not be written to it */
    MKV_ERROR_COPY    /* never from a node: the peer could not copy to or from its GPU */
};
/* end cdef */

#endif
