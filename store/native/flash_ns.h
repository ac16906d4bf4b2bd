/* flash_ns.h: what the flash tier is made of, for flash*.c and the files of ns.h. Nothing else includes it.
 *
 *   mkv_flash ──► drive[]          a device: its requests, flushes, faults                        (flash.c)
 *     ├─ op[]                      requests under way, and what each is for                       (flash.c)
 *     ├─ round                     how barriers are carried out                           (flash_barrier.c)
 *     └─ mkv_ns_flash              a namespace's part                                          (flash_ns.c)
 *          ├─ seg[] ──► cell[]     places for one image each, of one class    (flash_segment.c, _cell.c)
 *          ├─ cls[]                by size class: free cells per device, a sieve of held ones,
 *          │                       blocks that wait to be written                       (flash_writeback.c)
 *          ├─ doomed               cells whose header has to be zeroed                        (flash_zero.c)
 *          ├─ kept                 older images, until the newest is known to be good         (flash_kept.c)
 *          ├─ draining             a segment that is given back                             (flash_drain.c)
 *          └─ stages, waiting      who wants blocks brought to DRAM                          (flash_stage.c)
 *
 * A cell's life. What may be whole on the medium, and so might come back after a crash, has a star:
 *
 *                     ┌───────────────────── zeroed ◄──────────────────────┐
 *                     ▼                                                    │
 *   UNKNOWN* ─scan─► FREE ──► WRITING* ──► HELD* ──evicted──► STALE* ──► DOOMED* ──► ZEROING*
 *      └─────────────────────────────────►  │                  └──► WRITING*  ▲
 *                                           └────── deleted, or bad ──────────┘    from anywhere, when it or
 *                                                                                  its device is bad: DEAD
 *
 * Besides, the scan may find older images of a block: those are KEPT* until the newest is known to be good,
 * and then STALE; or HELD if that is no good, or DOOMED with the deleted block (flash_kept.c).
 *
 * An evicted image may be written over as it is, for it would do no harm if it came back. A deleted one
 * would, so its header is zeroed before the cell is used again, and before a barrier is over so are those of
 * all STALE ones: among them may be an older image of the deleted block.
 *
 * Locks. Lock order: arena's timer_lock, flash's round_lock, a namespace's lock, flash's lock and the arena's
 * lock (neither is held when the other is taken). The callbacks of flashio.h hold none when they begin and
 * take the namespace's; nobody waits for a request while he holds a lock. Functions declared here want the
 * namespace's lock held, unless it is said that they do not.
 */
#ifndef MKV_FLASH_NS_H
#define MKV_FLASH_NS_H

#include "flash.h"
#include "ns.h"

/* --- cells and segments --- */

enum mkv_cell_state {
    MKV_CELL_UNKNOWN, /* not scanned, not imported yet */
    MKV_CELL_FREE,
    MKV_CELL_STALE,   /* free, but an old image may be whole */
    MKV_CELL_WRITING, /* an image is being written */
    MKV_CELL_HELD,    /* its image is a block of the namespace */
    MKV_CELL_KEPT,    /* an older image of a block */
    MKV_CELL_DOOMED,  /* to be zeroed before anything else */
    MKV_CELL_ZEROING,
    MKV_CELL_DEAD
};

struct mkv_cell { /* 88 B: what the node knows of one extent on flash */
    uint8_t key[16];
    uint64_t checksum; /* of the payload, as the cold record said when it was written or scanned */
    uint64_t sequence;
    struct mkv_cell *prev, *next;
    struct mkv_extent *dram; /* the block's extent, if it has one: being written, clean, staging or staged */
    uint64_t until;          /* pinned: when the pin expires, ns */
    uint64_t covered;        /* HELD: the number of the flush that puts it on stable media */
    uint32_t length;
    uint32_t segment; /* handle */
    uint32_t pins;    /* of blocks that were in flash only when they were pinned */
    uint8_t state;
    uint8_t visited : 1;
    uint8_t bad : 1;      /* DOOMED, ZEROING: DEAD afterwards */
    uint8_t doubtful : 1; /* HELD: only its header was looked at, the payload may be torn; then dram is NULL
                             or STAGING */
    uint8_t demanded; /* HELD: somebody waits for it to be durable. Not 0: since when, see mkv_cell_demand */
    uint8_t spare;
};

