/* ns.h: what a namespace is made of, for the files that implement store.h. Nothing else includes it.
 *
 *   mkv_ns ──► index, table[]       what peers find blocks by                            (index.c, table.c)
 *     ├─ cls[0], cls[1], …          a size class: lists of free and quarantined extents,
 *     │                             a sieve of live blocks                               (slab.c, sieve.c)
 *     ├─ slabs ──► slab             a span of the arena, all extents of one class        (retire.c)
 *     │             └─ extent[]     what the node knows of each place for a block
 *     ├─ pinned                     live blocks that may not be evicted                  (pin.c)
 *     └─ flash                      NULL, or the namespace's part in the flash tier      (flash_ns.h)
 *
 * Lock order: arena's timer_lock, flash's round_lock, a namespace's lock, then the arena's lock or flash's
 * lock, then those inside flashio. All functions declared in this file want the namespace's lock held, unless
 * it is said that they do not.
 *
 * An extent's life:
 *
 *   FREE ──begin──► FILLING ──publish──► LIVE ──unpublish──► QUARANTINE ──five ticks──► FREE
 *     ▲                │
 *     └────abandon─────┘           and from anywhere, when its slab is retired: DEAD
 *
 * With flash there is a second way in, for a block that comes back from there; and an extent whose block was
 * deleted while a device reads it is not freed before that is over:
 *
 *   FREE ──stage──► STAGING ──verified──► STAGED ──second use──► LIVE ──unpublish──► QUARANTINE
 *     ▲                │                  │  └────────────────evict────────────────►  │ five ticks
 *     ├────in vain─────┘                  │                                           ▼
 *     ├─────────────evict, if idle────────┘                                           │
 *     └──────────────────────────────── the device is done ◄──────────────────────── BUSY
 *
 * A STAGED block is *idle* once nobody who knows of its place READs it any more (flash_stage.c).
 *
 * A LIVE block is besides that DIRTY or CLEAN (mkv_write_state); without flash it is always clean.
 */
#ifndef MKV_NS_H
#define MKV_NS_H

#include <pthread.h>

#include "index.h"
#include "store.h"

#define MKV_MAX_CLASSES 48 /* 1, 3/4, 1/2, 3/8, 1/4, … of 1 GiB down to 512 bytes are 43 */
#define MKV_MAX_TABLES  8  /* of one namespace, old ones that sessions still hold included */

enum mkv_extent_state {
    MKV_EXTENT_FREE,
    MKV_EXTENT_FILLING,
    MKV_EXTENT_LIVE,
    MKV_EXTENT_QUARANTINE,
    MKV_EXTENT_DEAD,
    MKV_EXTENT_STAGING, /* being read from flash */
    MKV_EXTENT_STAGED,  /* as LIVE, but no slot names it: its block's slot names the cell on flash */
    MKV_EXTENT_BUSY     /* has served its quarantine, but a device still reads it */
};

/* How far a LIVE block is from being on flash. */
enum mkv_write_state {
    MKV_CLEAN,         /* it is there; or it cannot be, and has no cell; or there is no flash */
    MKV_DIRTY,         /* from here on in the dirty list of that urgency */
    MKV_URGENT,        /* somebody waits for it */
    MKV_MUST,          /* a barrier that has begun waits for it, or it has to be written again */
    MKV_BEING_WRITTEN, /* in no list */
};

struct mkv_cell;

struct mkv_extent { /* 88 B: what the node knows of one extent. Not registered: no peer sees it */
    uint8_t key[16];
    uint64_t generation; /* of the last publication */
    uint64_t checksum;
    uint64_t until; /* QUARANTINE: the epoch of release; STAGED: the epoch until which it is not evicted;
                       pinned: when the pin expires, ns */
    struct mkv_extent *prev, *next;
    struct mkv_cell *cell; /* the block's place on flash, or NULL */
    uint32_t slab;
    uint32_t length;
    uint32_t pins;
    uint16_t op; /* 1 + the number of the request that has this memory, or 0 */
    uint8_t state;
    uint8_t visited;
    uint8_t write; /* mkv_write_state */
    uint8_t tries; /* to write it that failed */
    uint8_t avoid; /* 1 + the device where the last one did, or 0 */
    uint8_t idle;  /* STAGED, and nobody READs it: in the class's list of those */
};

struct mkv_list {
    struct mkv_extent *head, *tail;
    uint64_t count;
};

struct mkv_sieve { /* live blocks in the order of their coming, newest first */
    struct mkv_list queue;
    struct mkv_extent *hand; /* where the search for a victim goes on, towards the head; NULL: at the tail */
};

