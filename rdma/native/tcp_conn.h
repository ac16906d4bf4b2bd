/* tcp_conn.h: one socket of a responder: requests in, responses out, a turn at a time.
 *
 *    socket ─► in: requests ─┬─ small: copied ─► out: trailer│header│payload│trailer│header│payload│trailer
 *                            └─ large: body ───► sendmsg [out: trailer│header][payload, from the region]
 *
 * A turn ends when the socket has had its share of bytes, when it has nothing to do, or when it takes no
 * more.
 *
 * A payload is sampled when it is copied, into `out` or by sendmsg into the kernel; the trailer's times are
 * taken around that. While a payload is sampled its region's `sends` is raised:
 *
 *    responder: sends++, then looks at dead          withdrawal: dead = 1, then looks at sends
 *
 * (both sequentially consistent), so that one of them sees the other.
 *
 * Included by tcp_responder.c alone, whose thread runs all of this.
 */
#ifndef MKV_TCP_CONN_H
#define MKV_TCP_CONN_H

#include <stdbool.h>
#include <string.h>

#include <sys/socket.h>
#include <sys/uio.h>

#include "clock.h"
#include "tcp.h"

#define IN_REQUESTS 128
#define OUT_BYTES   (64u << 10)  /* holds several small responses, at least two of the largest */
#define TURN_BYTES  (512u << 10) /* a socket's share before the next one's turn */
#define DISCARD_MAX (1u << 20)   /* bytes swallowed behind a refused request */
#define JOIN_MAX    (96u << 10)  /* a body up to this waits in the kernel for its trailer; longer is slower */
#define HEAD        sizeof(struct mkv_tcp_header)
#define TAIL        sizeof(struct mkv_tcp_trailer)

_Static_assert(OUT_BYTES >= 2 * (HEAD + MKV_TCP_COPY_MAX + TAIL), "no room for small responses");

/* Statistics are written by one thread and read by any. */
#define COUNT(stats, what, n) __atomic_store_n(&(stats)->what, (stats)->what + (n), __ATOMIC_RELAXED)

struct conn {
    struct conn *next, **link; /* of all; link: what points here */
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

/* Ends the sampling of a large payload. */
static inline void body_done(struct conn *c) {
    __atomic_fetch_sub(&c->body_region->sends, 1, __ATOMIC_SEQ_CST);
    c->body_region = NULL;
}

/* Requests. */

static inline void out_put(struct conn *c, const void *data, uint32_t len) {
    memcpy(c->out + c->out_len, data, len);
    c->out_len += len;
}

static inline void out_header(struct conn *c, const struct mkv_tcp_request *q, uint32_t status) {
    struct mkv_tcp_header h = {.magic = MKV_TCP_RESPONSE_MAGIC,
                               .status = status,
                               .sequence = q->sequence,
                               .length = status == MKV_TCP_OK ? q->length : 0};
    out_put(c, &h, HEAD);
}

static inline void out_trailer(struct mkv_tcp_stats *stats, struct conn *c, uint64_t first_ns,
                               uint64_t last_ns) {
    struct mkv_tcp_trailer t = {.first_ns = first_ns, .last_ns = last_ns};
    out_put(c, &t, TAIL);
    COUNT(stats, reads, 1);
}

/* Finds what a request asks for and raises the region's `sends`, or says why not. */
static inline uint32_t request_open(struct conn *c, const struct mkv_tcp_request *q,
                                    struct mkv_region **region) {
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
static inline void conn_prepare(struct mkv_tcp_stats *stats, struct conn *c) {
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
            COUNT(stats, refusals, 1);
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
        COUNT(stats, bytes, q.length);
        out_trailer(stats, c, first, now);
    }
}

/* Receives. -1: the socket is to be closed. */
static inline int conn_recv(struct conn *c) {
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
static inline ssize_t conn_send(struct mkv_tcp_stats *stats, struct conn *c, uint32_t share) {
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
    COUNT(stats, sends, 1);
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
    COUNT(stats, bytes, sampled);
    if (!c->body_left) {
        body_done(c);
        out_trailer(stats, c, c->first_ns, mkv_now_ns());
    }
    return n;
}

/* After a refusal: closing with unread requests would reset the connection, and the refusal might be lost. So
 * ends our direction and swallows what comes until the peer closes. -1: closed, or too much. */
static inline int conn_linger(struct conn *c) {
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
static inline int conn_turn(struct mkv_tcp_stats *stats, struct conn *c) {
    uint32_t share = TURN_BYTES;
    for (;;) {
        conn_prepare(stats, c);
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
        ssize_t n = conn_send(stats, c, share);
        if (n < 0)
            return -1;
        share -= n < share ? (uint32_t)n : share;
    }
}

#endif
