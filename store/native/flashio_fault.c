/* flashio_fault.c: bad devices and power cuts, for the tests of whatever stands on the flash engine.
 *
 * Both stand between the places at a device and the rung, on the engine's thread. A *fault* makes a request
 * fail, stop half-way, or lie. The *volatile cache* is the model of a device that acknowledges a write before
 * it is on stable media: a write's bytes are copied to a list and the write is over; a read brings what the
 * file has and is laid over with what the list has; a flush writes to the file what was over when it was
 * queued, and forgets it. All of that waits for the file on the engine's thread, and the rung has no part in
 * it: a read under way there could miss what a flush moves from the list to the file meanwhile.
 *
 * A power cut takes the list in the order of arrival, with it the writes that have no place or no answer yet,
 * and lets each of them reach the file wholly, not at all, up to some sector, or in a random set of its
 * sectors. Since later writes go over earlier ones, a sector written twice may keep its old content, the
 * first or the second: all that a device that reorders within its cache can leave behind. A sector itself is
 * never torn: devices promise that much.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "clock.h"
#include "flashio_ops.h"

#define ANY_DEVICE UINT32_MAX

struct rule {
    struct mkv_fault fault;
    uint32_t hits;
    struct rule *next;
};

struct pending { /* a write that only the cache has */
    uint32_t device;
    uint64_t offset, length, over_ns;
    uint8_t *bytes; /* aligned, for O_DIRECT */
    struct pending *next;
};

struct mkv_faults {
    struct rule *rules;
    struct mkv_task *held;
    struct pending *cache, **last;
    uint64_t random;
    int is_volatile, dead;
};

