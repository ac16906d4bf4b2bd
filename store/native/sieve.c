/* sieve.c: which block to evict: SIEVE (Zhang et al., NSDI 2024), one queue per size class.
 *
 *   newest ── head ◄── prev ── … ── hand ── … ── next ──► tail ── oldest
 *                              ◄── the hand goes this way, and from the head back to the tail
 *
 * A touch sets a bit and moves nothing. The hand passes over visited blocks, clearing their bit, and takes
 * the first that nobody has touched since it last came by. Pinned blocks are not in the queue at all.
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

/* A hand that has come past HAND_MAX visited blocks takes what it stands on. */
struct mkv_extent *mkv_sieve_victim(struct mkv_sieve *s) {
    struct mkv_extent *e = s->hand ? s->hand : s->queue.tail;
    for (unsigned i = 0; e && e->visited && i < HAND_MAX; i++) {
        e->visited = 0;
        e = e->prev ? e->prev : s->queue.tail;
    }
    s->hand = e;
    return e;
}