struct mkv_cells {
    struct mkv_cell *head, *tail;
    uint64_t count;
};

struct mkv_seg {
    struct mkv_segment is;
    struct mkv_cell *cell; /* count of them */
    uint32_t count, handle;
    uint32_t cls;         /* index */
    uint32_t next;        /* scanning: the next cell to be read */
    uint32_t unknown;     /* cells */
    uint8_t import, gone; /* waits for mkv_ns_flash_imported; its device has failed, or it was given up */
    uint8_t drained;      /* to be given up, and empty */
    uint64_t live_bytes;  /* of HELD cells, payload */
};

struct mkv_flash_class {
    struct mkv_cells free[MKV_MAX_DEVICES], stale[MKV_MAX_DEVICES];
    uint64_t room;          /* cells in all of those lists */
    struct mkv_cells queue; /* SIEVE: HELD and not pinned */
    struct mkv_cell *hand;
    uint64_t segments, cells; /* on devices that have not failed */
    struct mkv_list dirty[3]; /* [0]: MKV_DIRTY, [1]: MKV_URGENT, [2]: MKV_MUST */
    uint64_t ask_again;       /* the epoch from which another segment may be asked for */
    uint32_t next;            /* device that is next in turn */
    uint8_t wants;            /* a segment */
    uint8_t denied;           /* and was told that there is none */
    uint8_t promised;         /* or that one is on its way */
};

/* --- requests --- */

enum mkv_op_kind { MKV_OP_WRITE, MKV_OP_ZERO, MKV_OP_STAGE, MKV_OP_SCAN, MKV_OP_KINDS };

struct mkv_item { /* one key of a stage */
    struct mkv_stage *stage;
    struct mkv_items *in; /* the list that it waits in; NULL: answered */
    struct mkv_item *prev, *next;
    struct mkv_slot slot;
    uint8_t key[16];
    uint8_t status;
};

struct mkv_items {
    struct mkv_item *head, *tail;
    uint64_t count;
};

struct mkv_op {
    struct mkv_io io; /* first */
    struct mkv_flash *f;
    struct mkv_ns *ns;
    struct mkv_extent *e;       /* whose memory the device has */
    struct mkv_cell *cell;      /* NULL: deleted meanwhile (a stage) */
    struct mkv_op *prev, *next; /* of the drive's writes, or of a list of idle or parked ones */
    uint64_t ticket;            /* writes: their number on the drive */
    uint64_t checksum;
    struct mkv_items waiters; /* a stage: who is told */
    uint8_t *page;            /* a scan: MKV_PAGE bytes of its own */
    uint32_t length;
    uint32_t uses; /* a stage: requests that it serves */
    uint16_t number;
    uint8_t kind;
    uint8_t dropped;  /* a write: the block was deleted meanwhile. A stage: why it is in vain, a status */
    uint8_t demanded; /* a write: of a block that somebody wants durable */
    uint8_t publish;  /* a stage: for a prefetch */
    uint8_t again;    /* a stage: its waiters try again */
};

#define MKV_PAGE 4096u

struct mkv_batch { /* requests that are submitted together */
    struct mkv_io *io[64];
    uint32_t n;
};

/* --- devices --- */

struct mkv_drive {
    struct mkv_io flush; /* first */
    struct mkv_flash *f;
    uint64_t identity;
    uint32_t known, failed; /* (atomic) */
    uint32_t strikes;       /* recent errors */
    uint32_t good;          /* requests since the last change of strikes */
    uint32_t images;        /* being written */
    uint64_t image_bytes;
    uint64_t ticket;                                 /* of the last write begun */
    struct mkv_op *first, *last;                     /* writes under way, in the order of their tickets */
    uint64_t flush_queued, flush_done, flush_wanted; /* numbers of flushes */
    uint32_t flushing;
    uint32_t unflushed; /* a write has ended since the last flush was queued */
    uint64_t read_errors, write_errors, corrupt;
};

