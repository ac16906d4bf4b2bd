/* tcp_lane.h: one socket of a tcp channel: requests out, responses straight to where they belong.
 *
 * A lane has a list of READs under way, answered in order; several responses are received with one readv:
 *
 *    stream    │header│payload 0│trailer│header│payload 1│trailer│header│ …
 *    lands in  │joint 0│ segs …  │   joint 1    │ segs …  │   joint 2    │ …
 *
 * Included by tcp_channel.c alone.
 */
#ifndef MKV_TCP_LANE_H
#define MKV_TCP_LANE_H

#include <stdbool.h>

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "clock.h"
#include "tcp.h"

#define NONE         UINT32_MAX
#define JOINTS       64         /* responses that one readv may reach into */
#define IOV_MAX_USED 256        /* entries of one readv */
#define RECV_MAX     (4u << 20) /* bytes that one readv asks for */
#define TX_REQUESTS  64         /* requests that wait for one send */
#define HEAD         sizeof(struct mkv_tcp_header)
#define TAIL         sizeof(struct mkv_tcp_trailer)

struct read {
    uint64_t cookie;
    uint64_t posted_ns; /* 0: not sent */
    uint64_t secret;
    uint64_t offset;
    uint32_t region;
    uint32_t length;
    uint32_t nseg;
    uint32_t next;   /* in whichever list it is */
    int32_t status;  /* what it ends with when the channel breaks */
    uint32_t vendor; /* status on the wire */
    struct iovec seg[MKV_MAX_SEG];
};

struct joint { /* what lies between two payloads */
    struct mkv_tcp_trailer trailer;
    struct mkv_tcp_header header;
};

struct list {
    uint32_t head, tail;
};

struct lane {
    int fd;
    bool want_out;          /* waits for room in the socket */
    bool deaf;              /* sending failed; what there is to receive will say why */
    uint32_t tx_at, tx_len; /* bytes of tx sent, and there */
    uint32_t tx_sequence;   /* of the next request */
    uint32_t rx_sequence;   /* of the oldest READ under way */
    struct list under_way;
    uint64_t load;  /* payload bytes under way */
    uint64_t rx_at; /* bytes received of the oldest READ's response */
    struct mkv_tcp_request tx[TX_REQUESTS];
    struct joint joint[JOINTS]; /* [s % JOINTS]: trailer of s - 1, header of s */
};

struct tcp_channel {
    struct mkv_channel ch;
    struct read *read; /* depth of them */
    struct list idle, queue;
    uint32_t nlanes;
    uint32_t lane_now;   /* gets READs … */
    uint32_t lane_given; /* … until it has been given LANE_GRAIN bytes */
    struct iovec iov[IOV_MAX_USED];
    struct lane lane[];
};

/* Lists. */

static inline void list_push(struct tcp_channel *c, struct list *l, uint32_t i) {
    c->read[i].next = NONE;
    if (l->head == NONE)
        l->head = i;
    else
        c->read[l->tail].next = i;
    l->tail = i;
}

static inline uint32_t list_pop(struct tcp_channel *c, struct list *l) {
    uint32_t i = l->head;
    if (i != NONE)
        l->head = c->read[i].next;
    return i;
}

/* Breaking. */

/* Closes the sockets. The READs stay in their lists, to be reported by poll. */
static inline void channel_break(struct tcp_channel *c, int err) {
    if (c->ch.broken)
        return;
    c->ch.broken = err;
    for (uint32_t i = 0; i < c->nlanes; i++) {
        shutdown(c->lane[i].fd, SHUT_RDWR); /* for a descriptor that a child process may have inherited */
        close(c->lane[i].fd);
        c->lane[i].fd = -1;
    }
}

/* Breaks the channel for what was seen on one lane: its oldest READ under way is the one to blame. */
static inline void lane_break(struct tcp_channel *c, struct lane *l, int err, uint32_t vendor) {
    if (l->under_way.head != NONE) {
        c->read[l->under_way.head].status = err;
        c->read[l->under_way.head].vendor = vendor;
    }
    channel_break(c, err);
}

/* Sending. */

static inline void lane_watch(struct tcp_channel *c, struct lane *l, bool out) {
    struct epoll_event ev = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.u32 = (uint32_t)(l - c->lane)};
    if (l->want_out == out)
        return;
    l->want_out = out;
    epoll_ctl(c->ch.fd, EPOLL_CTL_MOD, l->fd, &ev);
}

/* Sends the requests that wait on a lane, as far as the socket takes them. A failure is left to the receiving
 * side, where a refusal may lie that explains it; the shutdown makes sure that there is something to see. */
static inline void lane_send(struct tcp_channel *c, struct lane *l) {
    while (l->tx_at < l->tx_len) {
        ssize_t n = send(l->fd, (char *)l->tx + l->tx_at, l->tx_len - l->tx_at, MSG_NOSIGNAL | MSG_DONTWAIT);
        c->ch.doorbells++;
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            lane_watch(c, l, true);
            return;
        }
        if (n < 0) {
            l->deaf = true;
            shutdown(l->fd, SHUT_RDWR);
            break;
        }
        l->tx_at += (uint32_t)n;
    }
    l->tx_at = l->tx_len = 0;
    lane_watch(c, l, false);
}

