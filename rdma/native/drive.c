/* drive.c: makes jobs progress, spinning briefly and then asleep on their channels.
 *
 * A poller that spins takes the CPU from whoever would bring its completion (soft-RoCE's kernel threads, a
 * tcp responder), so it spins only where there is more than one CPU, and only as long as that pays. How long
 * is learned: a wait of w that ended while spinning asks for twice w the next time, a spin in vain halves the
 * patience, and now and then one wait is given all of MAX_PATIENCE spins, as waits may have become shorter
 * than what a sleep makes of them. What was learned is kept with the channel.
 * One thread of a process at a time is more patient than the least: two that spin for one another's CPU gain
 * nothing.
 *
 * Before sleeping, every channel is armed and polled once more: a completion between the last poll and the
 * arming would otherwise go unseen.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "drive.h"

#define MAX_FDS      256u
#define MAX_SLEEP_NS 100000000ull /* a look at broken channels now and then; deadlines wake by themselves */

#define MAX_PATIENCE 10u /* times spin_ns: the longest spin */
#define EXPLORE      32u /* of so many waits in vain, one is patient */

static uint64_t spin_ns = UINT64_MAX;
static int patient; /* a thread spins for longer than spin_ns */

void mkv_set_spin_ns(uint64_t ns) {
    __atomic_store_n(&spin_ns, ns, __ATOMIC_RELAXED);
}

uint64_t mkv_spin_ns(void) {
    uint64_t ns = __atomic_load_n(&spin_ns, __ATOMIC_RELAXED);
    if (ns == UINT64_MAX) {
        cpu_set_t mine;
        int several = sched_getaffinity(0, sizeof mine, &mine) == 0 && CPU_COUNT(&mine) > 1;
        ns = several ? 20000 : 0;
        mkv_set_spin_ns(ns);
    }
    return ns;
}

static void learn_afresh(struct mkv_waits *w, uint64_t least) {
    *w = (struct mkv_waits){.least = least, .most = least * MAX_PATIENCE, .budget = least * MAX_PATIENCE};
}

static void end_patience(struct mkv_waits *w) {
    if (w->patient)
        __atomic_store_n(&patient, 0, __ATOMIC_RELEASE);
    w->patient = 0;
    w->since = 0;
}

/* Something came: the wait, if there was one, was worth its spinning. */
static void came(struct mkv_waits *w) {
    if (!w->since)
        return;
    uint64_t due = 2 * (mkv_now_ns() - w->since);
    if (due > w->most)
        due = w->most;
    w->budget = due > w->budget ? due : w->budget - (w->budget - due) / 8;
    end_patience(w);
}

/* Nothing came; 1: spin on. */
static int go_on_spinning(struct mkv_waits *w) {
    uint64_t now = mkv_now_ns();
    if (!w->since) {
        uint64_t budget = w->vain && w->vain % EXPLORE == 0 ? w->most : w->budget;
        if (budget > w->least && __atomic_exchange_n(&patient, 1, __ATOMIC_ACQUIRE) == 0)
            w->patient = 1;
        else if (budget > w->least)
            budget = w->least;
        w->since = now;
        w->until = now + budget;
    }
    if (now < w->until)
        return 1;
    w->vain++;
    w->budget = w->budget / 2 > w->least ? w->budget / 2 : w->least;
    end_patience(w);
    return 0;
}

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* When a job wants to be stepped at the latest. */
static uint64_t wake_time(const struct mkv_job *job, uint64_t now) {
    uint64_t at = job->deadline_ns;
    if (job->wake_ns && job->wake_ns < at)
        at = job->wake_ns;
    if (job->ch->broken || at <= now)
        at = now + (at <= now ? 1000000 : MAX_SLEEP_NS / 10);
    return at;
}

/* Sleeps until a channel may have something, `extra` is readable, or a job wants to be stepped. */
static void sleep_on(struct mkv_job *const *jobs, uint32_t n, int extra) {
    struct pollfd fds[MAX_FDS];
    uint64_t now = mkv_now_ns(), at = n ? now + MAX_SLEEP_NS * 10 : UINT64_MAX;
    uint32_t k = 0;
    if (extra >= 0)
        fds[k++] = (struct pollfd){.fd = extra, .events = POLLIN};
    for (uint32_t i = 0; i < n; i++) {
        if (jobs[i]->done)
            continue;
        uint64_t t = wake_time(jobs[i], now);
        if (t < at)
            at = t;
        if (jobs[i]->ch->busy && k < MAX_FDS)
            fds[k++] = (struct pollfd){.fd = jobs[i]->ch->fd, .events = POLLIN};
        jobs[i]->ch->sleeps++;
    }
    if (at == UINT64_MAX) {
        poll(fds, k, -1);
        return;
    }
    struct timespec ts = {.tv_sec = (time_t)((at - now) / 1000000000ull),
                          .tv_nsec = (long)((at - now) % 1000000000ull)};
    ppoll(fds, k, &ts, 0);
}

static uint32_t step_all(struct mkv_job *const *jobs, uint32_t n, int *progress) {
    uint32_t left = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (jobs[i]->done)
            continue;
        *progress |= jobs[i]->step(jobs[i]);
        left += !jobs[i]->done;
    }
    return left;
}

static int arm_all(struct mkv_job *const *jobs, uint32_t n) {
    int again = 0;
    for (uint32_t i = 0; i < n; i++)
        if (!jobs[i]->done && jobs[i]->ch->busy)
            again |= jobs[i]->ch->ops->arm(jobs[i]->ch);
    return again;
}

