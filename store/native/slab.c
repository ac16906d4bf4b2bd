/* slab.c: size classes, and where an extent lies in its slab. */
#include "ns.h"

#include <stdlib.h>

#include "arena.h"

static uint64_t round_up(uint64_t x, uint64_t to) {
    return (x + to - 1) / to * to;
}

/* The classes of a namespace, largest first: block_bytes rounded up to `align`, then 3/4, 1/2, 3/8, 1/4, … of
 * that, each rounded up, down to `align` itself. Returns how many; 0 if the largest does not fit into a slab.
 */
uint32_t mkv_classes_make(struct mkv_class *cls, uint64_t block_bytes, uint64_t align, uint64_t slab_bytes) {
    uint64_t top = round_up(block_bytes, align);
    uint32_t n = 0;
    if (align + top > slab_bytes)
        return 0;
    for (uint64_t whole = top; n + 2 <= MKV_MAX_CLASSES; whole /= 2) {
        uint64_t step[2] = {round_up(whole, align), round_up((3 * whole + 3) / 4, align)};
        for (int i = 0; i < 2; i++)
            if (!n || step[i] < cls[n - 1].payload)
                cls[n++] = (struct mkv_class){.payload = step[i],
                                              .extent = align + step[i],
                                              .per_slab = slab_bytes / (align + step[i])};
        if (whole <= align)
            break;
    }
    return n;
}

/* The smallest class that a payload fits into, which must not be longer than block_bytes. */
struct mkv_class *mkv_class_of(struct mkv_ns *ns, uint64_t length) {
    uint32_t i = 0;
    while (i + 1 < ns->nclasses && ns->cls[i + 1].payload >= length)
        i++;
    return &ns->cls[i];
}

struct mkv_slab *mkv_slab_by_id(struct mkv_ns *ns, uint64_t id) {
    if (id > 0xfffff)
        return NULL;
    struct mkv_slab *s = __atomic_load_n(&ns->arena->by_id[id], __ATOMIC_RELAXED);
    return s && s->ns == ns ? s : NULL;
}

struct mkv_slab *mkv_slab_of(struct mkv_ns *ns, const struct mkv_extent *e) {
    return ns->arena->by_id[e->slab];
}

uint64_t mkv_extent_offset(const struct mkv_slab *s, const struct mkv_extent *e) {
    return (uint64_t)(e - s->extent) * s->cls->extent;
}

struct mkv_line *mkv_extent_line(const struct mkv_slab *s, const struct mkv_extent *e) {
    return (struct mkv_line *)(s->base + mkv_extent_offset(s, e) + s->ns->align - MKV_LINE_BYTES);
}

struct mkv_extent *mkv_extent_at(struct mkv_ns *ns, uint64_t location) {
    struct mkv_slab *s = ns->arena->by_id[mkv_location_slab(location)];
    return &s->extent[mkv_location_offset(location) / s->cls->extent];
}

/* From here on nobody finds it, and its id is gone. */
void mkv_slab_unlink(struct mkv_ns *ns, struct mkv_slab *s) {
    __atomic_store_n(&ns->arena->by_id[s->id], NULL, __ATOMIC_RELAXED);
    *(s->prev ? &s->prev->next : &ns->slabs) = s->next;
    if (s->next)
        s->next->prev = s->prev;
}

void mkv_slab_destroy(struct mkv_slab *s) {
    mkv_arena_give(s->ns->arena, s);
    free(s->extent);
    free(s);
}