/* Receiving. */

struct gather {
    struct iovec *iov;
    uint32_t n;
    uint64_t skip; /* received before */
    uint64_t bytes;
};

static inline void gather_add(struct gather *g, void *base, uint64_t len) {
    if (g->skip >= len) {
        g->skip -= len;
        return;
    }
    base = (char *)base + g->skip;
    len -= g->skip;
    g->skip = 0;
    g->bytes += len;
    if (g->n && (char *)g->iov[g->n - 1].iov_base + g->iov[g->n - 1].iov_len == (char *)base)
        g->iov[g->n - 1].iov_len += len;
    else
        g->iov[g->n++] = (struct iovec){base, len};
}

/* Lays out where the next responses of a lane belong, at most `max` of them. */
static inline struct gather lane_gather(struct tcp_channel *c, struct lane *l, int max) {
    struct gather g = {.iov = c->iov, .skip = l->rx_at};
    uint32_t s = l->rx_sequence;
    if (max > JOINTS - 1)
        max = JOINTS - 1;
    for (uint32_t i = l->under_way.head; i != NONE && max > 0; i = c->read[i].next, s++, max--) {
        struct read *r = &c->read[i];
        gather_add(&g, &l->joint[s % JOINTS].header, HEAD);
        for (uint32_t k = 0; k < r->nseg; k++)
            gather_add(&g, r->seg[k].iov_base, r->seg[k].iov_len);
        gather_add(&g, &l->joint[(s + 1) % JOINTS].trailer, TAIL);
        if (g.n + MKV_MAX_SEG + 2 > IOV_MAX_USED || g.bytes >= RECV_MAX)
            break;
    }
    return g;
}

static inline int header_check(const struct mkv_tcp_header *h, uint32_t sequence, uint32_t length) {
    if (h->magic != MKV_TCP_RESPONSE_MAGIC || h->sequence != sequence)
        return -EIO;
    switch (h->status) {
    case MKV_TCP_OK:
        return h->length == length ? 0 : -EIO;
    case MKV_TCP_ACCESS:
        return -EACCES;
    case MKV_TCP_RANGE:
        return -ERANGE;
    default:
        return -EIO;
    }
}

/* Takes note of n received bytes; reports the READs that they complete. */
static inline int lane_advance(struct tcp_channel *c, struct lane *l, uint64_t n, struct mkv_done *out) {
    uint64_t now = mkv_now_ns();
    int done = 0;
    while (n) {
        uint32_t i = l->under_way.head, s = l->rx_sequence;
        struct read *r = &c->read[i];
        uint64_t whole = HEAD + r->length + TAIL, before = l->rx_at;
        uint64_t take = n < whole - before ? n : whole - before;
        l->rx_at += take;
        n -= take;
        if (before < HEAD && l->rx_at >= HEAD) {
            const struct mkv_tcp_header *h = &l->joint[s % JOINTS].header;
            int err = header_check(h, s, r->length);
            if (err) {
                lane_break(c, l, err, h->magic == MKV_TCP_RESPONSE_MAGIC ? h->status : 0);
                break;
            }
        }
        if (l->rx_at < whole)
            break;
        const struct mkv_tcp_trailer *t = &l->joint[(s + 1) % JOINTS].trailer;
        out[done++] =
            (struct mkv_done){.cookie = r->cookie,
                              .posted_ns = r->posted_ns,
                              .done_ns = now,
                              .sample_ns = t->last_ns < t->first_ns ? UINT64_MAX : t->last_ns - t->first_ns};
        l->rx_at = 0;
        l->rx_sequence++;
        l->load -= r->length;
        c->ch.wire_bytes -= r->length;
        c->ch.read_bytes += r->length;
        c->ch.reads++;
        c->ch.busy--;
        list_pop(c, &l->under_way);
        list_push(c, &c->idle, i);
    }
    return done;
}

/* Receives what has come on one lane; at most max READs are completed. */
static inline int lane_recv(struct tcp_channel *c, struct lane *l, struct mkv_done *out, int max) {
    int done = 0;
    while (done < max) {
        struct gather g = lane_gather(c, l, max - done);
        char unexpected;
        ssize_t n = g.n == 1 ? recv(l->fd, g.iov->iov_base, g.iov->iov_len, MSG_DONTWAIT)
                    : g.n    ? readv(l->fd, g.iov, (int)g.n)
                             : recv(l->fd, &unexpected, 1, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            break;
        if (n < 0 && (errno == EFAULT || errno == ENOMEM))
            lane_break(c, l, -errno, 0);
        else if (n <= 0)
            lane_break(c, l, -EHOSTUNREACH, 0);
        else if (!g.n)
            lane_break(c, l, -EIO, 0); /* nothing was asked for */
        else
            done += lane_advance(c, l, (uint64_t)n, out + done);
        if (c->ch.broken || (uint64_t)n < g.bytes || !g.n)
            break;
    }
    return done;
}

#endif
