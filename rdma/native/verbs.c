/* verbs.c: a channel of one-sided READs over RC queue pairs.
 *
 * Each rail (queue pair) has a ring of READs, and three marks on it:
 *
 *        head            next             tail
 *   ──────┼───────────────┼────────────────┼──────     head: oldest READ not yet reported
 *         │ on the wire   │ queued         │           next: first whose work requests are not all posted
 *
 * A READ longer than the port's largest message becomes several work requests. Work requests carry a sequence
 * number as wr_id; RC completes in order, so a completion with number s covers everything up to s, and only
 * some requests need to be signalled. When the queue pair fails, every request left is flushed with a
 * completion of its own.
 *
 * Nothing of libibverbs is linked: posting and polling are inline calls through the context's operations, and
 * the few real functions are found in the library that pyverbs has loaded.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <infiniband/verbs.h>

#include "clock.h"
#include "verbs.h"

#define LINK_MAX_WR    32           /* work requests per ibv_post_send */
#define SIGNAL_WRS     16           /* ask for a completion at least this often, … */
#define SIGNAL_BYTES   (256u << 10) /* … or after this many bytes, … */
#define SIGNAL_SHARE   4            /* … or such a part of the window: each one may wake somebody */
#define DEFAULT_WINDOW (64ull << 20)

struct entry {
    struct mkv_read read;
    uint64_t posted_ns;
    uint64_t last_seq; /* of the newest work request posted for it */
    uint32_t length;
    uint32_t sent;
    int32_t status; /* why it was never posted (whole), or 0 */
};

struct rail {
    struct ibv_qp *qp;
    struct ibv_cq *cq;
    struct entry *ring;
    uint64_t max_msg;
    uint32_t mask;
    uint32_t head, next, tail; /* free-running */
    uint32_t sq_depth, max_sge;
    uint64_t seq_posted, seq_done; /* newest work request posted, newest known to be complete */
    uint64_t seq_failed;           /* first that failed; 0: none */
    uint64_t quiet_bytes;          /* since the last signalled one */
    uint32_t quiet_wrs;            /* since the last signalled one */
    uint32_t signalled;            /* signalled and not completed */
    uint64_t load;                 /* bytes queued and on the wire */
    int32_t fail_status;           /* why, until it has been reported */
    uint32_t fail_vendor;
    int index; /* into the regions' rail keys */
};

struct verbs_channel {
    struct mkv_channel ch;
    uint32_t nrails;
    int armed;
    int own_epoll;
    struct rail rail[MKV_MAX_RAILS];
};

static struct { /* found by dlsym: see the head of the file */
    int (*modify_qp)(struct ibv_qp *, struct ibv_qp_attr *, int);
    int (*get_cq_event)(struct ibv_comp_channel *, struct ibv_cq **, void **);
    void (*ack_cq_events)(struct ibv_cq *, unsigned int);
} verbs_lib;

int mkv_verbs_built(void) {
    return 1;
}

static int load_library(void) {
    if (verbs_lib.ack_cq_events)
        return 0;
    void *so = dlopen("libibverbs.so.1", RTLD_NOW);
    if (!so)
        return -ENOENT;
    *(void **)&verbs_lib.modify_qp = dlsym(so, "ibv_modify_qp");
    *(void **)&verbs_lib.get_cq_event = dlsym(so, "ibv_get_cq_event");
    *(void **)&verbs_lib.ack_cq_events = dlsym(so, "ibv_ack_cq_events");
    return verbs_lib.modify_qp && verbs_lib.get_cq_event && verbs_lib.ack_cq_events ? 0 : -ENOENT;
}

/* Whether [ptr, ptr+len) may be read: the kernel answers, through a pipe, without a fault. */
static int readable(const void *ptr, size_t len) {
    int fd[2], ok;
    if (pipe2(fd, O_CLOEXEC | O_NONBLOCK))
        return 0;
    ok = write(fd[1], ptr, len) == (ssize_t)len;
    close(fd[0]);
    close(fd[1]);
    return ok;
}

