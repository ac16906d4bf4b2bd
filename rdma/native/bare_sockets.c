/* bare_sockets.c: the limit over tcp: receives and sends in a loop over the same memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>

#include "bare.h"
#include "clock.h"

int64_t mkv_bare_recv(const int *fds, uint32_t n, void *buffer, uint64_t span, uint32_t size,
                      uint64_t bytes) {
    uint64_t at = 0, start = mkv_now_ns();
    for (uint64_t got = 0; got < bytes; got += size) {
        for (uint32_t i = 0; i < n; i++) {
            for (uint32_t have = 0; have < size;) {
                ssize_t r = recv(fds[i], (char *)buffer + at + have, size - have, 0);
                if (r <= 0)
                    return r ? -errno : -EPIPE;
                have += (uint32_t)r;
            }
            at = at + 2 * (uint64_t)size > span ? 0 : at + size;
        }
    }
    return (int64_t)(mkv_now_ns() - start);
}

int mkv_bare_send(int fd, const void *buffer, uint64_t span, uint32_t size, uint64_t bytes) {
    uint64_t at = 0;
    for (uint64_t sent = 0; sent < bytes; sent += size) {
        for (uint32_t have = 0; have < size;) {
            ssize_t r = send(fd, (const char *)buffer + at + have, size - have, MSG_NOSIGNAL);
            if (r < 0)
                return -errno;
            have += (uint32_t)r;
        }
        at = at + 2 * (uint64_t)size > span ? 0 : at + size;
    }
    return 0;
}
