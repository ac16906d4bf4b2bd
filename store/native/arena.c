/* arena.c: the node's memory in slabs of equal size, and the timer that ticks the namespaces.
 *
 * A slab belongs to one namespace at a time and to none while it lies here, zeroed. Whenever it is taken it
 * gets an id that no slab had before: a location that some peer remembers of its former life names a slab
 * that does not exist.
 */
#include "arena.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "clock.h"

#define SLAB_IDS (1u << 20) /* what a location can name; 0 is not an id */

static void *timer_main(void *arg);

/* Ends short if the kernel has no randomness yet, which it has soon after boot. */
static int random_u64(uint64_t *out) {
    return getrandom(out, sizeof *out, 0) == sizeof *out ? 0 : -EAGAIN;
}

static int start_timer(struct mkv_arena *a) {
    pthread_condattr_t attr;
    sigset_t all, old;
    pthread_mutex_init(&a->timer_lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&a->timer_wake, &attr);
    pthread_condattr_destroy(&attr);
    sigfillset(&all); /* signals are for the application's threads */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&a->timer, NULL, timer_main, a);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return -rc;
}

static void release(struct mkv_arena *a) {
    if (a->by_id)
        munmap(a->by_id, SLAB_IDS * sizeof *a->by_id);
    if (a->event >= 0)
        close(a->event);
    free(a->free_place);
    free(a);
}