int mkv_verbs_prove(uint64_t ptr, uint32_t qp_num, uint32_t qp_type, uint32_t pd_handle) {
    const struct ibv_qp *qp = (const struct ibv_qp *)(uintptr_t)ptr;
    if (!ptr || ptr % sizeof(void *) || !readable(qp, sizeof *qp))
        return -EFAULT;
    if (qp->qp_num != qp_num || (uint32_t)qp->qp_type != qp_type || !readable(qp->pd, sizeof *qp->pd) ||
        !readable(qp->send_cq, sizeof *qp->send_cq))
        return -EINVAL;
    return qp->pd->handle == pd_handle ? 0 : -EINVAL;
}

static inline struct verbs_channel *self(struct mkv_channel *ch) {
    return (struct verbs_channel *)ch;
}

static int read_length(const struct mkv_channel *ch, const struct mkv_read *r, uint64_t *length) {
    const struct mkv_region *remote = mkv_table_get(ch->remote, r->region);
    *length = 0;
    if (!remote)
        return -ENOENT;
    if (!r->nseg || r->nseg > MKV_MAX_SEG)
        return -ERANGE;
    for (uint32_t i = 0; i < r->nseg; i++) {
        const struct mkv_region *local = mkv_table_get(ch->local, r->seg[i].region);
        if (!local)
            return -ENOENT;
        if (!(local->access & MKV_LOCAL_WRITE))
            return -EACCES;
        if (!r->seg[i].length || r->seg[i].offset > local->length ||
            r->seg[i].length > local->length - r->seg[i].offset)
            return -ERANGE;
        *length += r->seg[i].length;
    }
    if (*length > UINT32_MAX || r->offset > remote->length || *length > remote->length - r->offset)
        return -ERANGE;
    return 0;
}

static int verbs_post(struct mkv_channel *ch, const struct mkv_read *r) {
    struct verbs_channel *c = self(ch);
    uint64_t length;
    int rc;
    if (ch->broken)
        return -EPIPE;
    if (ch->busy >= ch->depth)
        return -EAGAIN;
    if ((rc = read_length(ch, r, &length)))
        return rc;
    struct rail *rail = &c->rail[0];
    for (uint32_t i = 1; i < c->nrails; i++)
        if (c->rail[i].load < rail->load)
            rail = &c->rail[i];
    struct entry *e = &rail->ring[rail->tail++ & rail->mask];
    e->read = *r;
    e->length = (uint32_t)length;
    e->sent = 0;
    e->status = 0;
    rail->load += length;
    ch->busy++;
    return 0;
}

/* The scatter list of [from, from + length) of a READ. */
static int scatter(const struct mkv_channel *ch, const struct rail *rail, const struct entry *e,
                   uint32_t from, uint32_t length, struct ibv_sge *sge) {
    int n = 0;
    for (uint32_t i = 0; i < e->read.nseg && length; i++) {
        const struct mkv_seg *s = &e->read.seg[i];
        if (from >= s->length) {
            from -= s->length;
            continue;
        }
        const struct mkv_region *local = mkv_table_get(ch->local, s->region);
        if (!local)
            return -1;
        uint32_t part = s->length - from < length ? s->length - from : length;
        sge[n++] = (struct ibv_sge){
            .addr = local->rail[rail->index].iova + s->offset + from,
            .length = part,
            .lkey = local->rail[rail->index].lkey,
        };
        length -= part;
        from = 0;
    }
    return n;
}

/* Posts a signalled READ of nothing, whose completion says that all requests before it are over. */
static void post_marker(struct rail *rail) {
    struct ibv_send_wr *bad,
        marker = {.wr_id = rail->seq_posted + 1, .opcode = IBV_WR_RDMA_READ, .send_flags = IBV_SEND_SIGNALED};
    if (ibv_post_send(rail->qp, &marker, &bad))
        return;
    rail->seq_posted++;
    rail->signalled++;
    rail->quiet_wrs = rail->quiet_bytes = 0;
}

/* Takes every queue pair to the error state, where what is under way gets flushed. A completion is only owed
 * for signalled requests and for failed ones, hence the marker. */
