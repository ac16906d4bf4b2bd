/* sieve.c: which block to evict: SIEVE (Zhang et al., NSDI 2024), one queue per size class.
 *
 *   newest ── head ◄── prev ── … ── hand ── … ── next ──► tail ── oldest
 *                              ◄── the hand goes this way, and from the head back to the tail
 *
 * A touch sets a bit and moves nothing. The hand passes over visited blocks, clearing their bit, and takes
 * the first that nobody has touched since it last came by. Pinned blocks are not in the queue at all; those
 * that were staged a moment ago are passed over, for who asked for them is about to READ them.
 */
#include "list.h"

#define HAND_MAX 4096 /* steps in one go: the lock is held meanwhile */

void mkv_sieve_add(struct mkv_sieve *s, struct mkv_extent *e) {
    e->visited = 0;
    mkv_list_push_head(&s->queue, e);
}

void mkv_sieve_remove(struct mkv_sieve *s, struct mkv_extent *e) {
    if (s->hand == e)
        s->hand = e->prev;
    mkv_list_unlink(&s->queue, e);
}

static int is_spared(const struct mkv_extent *e, uint64_t epoch) {
    return e->state == MKV_EXTENT_STAGED && e->until > epoch;
}

/* A hand that has gone HAND_MAX steps, or round twice, takes what it stands on, unless that is spared. */
struct mkv_extent *mkv_sieve_victim(struct mkv_sieve *s, uint64_t epoch) {
    struct mkv_extent *e = s->hand ? s->hand : s->queue.tail;
    uint64_t steps = 2 * s->queue.count < HAND_MAX ? 2 * s->queue.count : HAND_MAX;
    for (uint64_t i = 0; e && i < steps && (e->visited || is_spared(e, epoch)); i++) {
        e->visited = 0;
        e = e->prev ? e->prev : s->queue.tail;
    }
    s->hand = e;
    return e && !is_spared(e, epoch) ? e : NULL;
}
