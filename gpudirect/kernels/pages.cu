/* pages.cu: packs the pages of paged KV caches into contiguous blocks, and unpacks them.
 *
 * A cache has parts (a layer's keys, its values, …; gpudirect/pages.py); page p of part s is `run` contiguous
 * bytes at bases[s] + p · stride. A block holds `each` pages of every part, part after part:
 *
 *   block b   ├─ part 0: pages[b][0], pages[b][1], … ─┼─ part 1: pages[b][0], … ─┼─ …
 *
 * All vectors of all blocks are numbered through in the order in which they lie there, and the threads of the
 * grid walk over the numbers: neighbours in number are neighbours in the block, and in the page. What number
 * i means takes three divisions by numbers that are the same for the whole call; they come as reciprocals.
 */
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

/* n / divisor as (n · multiplier) >> (32 + shift), exact for n below 2³¹ (gpudirect/pages.py, reciprocal). */
__device__ __forceinline__ u32 divided(u32 n, u32 divisor, u32 multiplier, u32 shift) {
    return divisor == 1 ? n : __umulhi(n, multiplier) >> shift;
}

#define AT_ONCE 4 /* vectors that a thread has under way */

/* What all of them take. bases: one for each part of the call. blocks: addresses. pages: (blocks, each).
 * last: the highest page. skip: bytes of a block before the first part of the call. total: vectors of the
 * call, below 2³¹. run: vectors of a page in a part. refused: counts vectors of pages that do not exist; they
 * are left out. */
#define PARAMETERS                                                                                           \
    const u64 *bases, const u64 *blocks, const int *pages, u64 stride, u32 last, u64 skip, u32 total,        \
        u32 run, u32 run_multiplier, u32 run_shift, u32 each, u32 each_multiplier, u32 each_shift,           \
        u32 parts, u32 parts_multiplier, u32 parts_shift, u32 *refused

/* T: the vector. */
template <typename T, bool GATHER> __device__ __forceinline__ void move(PARAMETERS) {
    const u32 threads = gridDim.x * blockDim.x;
    for (u32 first = blockIdx.x * blockDim.x + threadIdx.x; first < total; first += AT_ONCE * threads) {
        T *paged[AT_ONCE], *packed[AT_ONCE], vector[AT_ONCE];
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            const u32 i = first + k * threads;
            paged[k] = 0;
            if (i >= total)
                continue;
            const u32 rows = divided(i, run, run_multiplier, run_shift), within = i - rows * run;
            const u32 lists = divided(rows, each, each_multiplier, each_shift), place = rows - lists * each;
            const u32 block = divided(lists, parts, parts_multiplier, parts_shift),
                      part = lists - block * parts;
            const u32 page = (u32)pages[block * each + place];
            if (page > last) { /* negative ones too */
                atomicAdd(refused, 1u);
                continue;
            }
            paged[k] = (T *)(bases[part] + page * stride) + within;
            packed[k] = (T *)(blocks[block] + skip) + ((part * each + place) * run + within);
        }
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++)
            if (paged[k])
                vector[k] = __ldcs(GATHER ? paged[k] : packed[k]);
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++)
            if (paged[k])
                __stcs(GATHER ? packed[k] : paged[k], vector[k]);
    }
}

#define ARGUMENTS                                                                                            \
    bases, blocks, pages, stride, last, skip, total, run, run_multiplier, run_shift, each, each_multiplier,  \
        each_shift, parts, parts_multiplier, parts_shift, refused
#define KERNELS(BYTES, T)                                                                                    \
    extern "C" __global__ void mkv_gather_##BYTES(PARAMETERS) {                                              \
        move<T, true>(ARGUMENTS);                                                                            \
    }                                                                                                        \
    extern "C" __global__ void mkv_scatter_##BYTES(PARAMETERS) {                                             \
        move<T, false>(ARGUMENTS);                                                                           \
    }

KERNELS(16, uint4)
KERNELS(8, u64)
KERNELS(4, u32)
KERNELS(2, unsigned short)
KERNELS(1, u8)