/* --- barriers: flash_barrier.c --- */

enum mkv_phase { MKV_IDLE, MKV_BEGINNING, MKV_SETTLING, MKV_ZEROING, MKV_ZEROED, MKV_FLUSHING };

struct mkv_round {
    enum mkv_phase phase;
    uint64_t upto;        /* barriers that it carries out */
    uint32_t zero_failed; /* (atomic) a header could not be zeroed and will be tried again */
    uint64_t ticket[MKV_MAX_DEVICES], flush[MKV_MAX_DEVICES];
};

struct mkv_flash {
    struct mkv_flashio *io;
    uint64_t secret, boot, dirty_max;
    uint64_t counter;     /* of sequences (atomic) */
    uint64_t dirty_bytes; /* (atomic) */
    uint64_t dirty_blocks;
    int event;
    uint8_t *pages; /* the first is zero, one for each scan follows */
    struct mkv_op *op;

    pthread_mutex_t round_lock; /* guards the next three; held while all namespaces are looked at */
    struct mkv_ns_flash *all;
    struct mkv_round round;
    uint64_t sync_upto;
    uint64_t made, done; /* barriers (atomic) */

    pthread_mutex_t lock; /* guards the rest */
    pthread_cond_t quiet;
    struct mkv_op *idle[MKV_OP_KINDS];
    struct mkv_drive drive[MKV_MAX_DEVICES];
    uint32_t calls;           /* ops begun and flushes queued whose callbacks have not returned */
    uint32_t spaces;          /* (atomic) namespaces attached */
    uint32_t hungry;          /* (atomic) some namespace found no idle op or a busy drive */
    uint32_t failing;         /* (atomic) a drive has failed and its blocks are still to be dropped */
    struct mkv_flash_stats n; /* counters (atomic) */
};

/* --- a namespace's part --- */

struct mkv_tombs { /* keys deleted while older images of them may be kept, or not scanned: a hash set */
    uint8_t (*key)[16];
    uint64_t size, used; /* size: 0 or a power of two */
};

struct mkv_ns_flash {
    struct mkv_flash *f;
    struct mkv_ns *ns;
    struct mkv_ns_flash *next; /* of all */
    uint64_t incarnation;
    struct mkv_flash_class *cls; /* ns->nclasses of them */
    struct mkv_seg **seg;
    uint32_t segs;
    struct mkv_seg *draining; /* to be given up */
    uint8_t unbacked;         /* some blocks found no place on flash */
    uint64_t must;            /* blocks in the dirty lists of that urgency */
    struct mkv_cells pinned;
    uint64_t pinned_bytes, cell_bytes; /* whole cells */
    struct mkv_cells doomed, kept;
    int frozen;                            /* a sync has begun, and nothing was put or deleted since */
    uint64_t doom_in, doom_out, doom_mark; /* cells that joined that list, and left it, ever */
    uint64_t zeroing;
    int zero_pause;        /* a header could not be zeroed: not before the next tick */
    uint64_t unknown;      /* cells to be scanned */
    uint32_t scan_at;      /* the segment that is next in turn */
    struct mkv_op *parked; /* scanned, and no slot in the index yet */
    struct mkv_tombs tombs;
    struct mkv_items waiting; /* for an extent */
    struct mkv_stage *stages;
    uint64_t ops; /* under way */
    int closing;
    pthread_cond_t quiet;
    struct mkv_ns_flash_stats n;
};

