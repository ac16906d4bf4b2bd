/* put.h: a batch of puts, pulled by the node.
 *
 *    key ──begin──► extent set aside ──READ──► payload in the slab ──checksum agrees──► published
 *         │ EXISTS                   │ fails           │ differs            │ no slot in the index
 *         │ FULL: again after a tick └► abandoned      └► CORRUPT           └► again after a tick
 *
 * A *durable* put is acknowledged when the block, published or found, is on stable media as well. If the
 * deadline comes first its status is TIMEOUT, and the block is there all the same.
 *
 * Nothing of a put is visible before its payload has arrived whole and its checksum agrees (design: publish
 * last, verify always). A putjob belongs to one channel and is used for one batch after the other; what it
 * needs is allocated when it is made.
 */
#ifndef MKV_PUT_H
#define MKV_PUT_H

#include <stdint.h>

#include "job.h"
#include "store.h"

/* cdef */
struct mkv_putjob;

struct mkv_put_outcome { /* what a finished job says of itself */
    uint64_t stored_bytes;
    uint64_t read_bytes; /* of payload that arrived, kept or not */
    uint64_t started_ns;
    uint64_t ended_ns;
    int32_t rc;        /* 0, or a negative errno: -ETIMEDOUT, -ECANCELED, or what broke the channel */
    int32_t broken;    /* the channel's error: it can only be destroyed */
    int32_t undrained; /* destroy the queue pair, then call mkv_putjob_abandon */
    uint32_t held;     /* extents that are still set aside (undrained only) */
};

/* A job with room for `window` puts under way at once. NULL: no memory. */
struct mkv_putjob *mkv_putjob_new(uint32_t window);
/* Not while it is under way, and not while it holds extents. */
void mkv_putjob_free(struct mkv_putjob *pj);

/* Makes the job ready for submission (its address is that of its struct mkv_job). All columns and `status`
 * live until it is done; `checksums` may be NULL: then the node computes them. `channel` is a reading
 * struct mkv_channel whose local table holds the namespace's slabs under their ids. At most `credit` bytes
 * are set aside at once, but one block always may. `deadline_ns`: absolute, CLOCK_BOOTTIME. `durable`: STORED
 * and EXISTS are said only of blocks on stable media; MKV_ERROR_DEVICE: it could not be written there;
 * MKV_MISS: it was deleted meanwhile. */
void mkv_putjob_init(struct mkv_putjob *pj, struct mkv_ns *ns, void *channel, const uint8_t *keys,
                     const uint32_t *lengths, const uint32_t *regions, const uint64_t *offsets,
                     const uint64_t *checksums, uint8_t *status, uint32_t n, uint64_t credit,
                     uint64_t deadline_ns, int durable);
/* From any thread: the job ends as if its deadline had come, within a tenth of a second. */
void mkv_putjob_cancel(struct mkv_putjob *pj);
void mkv_putjob_outcome(const struct mkv_putjob *pj, struct mkv_put_outcome *out);
/* Gives back the extents of an undrained job, whose queue pair is destroyed. Returns how many. */
uint32_t mkv_putjob_abandon(struct mkv_putjob *pj);
/* end cdef */

#endif
