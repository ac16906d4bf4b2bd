/* tcp.h: one-sided READs over stream sockets, for machines without an RDMA device.
 *
 *    reader (tcp_channel.c, tcp_lane.h)           responder (tcp_responder.c, tcp_conn.h)
 *    ┌──────────────────┐  request, request, …   ┌─────────────────────────────┐
 *    │ lane: socket 0   │───────────────────────►│ one thread, epoll           │
 *    │ lane: socket 1   │◄───────────────────────│ finds the region, checks    │
 *    │  …               │  header payload trailer│ secret, right and bounds    │
 *    └──────────────────┘                        └─────────────────────────────┘
 *
 * A request (mkv_tcp_request, 40 bytes):
 *
 *    0       4        8                16               24       28         32               40
 *    ├─magic─┼─region─┼─────secret─────┼─────offset─────┼─length─┼─sequence─┼────reserved────┤
 *
 * Its response (mkv_tcp_header, 16; the payload; mkv_tcp_trailer, 16), in the order of the requests:
 *
 *    0       4        8          12       16              16+length          24+length         32+length
 *    ├─magic─┼─status─┼─sequence─┼─length─┼─── payload ───┼─────first_ns─────┼─────last_ns─────┤
 *
 * All little-endian. The trailer holds the responder's clock before it looked at the first byte of the
 * payload and after it looked at the last: a socket may stall in the middle of a response, and the bytes sent
 * after the stall are as old as they are, not as the request is. A refusal is a header with a status and
 * length 0, no trailer, and nothing behind it: as a queue pair goes to error, so the socket is closed.
 */
#ifndef MKV_TCP_H
#define MKV_TCP_H

#include <stddef.h>

#include "fabric.h"

/* [cdef begin] Everything up to [cdef end] is also what cffi is told. */

#define MKV_TCP_REQUEST_MAGIC  0x01524b4d /* "MKR", version 1 */
#define MKV_TCP_RESPONSE_MAGIC 0x01534b4d /* "MKS", version 1 */

/* Status of a response. A stranger's region, a wrong secret and a withdrawn region look the same. */
#define MKV_TCP_OK     0
#define MKV_TCP_ACCESS 1 /* no such region, wrong secret, not readable, withdrawn: the READ ends -EACCES */
#define MKV_TCP_RANGE  2 /* not inside the region: -ERANGE */
#define MKV_TCP_BAD    3 /* not a request: -EIO */

#define MKV_TCP_MAX_SOCKETS 64    /* of one channel */
#define MKV_TCP_COPY_MAX    16384 /* the responder copies payloads up to this and sends them together */

struct mkv_tcp_request {
    uint32_t magic;
    uint32_t region;   /* id in the responder's table */
    uint64_t secret;   /* of the region */
    uint64_t offset;   /* in the region */
    uint32_t length;   /* at least 1 */
    uint32_t sequence; /* counts the socket's requests from 0, modulo 2^32; comes back in the header */
    uint64_t reserved; /* 0 */
};

struct mkv_tcp_header {
    uint32_t magic;
    uint32_t status;
    uint32_t sequence;
    uint32_t length;
};

struct mkv_tcp_trailer {
    uint64_t first_ns;
    uint64_t last_ns;
};

/* What a responder has done so far, and (sockets) holds now. */
struct mkv_tcp_stats {
    uint64_t bytes;     /* of payload sampled */
    uint64_t reads;     /* responses completed */
    uint64_t refusals;  /* each closed its socket */
    uint64_t sockets;   /* open now */
    uint64_t wakeups;   /* returns from sleep: an idle responder has none */
    uint64_t sends;     /* send calls */
    uint64_t evictions; /* sockets closed because they sat on a withdrawn region */
};

struct mkv_tcp_responder;

/* Starts a responder's thread. NULL with errno. */
struct mkv_tcp_responder *mkv_tcp_responder_new(void);

/* Serves the regions of `table`, and no others, to the connected and authenticated stream socket `fd`, and
 * owns it from now on. Returns an id above 0 (descriptors are used again, ids are not), or a negative errno;
 * then fd is still the caller's. The table lives at least as long as the socket. */
int64_t mkv_tcp_responder_add(struct mkv_tcp_responder *r, int fd, const struct mkv_table *table);

/* Closes one socket; when it returns nothing is being sent there any more. -ENOENT: closed before. */
int mkv_tcp_responder_remove(struct mkv_tcp_responder *r, int64_t id);

/* Closes all sockets of a table, which may then be freed. Returns how many. */
int64_t mkv_tcp_responder_drop(struct mkv_tcp_responder *r, const struct mkv_table *table);

/* Withdraws a region: no response from it starts any more, and when this returns none is under way, so that
 * its memory may be unmapped. A socket that has not taken its response timeout_ns after the call is closed.
 * Returns how many were. Serves one responder; a region offered by several is withdrawn from each. */
int64_t mkv_tcp_region_withdraw(struct mkv_tcp_responder *r, struct mkv_region *region, uint64_t timeout_ns);

void mkv_tcp_responder_stats(struct mkv_tcp_responder *r, struct mkv_tcp_stats *out);

/* Closes everything and joins the thread. No other call may be under way. */
void mkv_tcp_responder_free(struct mkv_tcp_responder *r);

/* A channel over connected sockets that a responder serves; `depth` READs at once. It owns the sockets from
 * now on. NULL with errno; then they are still the caller's. */
struct mkv_channel *mkv_tcp_channel_new(const int *fds, uint32_t nfds, uint32_t depth,
                                        const struct mkv_table *local, const struct mkv_table *remote);
void mkv_tcp_channel_free(struct mkv_channel *ch);

/* [cdef end] */

#define MKV_TCP_AT(type, field, at) _Static_assert(offsetof(struct type, field) == (at), #type "." #field)
MKV_TCP_AT(mkv_tcp_request, magic, 0);
MKV_TCP_AT(mkv_tcp_request, region, 4);
MKV_TCP_AT(mkv_tcp_request, secret, 8);
MKV_TCP_AT(mkv_tcp_request, offset, 16);
MKV_TCP_AT(mkv_tcp_request, length, 24);
MKV_TCP_AT(mkv_tcp_request, sequence, 28);
MKV_TCP_AT(mkv_tcp_request, reserved, 32);
MKV_TCP_AT(mkv_tcp_header, magic, 0);
MKV_TCP_AT(mkv_tcp_header, status, 4);
MKV_TCP_AT(mkv_tcp_header, sequence, 8);
MKV_TCP_AT(mkv_tcp_header, length, 12);
MKV_TCP_AT(mkv_tcp_trailer, first_ns, 0);
MKV_TCP_AT(mkv_tcp_trailer, last_ns, 8);
_Static_assert(sizeof(struct mkv_tcp_request) == 40, "request");
_Static_assert(sizeof(struct mkv_tcp_header) == 16, "header");
_Static_assert(sizeof(struct mkv_tcp_trailer) == 16, "trailer");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the structs are the wire's bytes as they lie");

#endif
