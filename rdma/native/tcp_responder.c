/* tcp_responder.c: the serving side of the tcp fabric, one thread over all its sockets.
 *
 *    socket ─► in: requests ─┬─ small: copied ─► out: trailer│header│payload│trailer│header│payload│trailer
 *                            └─ large: body ───► sendmsg [out: trailer│header][payload, from the region]
 *
 * A turn of a socket ends when it has had its share of bytes, when it has nothing to do, or when it takes no
 * more; epoll is edge-triggered, so a socket that waits costs nothing and an idle responder sleeps.
 *
 * A payload is sampled when it is copied, into `out` or by sendmsg into the kernel; the trailer's times are
 * taken around that. While a payload is sampled its region's `sends` is raised:
 *
 *    responder: sends++, then looks at dead          withdrawal: dead = 1, then looks at sends
 *
 * (both sequentially consistent), so that one of them sees the other. Whatever other threads want done
 * (add, remove, withdraw, …) is a command that the thread executes between turns, so sockets need no lock.
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
#include <sys/socket.h>
#include <sys/uio.h>
#include <fcntl.h>
#include <unistd.h>

#include "clock.h"
#include "tcp.h"

#define IN_REQUESTS 128
#define OUT_BYTES   (64u << 10)  /* holds several small responses, at least two of the largest */
#define TURN_BYTES  (512u << 10) /* a socket's share before the next one's turn */
#define DISCARD_MAX (1u << 20)   /* bytes swallowed behind a refused request */
#define JOIN_MAX    (96u << 10) /* a body up to this waits for its trailer in the kernel; longer, it is slower \
                                 */
#define EVENTS 64
#define HEAD   sizeof(struct mkv_tcp_header)
#define TAIL   sizeof(struct mkv_tcp_trailer)

_Static_assert(OUT_BYTES >= 2 * (HEAD + MKV_TCP_COPY_MAX + TAIL), "no room for small responses");

struct conn {
    struct conn *next, *prev; /* of all */
    struct conn *next_ready;
    const struct mkv_table *table;
    int64_t id;
    int fd;                  /* -1: closed */
    bool ready;              /* in the list of those with something to do */
    bool can_recv, can_send; /* as far as is known: until the next EAGAIN or short receive */
    bool refused;            /* answers nothing more; closes when `out` is sent and the peer has closed */
    bool shut;               /* … and said so to the peer */
    bool eof;                /* the peer sends nothing more */
    uint32_t in_at, in_len;
    uint32_t out_at, out_len;
    struct mkv_region *body_region; /* of the large payload under way, or NULL */
    const uint8_t *body;
    uint32_t body_left;
    uint32_t discarded;
    uint64_t first_ns; /* 0: none of it has been sent */
    uint8_t in[IN_REQUESTS * sizeof(struct mkv_tcp_request)];
    uint8_t out[OUT_BYTES];
};

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
    struct conn all;             /* ring */
    struct conn *ready, **ready_end;
    int64_t last_id;
    bool stop;
    struct mkv_tcp_stats stats;
};

#define COUNT(r, what, n) __atomic_store_n(&(r)->stats.what, (r)->stats.what + (n), __ATOMIC_RELAXED)

/* Connections. */

static void body_done(struct conn *c) {
    __atomic_fetch_sub(&c->body_region->sends, 1, __ATOMIC_SEQ_CST);
    c->body_region = NULL;
}