void mkv_run(struct mkv_job **jobs, uint32_t n) {
    struct mkv_waits *w = &jobs[0]->ch->waits;
    if (w->least != mkv_spin_ns())
        learn_afresh(w, mkv_spin_ns());
    for (;;) {
        int progress = 0;
        uint32_t left = step_all(jobs, n, &progress);
        if (progress || !left)
            came(w);
        if (!left)
            return;
        if (progress)
            continue;
        if (go_on_spinning(w)) {
            relax();
            continue;
        }
        if (arm_all(jobs, n))
            continue;
        sleep_on(jobs, n, -1);
    }
}

void mkv_run_one(struct mkv_job *job) {
    mkv_run(&job, 1);
}

struct mkv_loop {
    pthread_t thread;
    pthread_mutex_t lock;
    struct mkv_job *inbox, *inbox_tail; /* submitted, under the lock */
    struct mkv_job *outbox, *outbox_tail;
    struct mkv_job **jobs; /* the thread's own */
    uint32_t n, capacity;
    int wake_fd, done_fd, stop;
};

static void append(struct mkv_job **head, struct mkv_job **tail, struct mkv_job *job) {
    job->next = 0;
    if (*head)
        (*tail)->next = job;
    else
        *head = job;
    *tail = job;
}

static void signal_fd(int fd) {
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static void clear_fd(int fd) {
    uint64_t value;
    while (read(fd, &value, sizeof value) < 0 && errno == EINTR)
        ;
}

/* Moves what was submitted to the thread's own list; 0 when the loop is to end and nothing is left. */
static int take_inbox(struct mkv_loop *loop) {
    pthread_mutex_lock(&loop->lock);
    while (loop->inbox) {
        if (loop->n == loop->capacity) {
            struct mkv_job **more = realloc(loop->jobs, sizeof *more * loop->capacity * 2);
            if (!more)
                break; /* they wait in the inbox */
            loop->jobs = more;
            loop->capacity *= 2;
        }
        struct mkv_job *job = loop->inbox;
        loop->inbox = job->next;
        loop->jobs[loop->n++] = job;
    }
    int go_on = !loop->stop || loop->n || loop->inbox;
    pthread_mutex_unlock(&loop->lock);
    return go_on;
}

static void put_out(struct mkv_loop *loop) {
    uint32_t kept = 0, ended = 0;
    pthread_mutex_lock(&loop->lock);
    for (uint32_t i = 0; i < loop->n; i++) {
        if (loop->jobs[i]->done) {
            append(&loop->outbox, &loop->outbox_tail, loop->jobs[i]);
            ended++;
        } else {
            loop->jobs[kept++] = loop->jobs[i];
        }
    }
    loop->n = kept;
    pthread_mutex_unlock(&loop->lock);
    if (ended)
        signal_fd(loop->done_fd);
}

static void *loop_main(void *arg) {
    struct mkv_loop *loop = arg;
    struct mkv_waits own, *w = &own;
    learn_afresh(w, mkv_spin_ns());
    while (take_inbox(loop)) {
        int progress = 0;
        uint32_t before = loop->n;
        if (step_all(loop->jobs, loop->n, &progress) < before)
            put_out(loop);
        if (progress || !loop->n)
            came(w);
        if (progress)
            continue;
        if (loop->n && go_on_spinning(w)) {
            relax();
            continue;
        }
        if (arm_all(loop->jobs, loop->n))
            continue;
        sleep_on(loop->jobs, loop->n, loop->wake_fd);
        clear_fd(loop->wake_fd);
    }
    return 0;
}

struct mkv_loop *mkv_loop_new(void) {
    struct mkv_loop *loop = calloc(1, sizeof *loop);
    if (!loop)
        return 0;
    loop->capacity = 64;
    loop->jobs = calloc(loop->capacity, sizeof *loop->jobs);
    loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    loop->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&loop->lock, 0);
    if (!loop->jobs || loop->wake_fd < 0 || loop->done_fd < 0 ||
        pthread_create(&loop->thread, 0, loop_main, loop)) {
        close(loop->wake_fd);
        close(loop->done_fd);
        free(loop->jobs);
        free(loop);
        return 0;
    }
    pthread_setname_np(loop->thread, "memkv-progress");
    return loop;
}

int mkv_loop_eventfd(const struct mkv_loop *loop) {
    return loop->done_fd;
}

void mkv_loop_submit(struct mkv_loop *loop, struct mkv_job *job) {
    pthread_mutex_lock(&loop->lock);
    append(&loop->inbox, &loop->inbox_tail, job);
    pthread_mutex_unlock(&loop->lock);
    signal_fd(loop->wake_fd);
}

uint32_t mkv_loop_reap(struct mkv_loop *loop, struct mkv_job **out, uint32_t max) {
    uint32_t n = 0;
    pthread_mutex_lock(&loop->lock);
    while (n < max && loop->outbox) {
        out[n++] = loop->outbox;
        loop->outbox = loop->outbox->next;
    }
    if (!loop->outbox)
        clear_fd(loop->done_fd);
    pthread_mutex_unlock(&loop->lock);
    return n;
}

void mkv_loop_free(struct mkv_loop *loop) {
    if (!loop)
        return;
    pthread_mutex_lock(&loop->lock);
    loop->stop = 1;
    pthread_mutex_unlock(&loop->lock);
    signal_fd(loop->wake_fd);
    pthread_join(loop->thread, 0);
    close(loop->wake_fd);
    close(loop->done_fd);
    pthread_mutex_destroy(&loop->lock);
    free(loop->jobs);
    free(loop);
}
