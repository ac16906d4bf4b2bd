/* clock.h: the one clock of the data path.
 *
 * CLOCK_BOOTTIME, because premise (c) of the grace-period argument (docs/architecture.md, "One READ, one
 * clock") asks for real time: CLOCK_MONOTONIC stands still while a laptop or a virtual machine is suspended.
 * A virtual machine that is *paused* by its hypervisor loses time on every clock; strict readers do without.
 */
#ifndef MKV_CLOCK_H
#define MKV_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t mkv_now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_BOOTTIME, &ts);
    return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

#endif
