/* tcp_responder.c: the serving side of the tcp fabric, one thread over all its sockets (tcp_conn.h: each).
 *
 * Sockets with something to do stand in a list and have turns, one round after the other. epoll is
 * edge-triggered: a socket that waits costs nothing, and an idle responder sleeps.
 *
 * Whatever other threads want done (add, remove, withdraw, …) is a command that the thread executes between
 * rounds, so sockets need no lock.
 */
#define _GNU_SOURCE /* pthread_setname_np */
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <fcntl.h>
#include <unistd.h>

#include "tcp_conn.h"

#define EVENTS 64

struct command {
    enum { ADD, REMOVE, DROP, WITHDRAW, STOP } what;
    struct conn *conn;             /* ADD */
    int64_t id;                    /* REMOVE */
    const struct mkv_table *table; /* DROP */
    struct mkv_region *region;     /* WITHDRAW */
    uint64_t deadline_ns;
    int64_t result;
    bool done;
    struct command *next;
};

struct mkv_tcp_responder {
    pthread_t thread;
    int epoll_fd, event_fd;
    pthread_mutex_t lock; /* over `commands` and command.done */
    pthread_cond_t done;
    struct command *commands;
    /* The rest is the thread's own; but stats, each of them written by it and read by anybody (relaxed). */
    struct command *withdrawals; /* that wait for a socket */
    struct conn *all;
    struct conn *ready, **ready_end;
    int64_t last_id;
    bool stop;
    struct mkv_tcp_stats stats;
};

/* Connections. */

/* Closes it; the struct goes now or, while it is in the ready list, when it is taken from there. */
static void conn_close(struct mkv_tcp_responder *r, struct conn *c) {
    close(c->fd);
    c->fd = -1;
    if (c->body_region)
        body_done(c);
    *c->link = c->next;
    if (c->next)
        c->next->link = c->link;
    COUNT(&r->stats, sockets, -1);
    if (!c->ready)
        free(c);
}

static void conn_ready(struct mkv_tcp_responder *r, struct conn *c) {
    if (c->ready)
        return;
    c->ready = true;
    c->next_ready = NULL;
    *r->ready_end = c;
    r->ready_end = &c->next_ready;
}

/* Commands. */

static void command_done(struct mkv_tcp_responder *r, struct command *cmd, int64_t result) {
    pthread_mutex_lock(&r->lock);
    cmd->result = result;
    cmd->done = true; /* it is on the caller's stack: gone when the lock is */
    pthread_cond_broadcast(&r->done);
    pthread_mutex_unlock(&r->lock);
}

