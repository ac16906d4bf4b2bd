/* flash.h: the node's flash tier, as Python (through cffi) and put.c see it.
 *
 *   mkv_flash     what all namespaces share: the I/O engine, devices, the dirty limit, barriers
 *     └─ per namespace (mkv_ns_flash_attach): segments, extents on flash, a SIEVE queue per size class
 *
 * A block of a namespace with flash is in one of these states; its slot in the index says LIVE or FLASH:
 *
 *               put                written              evicted from DRAM
 *   (nothing) ─────► DIRTY, LIVE ─────────► CLEAN, LIVE ─────────────────► COLD, FLASH
 *                                              ▲                              │ asked for
 *                                              │ second use, or touched       ▼
 *                                              └──────────────────── STAGED, FLASH: in a private extent
 *                                                                    whose location only who asked is told
 *
 * Evicted from flash it is gone from DRAM too (a CLEAN or STAGED block's extent goes to quarantine). A slot
 * in state FLASH names the flash extent by a number that means nothing to peers (in the location word's slab
 * and offset bits), so that the node needs no second index.
 *
 * Division of labour: formats of superblock, segment and namespace tables and of the snapshot, and their
 * writing, are Python's (store/flash/); extents, writing behind, staging and scanning are C's. All I/O of C
 * goes through flashio.h; its completions run on that engine's thread.
 */
#ifndef MKV_FLASH_H
#define MKV_FLASH_H

#include "flashio.h"
#include "store.h"

/* cdef */
struct mkv_flash;
struct mkv_stage;

/* --- the node's flash --- */

/* secret: keys the check of cold records (of the store, from its superblocks). boot: counts the starts of
 * this store; sequences are boot << 40 | counter, so that what is written now always wins over what was
 * written before. dirty_max: bytes that may wait to be written; beyond them mkv_fill_begin says
 * MKV_ERROR_FULL. */
struct mkv_flash *mkv_flash_new(struct mkv_flashio *io, uint64_t secret, uint64_t boot, uint64_t dirty_max);
/* After all namespaces; waits for what is under way. */
void mkv_flash_free(struct mkv_flash *f);
/* identity: of the device, from its superblock, goes into every cold record. device: flashio's index. */
int mkv_flash_device(struct mkv_flash *f, uint32_t device, uint64_t identity);
/* Readable when Python has something to collect: barriers, stages, chores, scans. */
int mkv_flash_eventfd(const struct mkv_flash *f);

/* A barrier is over when every header that had to be zeroed, and every block that was dirty and demanded
 * durable when it was made, is on stable media. Numbers grow; mkv_flash_barriers says up to which all are
 * over. A device that was taken out is not waited for: what it holds must not come back at the next start.
 * Barriers wait for scans if something was deleted meanwhile. */
uint64_t mkv_flash_barrier(struct mkv_flash *f);
uint64_t mkv_flash_barriers(struct mkv_flash *f);
/* Writes all that is dirty and flushes: a barrier over everything (clean stop). */
uint64_t mkv_flash_sync(struct mkv_flash *f);

struct mkv_flash_device_stats {
    uint64_t identity, segments, extents, free, bytes_live, read_errors, write_errors, corrupt;
    uint32_t failed; /* taken out: nothing more is written there, reads are misses */
    uint32_t spare;
};
struct mkv_flash_stats {
    uint64_t dirty_blocks, dirty_bytes, writing_blocks, written_blocks, written_bytes, staged_blocks,
        staged_bytes, stage_joined, barriers, headers_zeroed, flushes, scanned, scan_total, recovered,
        dropped_torn, dropped_superseded, dropped_foreign, dropped_misplaced, dropped_corrupt,
        lost_memory_acks;
};
void mkv_flash_stats(struct mkv_flash *f, struct mkv_flash_stats *out);
int mkv_flash_device_stats(struct mkv_flash *f, uint32_t device, struct mkv_flash_device_stats *out);
/* Takes it out, as repeated errors (or one failed flush) do: blocks that DRAM has are written to the others,
 * what it alone had is dropped. */
int mkv_flash_device_fail(struct mkv_flash *f, uint32_t device);
/* How many have been taken out. The eventfd is readable after each. */
uint32_t mkv_flash_devices_failed(const struct mkv_flash *f);

/* --- a namespace on flash --- */

/* Before its first slab is ready. incarnation: of the namespace on this store. */
int mkv_ns_flash_attach(struct mkv_ns *ns, struct mkv_flash *f, uint64_t incarnation);

#define MKV_CHORE_SEGMENT 8u /* one is wanted: note a free one down and add it; or one has been given up */

struct mkv_segment { /* a span of a device that holds extents of one size class of one namespace */
    uint64_t offset; /* on the device */
    uint64_t bytes;
    uint64_t epoch; /* of this assignment, from the segment table; stands in its cold records (slab epoch) */
    uint64_t payload; /* of the size class: the extents' size is align + payload */
    uint32_t device;
    uint32_t number; /* Python's: of the segment on the device */
};
/* The payload size of a class that wants a segment; 0: none does. */
uint64_t mkv_ns_segment_wanted(struct mkv_ns *ns);
/* Python has given up (all devices full): the class evicts from what it has, or has blocks in cells of a
 * larger one. A class that has neither keeps its blocks in DRAM only; when a segment comes later they are
 * written. */
void mkv_ns_segment_denied(struct mkv_ns *ns, uint64_t payload);
/* Python has found somebody who gives one back, and adds it in a while: until then a class that has none
 * keeps its blocks waiting (unless cells of a larger one can be had), any other evicts from what it has. If
 * nothing comes of it Python says denied after all. */