struct mkv_class {
    uint64_t payload; /* the longest that fits */
    uint64_t extent;  /* header page and payload */
    uint64_t per_slab;
    struct mkv_list free, quarantine;
    struct mkv_sieve sieve; /* live or staged, clean, not pinned, not idle */
    struct mkv_list idle;   /* the one that has been so for longest at the head */
    uint64_t slabs;         /* ready ones */
    uint64_t extents;       /* of ready slabs: free, filling, live, quarantined */
    uint64_t filling;       /* and staging */
    uint64_t pinned;
    uint64_t coming;    /* slabs taken and not ready */
    uint64_t taken;     /* extents asked of this class since the last tick, less those that became idle */
    uint64_t rate16;    /* the same per tick, smoothed, in sixteenths */
    uint64_t asked;     /* puts of this class's lengths since the last tick, whichever class served them */
    uint64_t demand256; /* the same per tick, smoothed over many, in 256ths */
    int wants;          /* a slab */
};

enum mkv_slab_state {
    MKV_SLAB_TAKEN,    /* being registered */
    MKV_SLAB_READY,    /* holds blocks */
    MKV_SLAB_RETIRING, /* in quarantine as a whole */
    MKV_SLAB_RETIRED,  /* has served it */
    MKV_SLAB_REPORTED, /* and Python knows */
    MKV_SLAB_ZEROING   /* on its way back to the arena */
};

struct mkv_slab {
    struct mkv_ns *ns;
    struct mkv_slab *prev, *next; /* of the same namespace */
    struct mkv_class *cls;
    struct mkv_extent *extent; /* count of them */
    uint8_t *base;
    uint64_t until; /* RETIRING: the epoch at which the grace period has passed */
    uint32_t id;
    uint32_t place; /* in the arena */
    uint32_t count;
    uint32_t live; /* and staged */
    uint32_t pinned;
    uint32_t filling; /* and staging */
    uint32_t io;      /* extents whose memory a device has */
    enum mkv_slab_state state;
};

struct mkv_ns {
    pthread_mutex_t lock;
    struct mkv_arena *arena;
    struct mkv_ns *next; /* of the timer's list */
    uint32_t id, block_bytes, align;
    uint32_t nclasses;
    uint64_t salt;
    uint64_t tick_ns;
    uint64_t ticked_ns; /* when the last tick had been made (atomic) */
    uint64_t epoch;
    uint64_t sequence;
    struct mkv_class cls[MKV_MAX_CLASSES]; /* largest first */
    struct mkv_slab *slabs;
    struct mkv_list pinned;
    uint64_t pinned_bytes;
    struct mkv_ns_flash *flash; /* or NULL */
    uint32_t retiring;          /* slabs between retire and released */
    struct mkv_index *index;    /* in force */
    struct mkv_index *pending;  /* prepared */
    struct mkv_index *growing;  /* pending, while switch fills it: changes go to both */
    int growing_failed;
    int pressure; /* an insertion found no room since the last growth */
    struct mkv_index *table[MKV_MAX_TABLES];
    uint64_t versions;     /* tables made so far */
    struct mkv_ns_stats n; /* the counters; the gauges are filled in when asked for */
};

/* --- slab.c --- */
uint32_t mkv_classes_make(struct mkv_class *cls, uint64_t block_bytes, uint64_t align, uint64_t slab_bytes);
struct mkv_class *mkv_class_of(struct mkv_ns *ns, uint64_t length);
struct mkv_slab *mkv_slab_by_id(struct mkv_ns *ns, uint64_t id);
struct mkv_slab *mkv_slab_of(struct mkv_ns *ns, const struct mkv_extent *e);
/* The extent that a slot names. */
struct mkv_extent *mkv_extent_at(struct mkv_ns *ns, uint64_t location);
uint64_t mkv_extent_offset(const struct mkv_slab *s, const struct mkv_extent *e); /* of the header page */
struct mkv_line *mkv_extent_line(const struct mkv_slab *s, const struct mkv_extent *e);
void mkv_slab_unlink(struct mkv_ns *ns, struct mkv_slab *s);
void mkv_slab_destroy(struct mkv_slab *s); /* gives the memory back, zeroed; wants no lock */

/* --- retire.c --- */
void mkv_slab_retire_locked(struct mkv_ns *ns, struct mkv_slab *s);
/* A class finds no extent and the arena has no slab: retires a slab of another class, if that is fair. */
void mkv_rebalance(struct mkv_ns *ns, struct mkv_class *c);

/* --- sieve.c --- */
void mkv_sieve_add(struct mkv_sieve *s, struct mkv_extent *e);
void mkv_sieve_remove(struct mkv_sieve *s, struct mkv_extent *e);
/* Still in the queue; NULL if there is none. */
struct mkv_extent *mkv_sieve_victim(struct mkv_sieve *s, uint64_t epoch);

/* --- fill.c --- */
void mkv_write_line(const struct mkv_slab *s, const struct mkv_extent *e);
void mkv_put_back(struct mkv_ns *ns, struct mkv_extent *e); /* FILLING or STAGING -> FREE */