static uint64_t draw(uint64_t *state) { /* splitmix64 */
    uint64_t x = *state += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static struct mkv_faults *faults(struct mkv_flashio *f) {
    if (!f->faults && (f->faults = calloc(1, sizeof *f->faults)))
        f->faults->last = &f->faults->cache;
    return f->faults;
}

static int put(int fd, const uint8_t *from, uint64_t length, uint64_t offset) {
    while (length) {
        ssize_t n = pwrite(fd, from, length < MKV_PART_BYTES ? length : MKV_PART_BYTES, (off_t)offset);
        if (n <= 0) {
            if (n < 0 && errno == EINTR)
                continue;
            return n < 0 ? -errno : -EIO;
        }
        from += n;
        offset += (uint64_t)n;
        length -= (uint64_t)n;
    }
    return 0;
}

static int get(int fd, uint8_t *to, uint64_t length, uint64_t offset) {
    while (length) {
        ssize_t n = pread(fd, to, length < MKV_PART_BYTES ? length : MKV_PART_BYTES, (off_t)offset);
        if (n <= 0) {
            if (n < 0 && errno == EINTR)
                continue;
            return n < 0 ? -errno : -EIO;
        }
        to += n;
        offset += (uint64_t)n;
        length -= (uint64_t)n;
    }
    return 0;
}

/* --- the volatile cache --- */

static int cache_write(struct mkv_flashio *f, const struct mkv_io *io, uint64_t length) {
    struct mkv_faults *x = f->faults;
    off_t end = lseek(f->devices[io->device].fd, 0, SEEK_END);
    if (end < 0)
        return -errno;
    if (io->offset + length > (uint64_t)end)
        return -ENOSPC;
    if (!length)
        return 0;
    struct pending *p = calloc(1, sizeof *p);
    void *bytes = 0;
    if (!p || posix_memalign(&bytes, 4096, length)) {
        free(p);
        return -ENOMEM;
    }
    memcpy(bytes, (const void *)(uintptr_t)io->address, length);
    *p = (struct pending){
        .device = io->device, .offset = io->offset, .length = length, .over_ns = UINT64_MAX, .bytes = bytes};
    *x->last = p;
    x->last = &p->next;
    return 0;
}

static int cache_read(const struct mkv_flashio *f, const struct mkv_io *io) {
    uint8_t *to = (uint8_t *)(uintptr_t)io->address;
    int rc = get(f->devices[io->device].fd, to, io->length, io->offset);
    if (rc)
        return rc;
    for (const struct pending *p = f->faults->cache; p; p = p->next) {
        uint64_t from = p->offset > io->offset ? p->offset : io->offset;
        uint64_t p_end = p->offset + p->length, io_end = io->offset + io->length;
        uint64_t end = p_end < io_end ? p_end : io_end;
        if (p->device == io->device && from < end)
            memcpy(to + (from - io->offset), p->bytes + (from - p->offset), end - from);
    }
    return 0;
}

static void drop(struct mkv_faults *x, struct pending **link) {
    struct pending *p = *link;
    *link = p->next;
    if (x->last == &p->next)
        x->last = link;
    free(p->bytes);
    free(p);
}

/* What was over before any of these flushes was queued. */
static int cache_flush(struct mkv_flashio *f, const struct mkv_io *flushes) {
    struct mkv_faults *x = f->faults;
    uint64_t until = 0;
    for (const struct mkv_io *io = flushes; io; io = io->next)
        if (io->queued_ns > until)
            until = io->queued_ns;
    for (struct pending **link = &x->cache; *link;) {
        struct pending *p = *link;
        if (p->device != flushes->device || p->over_ns > until) {
            link = &p->next;
            continue;
        }
        int rc = put(f->devices[p->device].fd, p->bytes, p->length, p->offset);
        if (rc)
            return rc;
        drop(x, link);
    }
    return 0;
}

/* Not at all, wholly, its beginning, or some of its sectors. */
static void cut_one(struct mkv_flashio *f, uint64_t *random, const struct pending *p) {
    const struct mkv_device *dev = &f->devices[p->device];
    uint64_t unit = dev->align, fate = draw(random) % 4, end = p->length;
    if (fate == 0)
        return;
    if (fate == 2)
        end = draw(random) % (end / unit) * unit;
    for (uint64_t at = 0, to; at < end; at = to + unit) {
        for (to = at; to < end && (fate < 3 || draw(random) % 2); to += unit)
            ;
        put(dev->fd, p->bytes + at, to - at, p->offset + at);
    }
}

/* A write that is still waiting may be on its way as well. */
static void add_waiting(struct mkv_flashio *f, const struct mkv_io *io) {
    for (; io; io = io->next)
        if (io->op == MKV_IO_WRITE)
            cache_write(f, io, io->length);
}

static void fail_held(struct mkv_flashio *f) {
    struct mkv_faults *x = f->faults;
    for (struct mkv_task *t; (t = x->held);) {
        x->held = t->next;
        mkv_task_over(f, t, -EIO);
    }
}

static int power_cut(struct mkv_flashio *f, void *arg) {
    struct mkv_faults *x = f->faults;
    uint64_t random = *(const uint64_t *)arg;
    if (!x || !x->is_volatile)
        return -EINVAL;
    if (x->dead)
        return 0;
    x->dead = 1;
    for (const struct mkv_task *t = x->held; t; t = t->next)
        if (t->io->op == MKV_IO_WRITE)
            cache_write(f, t->io, t->io->length);
    for (uint32_t i = 0; i < f->device_count; i++)
        add_waiting(f, f->devices[i].writes.head);
    while (x->cache) {
        cut_one(f, &random, x->cache);
        drop(x, &x->cache);
    }
    fail_held(f);
    return 0;
}

/* --- faults --- */

static int applies(uint32_t kind, uint32_t op) {
    switch (kind) {
    case MKV_FAULT_TORN:
        return op == MKV_IO_WRITE;
    case MKV_FAULT_LOST:
        return op == MKV_IO_WRITE || op == MKV_IO_FLUSH;
    case MKV_FAULT_FLIP:
        return op == MKV_IO_READ;
    default:
        return 1;
    }
}

static int hits(struct mkv_faults *x, struct rule *rule, const struct mkv_io *io) {
    const struct mkv_fault *fault = &rule->fault;
    if (!applies(fault->kind, io->op) || (fault->op && fault->op != io->op))
        return 0;
    if (fault->device != ANY_DEVICE && fault->device != io->device)
        return 0;
    if (fault->to && io->op != MKV_IO_FLUSH &&
        (io->offset >= fault->to || io->offset + io->length <= fault->from))
        return 0;
    if (fault->times && rule->hits >= fault->times)
        return 0;
    if (fault->per_million && draw(&x->random) % 1000000 >= fault->per_million)
        return 0;
    rule->hits++;
    return 1;
}

/* `flips`: whether to look for what befalls a read at its end, or for what befalls a request at its start. */
static const struct mkv_fault *find(struct mkv_faults *x, const struct mkv_io *io, int flips) {
    for (struct rule *rule = x->rules; rule; rule = rule->next)
        if ((rule->fault.kind == MKV_FAULT_FLIP) == flips && hits(x, rule, io))
            return &rule->fault;
    return 0;
}

/* Only the first sectors of a write arrive, never all of them. */
static int tear(struct mkv_flashio *f, const struct mkv_io *io, int error) {
    const struct mkv_device *dev = &f->devices[io->device];
    uint64_t length = draw(&f->faults->random) % (io->length / dev->align) * dev->align;
    int rc = f->faults->is_volatile
                 ? cache_write(f, io, length)
                 : put(dev->fd, (const uint8_t *)(uintptr_t)io->address, length, io->offset);
    return rc ? rc : error;
}

static void over(struct mkv_flashio *f, struct mkv_task *t, int result) {
    struct mkv_faults *x = f->faults;
    /* The write is in the cache from here on; a flush that is queued from its callback on covers it. */
    for (struct pending *p = x->cache; p; p = p->next)
        if (p->over_ns == UINT64_MAX)
            p->over_ns = mkv_now_ns();
    mkv_task_over(f, t, result);
}

int mkv_faults_start(struct mkv_flashio *f, struct mkv_task *t) {
    struct mkv_faults *x = f->faults;
    struct mkv_io *io = t->io;
    if (x->dead) {
        over(f, t, -EIO);
        return 1;
    }
    const struct mkv_fault *fault = find(x, io, 0);
    if (fault && fault->kind == MKV_FAULT_HELD) {
        t->next = x->held;
        x->held = t;
    } else if (fault && fault->kind == MKV_FAULT_ERROR) {
        over(f, t, fault->error);
    } else if (fault && fault->kind == MKV_FAULT_LOST) {
        over(f, t, 0);
    } else if (fault && fault->kind == MKV_FAULT_TORN) {
        over(f, t, tear(f, io, fault->error));
    } else if (x->is_volatile && io->op == MKV_IO_READ) {
        over(f, t, mkv_faults_ended(f, t, cache_read(f, io)));
    } else if (x->is_volatile && io->op == MKV_IO_WRITE) {
        over(f, t, cache_write(f, io, io->length));
    } else if (x->is_volatile && io->op == MKV_IO_FLUSH) {
        over(f, t, cache_flush(f, io));
    } else if (x->is_volatile && io->op == MKV_IO_DISCARD) {
        over(f, t, 0);
    } else {
        return 0;
    }
    return 1;
}

int mkv_faults_ended(struct mkv_flashio *f, struct mkv_task *t, int result) {
    struct mkv_faults *x = f->faults;
    const struct mkv_io *io = t->io;
    if (result || io->op != MKV_IO_READ)
        return result;
    if (find(x, io, 1)) {
        uint64_t bit = draw(&x->random) % (io->length * 8);
        ((uint8_t *)(uintptr_t)io->address)[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    return 0;
}

static int add_rule(struct mkv_flashio *f, void *arg) {
    const struct mkv_fault *fault = arg;
    struct rule *rule = faults(f) ? calloc(1, sizeof *rule) : 0;
    if (!rule)
        return -ENOMEM;
    rule->fault = *fault;
    struct rule **last = &f->faults->rules;
    while (*last)
        last = &(*last)->next;
    *last = rule;
    return 0;
}

static int clear_rules(struct mkv_flashio *f, void *arg) {
    struct mkv_faults *x = f->faults;
    (void)arg;
    if (!x)
        return 0;
    for (struct rule *rule; (rule = x->rules);) {
        x->rules = rule->next;
        free(rule);
    }
    struct mkv_task *t = x->held, *next;
    x->held = 0;
    for (; t; t = next) {
        next = t->next;
        if (!mkv_faults_start(f, t))
            f->rung->ops->start(f->rung, t);
    }
    return 0;
}

static int make_volatile(struct mkv_flashio *f, void *arg) {
    if (f->begun)
        return -EBUSY;
    if (!faults(f))
        return -ENOMEM;
    f->faults->is_volatile = 1;
    f->faults->random = *(const uint64_t *)arg;
    return 0;
}

void mkv_faults_free(struct mkv_faults *x) {
    if (!x)
        return;
    while (x->cache)
        drop(x, &x->cache);
    free(x);
}

int mkv_flashio_fault(struct mkv_flashio *f, const struct mkv_fault *fault) {
    struct mkv_fault copy = *fault;
    if (copy.kind < MKV_FAULT_ERROR || copy.kind > MKV_FAULT_FLIP || copy.error > 0 ||
        (copy.kind == MKV_FAULT_ERROR && !copy.error))
        return -EINVAL;
    return mkv_engine_call(f, add_rule, &copy);
}

void mkv_flashio_fault_clear(struct mkv_flashio *f) {
    mkv_engine_call(f, clear_rules, 0);
}

int mkv_flashio_volatile(struct mkv_flashio *f, uint64_t seed) {
    return mkv_engine_call(f, make_volatile, &seed);
}

int mkv_flashio_power_cut(struct mkv_flashio *f, uint64_t seed) {
    return mkv_engine_call(f, power_cut, &seed);
}
