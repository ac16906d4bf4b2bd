/* simt.h: what gpudirect/kernels/ needs of a GPU, on a host: the same source is compiled as C++ behind this.
 *
 * A block's threads are fibers (ucontext) of one thread, run in turn. Where lanes of a warp meet, at an
 * exchange or __syncwarp, a fiber waits until all 32 have come; a lane that has ended, or waits elsewhere, is
 * an error, as it would be undefined on a GPU. Vector loads and stores fail unless aligned, as they would
 * there.
 */
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#include <ucontext.h>

#define __device__
#define __global__
#define __constant__    static const
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

struct dim {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};
static dim threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr unsigned LANES = 32, STACK = 64 << 10;

struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    unsigned meetings; /* so many it has come to */
    bool done;
    unsigned long long given[2]; /* what it brought to this meeting and the one before */
};

static std::vector<Lane> lanes;
static ucontext_t scheduler;
static const std::function<void()> *body;
static unsigned running;
static const char *failure;

static void fail(const char *what) {
    if (!failure)
        failure = what;
}

static void enter() {
    (*body)();
    lanes[running].done = true;
}

static void yield() {
    swapcontext(&lanes[running].context, &scheduler);
}

/* Waits for the other lanes of the warp. */
static void meet(unsigned long long brought) {
    Lane &me = lanes[running];
    me.given[me.meetings % 2] = brought;
    me.meetings++;
    yield();
}

static unsigned long long from(unsigned other) {
    const Lane &me = lanes[running], &they = lanes[running / LANES * LANES + other % LANES];
    return they.given[(me.meetings - 1) % 2];
}

/* One round over a warp: runs each lane up to its next meeting or its end. False: all have ended. */
static bool round(unsigned warp) {
    unsigned ended = 0;
    for (unsigned i = 0; i < LANES; i++) {
        running = warp * LANES + i;
        threadIdx = {running, 0, 0};
        if (!lanes[running].done)
            swapcontext(&scheduler, &lanes[running].context);
        ended += lanes[running].done;
    }
    if (ended && ended < LANES)
        fail("some lanes of a warp have ended while others wait for them");
    for (unsigned i = 1; i < LANES; i++)
        if (lanes[warp * LANES + i].meetings != lanes[warp * LANES].meetings)
            fail("the lanes of a warp did not come to the same meeting");
    return ended == 0 && !failure;
}

/* Runs a kernel: null, or what it did wrong. */
static const char *launch(unsigned grid, unsigned block, const std::function<void()> &kernel) {
    failure = nullptr;
    if (block % LANES)
        return "a block of threads that is no whole number of warps";
    gridDim = {grid, 1, 1};
    blockDim = {block, 1, 1};
    body = &kernel;
    lanes.resize(block);
    for (unsigned b = 0; b < grid && !failure; b++) {
        blockIdx = {b, 0, 0};
        for (Lane &lane : lanes) {
            if (!lane.stack)
                lane.stack.reset(new char[STACK]);
            lane.done = false;
            lane.meetings = 0;
            getcontext(&lane.context);
            lane.context.uc_stack.ss_sp = lane.stack.get();
            lane.context.uc_stack.ss_size = STACK;
            lane.context.uc_link = &scheduler;
            makecontext(&lane.context, enter, 0);
        }
        for (unsigned warp = 0; warp < block / LANES; warp++)
            while (round(warp)) {
            }
    }
    return failure;
}

} // namespace simt

static inline unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, unsigned lanes) {
    if (mask != 0xffffffffu)
        simt::fail("an exchange between some of the lanes only");
    simt::meet(value);
    return simt::from((threadIdx.x % simt::LANES) ^ lanes);
}

static inline void __syncwarp() {
    simt::meet(0);
}

static inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((unsigned long long)a * b >> 32);
}

static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

static inline void atomicAdd(unsigned *at, unsigned more) {
    *at += more;
}

template <typename T> static bool aligned(const T *p) {
    if ((uintptr_t)p % sizeof(T))
        simt::fail("a vector that is not aligned");
    return (uintptr_t)p % sizeof(T) == 0;
}

template <typename T> static inline T __ldcs(const T *p) {
    return aligned(p) ? *p : T();
}

template <typename T> static inline void __stcs(T *p, T value) {
    if (aligned(p))
        *p = value;
}
