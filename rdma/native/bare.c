/* bare.c: the limit over verbs. No index, no checks, no scatter lists, no batches: READs in a loop over the
 * same memory. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <string.h>

#include <infiniband/verbs.h>

#include "bare.h"
#include "clock.h"

#define LINK 32

static int wait_event(struct ibv_cq *cq) {
    static int (*get)(struct ibv_comp_channel *, struct ibv_cq **, void **);
    static void (*ack)(struct ibv_cq *, unsigned int);
    struct ibv_cq *which;
    void *context;
    if (!ack) {
        void *so = dlopen("libibverbs.so.1", RTLD_NOW);
        if (!so)
            return -ENOENT;
        *(void **)&get = dlsym(so, "ibv_get_cq_event");
        *(void **)&ack = dlsym(so, "ibv_ack_cq_events");
    }
    struct pollfd fd = {.fd = cq->channel->fd, .events = POLLIN};
    if (poll(&fd, 1, 5000) < 1)
        return -ETIMEDOUT;
    if (!get(cq->channel, &which, &context))
        ack(which, 1);
    return 0;
}

/* Polls once; sleeps first if that is asked for and nothing is there. READs newly complete, or a negative
 * errno. */
static int64_t complete(struct ibv_cq *cq, int events, uint64_t *done) {
    struct ibv_wc wc[16];
    int n = ibv_poll_cq(cq, 16, wc);
    if (!n && events) {
        ibv_req_notify_cq(cq, 0);
        if (!(n = ibv_poll_cq(cq, 16, wc))) {
            int rc = wait_event(cq);
            if (rc)
                return rc;
            n = ibv_poll_cq(cq, 16, wc);
        }
    }
    for (int i = 0; i < n; i++) {
        if (wc[i].status != IBV_WC_SUCCESS)
            return -EIO;
        *done = wc[i].wr_id;
    }
    return n;
}

int64_t mkv_bare_reads(const struct mkv_bare *b) {
    struct ibv_qp *qp = (struct ibv_qp *)(uintptr_t)b->qp;
    struct ibv_send_wr wr[LINK], *bad;
    struct ibv_sge sge[LINK];
    uint64_t posted = 0, done = 0, from = 0, to = 0, idle = 0;
    uint64_t start = mkv_now_ns();
    while (done < b->count) {
        uint64_t room = b->window - (posted - done);
        uint32_t n = 0;
        for (; n < room && n < LINK && posted < b->count; n++) {
            sge[n] = (struct ibv_sge){.addr = b->local_addr + to, .length = b->size, .lkey = b->lkey};
            wr[n] = (struct ibv_send_wr){
                .wr_id = ++posted,
                .next = n + 1 < room && n + 1 < LINK && posted < b->count ? &wr[n + 1] : 0,
                .sg_list = &sge[n],
                .num_sge = 1,
                .opcode = IBV_WR_RDMA_READ,
                .send_flags = posted % b->signal_every == 0 || posted == b->count ? IBV_SEND_SIGNALED : 0,
                .wr.rdma = {.remote_addr = b->remote_addr + from, .rkey = b->rkey}};
            from = from + 2 * b->size > b->remote_bytes ? 0 : from + b->size;
            to = to + 2 * b->size > b->local_bytes ? 0 : to + b->size;
        }
        if (n && ibv_post_send(qp, wr, &bad))
            return -EIO;
        int64_t got = complete(qp->send_cq, (int)b->events, &done);
        if (got < 0)
            return got;
        if (got)
            idle = 0;
        else if (!(++idle & 0xffff) && mkv_now_ns() - start > 600000000000ull)
            return -ETIMEDOUT;
    }
    return (int64_t)(mkv_now_ns() - start);
}

int mkv_bare_latency(const struct mkv_bare *b, uint64_t *out) {
    struct mkv_bare one = *b;
    one.window = one.signal_every = 1;
    one.count = 1;
    for (uint64_t i = 0; i < b->count; i++) {
        int64_t ns = mkv_bare_reads(&one);
        if (ns < 0)
            return (int)ns;
        out[i] = (uint64_t)ns;
    }
    return 0;
}
