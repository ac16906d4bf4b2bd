/* bare.h: the limit that a benchmark divides by: the plainest READ loops that verbs and sockets allow. */
#ifndef MKV_BARE_H
#define MKV_BARE_H

#include <stdint.h>

struct mkv_bare {
    uint64_t qp; /* struct ibv_qp *, connected, with an empty send queue */
    uint64_t remote_addr, remote_bytes;
    uint64_t local_addr, local_bytes;
    uint32_t rkey, lkey;
    uint32_t size;         /* bytes of one READ */
    uint32_t window;       /* READs under way */
    uint32_t signal_every; /* completions asked for: every so many READs */
    uint32_t events;       /* 0: spin on the completion queue; 1: sleep on its channel */
    uint64_t count;        /* READs to do, walking over both spans and wrapping around */
};

/* Runs `count` READs and returns the nanoseconds they took, or a negative errno. */
int64_t mkv_bare_reads(const struct mkv_bare *b);
/* One READ at a time; each one's nanoseconds go to out[0..count). */
int mkv_bare_latency(const struct mkv_bare *b, uint64_t *out);
/* Receives `bytes` from each of n connected sockets, `size` at a time, round robin over a buffer; ns, or
 * errno. */
int64_t mkv_bare_recv(const int *fds, uint32_t n, void *buffer, uint64_t span, uint32_t size, uint64_t bytes);
/* The sender of mkv_bare_recv, for one socket. */
int mkv_bare_send(int fd, const void *buffer, uint64_t span, uint32_t size, uint64_t bytes);

#endif
