/* quarantine.c: taking blocks away from under their readers. Theory of operation.
 *
 * A peer copies a block out of this node's memory by one RDMA READ. No lock of ours can hold it off, nothing
 * tells us that it is reading, and the bytes that arrive may have been sampled in any order over any part of
 * the time between its posting the READ and seeing it complete. Still, what it takes for block K must be
 * block K. Here is why it is.
 *
 * The rules
 * ---------
 * Unpublishing (evicting, deleting, retiring a slab) zeroes the live line's generation, then empties the
 * slot (or lets it say FLASH), and then *leaves the extent alone*: it joins a queue and its bytes stay as
 * they are until the namespace's epoch has advanced by five ticks. Ticks are at least a quarter of the grace
 * period G apart, measured from the end of one to the start of the next (arena.c). The first of the five may
 * come at any moment after the unpublishing, the other four each take G/4: at least G of real time passes.
 *
 * The reader accepts the payload only if, in the same READ, the live line carried the key, length and
 * generation that it expected, and less than G/2 passed from just before the posting to just after the
 * completion.
 *
 * The argument
 * ------------
 * Let the reader post at p, and let it expect generation g, which it learned from a slot or was told.
 *
 *  1. Nobody learns g before the block is published, and the payload is complete before that. So from p on,
 *     until the extent is freed and filled again, the bytes are those of the block.
 *  2. A generation is never used twice. If the READ brought g, then at some moment s after p, when the line
 *     was sampled, the generation had not been zeroed yet. So whoever unpublished the block did it after s,
 *     hence after p.
 *  3. From then on the bytes stay for at least G: the extent is not filled again before p + G.
 *  4. The reader saw the READ complete before p + G/2, so that is when the last byte had been sampled.
 *
 * Every byte was thus sampled between p and p + G/2, and from p to p + G the bytes are those of the block,
 * whatever the order of the samples. The other half of G is for what the two clocks do not see: the time
 * until a store of ours reaches memory as the NIC sees it, clocks that run a little apart.
 *
 * Nothing in this depends on the order in which the NIC reads a cache line or a payload, on the order in
 * which PCIe delivers, or on sizes. There is no version per cache line and no second READ.
 *
 * The four premises, each of which somebody will be tempted to break
 * ------------------------------------------------------------------
 * (a) Nothing writes to an extent between its publication and the end of its quarantine. Not a READ that is
 *     still under way when the put gives up (a put ends only when no device can write any more), not a repair
 *     of the checksum, not a flag in the live line. The generation is the one exception. (The cold record,
 * which no READ of a block covers, is completed when the image goes to flash.) Step 3 needs it.
 *
 * (b) A live line appears by a store of this CPU, after the fill has completed, and by nothing else: no DMA
 *     brings one along, and flash is read into the payload only. A generation is never one that was stored
 *     before, so the counter starts at a random place in each run. Steps 1 and 2 need it.
 *
 * (c) The reader's clock counts real time. It stands still in a virtual machine that is paused or migrated.
 *     So each index region has an epoch line, and a *strict* reader needs no clock in step 4: it knows epoch
 *     e before it posts and reads the line again after the last completion. If that says e + 3 at most, no
 *     extent that was live after p has been freed, since this takes five ticks and a tick advances the epoch
 *     *before* it frees. Two ticks are left over, for the same reasons as the other half of G.
 *
 * (d) The place of a live line never becomes payload, or a payload could contain what looks like a live line.
 *     Within a slab the extents have one size for ever; to change it the slab is retired, zeroed and given a
 *     new id (retire.c). Step 2 needs it: the line was sampled where lines are.
 *
 * The one exception
 * -----------------
 * A block that was staged from flash lies in an extent that no slot names. Where it is was told to one
 * request of one peer, which keeps the location to itself (it does not go into the location cache that the
 * peer's other batches share), and after its READ has completed says so (Unstage, with the generation). If
 * nobody else was told meanwhile, nobody READs the extent, and nobody will: it is *idle*, and may be filled
 * again at once. A second request is told the same place, and therefore makes the block an ordinary one
 * first (mkv_promote): from then on it leaves by quarantine. A peer that says so untimely harms itself alone.
 *
 * Who writes, who reads, why a stale read is harmless
 * ---------------------------------------------------
 * live line    This node writes it, under the namespace's lock: fill.c publishes, this file unpublishes.
 *              Peers read it. One sampled live just before it was zeroed is what all of the above is about.
 *
 * slot         index.c writes it, under the lock. Peers read it. A stale slot leads to a line that does not
 *              agree, or to the id of a slab that exists no more.
 *
 * epoch line   The tick writes it. Strict peers read it. A stale first value makes e smaller and the check
 *              stricter; a stale second one is late by less than the two spare ticks.
 *
 * struct mkv_extent is this node's own memory: nobody else reads it, and the lock guards it.
 *
 * A device that writes a block to flash is a reader as well, one that tells when it is done. An extent that
 * it still has when the five ticks are over is BUSY until the request ends.
 */