struct mkv_arena *mkv_arena_new(void *base, uint64_t bytes, uint64_t slab_bytes, uint64_t incarnation) {
    if (!base || (uintptr_t)base % 4096 || !slab_bytes || slab_bytes % 4096 ||
        slab_bytes > MKV_SLAB_MAX_BYTES || bytes < slab_bytes || bytes / slab_bytes > UINT32_MAX ||
        !incarnation) {
        errno = EINVAL;
        return NULL;
    }
    struct mkv_arena *a = calloc(1, sizeof *a);
    if (!a)
        return NULL;
    a->base = base;
    a->slab_bytes = slab_bytes;
    a->incarnation = incarnation;
    a->next_id = 1;
    a->nfree = bytes / slab_bytes;
    a->free_place = malloc(a->nfree * sizeof *a->free_place);
    void *ids = mmap(NULL, SLAB_IDS * sizeof *a->by_id, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    a->by_id = ids == MAP_FAILED ? NULL : ids;
    a->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = !a->free_place || !a->by_id || a->event < 0 ? -ENOMEM : random_u64(&a->generation);
    if (!rc) {
        a->generation >>= 16; /* 48 random bits to start from: a restart does not meet its own past */
        for (uint64_t i = 0; i < a->nfree; i++)
            a->free_place[i] = (uint32_t)(a->nfree - 1 - i);
        pthread_mutex_init(&a->lock, NULL);
        rc = start_timer(a);
    }
    if (rc) {
        release(a);
        errno = -rc;
        return NULL;
    }
    return a;
}

void mkv_arena_free(struct mkv_arena *a) {
    if (!a)
        return;
    pthread_mutex_lock(&a->timer_lock);
    a->stopping = 1;
    pthread_cond_signal(&a->timer_wake);
    pthread_mutex_unlock(&a->timer_lock);
    pthread_join(a->timer, NULL);
    pthread_cond_destroy(&a->timer_wake);
    pthread_mutex_destroy(&a->timer_lock);
    pthread_mutex_destroy(&a->lock);
    release(a);
}

int mkv_arena_eventfd(const struct mkv_arena *a) {
    return a->event;
}

uint64_t mkv_arena_free_slabs(const struct mkv_arena *a) {
    return __atomic_load_n(&a->nfree, __ATOMIC_RELAXED);
}

int mkv_arena_next(struct mkv_arena *a, uint64_t i, uint64_t *address) {
    pthread_mutex_lock(&a->lock);
    int rc = i < a->nfree ? 0 : -ENOENT;
    if (!rc)
        *address = (uint64_t)(uintptr_t)(a->base + a->free_place[a->nfree - 1 - i] * a->slab_bytes);
    pthread_mutex_unlock(&a->lock);
    return rc;
}

void mkv_arena_signal(struct mkv_arena *a) {
    uint64_t one = 1;
    ssize_t n = write(a->event, &one, sizeof one);
    (void)n; /* it can only fail by being full, and then it is readable */
}

uint64_t mkv_arena_generation(struct mkv_arena *a) {
    uint64_t g;
    do
        g = __atomic_add_fetch(&a->generation, 1, __ATOMIC_RELAXED);
    while (!(uint32_t)g); /* a slot's generation is never zero */
    return g;
}

int mkv_arena_take(struct mkv_arena *a, struct mkv_slab *s) {
    pthread_mutex_lock(&a->lock);
    int rc = a->nfree && a->next_id < SLAB_IDS ? 0 : -ENOMEM;
    if (!rc) {
        s->place = a->free_place[a->nfree - 1];
        __atomic_store_n(&a->nfree, a->nfree - 1, __ATOMIC_RELAXED);
        s->base = a->base + s->place * a->slab_bytes;
        s->id = (uint32_t)a->next_id++;
        __atomic_store_n(&a->by_id[s->id], s, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&a->lock);
    return rc;
}

void mkv_arena_give(struct mkv_arena *a, struct mkv_slab *s) {
    memset(s->base, 0, a->slab_bytes);
    pthread_mutex_lock(&a->lock);
    a->free_place[a->nfree] = s->place;
    __atomic_store_n(&a->nfree, a->nfree + 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&a->lock);
}

/* --- the timer --- */

int mkv_arena_watch(struct mkv_arena *a, struct mkv_ns *ns) {
    int rc = 0;
    pthread_mutex_lock(&a->timer_lock);
    for (struct mkv_ns *other = a->watched; other; other = other->next)
        if (other->id == ns->id)
            rc = -EEXIST;
    if (!rc) {
        ns->next = a->watched;
        a->watched = ns;
        pthread_cond_signal(&a->timer_wake);
    }
    pthread_mutex_unlock(&a->timer_lock);
    return rc;
}

void mkv_arena_unwatch(struct mkv_arena *a, struct mkv_ns *ns) {
    pthread_mutex_lock(&a->timer_lock);
    for (struct mkv_ns **at = &a->watched; *at; at = &(*at)->next)
        if (*at == ns) {
            *at = ns->next;
            break;
        }
    pthread_mutex_unlock(&a->timer_lock);
}

static void wait_ns(struct mkv_arena *a, uint64_t ns) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    ns += (uint64_t)ts.tv_nsec;
    ts.tv_sec += (time_t)(ns / 1000000000u);
    ts.tv_nsec = (long)(ns % 1000000000u);
    pthread_cond_timedwait(&a->timer_wake, &a->timer_lock, &ts);
}

/* Ticks every namespace a quarter of its grace period after the end of the last tick that was really made. A
 * process that was stopped or suspended thus makes one tick late, never several in a burst: five ticks always
 * span a whole grace period of real time, which is what quarantine.c counts on. It may sleep on a clock that
 * stands still in suspension, for waking up late does no harm; what decides is mkv_now_ns. */
static void *timer_main(void *arg) {
    struct mkv_arena *a = arg;
    pthread_mutex_lock(&a->timer_lock);
    while (!a->stopping) {
        uint64_t next = UINT64_MAX;
        for (struct mkv_ns *ns = a->watched; ns; ns = ns->next) {
            uint64_t due = __atomic_load_n(&ns->ticked_ns, __ATOMIC_RELAXED) + ns->tick_ns;
            if (mkv_now_ns() >= due) {
                mkv_ns_tick_now(ns);
                due = __atomic_load_n(&ns->ticked_ns, __ATOMIC_RELAXED) + ns->tick_ns;
            }
            next = due < next ? due : next;
        }
        uint64_t now = mkv_now_ns();
        if (!a->watched)
            pthread_cond_wait(&a->timer_wake, &a->timer_lock);
        else if (next > now)
            wait_ns(a, next - now);
    }
    pthread_mutex_unlock(&a->timer_lock);
    return NULL;
}