static int64_t conn_add(struct mkv_tcp_responder *r, struct conn *c) {
    struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    int flags = fcntl(c->fd, F_GETFL), one = 1;
    if (flags < 0 || fcntl(c->fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* refused by a unix socket */
    if (epoll_ctl(r->epoll_fd, EPOLL_CTL_ADD, c->fd, &ev) < 0)
        return -errno;
    c->id = ++r->last_id;
    c->next = r->all;
    c->link = &r->all;
    if (c->next)
        c->next->link = &c->next;
    r->all = c;
    COUNT(&r->stats, sockets, 1);
    return c->id;
}

/* Closes the sockets that match. Returns how many. */
static int64_t conn_sweep(struct mkv_tcp_responder *r, int64_t id, const struct mkv_table *table,
                          const struct mkv_region *region) {
    int64_t n = 0;
    for (struct conn *c = r->all, *next; c; c = next) {
        next = c->next;
        if ((id && c->id == id) || (table && c->table == table) || (region && c->body_region == region)) {
            conn_close(r, c);
            n++;
        }
    }
    return n;
}

static bool region_in_use(struct mkv_tcp_responder *r, const struct mkv_region *region) {
    for (struct conn *c = r->all; c; c = c->next)
        if (c->body_region == region)
            return true;
    return false;
}

static void command_execute(struct mkv_tcp_responder *r, struct command *cmd) {
    switch (cmd->what) {
    case ADD:
        command_done(r, cmd, conn_add(r, cmd->conn));
        break;
    case REMOVE:
        command_done(r, cmd, conn_sweep(r, cmd->id, NULL, NULL) ? 0 : -ENOENT);
        break;
    case DROP:
        command_done(r, cmd, conn_sweep(r, 0, cmd->table, NULL));
        break;
    case WITHDRAW:
        cmd->next = r->withdrawals;
        r->withdrawals = cmd;
        break;
    case STOP:
        r->stop = true;
        command_done(r, cmd, 0);
    }
}

static void commands_take(struct mkv_tcp_responder *r) {
    uint64_t count;
    if (read(r->event_fd, &count, sizeof count) < 0)
        return;
    pthread_mutex_lock(&r->lock);
    struct command *cmd = r->commands, *next;
    r->commands = NULL;
    pthread_mutex_unlock(&r->lock);
    for (; cmd; cmd = next) {
        next = cmd->next;
        command_execute(r, cmd);
    }
}

/* Ends the withdrawals whose region nobody holds any more, or whose time is up. Returns when the next one's
 * is, in milliseconds from now; -1: there is none. */
static int withdrawals_check(struct mkv_tcp_responder *r) {
    uint64_t now = r->withdrawals ? mkv_now_ns() : 0, next = UINT64_MAX;
    for (struct command **at = &r->withdrawals, *cmd; (cmd = *at);) {
        int64_t closed = 0;
        if (region_in_use(r, cmd->region)) {
            if (now < cmd->deadline_ns) {
                next = cmd->deadline_ns < next ? cmd->deadline_ns : next;
                at = &cmd->next;
                continue;
            }
            closed = conn_sweep(r, 0, NULL, cmd->region);
            COUNT(&r->stats, evictions, (uint64_t)closed);
        }
        *at = cmd->next;
        command_done(r, cmd, closed);
    }
    if (next == UINT64_MAX)
        return -1;
    uint64_t ms = (next - now) / 1000000 + 1;
    return ms < 1000000 ? (int)ms : 1000000;
}

/* The thread. */

static void round_of_turns(struct mkv_tcp_responder *r) {
    struct conn *c = r->ready, *next;
    r->ready = NULL;
    r->ready_end = &r->ready;
    for (; c; c = next) {
        next = c->next_ready;
        c->ready = false;
        if (c->fd < 0) {
            free(c);
            continue;
        }
        int rc = conn_turn(&r->stats, c);
        if (rc < 0)
            conn_close(r, c);
        else if (rc > 0)
            conn_ready(r, c);
    }
}

static void *responder_main(void *arg) {
    struct mkv_tcp_responder *r = arg;
    struct epoll_event ev[EVENTS];
    while (!r->stop) {
        bool commands = false;
        int timeout = withdrawals_check(r);
        int n = epoll_wait(r->epoll_fd, ev, EVENTS, r->ready ? 0 : timeout);
        if (!r->ready)
            COUNT(&r->stats, wakeups, 1);
        for (int i = 0; i < n; i++) {
            struct conn *c = ev[i].data.ptr;
            if (!c) {
                commands = true;
                continue;
            }
            c->can_recv |= !!(ev[i].events & ~(uint32_t)EPOLLOUT);
            c->can_send |= !!(ev[i].events & (EPOLLOUT | EPOLLHUP | EPOLLERR));
            conn_ready(r, c);
        }
        if (commands)
            commands_take(r); /* may close: only after the events, which point to connections */
        round_of_turns(r);
    }
    while (r->all)
        conn_close(r, r->all);
    withdrawals_check(r);
    round_of_turns(r); /* frees those that were in the list */
    return NULL;
}

/* Called by other threads. */

static int64_t command_run(struct mkv_tcp_responder *r, struct command *cmd) {
    uint64_t one = 1;
    pthread_mutex_lock(&r->lock);
    cmd->next = r->commands;
    r->commands = cmd;
    while (write(r->event_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
    while (!cmd->done)
        pthread_cond_wait(&r->done, &r->lock);
    pthread_mutex_unlock(&r->lock);
    return cmd->result;
}

struct mkv_tcp_responder *mkv_tcp_responder_new(void) {
    struct mkv_tcp_responder *r = calloc(1, sizeof *r);
    struct epoll_event ev = {.events = EPOLLIN};
    sigset_t all, old;
    int err;
    if (!r)
        return NULL;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->done, NULL);
    r->ready_end = &r->ready;
    r->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    r->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (r->epoll_fd < 0 || r->event_fd < 0 || epoll_ctl(r->epoll_fd, EPOLL_CTL_ADD, r->event_fd, &ev) < 0) {
        err = errno;
        goto fail;
    }
    sigfillset(&all); /* signals are for the threads of whoever embeds us */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    err = pthread_create(&r->thread, NULL, responder_main, r);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!err) {
        pthread_setname_np(r->thread, "memkv-tcp");
        return r;
    }
fail:
    if (r->epoll_fd >= 0)
        close(r->epoll_fd);
    if (r->event_fd >= 0)
        close(r->event_fd);
    free(r);
    errno = err;
    return NULL;
}

int64_t mkv_tcp_responder_add(struct mkv_tcp_responder *r, int fd, const struct mkv_table *table) {
    struct conn *c = malloc(sizeof *c); /* its buffers are not worth zeroing */
    if (!c)
        return -ENOMEM;
    memset(c, 0, offsetof(struct conn, in));
    c->fd = fd;
    c->table = table;
    c->can_send = true;
    struct command cmd = {.what = ADD, .conn = c};
    int64_t id = command_run(r, &cmd);
    if (id < 0)
        free(c);
    return id;
}

int mkv_tcp_responder_remove(struct mkv_tcp_responder *r, int64_t id) {
    struct command cmd = {.what = REMOVE, .id = id};
    return id > 0 ? (int)command_run(r, &cmd) : -ENOENT;
}

int64_t mkv_tcp_responder_drop(struct mkv_tcp_responder *r, const struct mkv_table *table) {
    struct command cmd = {.what = DROP, .table = table};
    return table ? command_run(r, &cmd) : 0;
}

int64_t mkv_tcp_region_withdraw(struct mkv_tcp_responder *r, struct mkv_region *region, uint64_t timeout_ns) {
    uint64_t now = mkv_now_ns();
    struct command cmd = {.what = WITHDRAW,
                          .region = region,
                          .deadline_ns = timeout_ns < UINT64_MAX - now ? now + timeout_ns : UINT64_MAX};
    __atomic_store_n(&region->dead, 1, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&region->sends, __ATOMIC_SEQ_CST) ? command_run(r, &cmd) : 0;
}

void mkv_tcp_responder_stats(struct mkv_tcp_responder *r, struct mkv_tcp_stats *out) {
    const uint64_t *from = (const uint64_t *)&r->stats;
    uint64_t *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

void mkv_tcp_responder_free(struct mkv_tcp_responder *r) {
    struct command cmd = {.what = STOP};
    if (!r)
        return;
    command_run(r, &cmd);
    pthread_join(r->thread, NULL);
    close(r->epoll_fd);
    close(r->event_fd);
    pthread_cond_destroy(&r->done);
    pthread_mutex_destroy(&r->lock);
    free(r);
}