static void fail(struct verbs_channel *c, int err) {
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
    if (c->ch.broken)
        return;
    c->ch.broken = err;
    for (uint32_t i = 0; i < c->nrails; i++) {
        verbs_lib.modify_qp(c->rail[i].qp, &attr, IBV_QP_STATE);
        if (c->rail[i].seq_done != c->rail[i].seq_posted)
            post_marker(&c->rail[i]);
    }
}

static void verbs_abort(struct mkv_channel *ch) {
    fail(self(ch), -ECANCELED);
}

/* Builds the next work request of the READ at `next`; 0 if it has to wait for the window, -1 if a region is
 * gone. */
static int build(struct verbs_channel *c, struct rail *rail, uint64_t now, struct ibv_send_wr *wr,
                 struct ibv_sge *sge) {
    struct mkv_channel *ch = &c->ch;
    struct entry *e = &rail->ring[rail->next & rail->mask];
    if (!e->sent && ch->wire_bytes && ch->wire_bytes + e->length > ch->window)
        return 0;
    const struct mkv_region *remote = mkv_table_get(ch->remote, e->read.region);
    uint32_t left = e->length - e->sent;
    uint32_t part = left < rail->max_msg ? left : (uint32_t)rail->max_msg;
    int nsge = remote ? scatter(ch, rail, e, e->sent, part, sge) : -1;
    if (nsge < 0) {
        e->status = -ENOENT;
        if (!e->sent)
            e->posted_ns = now, ch->wire_bytes += e->length;
        e->sent = e->length;
        e->last_seq = rail->seq_posted;
        rail->next++;
        return -1;
    }
    *wr = (struct ibv_send_wr){
        .wr_id = ++rail->seq_posted,
        .sg_list = sge,
        .num_sge = nsge,
        .opcode = IBV_WR_RDMA_READ,
        .wr.rdma = {.remote_addr = remote->rail[rail->index].iova + e->read.offset + e->sent,
                    .rkey = remote->rail[rail->index].rkey},
    };
    if (!e->sent) {
        ch->wire_bytes += e->length;
        e->posted_ns = now;
    }
    e->sent += part;
    e->last_seq = rail->seq_posted;
    rail->quiet_wrs++;
    rail->quiet_bytes += part;
    if (e->sent == e->length)
        rail->next++;
    return 1;
}

static void signal_request(struct rail *rail, struct ibv_send_wr *wr) {
    wr->send_flags = IBV_SEND_SIGNALED;
    rail->quiet_wrs = rail->quiet_bytes = 0;
    rail->signalled++;
}

/* Posts queued READs of a rail as linked work requests, as far as send queue and window allow. */
static void push(struct verbs_channel *c, struct rail *rail) {
    struct ibv_send_wr wr[LINK_MAX_WR], *bad = 0;
    struct ibv_sge sge[LINK_MAX_WR][MKV_MAX_SEG];
    uint64_t often = c->ch.window / SIGNAL_SHARE > SIGNAL_BYTES ? c->ch.window / SIGNAL_SHARE : SIGNAL_BYTES;
    while (!c->ch.broken && rail->next != rail->tail) {
        uint64_t now = mkv_now_ns();
        uint32_t n = 0;
        int full = 0;
        while (n < LINK_MAX_WR && rail->next != rail->tail &&
               rail->seq_posted - rail->seq_done < rail->sq_depth) {
            int built = build(c, rail, now, &wr[n], sge[n]);
            if (!built) {
                full = 1;
                break;
            }
            if (built < 0)
                continue;
            if (rail->quiet_wrs >= SIGNAL_WRS || rail->quiet_bytes >= often)
                signal_request(rail, &wr[n]);
            if (n)
                wr[n - 1].next = &wr[n];
            n++;
        }
        /* The newest request must be signalled if nothing later will be, or nothing earlier is: a window that
         * is full opens by its completion alone. */
        if (n && rail->quiet_wrs && (full || rail->next == rail->tail || !rail->signalled))
            signal_request(rail, &wr[n - 1]);
        if (!n) { /* the window is full, or all else is withdrawn: nobody signals for what was posted */
            if (rail->quiet_wrs && !rail->signalled)
                post_marker(rail);
            return;
        }
        c->ch.doorbells++;
        if (ibv_post_send(rail->qp, wr, &bad)) {
            /* What lies before `bad` is posted and will be flushed; the rest never was. */
            rail->seq_posted = (bad ? bad : wr)->wr_id - 1;
            rail->seq_failed = rail->seq_posted + 1;
            fail(c, rail->fail_status = -EIO);
        }
    }
}

