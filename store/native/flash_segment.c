/* flash_segment.c: spans of devices that a namespace is given, each for one size class.
 *
 * Python finds and writes down who has which; here they are asked for (mkv_ns_segment_wanted) and added. The
 * table of cells of a segment is all that is ever allocated for its blocks.
 */
#include "flash_ns.h"

#include <errno.h>
#include <stdlib.h>

#define ASK_TICKS   256u       /* after a refusal */
#define CELLS_MAX   (1u << 21) /* that a location can number, in one segment */
#define HANDLES_MAX (1u << 20)

uint64_t mkv_ns_segment_wanted(struct mkv_ns *ns) {
    uint64_t payload = 0;
    pthread_mutex_lock(&ns->lock);
    for (uint32_t i = 0; ns->flash && i < ns->nclasses && !payload; i++)
        if (ns->flash->cls[i].wants)
            payload = ns->cls[i].payload;
    pthread_mutex_unlock(&ns->lock);
    return payload;
}

static struct mkv_flash_class *class_with(struct mkv_ns *ns, uint64_t payload) {
    for (uint32_t i = 0; ns->flash && i < ns->nclasses; i++)
        if (ns->cls[i].payload == payload)
            return &ns->flash->cls[i];
    return NULL;
}

/* An answer other than a segment. */
static void told(struct mkv_ns *ns, uint64_t payload, int promised) {
    pthread_mutex_lock(&ns->lock);
    struct mkv_flash_class *c = class_with(ns, payload);
    if (c) {
        c->wants = 0;
        c->promised = (uint8_t)promised;
        c->denied = !promised || c->segments; /* while it waits it lives on what it has */
        c->ask_again = ns->epoch + ASK_TICKS;
        mkv_write_pump(ns);
    }
    pthread_mutex_unlock(&ns->lock);
    if (c)
        mkv_flash_after(ns->flash->f);
}

void mkv_ns_segment_denied(struct mkv_ns *ns, uint64_t payload) {
    told(ns, payload, 0);
}

void mkv_ns_segment_promised(struct mkv_ns *ns, uint64_t payload) {
    told(ns, payload, 1);
}

static int fits(struct mkv_ns *ns, const struct mkv_segment *is, uint64_t count) {
    struct mkv_flash *f = ns->flash->f;
    if (is->device >= MKV_MAX_DEVICES || !f->drive[is->device].known)
        return -ENODEV;
    if (mkv_drive_failed(f, is->device))
        return -EIO;
    if (is->offset % ns->align || !count || count > CELLS_MAX || !is->epoch)
        return -EINVAL;
    return ns->flash->segs < HANDLES_MAX ? 0 : -ENOSPC;
}

int64_t mkv_ns_segment_add(struct mkv_ns *ns, const struct mkv_segment *is, int scan) {
    struct mkv_seg *s = NULL;
    pthread_mutex_lock(&ns->lock);
    struct mkv_ns_flash *nf = ns->flash;
    struct mkv_flash_class *c = class_with(ns, is->payload);
    uint64_t count = c ? is->bytes / (ns->align + is->payload) : 0;
    int64_t rc = c ? fits(ns, is, count) : -EINVAL;
    if (!rc) {
        struct mkv_seg **more = realloc(nf->seg, (nf->segs + 1) * sizeof *more);
        if (more)
            nf->seg = more;
        s = more ? calloc(1, sizeof *s) : NULL;
        if (s)
            s->cell = calloc(count, sizeof *s->cell);
        if (!s || !s->cell) {
            free(s);
            rc = -ENOMEM;
        }
    }
    if (!rc) {
        s->is = *is;
        s->count = (uint32_t)count;
        s->cls = (uint32_t)(c - nf->cls);
        s->handle = nf->segs;
        nf->seg[nf->segs++] = s;
        nf->n.segments++;
        nf->n.extents += count;
        nf->cell_bytes += count * (ns->align + is->payload);
        c->segments++;
        c->cells += count;
        c->wants = c->denied = c->promised = 0;
        c->ask_again = 0;
        s->import = scan == 2;
        s->unknown = scan == 1 ? s->count : 0;
        nf->unknown += s->unknown;
        for (uint32_t i = s->count; i-- > 0;) { /* so that the first is the first to be used */
            s->cell[i].segment = s->handle;
            if (!scan)
                mkv_cell_free(ns, &s->cell[i], MKV_CELL_FREE);
        }
        if (scan == 1)
            MKV_COUNT(nf->f, scan_total, count);
        mkv_scan_pump(ns);
        mkv_write_again(ns);
        mkv_write_pump(ns);
        rc = s->handle;
    }
    pthread_mutex_unlock(&ns->lock);
    return rc;
}
