/* flash_ns.c: a namespace's part in the flash tier: made, freed, ticked, counted. */
#include "flash_ns.h"

#include <errno.h>
#include <stdlib.h>

#include "arena.h"

#define ZERO_PER_TICK 64u /* headers of evicted images, of each class and device */
#define KEPT_PER_TICK 4096u

int mkv_ns_flash_attach(struct mkv_ns *ns, struct mkv_flash *f, uint64_t incarnation) {
    struct mkv_ns_flash *nf = calloc(1, sizeof *nf);
    struct mkv_flash_class *cls = nf ? calloc(ns->nclasses, sizeof *cls) : NULL;
    int rc = cls ? 0 : -ENOMEM;
    pthread_mutex_lock(&f->round_lock);
    pthread_mutex_lock(&ns->lock);
    for (const struct mkv_slab *s = ns->slabs; s && !rc; s = s->next)
        rc = s->state == MKV_SLAB_TAKEN ? 0 : -EBUSY;
    if (ns->flash)
        rc = -EALREADY;
    if (!rc) {
        nf->f = f;
        nf->ns = ns;
        nf->incarnation = incarnation;
        nf->cls = cls;
        pthread_cond_init(&nf->quiet, NULL);
        nf->next = f->all;
        f->all = nf;
        __atomic_add_fetch(&f->spaces, 1, __ATOMIC_RELAXED);
        ns->flash = nf;
    }
    pthread_mutex_unlock(&ns->lock);
    pthread_mutex_unlock(&f->round_lock);
    if (rc) {
        free(cls);
        free(nf);
    }
    return rc;
}

/* When nothing asks the namespace for anything any more: takes it away from the others and waits until no
 * device has its memory. What is dirty is lost. */
void mkv_ns_flash_detach(struct mkv_ns *ns) {
    struct mkv_ns_flash *nf = ns->flash;
    struct mkv_flash *f = nf->f;
    pthread_mutex_lock(&f->round_lock);
    for (struct mkv_ns_flash **at = &f->all; *at; at = &(*at)->next)
        if (*at == nf) {
            *at = nf->next;
            break;
        }
    __atomic_sub_fetch(&f->spaces, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&f->round_lock);
    pthread_mutex_lock(&ns->lock);
    nf->closing = 1;
    while (nf->parked) {
        struct mkv_op *op = nf->parked;
        nf->parked = op->next;
        mkv_op_end(op);
    }
    while (nf->ops)
        pthread_cond_wait(&nf->quiet, &ns->lock);
    for (uint32_t i = 0; i < ns->nclasses; i++)
        for (int u = 0; u < 3; u++)
            while (nf->cls[i].dirty[u].head)
                mkv_dirty_remove(ns, nf->cls[i].dirty[u].head);
    pthread_mutex_unlock(&ns->lock);
    mkv_flash_after(f); /* a round may have waited for it */
    pthread_cond_destroy(&nf->quiet);
    for (uint32_t i = 0; i < nf->segs; i++) {
        free(nf->seg[i]->cell);
        free(nf->seg[i]);
    }
    free(nf->seg);
    free(nf->tombs.key);
    free(nf->cls);
    free(nf);
    ns->flash = NULL;
}

void mkv_flash_tick(struct mkv_ns *ns) {
    ns->flash->zero_pause = 0;
    mkv_scan_unpark(ns);
    mkv_stage_tick(ns);
    mkv_kept_tick(ns, KEPT_PER_TICK);
    mkv_doom_stale(ns, ZERO_PER_TICK);
    mkv_zero_pump(ns);
    mkv_drain_pump(ns);
    mkv_write_pump(ns);
    mkv_scan_pump(ns);
}

void mkv_flash_ticked(struct mkv_ns *ns) {
    mkv_flash_after(ns->flash->f);
}

void mkv_flash_room(struct mkv_ns *ns) {
    mkv_stage_pump(ns, UINT64_MAX);
}

/* --- what the rest of the namespace does to a block --- */

void mkv_cell_touch(struct mkv_ns *ns, const struct mkv_place *p) {
    p->cell->visited = 1;
    if (p->e && p->e->state == MKV_EXTENT_STAGED)
        mkv_promote(ns, p->e);
}

void mkv_flash_left(struct mkv_ns *ns, struct mkv_extent *e) {
    if (e->write != MKV_CLEAN)
        mkv_write_drop(ns, e);
    if (e->state == MKV_EXTENT_STAGED)
        ns->flash->n.staged--;
    if (e->cell)
        e->cell->dram = NULL;
    e->cell = NULL;
}

/* The block at p (nowhere: both NULL) shall be no more, and not come back. */
int mkv_flash_delete(struct mkv_ns *ns, const uint8_t key[16], const struct mkv_place *p) {
    if ((ns->flash->unknown || ns->flash->kept.count) && mkv_tomb_add(ns, key))
        return -ENOMEM;
    ns->flash->frozen = 0;
    if (p->e && p->e->state != MKV_EXTENT_STAGING) {
        mkv_unpublish(ns, p->e);
    } else if (p->cell) {
        if (p->e)
            mkv_stage_drop(ns, p->cell, MKV_MISS);
        mkv_ns_remove(ns, key);
    }
    if (p->cell && p->cell->state == MKV_CELL_HELD) { /* else its write goes on and dooms it */
        mkv_cell_unhold(ns, p->cell);
        mkv_cell_doom(ns, p->cell, 0);
    }
    return 0;
}

/* After a batch of them. */
void mkv_flash_deleted(struct mkv_ns *ns) {
    pthread_mutex_lock(&ns->lock);
    mkv_zero_pump(ns);
    pthread_mutex_unlock(&ns->lock);
}

int mkv_flash_wants(const struct mkv_ns *ns) {
    if (ns->flash->draining && ns->flash->draining->drained)
        return 1;
    for (uint32_t i = 0; i < ns->nclasses; i++)
        if (ns->flash->cls[i].wants)
            return 1;
    return 0;
}

int mkv_flash_full(const struct mkv_ns *ns, uint64_t length) {
    const struct mkv_flash *f = ns->flash->f;
    uint64_t dirty = __atomic_load_n(&f->dirty_bytes, __ATOMIC_RELAXED);
    return dirty && dirty + length > f->dirty_max;
}

void mkv_ns_flash_stats(struct mkv_ns *ns, struct mkv_ns_flash_stats *out) {
    *out = (struct mkv_ns_flash_stats){0};
    pthread_mutex_lock(&ns->lock);
    struct mkv_ns_flash *nf = ns->flash;
    if (nf) {
        *out = nf->n;
        out->pinned = nf->pinned.count;
        for (uint32_t i = 0; i < ns->nclasses; i++)
            out->extents_free += nf->cls[i].room;
    }
    pthread_mutex_unlock(&ns->lock);
}