static void verbs_flush(struct mkv_channel *ch) {
    struct verbs_channel *c = self(ch);
    for (uint32_t i = 0; i < c->nrails; i++)
        push(c, &c->rail[i]);
}

static int wc_error(enum ibv_wc_status status) {
    switch (status) {
    case IBV_WC_SUCCESS:
        return 0;
    case IBV_WC_WR_FLUSH_ERR:
        return -ECANCELED;
    case IBV_WC_REM_ACCESS_ERR:
    case IBV_WC_LOC_PROT_ERR:
        return -EACCES;
    case IBV_WC_RETRY_EXC_ERR:
    case IBV_WC_RNR_RETRY_EXC_ERR:
        return -EHOSTUNREACH;
    default:
        return -EIO;
    }
}

/* Takes what the completion queue has. */
static void take_completions(struct verbs_channel *c, struct rail *rail) {
    struct ibv_wc wc[16];
    int n;
    while ((n = ibv_poll_cq(rail->cq, 16, wc)) > 0) {
        for (int i = 0; i < n; i++) {
            if (wc[i].wr_id > rail->seq_done)
                rail->seq_done = wc[i].wr_id;
            if (rail->signalled)
                rail->signalled--;
            if (wc[i].status != IBV_WC_SUCCESS && !rail->seq_failed) {
                rail->seq_failed = wc[i].wr_id;
                rail->fail_status = wc_error(wc[i].status);
                rail->fail_vendor = (uint32_t)wc[i].status << 16 | (wc[i].vendor_err & 0xffff);
                fail(c, rail->fail_status);
            }
        }
        if (n < 16)
            break;
    }
    if (n < 0)
        fail(c, -EIO);
}

/* What became of the READ at the head of a rail: 1 and a status, or 0 if the device may still have it. */
static int over(struct verbs_channel *c, struct rail *rail, const struct entry *e, int32_t *status) {
    int complete = e->sent && e->last_seq <= rail->seq_done;
    *status = e->status;
    if (!c->ch.broken)
        return complete && e->sent == e->length;
    if (e->sent && !complete && rail->seq_done != rail->seq_posted)
        return 0; /* its flush is still to come */
    if (complete && e->sent == e->length && (!rail->seq_failed || e->last_seq < rail->seq_failed))
        return 1;
    /* The first one to fail tells why; the others were flushed. */
    *status = e->sent && rail->fail_status ? rail->fail_status : -ECANCELED;
    rail->fail_status = 0;
    return 1;
}

static int verbs_poll(struct mkv_channel *ch, struct mkv_done *out, int max) {
    struct verbs_channel *c = self(ch);
    int n = 0;
    for (uint32_t i = 0; i < c->nrails; i++) {
        struct rail *rail = &c->rail[i];
        int32_t status;
        take_completions(c, rail);
        uint64_t now = 0; /* of the completions: not asked for by one who polls in vain */
        for (struct entry *e; n < max && rail->head != rail->tail; n++) {
            e = &rail->ring[rail->head & rail->mask];
            if (!over(c, rail, e, &status))
                break;
            if (!now)
                now = mkv_now_ns();
            out[n] = (struct mkv_done){.cookie = e->read.cookie,
                                       .posted_ns = e->sent ? e->posted_ns : now,
                                       .done_ns = now,
                                       .sample_ns = UINT64_MAX,
                                       .status = status,
                                       .vendor = status ? rail->fail_vendor : 0};
            if (e->sent)
                ch->wire_bytes -= e->length;
            if (!status) {
                ch->read_bytes += e->length;
                ch->reads++;
            }
            rail->load -= e->length;
            if (rail->next == rail->head) /* never posted whole */
                rail->next++;
            rail->head++;
            ch->busy--;
        }
        push(c, rail);
    }
    return n;
}