/* Closes it; the struct goes now or, while it is in the ready list, when it is taken from there. */
static void conn_close(struct mkv_tcp_responder *r, struct conn *c) {
    close(c->fd);
    c->fd = -1;
    if (c->body_region)
        body_done(c);
    c->next->prev = c->prev;
    c->prev->next = c->next;
    COUNT(r, sockets, -1);
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

/* Requests. */

static void out_put(struct conn *c, const void *data, uint32_t len) {
    memcpy(c->out + c->out_len, data, len);
    c->out_len += len;
}

static void out_header(struct conn *c, const struct mkv_tcp_request *q, uint32_t status) {
    struct mkv_tcp_header h = {.magic = MKV_TCP_RESPONSE_MAGIC,
                               .status = status,
                               .sequence = q->sequence,
                               .length = status == MKV_TCP_OK ? q->length : 0};
    out_put(c, &h, HEAD);
}

static void out_trailer(struct mkv_tcp_responder *r, struct conn *c, uint64_t first_ns, uint64_t last_ns) {
    struct mkv_tcp_trailer t = {.first_ns = first_ns, .last_ns = last_ns};
    out_put(c, &t, TAIL);
    COUNT(r, reads, 1);
}

/* Finds what a request asks for and raises the region's `sends`, or says why not. */
static uint32_t request_open(struct conn *c, const struct mkv_tcp_request *q, struct mkv_region **region) {
    if (q->magic != MKV_TCP_REQUEST_MAGIC || !q->length || q->reserved)
        return MKV_TCP_BAD;
    struct mkv_region *g = mkv_table_get(c->table, q->region);
    if (!g || g->secret != q->secret || !(g->access & MKV_REMOTE_READ))
        return MKV_TCP_ACCESS;
    if (q->offset > g->length || q->length > g->length - q->offset)
        return MKV_TCP_RANGE;
    __atomic_fetch_add(&g->sends, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&g->dead, __ATOMIC_SEQ_CST)) {
        __atomic_fetch_sub(&g->sends, 1, __ATOMIC_SEQ_CST);
        return MKV_TCP_ACCESS;
    }
    *region = g;
    return MKV_TCP_OK;
}

/* Turns requests into output until there is a large payload to send or no room. */
static void conn_prepare(struct mkv_tcp_responder *r, struct conn *c) {
    uint64_t now = 0;
    while (!c->body_region && !c->refused && c->in_len - c->in_at >= sizeof(struct mkv_tcp_request) &&
           OUT_BYTES - c->out_len >= HEAD + MKV_TCP_COPY_MAX + TAIL) {
        struct mkv_tcp_request q;
        struct mkv_region *g;
        memcpy(&q, c->in + c->in_at, sizeof q);
        c->in_at += sizeof q;
        uint32_t status = request_open(c, &q, &g);
        out_header(c, &q, status);
        if (status != MKV_TCP_OK) {
            c->refused = true;
            COUNT(r, refusals, 1);
            return;
        }
        const uint8_t *from = (const uint8_t *)(uintptr_t)(g->base + q.offset);
        if (q.length > MKV_TCP_COPY_MAX) {
            c->body_region = g;
            c->body = from;
            c->body_left = q.length;
            c->first_ns = 0;
            return;
        }
        uint64_t first = now ? now : mkv_now_ns(); /* the last one's end is a little early, which is safe */
        out_put(c, from, q.length);
        __atomic_fetch_sub(&g->sends, 1, __ATOMIC_SEQ_CST); /* a full barrier: the copy is over */
        now = mkv_now_ns();
        COUNT(r, bytes, q.length);
        out_trailer(r, c, first, now);
    }
}

/* Receives. -1: the socket is to be closed. */
static int conn_recv(struct conn *c) {
    if (c->in_at) {
        memmove(c->in, c->in + c->in_at, c->in_len - c->in_at);
        c->in_len -= c->in_at;
        c->in_at = 0;
    }
    size_t room = sizeof c->in - c->in_len;
    ssize_t n = recv(c->fd, c->in + c->in_len, room, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR)
        return 0;
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
        return -1;
    if (n < (ssize_t)room)
        c->can_recv = false; /* emptied; what comes later, the end too, is a new edge */
    if (n == 0)
        c->eof = true;
    if (n > 0)
        c->in_len += (uint32_t)n;
    return 0;
}

