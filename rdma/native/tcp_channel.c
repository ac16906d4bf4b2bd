/* tcp_channel.c: the reading side of the tcp fabric, a channel over several sockets (tcp_lane.h: each).
 *
 * A READ waits in the queue, then is under way on a lane, then is free again:
 *
 *    post ─► queue ─► lane.head … lane.tail ─► poll        all lists of struct read by index; no allocation
 *
 * There is no thread and no lock: everything happens inside the owner's calls. So once the sockets are closed
 * nothing can write into a destination any more.
 */
#include <stdlib.h>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <fcntl.h>

#include "tcp_lane.h"

#define LANE_GRAIN     (128u << 10) /* bytes given to a lane before another is looked for */
#define DEFAULT_WINDOW (32ull << 20)

static inline struct tcp_channel *self(struct mkv_channel *ch) {
    return (struct tcp_channel *)ch;
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

/* Polling. */

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