static int verbs_arm(struct mkv_channel *ch) {
    struct verbs_channel *c = self(ch);
    for (uint32_t i = 0; i < c->nrails; i++) {
        struct ibv_cq *cq;
        void *context;
        while (c->rail[i].cq->channel && !verbs_lib.get_cq_event(c->rail[i].cq->channel, &cq, &context)) {
            verbs_lib.ack_cq_events(cq, 1);
            c->armed = 0;
        }
    }
    if (c->armed)
        return 0;
    for (uint32_t i = 0; i < c->nrails; i++)
        ibv_req_notify_cq(c->rail[i].cq, 0);
    c->armed = 1;
    return 1;
}

static const struct mkv_channel_ops verbs_ops = {verbs_post, verbs_flush, verbs_poll, verbs_arm, verbs_abort};

static int watch(struct verbs_channel *c) {
    if (c->nrails == 1) {
        c->ch.fd = c->rail[0].cq->channel->fd;
        return 0;
    }
    c->ch.fd = epoll_create1(EPOLL_CLOEXEC);
    if (c->ch.fd < 0)
        return -errno;
    c->own_epoll = 1;
    for (uint32_t i = 0; i < c->nrails; i++) {
        struct epoll_event ev = {.events = EPOLLIN};
        if (epoll_ctl(c->ch.fd, EPOLL_CTL_ADD, c->rail[i].cq->channel->fd, &ev))
            return -errno;
    }
    return 0;
}

struct mkv_channel *mkv_verbs_channel_new(const struct mkv_verbs_rail *rails, uint32_t nrails, uint32_t depth,
                                          const struct mkv_table *local, const struct mkv_table *remote) {
    uint32_t ring = 1;
    int rc = load_library();
    struct verbs_channel *c = rc ? 0 : calloc(1, sizeof *c);
    if (!c || !nrails || nrails > MKV_MAX_RAILS || !depth || depth > 1u << 20) {
        free(c);
        errno = rc ? -rc : c ? EINVAL : ENOMEM;
        return 0;
    }
    while (ring < depth)
        ring *= 2;
    c->ch = (struct mkv_channel){.ops = &verbs_ops,
                                 .local = local,
                                 .remote = remote,
                                 .depth = depth,
                                 .fd = -1,
                                 .window = DEFAULT_WINDOW};
    c->nrails = nrails;
    for (uint32_t i = 0; i < nrails && !rc; i++) {
        struct rail *r = &c->rail[i];
        r->qp = (struct ibv_qp *)(uintptr_t)rails[i].qp;
        r->cq = r->qp->send_cq;
        r->sq_depth = rails[i].sq_depth;
        r->max_sge = rails[i].max_sge;
        r->max_msg = rails[i].max_msg;
        r->mask = ring - 1;
        r->index = (int)i;
        r->ring = calloc(ring, sizeof *r->ring);
        if (!r->ring)
            rc = -ENOMEM;
        else if (!r->cq->channel || !r->max_msg || !r->sq_depth || r->max_sge < MKV_MAX_SEG)
            rc = -EINVAL;
        else
            fcntl(r->cq->channel->fd, F_SETFL, fcntl(r->cq->channel->fd, F_GETFL) | O_NONBLOCK);
    }
    if (!rc)
        rc = watch(c);
    if (rc) {
        mkv_verbs_channel_free(&c->ch);
        errno = -rc;
        return 0;
    }
    return &c->ch;
}

void mkv_verbs_channel_free(struct mkv_channel *ch) {
    struct verbs_channel *c = self(ch);
    if (!ch)
        return;
    for (uint32_t i = 0; i < c->nrails; i++)
        free(c->rail[i].ring);
    if (c->own_epoll)
        close(ch->fd);
    free(c);
}