/* Sends `out` and at most `share` bytes of the body. The number of bytes; 0: no room; -1: close. */
static ssize_t conn_send(struct mkv_tcp_responder *r, struct conn *c, uint32_t share) {
    uint32_t out_left = c->out_len - c->out_at;
    struct iovec iov[2] = {{c->out + c->out_at, out_left}};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 1};
    int flags = MSG_NOSIGNAL | MSG_DONTWAIT;
    uint64_t before = 0;
    if (c->body_region) {
        if (c->body_left <= JOIN_MAX)
            flags |= MSG_MORE;
        iov[1] = (struct iovec){(void *)c->body, c->body_left < share ? c->body_left : share};
        msg.msg_iovlen = 2;
        before = mkv_now_ns();
    }
    ssize_t n = sendmsg(c->fd, &msg, flags);
    COUNT(r, sends, 1);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
        c->can_send = false; /* room is a new edge */
        return 0;
    }
    if (n < 0)
        return errno == EINTR ? 0 : -1;
    if ((size_t)n < out_left) {
        c->out_at += (uint32_t)n;
        return n;
    }
    c->out_at = c->out_len = 0;
    uint32_t sampled = (uint32_t)n - out_left;
    if (!sampled)
        return n;
    if (!c->first_ns)
        c->first_ns = before;
    c->body += sampled;
    c->body_left -= sampled;
    COUNT(r, bytes, sampled);
    if (!c->body_left) {
        body_done(c);
        out_trailer(r, c, c->first_ns, mkv_now_ns());
    }
    return n;
}

/* After a refusal: closing with unread requests would reset the connection, and the refusal might be lost. So
 * ends our direction and swallows what comes until the peer closes. -1: closed, or too much. */
static int conn_linger(struct conn *c) {
    if (!c->shut) {
        shutdown(c->fd, SHUT_WR);
        c->shut = true;
    }
    while (c->can_recv && !c->eof) {
        c->discarded += c->in_len - c->in_at;
        c->in_at = c->in_len = 0;
        if (conn_recv(c) < 0 || c->discarded > DISCARD_MAX)
            return -1;
    }
    return c->eof ? -1 : 0;
}

/* A turn. 1: has more to do; 0: waits for an edge; -1: to be closed. */
static int conn_turn(struct mkv_tcp_responder *r, struct conn *c) {
    uint32_t share = TURN_BYTES;
    for (;;) {
        conn_prepare(r, c);
        if (!c->body_region && !c->refused && c->can_recv && OUT_BYTES - c->out_len >= OUT_BYTES / 2) {
            if (conn_recv(c) < 0) /* before sending: a trailer travels with the next header if there is one */
                return -1;
            continue;
        }
        if (c->out_at == c->out_len && !c->body_region) {
            if (c->refused)
                return conn_linger(c);
            return c->eof ? -1 : 0;
        }
        if (!c->can_send)
            return 0;
        if (!share)
            return 1;
        ssize_t n = conn_send(r, c, share);
        if (n < 0)
            return -1;
        share -= n < share ? (uint32_t)n : share;
    }
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
    c->next = r->all.next;
    c->prev = &r->all;
    c->next->prev = c;
    r->all.next = c;
    COUNT(r, sockets, 1);
    return c->id;
}

/* Closes the sockets that match. Returns how many. */
static int64_t conn_sweep(struct mkv_tcp_responder *r, int64_t id, const struct mkv_table *table,
                          const struct mkv_region *region) {
    int64_t n = 0;
    for (struct conn *c = r->all.next, *next; c != &r->all; c = next) {
        next = c->next;
        if ((id && c->id == id) || (table && c->table == table) || (region && c->body_region == region)) {
            conn_close(r, c);
            n++;
        }
    }
    return n;
}

static bool region_in_use(struct mkv_tcp_responder *r, const struct mkv_region *region) {
    for (struct conn *c = r->all.next; c != &r->all; c = c->next)
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
            COUNT(r, evictions, (uint64_t)closed);
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
        int rc = conn_turn(r, c);
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
            COUNT(r, wakeups, 1);
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
    while (r->all.next != &r->all)
        conn_close(r, r->all.next);
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
    r->all.next = r->all.prev = &r->all;
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
