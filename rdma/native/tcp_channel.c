/* tcp_channel.c: the reading side of the tcp fabric, a channel over several sockets.
 *
 * Each socket is a lane with a list of READs under way, answered in order. Payloads are received straight
 * into their destinations, several responses with one readv:
 *
 *    stream    │header│payload 0│trailer│header│payload 1│trailer│header│ …
 *    lands in  │joint 0│ segs …  │   joint 1    │ segs …  │   joint 2    │ …
 *
 * A READ waits in the queue, then is under way on a lane, then is free again:
 *
 *    post ─► queue ─► lane.head … lane.tail ─► poll        all lists of struct read by index; no allocation
 *
 * There is no thread and no lock: everything happens inside the owner's calls. So once the sockets are closed
 * nothing can write into a destination any more.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <fcntl.h>
#include <unistd.h>

#include "clock.h"
#include "tcp.h"

#define NONE           UINT32_MAX
#define JOINTS         64           /* responses that one readv may reach into */
#define IOV_MAX_USED   256          /* entries of one readv */
#define RECV_MAX       (4u << 20)   /* bytes that one readv asks for */
#define TX_REQUESTS    64           /* requests that wait for one send */
#define LANE_GRAIN     (128u << 10) /* bytes given to a lane before another is looked for */
#define DEFAULT_WINDOW (32ull << 20)
#define HEAD           sizeof(struct mkv_tcp_header)
#define TAIL           sizeof(struct mkv_tcp_trailer)

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

static inline struct tcp_channel *self(struct mkv_channel *ch) {
    return (struct tcp_channel *)ch;
}

/* Lists. */

static void list_push(struct tcp_channel *c, struct list *l, uint32_t i) {
    c->read[i].next = NONE;
    if (l->head == NONE)
        l->head = i;
    else
        c->read[l->tail].next = i;
    l->tail = i;
}

static uint32_t list_pop(struct tcp_channel *c, struct list *l) {
    uint32_t i = l->head;
    if (i != NONE)
        l->head = c->read[i].next;
    return i;
}

/* Breaking and reporting. */

/* Closes the sockets. The READs stay in their lists, to be reported by poll. */
static void channel_break(struct tcp_channel *c, int err) {
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
static void lane_break(struct tcp_channel *c, struct lane *l, int err, uint32_t vendor) {
    if (l->under_way.head != NONE) {
        c->read[l->under_way.head].status = err;
        c->read[l->under_way.head].vendor = vendor;
    }
    channel_break(c, err);
}

/* Reports the READs of a broken channel. */
static int report_broken(struct tcp_channel *c, struct mkv_done *out, int max) {
    uint64_t now = mkv_now_ns();
    uint32_t lane = 0;
    int n = 0;
    while (n < max) {
        while (lane < c->nlanes && c->lane[lane].under_way.head == NONE)
            lane++;
        uint32_t i = list_pop(c, lane < c->nlanes ? &c->lane[lane].under_way : &c->queue);
        if (i == NONE)
            break;
        struct read *r = &c->read[i];
        if (r->posted_ns)
            c->ch.wire_bytes -= r->length;
        out[n++] = (struct mkv_done){.cookie = r->cookie,
                                     .posted_ns = r->posted_ns ? r->posted_ns : now,
                                     .done_ns = now,
                                     .sample_ns = UINT64_MAX,
                                     .status = r->status,
                                     .vendor = r->vendor};
        list_push(c, &c->idle, i);
        c->ch.busy--;
    }
    return n;
}

/* Posting and sending. */

static int tcp_post(struct mkv_channel *ch, const struct mkv_read *rd) {
    struct tcp_channel *c = self(ch);
    uint64_t length = 0;
    if (ch->broken)
        return -EPIPE;
    if (ch->busy >= ch->depth)
        return -EAGAIN;
    const struct mkv_region *remote = mkv_table_get(ch->remote, rd->region);
    if (!remote)
        return -ENOENT;
    if (!rd->nseg || rd->nseg > MKV_MAX_SEG)
        return -ERANGE;
    struct read *r = &c->read[c->idle.head];
    for (uint32_t i = 0; i < rd->nseg; i++) {
        const struct mkv_seg *seg = &rd->seg[i];
        const struct mkv_region *local = mkv_table_get(ch->local, seg->region);
        if (!local)
            return -ENOENT;
        if (!(local->access & MKV_LOCAL_WRITE))
            return -EACCES;
        if (!seg->length || seg->offset > local->length || seg->length > local->length - seg->offset)
            return -ERANGE;
        r->seg[i] = (struct iovec){(void *)(uintptr_t)(local->base + seg->offset), seg->length};
        length += seg->length;
    }
    if (length > UINT32_MAX || rd->offset > remote->length || length > remote->length - rd->offset)
        return -ERANGE;
    r->cookie = rd->cookie;
    r->posted_ns = 0;
    r->secret = remote->secret;
    r->offset = rd->offset;
    r->region = rd->region;
    r->length = (uint32_t)length;
    r->nseg = rd->nseg;
    r->status = -ECANCELED;
    r->vendor = 0;
    uint32_t i = list_pop(c, &c->idle);
    list_push(c, &c->queue, i);
    ch->busy++;
    return 0;
}

static void lane_watch(struct tcp_channel *c, struct lane *l, bool out) {
    struct epoll_event ev = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.u32 = (uint32_t)(l - c->lane)};
    if (l->want_out == out)
        return;
    l->want_out = out;
    epoll_ctl(c->ch.fd, EPOLL_CTL_MOD, l->fd, &ev);
}