void mkv_ns_segment_promised(struct mkv_ns *ns, uint64_t payload);
/* For whoever needs one: the namespace evicts what is in one of its segments, of the class that has most of
 * them, on one of `devices` (bits). 0; -ENOENT: no class has two, or their scan is not over; -EBUSY: one is
 * on its way. When it is empty MKV_CHORE_SEGMENT is set and given_up answers 0 (before: -EAGAIN; -ENOENT:
 * nothing was asked for): the segment is not known here any more. */
int mkv_ns_segment_give_up(struct mkv_ns *ns, uint64_t devices);
int mkv_ns_segment_given_up(struct mkv_ns *ns, struct mkv_segment *out);
/* A segment of this namespace. scan 0: its extents are free (new). 1: its header pages are to be read; blocks
 * found appear in the index one by one, on the engine's thread, and extents are free as they are found to be.
 * 2: to be imported. The namespace's align must be a multiple of the device's logical block. Returns its
 * handle or -errno: -EINVAL (payload is of no class, alignment, epoch 0), -ENODEV, -EIO (the device was taken
 * out). */
int64_t mkv_ns_segment_add(struct mkv_ns *ns, const struct mkv_segment *segment, int scan);
uint64_t mkv_ns_scanning(struct mkv_ns *ns); /* header pages still to be looked at */

struct mkv_flash_record { /* 64 B: one block on flash, as the snapshot keeps it */
    uint8_t key[16];
    uint64_t checksum;
    uint64_t sequence;
    uint64_t offset; /* of the header page, on the device */
    uint32_t device; /* flashio's index now; identity in the file */
    uint32_t length;
    uint32_t flags; /* bit 0: visited; bit 1: its payload was not verified since a scan found it;
                       bit 2: an older image, of a block that another record names */
    uint32_t namespace_id;
    uint32_t spare[2];
};
/* All blocks that are on flash, and older images that are kept: fills at most max, returns how many there
 * are. For a snapshot: after mkv_flash_sync is over, with nothing going on since. */
uint64_t mkv_ns_flash_export(struct mkv_ns *ns, struct mkv_flash_record *out, uint64_t max);
/* Into segments that were added with scan 2; what does not fit one is skipped. Returns how many were looked
 * at: all of them, unless the index has no room for more (MKV_CHORE_TABLE): the rest is for another call. */
uint64_t mkv_ns_flash_import(struct mkv_ns *ns, const struct mkv_flash_record *in, uint64_t n);
/* After the last import: what was not named is free. */
void mkv_ns_flash_imported(struct mkv_ns *ns);

struct mkv_ns_flash_stats {
    uint64_t blocks, bytes, segments, extents, extents_free, evictions, evicted_bytes, pinned, dirty, staged;
};
void mkv_ns_flash_stats(struct mkv_ns *ns, struct mkv_ns_flash_stats *out);

/* Whether a block that exists is more than the header that a scan found: MKV_DONE; MKV_PENDING: it is being
 * read, begun by this call if there was an extent for it; MKV_MISS: it was torn, and is no more (or was
 * deleted). */
int mkv_ns_verified(struct mkv_ns *ns, const uint8_t key[16]);
/* Whether a block that mkv_fill_publish stored (or found) is on stable media: MKV_DONE; MKV_PENDING: it is on
 * its way, and was demanded by this call; MKV_ERROR_DEVICE: it could not be written; MKV_MISS: deleted
 * meanwhile, or found by a scan and now found to be torn: who has the payload puts it again. */
int mkv_ns_durable(struct mkv_ns *ns, const uint8_t key[16]);

/* --- staging: flash to DRAM, for a batch of keys --- */

/* Starts to bring what is not in DRAM. Keys in DRAM are answered at once; keys that somebody else is bringing
 * are waited for (one device read); what finds no extent waits for one until the deadline (absolute,
 * mkv_now_ns). `keys` is copied. prefetch 0: answers are private locations, until the second use; 1: nobody
 * wants a location, and what is brought is for all at once. NULL: memory, or no flash. */
struct mkv_stage *mkv_stage_new(struct mkv_ns *ns, const uint8_t *keys, uint32_t n, uint64_t deadline_ns,
                                int prefetch);
/* What has been answered since the last call: indices, statuses (MKV_HIT, MKV_MISS, MKV_TIMEOUT, MKV_CORRUPT,
 * MKV_ERROR_DEVICE) and, for hits, slots (state LIVE) to READ by. At most max; returns how many. */
uint32_t mkv_stage_collect(struct mkv_stage *s, uint32_t *index, uint8_t *status, struct mkv_slot *slots,
                           uint32_t max);
int mkv_stage_done(const struct mkv_stage *s); /* all keys answered (collected or not) */
/* Forgets it, done or not: reads under way go on for those who joined. */
void mkv_stage_free(struct mkv_stage *s);
/* Whoever was told these places (generations: those in the slots) has READ them and will not again. Those
 * that nobody else was told can be taken at once. Returns how many. */
uint32_t mkv_ns_unstage(struct mkv_ns *ns, const uint8_t *keys, const uint32_t *generations, uint32_t n);

/* --- looking after it --- */

/* Reads and verifies blocks on flash from a cursor on (0: the first), at most max of them, synchronously; bad
 * ones are dropped and counted. Returns the next cursor, 0 at the end. */
uint64_t mkv_ns_scrub(struct mkv_ns *ns, uint64_t cursor, uint32_t max, uint64_t *checked, uint64_t *bad);
/* end cdef */

#endif