#include "list.h"

#include <string.h>

/* Nobody READs the extent any more; a device may. */
static void free_now(struct mkv_class *c, struct mkv_extent *e) {
    if (e->op) {
        e->state = MKV_EXTENT_BUSY;
    } else {
        e->state = MKV_EXTENT_FREE;
        mkv_list_push_head(&c->free, e);
    }
}

/* What both ways of going have in common, after the generation and the slot: puts the extent into quarantine
 * (or, in a slab that is being retired, leaves it dead: then the slab is in quarantine as a whole). An idle
 * one needs none: see "The one exception". */
static void leave(struct mkv_ns *ns, struct mkv_extent *e) {
    struct mkv_slab *s = mkv_slab_of(ns, e);
    struct mkv_class *c = s->cls;
    int idle = e->idle;

    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* out of the store buffer before the clock starts to run */

    if (e->pins)
        mkv_pin_drop(ns, e);
    else if (e->write == MKV_CLEAN)
        mkv_settled_leave(ns, e);
    if (ns->flash)
        mkv_flash_left(ns, e);
    s->live--;
    ns->n.blocks--;
    ns->n.bytes -= e->length;
    e->until = ns->epoch + MKV_GRACE_TICKS;
    if (s->state != MKV_SLAB_READY) {
        e->state = MKV_EXTENT_DEAD;
        s->until = e->until;
        return;
    }
    if (idle) {
        free_now(c, e);
        return;
    }
    e->state = MKV_EXTENT_QUARANTINE;
    mkv_list_push_tail(&c->quarantine, e);
}

static void zero_generation(struct mkv_ns *ns, const struct mkv_extent *e) {
    __atomic_store_n(&mkv_extent_line(mkv_slab_of(ns, e), e)->generation, 0, __ATOMIC_RELEASE);
}

void mkv_unpublish(struct mkv_ns *ns, struct mkv_extent *e) {
    zero_generation(ns, e);
    mkv_ns_remove(ns, e->key);
    leave(ns, e);
}

/* A clean block that is on flash stays there: its slot says so, with the generation that it had, which no
 * line will ever have again. Without a copy there the block is gone. */
void mkv_evict(struct mkv_ns *ns, struct mkv_extent *e) {
    if (!e->cell) {
        mkv_unpublish(ns, e);
        return;
    }
    zero_generation(ns, e);
    if (e->state == MKV_EXTENT_LIVE) {
        struct mkv_slot slot = {.generation = (uint32_t)e->generation,
                                .length = e->length,
                                .location = mkv_cell_location(ns, e->cell)};
        memcpy(slot.key, e->key, sizeof slot.key);
        mkv_ns_change(ns, &slot);
    }
    if (e->pins)
        mkv_cell_pin(ns, e->cell, e->pins, e->until);
    leave(ns, e);
}

void mkv_extent_io_begin(struct mkv_ns *ns, struct mkv_extent *e, uint16_t number) {
    e->op = (uint16_t)(number + 1);
    mkv_slab_of(ns, e)->io++;
}

void mkv_extent_io_end(struct mkv_ns *ns, struct mkv_extent *e) {
    struct mkv_slab *s = mkv_slab_of(ns, e);
    e->op = 0;
    s->io--;
    if (e->state == MKV_EXTENT_BUSY)
        free_now(s->cls, e);
}

/* Frees what has served its time. The tick calls it after it has advanced the epoch. */
void mkv_quarantine_release(struct mkv_ns *ns, struct mkv_class *c) {
    while (c->quarantine.head && c->quarantine.head->until <= ns->epoch) {
        struct mkv_extent *e = c->quarantine.head;
        mkv_list_unlink(&c->quarantine, e);
        free_now(c, e);
    }
}
