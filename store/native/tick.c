/* tick.c: what happens to a namespace every quarter of its grace period. The timer in arena.c calls it. */
#include "flash.h"
#include "ns.h"

#include "arena.h"
#include "clock.h"

#define EXPIRE_PER_TICK 4096

uint32_t mkv_chores_locked(struct mkv_ns *ns) {
    uint32_t chores = mkv_table_wanted(ns) ? MKV_CHORE_TABLE : 0;
    if (mkv_arena_free_slabs(ns->arena))
        for (uint32_t i = 0; i < ns->nclasses; i++)
            if (ns->cls[i].wants)
                chores |= MKV_CHORE_SLAB;
    if (ns->retiring)
        for (const struct mkv_slab *s = ns->slabs; s; s = s->next)
            if (s->state == MKV_SLAB_RETIRED)
                chores |= MKV_CHORE_RETIRE;
    if (ns->flash && mkv_flash_wants(ns))
        chores |= MKV_CHORE_SEGMENT;
    return chores;
}

uint32_t mkv_ns_chores(struct mkv_ns *ns) {
    pthread_mutex_lock(&ns->lock);
    uint32_t chores = mkv_chores_locked(ns);
    pthread_mutex_unlock(&ns->lock);
    return chores;
}

/* The order matters in two places. The epoch goes out before anything is released: a strict reader that still
 * sees the old one must find the old bytes. And the time of the tick is taken when all is done: the next one
 * is measured from there, so a tick that took long does not shorten the next. */
void mkv_ns_tick_now(struct mkv_ns *ns) {
    pthread_mutex_lock(&ns->lock);
    ns->epoch++;
    mkv_tables_tick(ns);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < ns->nclasses; i++)
        mkv_quarantine_release(ns, &ns->cls[i]);
    if (ns->retiring)
        for (struct mkv_slab *s = ns->slabs; s; s = s->next)
            if (s->state == MKV_SLAB_RETIRING && s->until <= ns->epoch && !s->filling && !s->io && !s->live)
                s->state = MKV_SLAB_RETIRED;
    mkv_pins_expire(ns, EXPIRE_PER_TICK);
    for (uint32_t i = 0; i < ns->nclasses; i++)
        mkv_class_tick(ns, &ns->cls[i]);
    if (ns->flash)
        mkv_flash_tick(ns);
    uint32_t chores = mkv_chores_locked(ns);
    __atomic_store_n(&ns->ticked_ns, mkv_now_ns(), __ATOMIC_RELAXED);
    pthread_mutex_unlock(&ns->lock);
    if (chores)
        mkv_arena_signal(ns->arena);
    if (ns->flash)
        mkv_flash_ticked(ns);
}