/* --- flash.c: none of these wants a lock; they take flash's --- */
#define MKV_COUNT(f, field, by) (void)__atomic_add_fetch(&(f)->n.field, (uint64_t)(by), __ATOMIC_RELAXED)
void mkv_flash_signal(struct mkv_flash *f);
uint64_t mkv_flash_sequence(struct mkv_flash *f);
int mkv_drive_failed(const struct mkv_flash *f, uint32_t device);
uint32_t mkv_drives_good(const struct mkv_flash *f);
/* An op, or NULL: none is idle, or (images) the drive has enough to do. The namespace's lock is held. */
struct mkv_op *mkv_op_begin(struct mkv_ns *ns, enum mkv_op_kind kind, uint32_t device, uint64_t bytes);
/* The op is over and belongs to nobody; the namespace's lock is held. */
void mkv_op_end(struct mkv_op *op);
/* The same for one that was not submitted. */
void mkv_op_cancel(struct mkv_op *op);
/* What became of a request: counts it, and takes the drive out after too many errors. */
void mkv_drive_result(struct mkv_flash *f, uint32_t device, enum mkv_op_kind kind, int result);
void mkv_drive_corrupt(struct mkv_flash *f, uint32_t device);
void mkv_batch_add(struct mkv_flash *f, struct mkv_batch *b, struct mkv_op *op);
void mkv_batch_send(struct mkv_flash *f, struct mkv_batch *b);
/* After every tick: what concerns others than the namespace. Wants no lock. */
void mkv_flash_after(struct mkv_flash *f);
/* The same, and the last that a callback does. Wants no lock. */
void mkv_callback_end(struct mkv_flash *f);

/* --- flash_barrier.c --- */
/* The number of the flush that will cover a write that has just ended. Takes flash's lock. */
uint64_t mkv_flush_next(struct mkv_flash *f, uint32_t device);
/* Whether that flush is over; if not, it is under way afterwards. Takes flash's lock. */
int mkv_flush_over(struct mkv_flash *f, uint32_t device, uint64_t number);
void mkv_round_advance(struct mkv_flash *f); /* round_lock is held, no namespace's */

/* --- flash_cell.c --- */
struct mkv_seg *mkv_seg_of(struct mkv_ns *ns, const struct mkv_cell *cell);
uint64_t mkv_cell_offset(struct mkv_ns *ns,
                         const struct mkv_cell *cell); /* of the header page, on the device */
struct mkv_flash_class *mkv_flash_class_of(struct mkv_ns *ns, uint64_t length);
uint64_t mkv_image_bytes(const struct mkv_ns *ns, uint64_t length); /* of the whole, as it is written */
/* An op with a cell to write an image of so many bytes into (state WRITING), or NULL. avoid: a device to be
 * spared if another has room, or -1. */
struct mkv_op *mkv_cell_take(struct mkv_ns *ns, struct mkv_flash_class *c, uint64_t bytes, int avoid);
/* Whether no cell will ever come free for the class. */
int mkv_class_hopeless(struct mkv_ns *ns, const struct mkv_flash_class *c);
void mkv_cell_hold(struct mkv_ns *ns, struct mkv_cell *cell);            /* in no list -> HELD */
void mkv_cell_unhold(struct mkv_ns *ns, struct mkv_cell *cell);          /* HELD -> in no list */
void mkv_cell_free(struct mkv_ns *ns, struct mkv_cell *cell, int state); /* in no list -> FREE, STALE */
void mkv_cell_kill(struct mkv_ns *ns, struct mkv_cell *cell);            /* in no list -> DEAD */
/* The image in a HELD cell is no good any more: the block is written elsewhere if DRAM has it, else an older
 * image that was kept takes its place (1), else it is dropped. bad: so is the place. status: for those who
 * wait for it. */
int mkv_cell_lost(struct mkv_ns *ns, struct mkv_cell *cell, int bad, uint8_t status);
void mkv_ns_drive_failed(struct mkv_ns *ns, uint32_t device);
void mkv_doomed_push(struct mkv_ns *ns, struct mkv_cell *cell); /* and counts it */
struct mkv_cell *mkv_doomed_pop(struct mkv_ns *ns);
void mkv_kept_push(struct mkv_ns *ns, struct mkv_cell *cell); /* in no list -> KEPT */
void mkv_kept_take(struct mkv_ns *ns, struct mkv_cell *cell); /* KEPT -> in no list */
/* Dooms up to so many STALE cells of each class and device. */
void mkv_doom_stale(struct mkv_ns *ns, uint64_t max_each);