/* Sends the requests that wait on a lane, as far as the socket takes them. A failure is left to the receiving
 * side, where a refusal may lie that explains it; the shutdown makes sure that there is something to see. */
static void lane_send(struct tcp_channel *c, struct lane *l) {
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

static inline bool lane_open(const struct lane *l) {
    return !l->deaf && l->tx_len < sizeof l->tx;
}

/* The lane for the next READ: the present one for a while, so that small READs share send calls, then the one
 * with the fewest bytes under way. NULL: none has room. */
static struct lane *lane_pick(struct tcp_channel *c) {
    struct lane *best = &c->lane[c->lane_now];
    if (c->lane_given < LANE_GRAIN && lane_open(best))
        return best;
    best = NULL;
    for (uint32_t i = 0; i < c->nlanes; i++)
        if (lane_open(&c->lane[i]) && (!best || c->lane[i].load < best->load))
            best = &c->lane[i];
    if (best) {
        c->lane_now = (uint32_t)(best - c->lane);
        c->lane_given = 0;
    }
    return best;
}

static void tcp_flush(struct mkv_channel *ch) {
    struct tcp_channel *c = self(ch);
    struct lane *l;
    uint64_t now = 0;
    if (ch->broken)
        return;
    while (c->queue.head != NONE) {
        struct read *r = &c->read[c->queue.head];
        if (ch->wire_bytes && ch->wire_bytes + r->length > ch->window)
            break;
        if (!(l = lane_pick(c)))
            break;
        if (!now)
            now = mkv_now_ns();
        r->posted_ns = now;
        l->tx[l->tx_len / sizeof *l->tx] = (struct mkv_tcp_request){.magic = MKV_TCP_REQUEST_MAGIC,
                                                                    .region = r->region,
                                                                    .secret = r->secret,
                                                                    .offset = r->offset,
                                                                    .length = r->length,
                                                                    .sequence = l->tx_sequence++};
        l->tx_len += sizeof *l->tx;
        l->load += r->length;
        c->lane_given += r->length;
        ch->wire_bytes += r->length;
        uint32_t i = list_pop(c, &c->queue);
        list_push(c, &l->under_way, i);
        if (l->tx_len == sizeof l->tx)
            lane_send(c, l);
    }
    for (l = c->lane; l < c->lane + c->nlanes; l++)
        if (l->tx_len)
            lane_send(c, l);
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
static struct gather lane_gather(struct tcp_channel *c, struct lane *l, int max) {
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

static int header_check(const struct mkv_tcp_header *h, uint32_t sequence, uint32_t length) {
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
static int lane_advance(struct tcp_channel *c, struct lane *l, uint64_t n, struct mkv_done *out) {
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
static int lane_recv(struct tcp_channel *c, struct lane *l, struct mkv_done *out, int max) {
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

static int tcp_poll(struct mkv_channel *ch, struct mkv_done *out, int max) {
    struct tcp_channel *c = self(ch);
    struct epoll_event ev[MKV_TCP_MAX_SOCKETS];
    int done = 0;
    if (max <= 0)
        return 0;
    if (!ch->broken) {
        bool room = false;
        int n = epoll_wait(ch->fd, ev, MKV_TCP_MAX_SOCKETS, 0);
        for (int i = 0; i < n && done < max && !ch->broken; i++) {
            room |= !!(ev[i].events & EPOLLOUT);
            if (ev[i].events & ~(uint32_t)EPOLLOUT)
                done += lane_recv(c, &c->lane[ev[i].data.u32], out + done, max - done);
        }
        if (room || (done && c->queue.head != NONE))
            tcp_flush(ch);
    }
    if (ch->broken && done < max)
        done += report_broken(c, out + done, max - done);
    return done;
}

/* The epoll descriptor is level-triggered: whatever poll left behind keeps it readable. Only the READs of a
 * broken channel, whose sockets are gone, would not show. */
static int tcp_arm(struct mkv_channel *ch) {
    return ch->broken && ch->busy;
}

static void tcp_abort(struct mkv_channel *ch) {
    channel_break(self(ch), -ECANCELED);
}

static const struct mkv_channel_ops tcp_ops = {
    .post = tcp_post, .flush = tcp_flush, .poll = tcp_poll, .arm = tcp_arm, .abort = tcp_abort};

/* Making and freeing. */

static int lane_open_socket(struct tcp_channel *c, struct lane *l, int fd) {
    struct epoll_event ev = {.events = EPOLLIN, .data.u32 = (uint32_t)(l - c->lane)};
    int flags = fcntl(fd, F_GETFL), one = 1;
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one,
               sizeof one); /* refused by a unix socket, which needs none */
    l->fd = fd;
    l->under_way.head = NONE;
    return epoll_ctl(c->ch.fd, EPOLL_CTL_ADD, fd, &ev);
}

struct mkv_channel *mkv_tcp_channel_new(const int *fds, uint32_t nfds, uint32_t depth,
                                        const struct mkv_table *local, const struct mkv_table *remote) {
    struct tcp_channel *c;
    if (!nfds || nfds > MKV_TCP_MAX_SOCKETS || !depth || depth >= NONE) {
        errno = EINVAL;
        return NULL;
    }
    if (!(c = calloc(1, sizeof *c + nfds * sizeof *c->lane)))
        return NULL;
    c->ch = (struct mkv_channel){
        .ops = &tcp_ops, .local = local, .remote = remote, .depth = depth, .window = DEFAULT_WINDOW};
    c->nlanes = nfds;
    c->idle.head = c->queue.head = NONE;
    c->ch.fd = epoll_create1(EPOLL_CLOEXEC);
    c->read = calloc(depth, sizeof *c->read);
    if (c->ch.fd < 0 || !c->read)
        goto fail;
    for (uint32_t i = 0; i < nfds; i++)
        if (lane_open_socket(c, &c->lane[i], fds[i]) < 0)
            goto fail;
    for (uint32_t i = 0; i < depth; i++)
        list_push(c, &c->idle, i);
    return &c->ch;
fail:;
    int err = errno;
    if (c->ch.fd >= 0)
        close(c->ch.fd);
    free(c->read);
    free(c);
    errno = err;
    return NULL;
}

void mkv_tcp_channel_free(struct mkv_channel *ch) {
    struct tcp_channel *c = self(ch);
    if (!ch)
        return;
    channel_break(c, -ECANCELED);
    close(ch->fd);
    free(c->read);
    free(c);
}