/* --- quarantine.c --- */
void mkv_unpublish(struct mkv_ns *ns, struct mkv_extent *e); /* of a LIVE or STAGED one: the block is gone */
void mkv_evict(struct mkv_ns *ns, struct mkv_extent *e);     /* the same, but what flash has stays */
/* A device has the extent's memory for the request of that number; and has it no more. */
void mkv_extent_io_begin(struct mkv_ns *ns, struct mkv_extent *e, uint16_t number);
void mkv_extent_io_end(struct mkv_ns *ns, struct mkv_extent *e);
void mkv_quarantine_release(struct mkv_ns *ns, struct mkv_class *c);

/* --- reserve.c --- */
int mkv_class_may_grow(struct mkv_ns *ns, const struct mkv_class *c);
uint64_t mkv_class_need(const struct mkv_class *c);
struct mkv_extent *mkv_extent_take(struct mkv_ns *ns, struct mkv_class *c);
void mkv_class_tick(struct mkv_ns *ns, struct mkv_class *c);

/* --- pin.c --- */
/* Neither adds to a list; drop forgets all pins and takes a clean e off the list of pinned ones. */
void mkv_pin_add(struct mkv_ns *ns, struct mkv_extent *e, uint32_t pins, uint64_t until);
void mkv_pin_drop(struct mkv_ns *ns, struct mkv_extent *e);
/* A clean block joins the SIEVE queue, or the list of pinned ones; and leaves it, or that of idle ones. */
void mkv_settled_join(struct mkv_ns *ns, struct mkv_extent *e);
void mkv_settled_leave(struct mkv_ns *ns, struct mkv_extent *e);
void mkv_pins_expire(struct mkv_ns *ns, uint64_t max);

/* --- table.c --- */
int mkv_ns_room(struct mkv_ns *ns, const uint8_t key[16]);           /* as mkv_index_room */
void mkv_ns_insert(struct mkv_ns *ns, const struct mkv_slot *entry); /* after mkv_ns_room said 0 */
void mkv_ns_remove(struct mkv_ns *ns, const uint8_t key[16]);
void mkv_ns_change(struct mkv_ns *ns, const struct mkv_slot *entry); /* in place; there is one of that key */
void mkv_tables_tick(struct mkv_ns *ns);
int mkv_table_wanted(const struct mkv_ns *ns);

/* --- tick.c --- */
uint32_t mkv_chores_locked(struct mkv_ns *ns);

/* --- namespace.c --- */
struct mkv_place {         /* where a block is: at least one of the two */
    struct mkv_extent *e;  /* LIVE, STAGING or STAGED */
    struct mkv_cell *cell; /* WRITING or HELD */
};
int mkv_ns_where(struct mkv_ns *ns, const uint8_t key[16], struct mkv_place *out); /* 0: nowhere */
void mkv_place_touch(struct mkv_ns *ns, const struct mkv_place *p);

/* --- flash_*.c: of a namespace with flash only --- */
void mkv_ns_flash_detach(struct mkv_ns *ns); /* wants no lock */
void mkv_flash_tick(struct mkv_ns *ns);
void mkv_flash_ticked(struct mkv_ns *ns);                     /* afterwards; wants no lock */
void mkv_flash_room(struct mkv_ns *ns);                       /* extents have come free */
int mkv_flash_wants(const struct mkv_ns *ns);                 /* a segment */
int mkv_flash_full(const struct mkv_ns *ns, uint64_t length); /* too much is dirty */
int mkv_place_doubtful(const struct mkv_place *p);            /* found by a scan, and not verified since */
void mkv_flash_published(struct mkv_ns *ns, struct mkv_extent *e);
void mkv_flash_hasten(struct mkv_ns *ns, struct mkv_extent *e); /* a dirty one */
void mkv_flash_left(struct mkv_ns *ns,
                    struct mkv_extent *e); /* an extent's block is unpublished or evicted */
int mkv_flash_delete(struct mkv_ns *ns, const uint8_t key[16], const struct mkv_place *p); /* 0 or -ENOMEM */
void mkv_flash_deleted(struct mkv_ns *ns);
struct mkv_cell *mkv_cell_at(struct mkv_ns *ns, uint64_t location);
struct mkv_extent *mkv_cell_dram(const struct mkv_cell *cell); /* the block's extent, or NULL */
void mkv_cell_touch(struct mkv_ns *ns, const struct mkv_place *p);
uint64_t mkv_cell_location(struct mkv_ns *ns, const struct mkv_cell *cell);
uint8_t mkv_cell_pin_status(struct mkv_ns *ns, struct mkv_cell *cell, uint64_t until);
uint8_t mkv_cell_unpin_status(struct mkv_ns *ns, struct mkv_cell *cell);
void mkv_cell_pin(struct mkv_ns *ns, struct mkv_cell *cell, uint32_t pins, uint64_t until);
void mkv_cell_pins_expire(struct mkv_ns *ns, uint64_t max, uint64_t now);
int mkv_flash_check(struct mkv_ns *ns, uint64_t live, uint64_t staged); /* as mkv_ns_check */

#endif