/* Somebody waits for it to be durable, and will look again in a moment: it is not evicted before he has seen
 * that it is, unless he does not look for two ticks. */
void mkv_cell_demand(struct mkv_ns *ns, struct mkv_cell *cell);
/* Whether it may go now. What is demanded has a flush under way afterwards, if it needs one. */
int mkv_cell_evictable(struct mkv_ns *ns, struct mkv_cell *cell);
void mkv_cell_evict(struct mkv_ns *ns, struct mkv_cell *cell);    /* HELD -> STALE, and gone from DRAM */
void mkv_cell_take_out(struct mkv_ns *ns, struct mkv_cell *cell); /* FREE, STALE -> in no list */

/* --- flash_drain.c --- */
void mkv_drain_pump(struct mkv_ns *ns);

/* --- flash_zero.c --- */
void mkv_cell_doom(struct mkv_ns *ns, struct mkv_cell *cell, int bad); /* in no list -> DOOMED */
void mkv_zero_pump(struct mkv_ns *ns);

/* --- flash_kept.c --- */
struct mkv_cell *mkv_kept_best(struct mkv_ns *ns, const uint8_t key[16]); /* NULL: none is kept */
void mkv_kept_adopt(struct mkv_ns *ns, struct mkv_cell *cell);            /* KEPT -> HELD: not the index */
void mkv_kept_tick(struct mkv_ns *ns, uint64_t max);
/* Of a round: what is of deleted blocks is doomed. sync: of one that a snapshot may follow. */
void mkv_kept_barrier(struct mkv_ns *ns, int sync);

/* --- flash_writeback.c --- */
void mkv_dirty_add(struct mkv_ns *ns, struct mkv_extent *e, int urgency); /* e is in no list */
void mkv_dirty_remove(struct mkv_ns *ns, struct mkv_extent *e);
void mkv_dirty_hasten(struct mkv_ns *ns, int from, int to);   /* all of one urgency to another */
void mkv_write_drop(struct mkv_ns *ns, struct mkv_extent *e); /* a block that is not clean is gone */
void mkv_write_pump(struct mkv_ns *ns);
void mkv_write_again(struct mkv_ns *ns); /* what found no place before */
/* The check over a cold record. */
uint64_t mkv_cold_check(const struct mkv_cold *cold, uint64_t secret);

/* --- flash_stage.c --- */
void mkv_stage_pump(struct mkv_ns *ns, uint64_t max);
void mkv_stage_tick(struct mkv_ns *ns);
void mkv_stage_drop(struct mkv_ns *ns, struct mkv_cell *cell, uint8_t status); /* its read is in vain */
/* Begins to read the block of a doubtful cell, for nobody, if that is not done yet and can be now. */
void mkv_stage_verify(struct mkv_ns *ns, struct mkv_cell *cell);
/* A STAGED extent becomes the block's LIVE one. */
void mkv_promote(struct mkv_ns *ns, struct mkv_extent *e);

/* --- flash_scan.c --- */
/* An image that was found in a cell (in no list) is a block: the cell is HELD, and then goes into the index.
 */
void mkv_cell_adopt(struct mkv_ns *ns, struct mkv_cell *cell, const struct mkv_flash_record *r);
void mkv_cell_keep(struct mkv_ns *ns, struct mkv_cell *cell, const struct mkv_flash_record *r); /* KEPT */
void mkv_cell_insert(struct mkv_ns *ns, const struct mkv_cell *cell);
void mkv_scan_pump(struct mkv_ns *ns);
void mkv_scan_unpark(struct mkv_ns *ns);
void mkv_scan_forget(struct mkv_ns *ns, struct mkv_cell *cell);       /* UNKNOWN -> in no list */
void mkv_cell_change(struct mkv_ns *ns, const struct mkv_cell *cell); /* the same; the key is there */
int mkv_tomb_add(struct mkv_ns *ns, const uint8_t key[16]);           /* 0 or -ENOMEM */
int mkv_is_tomb(struct mkv_ns *ns, const uint8_t key[16]);
void mkv_tombs_clear(struct mkv_ns *ns);

#endif
