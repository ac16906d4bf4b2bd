/* checksum.cu: payload checksums of a batch of blocks, as docs/layout.md ("Checksum") defines them.
 *
 * Two kernels, one after the other on a stream:
 *
 *   mkv_chunks     one warp for each chunk of CHUNK_BYTES         h_i = XXH3_64(chunk i)
 *   mkv_verdicts   one warp for each block, over its list of h_i  checksum = XXH3_64(h_0 ‖ … ‖ h_{n-1} ‖
 * length)
 *
 * How XXH3 lies on a warp. Eight 64-bit accumulators take in stripes of 64 bytes; sixteen stripes are added
 * up, which may happen in any order, and only then are the accumulators scrambled. So a kibibyte is one step
 * of a warp: it loads it in two halves of eight stripes, each lane 16 bytes of it,
 *
 *   lane      0    1    2    3    4    5   …   31
 *   stripe    0    0    0    0    1    1   …    7      and 8 more in the second half
 *   words    0 1  2 3  4 5  6 7  0 1  2 3  …   6 7     a lane's two words are the two that XXH3 swaps
 *
 * and what four lanes have of one stripe is added over the eight stripes by three exchanges between lanes.
 * Then every lane has the sums for its two accumulators, and scrambles them. The last, shorter step has at
 * most 15 stripes, so that the lanes of the sixteenth are free for the stripe that ends with the last byte.
 *
 * The words of the secret, SECRET, LAST and MERGE, stand above this text (gpudirect/kernels/__init__.py).
 * Nothing outside of [pointer, pointer + length) is read.
 */
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

#define P32_1 0x9E3779B1ull
#define P32_2 0x85EBCA77ull
#define P32_3 0xC2B2AE3Dull
#define P64_1 0x9E3779B185EBCA87ull
#define P64_2 0xC2B2AE3D27D4EB4Full
#define P64_3 0x165667B19E3779F9ull
#define P64_4 0x85EBCA77C2B2AE63ull
#define P64_5 0x27D4EB2F165667C5ull

#define STRIPE      64u
#define STEP_BYTES  1024u /* sixteen stripes: so far the secret goes, eight bytes a stripe */
#define SHORT_BYTES 240u  /* up to here XXH3 has no accumulators */
#define ALL         0xffffffffu

/* --- reading --- */

__device__ __forceinline__ u64 bytes_at(const u8 *p, u32 n) {
    u64 x = 0;
    for (u32 i = 0; i < n; i++)
        x |= (u64)p[i] << 8 * i;
    return x;
}

__device__ __forceinline__ u64 read64(const u8 *p) {
    if (((u64)p & 7) == 0)
        return *(const u64 *)p;
    return bytes_at(p, 8);
}

/* Two words from p, which is a multiple of ALIGN; 1: of anything. */
template <int ALIGN> __device__ __forceinline__ void load(const u8 *p, u64 &a, u64 &b) {
    if (ALIGN == 16) {
        const ulonglong2 x = __ldcs((const ulonglong2 *)p);
        a = x.x;
        b = x.y;
    } else if (ALIGN == 8) {
        a = __ldcs((const u64 *)p);
        b = __ldcs((const u64 *)p + 1);
    } else {
        a = bytes_at(p, 8);
        b = bytes_at(p + 8, 8);
    }
}

/* Eight bytes of the secret from any offset. */
__device__ __forceinline__ u64 secret(u32 offset) {
    const u32 word = offset / 8, bits = offset % 8 * 8;
    return bits ? SECRET[word] >> bits | SECRET[word + 1] << (64 - bits) : SECRET[word];
}

/* --- mixing --- */

__device__ __forceinline__ u64 fold(u64 a, u64 b) {
    return a * b ^ __umul64hi(a, b);
}

__device__ __forceinline__ u64 avalanche(u64 h) {
    h ^= h >> 37;
    h *= 0x165667919E3779F9ull;
    return h ^ h >> 32;
}

__device__ __forceinline__ u64 avalanche_xxh64(u64 h) {
    h ^= h >> 33;
    h *= P64_2;
    h ^= h >> 29;
    h *= P64_3;
    return h ^ h >> 32;
}

__device__ __forceinline__ u64 rotl(u64 x, u32 n) {
    return x << n | x >> (64 - n);
}

__device__ __forceinline__ u64 swapped(u64 x) {
    x = (x & 0x00ff00ff00ff00ffull) << 8 | (x >> 8 & 0x00ff00ff00ff00ffull);
    x = (x & 0x0000ffff0000ffffull) << 16 | (x >> 16 & 0x0000ffff0000ffffull);
    return x << 32 | x >> 32;
}

__device__ __forceinline__ u64 mix16(const u8 *p, u32 offset) {
    return fold(read64(p) ^ secret(offset), read64(p + 8) ^ secret(offset + 8));
}

/* --- up to 240 bytes: one lane --- */

__device__ __noinline__ u64 hash_short(const u8 *p, u32 n) {
    if (n > 128) {
        u64 h = n * P64_1;
        for (u32 i = 0; i < 8; i++)
            h += mix16(p + 16 * i, 16 * i);
        h = avalanche(h);
        for (u32 i = 8; i < n / 16; i++)
            h += mix16(p + 16 * i, 16 * (i - 8) + 3);
        return avalanche(h + mix16(p + n - 16, 136 - 17));
    }
    if (n > 16) {
        u64 h = n * P64_1;
        for (u32 i = (n - 1) / 32 + 1; i-- > 0;) /* from both ends towards the middle */
            h += mix16(p + 16 * i, 32 * i) + mix16(p + n - 16 * (i + 1), 32 * i + 16);
        return avalanche(h);
    }
    if (n > 8) {
        const u64 low = read64(p) ^ secret(24) ^ secret(32);
        const u64 high = read64(p + n - 8) ^ secret(40) ^ secret(48);
        return avalanche(n + swapped(low) + high + fold(low, high));
    }
    if (n >= 4) {
        u64 h = (bytes_at(p, 4) << 32) + bytes_at(p + n - 4, 4);
        h ^= secret(8) ^ secret(16);
        h ^= rotl(h, 49) ^ rotl(h, 24);
        h *= 0x9FB21C651E98DF25ull;
        h ^= (h >> 35) + n;
        h *= 0x9FB21C651E98DF25ull;
        return h ^ h >> 28;
    }
    if (n > 0) {
        const u64 h = (u64)p[0] << 16 | (u64)p[n >> 1] << 24 | (u64)p[n - 1] | (u64)n << 8;
        return avalanche_xxh64(h ^ ((SECRET[0] ^ SECRET[0] >> 32) & 0xffffffffull));
    }
    return avalanche_xxh64(secret(56) ^ secret(64));
}

/* --- longer: a whole warp --- */

__constant__ u64 STARTS[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

/* What two words of a stripe add to their two accumulators. */
__device__ __forceinline__ void take(u64 a, u64 b, u64 key_a, u64 key_b, u64 &sum_a, u64 &sum_b) {
    const u64 x = a ^ key_a, y = b ^ key_b;
    sum_a += b + (x & 0xffffffffull) * (x >> 32);
    sum_b += a + (y & 0xffffffffull) * (y >> 32);
}

/* Adds up over the eight lanes that have the same two accumulators. */
__device__ __forceinline__ void over_stripes(u64 &a, u64 &b) {
    for (u32 m = 4; m < 32; m *= 2) {
        a += __shfl_xor_sync(ALL, a, m);
        b += __shfl_xor_sync(ALL, b, m);
    }
}

template <int ALIGN> __device__ __noinline__ u64 hash_long(const u8 *p, u32 n, u32 lane) {
    const u32 pair = lane % 4, row = lane / 4; /* which two accumulators, and which stripe of a half */
    const u64 key0 = SECRET[row + 2 * pair], key1 = SECRET[row + 2 * pair + 1];
    const u64 key2 = SECRET[row + 2 * pair + 8], key3 = SECRET[row + 2 * pair + 9];
    const u64 scramble_a = SECRET[16 + 2 * pair], scramble_b = SECRET[17 + 2 * pair];
    const u32 steps = (n - 1) / STEP_BYTES;
    const u32 rest = (n - 1 - steps * STEP_BYTES) / STRIPE; /* whole stripes of the last step: 15 at most */
    const u8 *at = p + lane * 16;
    u64 acc_a = STARTS[2 * pair], acc_b = STARTS[2 * pair + 1];
    u64 a0, b0, a1, b1;

    if (steps) {
        load<ALIGN>(at, a0, b0);
        load<ALIGN>(at + STEP_BYTES / 2, a1, b1);
    }
    for (u32 i = 0; i < steps; i++) {
        u64 sum_a = 0, sum_b = 0;
        take(a0, b0, key0, key1, sum_a, sum_b);
        take(a1, b1, key2, key3, sum_a, sum_b);
        at += STEP_BYTES;
        if (i + 1 < steps) { /* under way while the lanes exchange */
            load<ALIGN>(at, a0, b0);
            load<ALIGN>(at + STEP_BYTES / 2, a1, b1);
        }
        over_stripes(sum_a, sum_b);
        acc_a += sum_a;
        acc_b += sum_b;
        acc_a = (acc_a ^ acc_a >> 47 ^ scramble_a) * P32_1;
        acc_b = (acc_b ^ acc_b >> 47 ^ scramble_b) * P32_1;
    }

    u64 sum_a = 0, sum_b = 0;
    if (row < rest) {
        load<ALIGN>(at, a0, b0);
        take(a0, b0, key0, key1, sum_a, sum_b);
    }
    if (row + 8 < rest) {
        load<ALIGN>(at + STEP_BYTES / 2, a1, b1);
        take(a1, b1, key2, key3, sum_a, sum_b);
    } else if (row == 7) { /* the stripe that ends with the last byte; it may overlap others */
        const u8 *end = p + n - STRIPE + pair * 16;
        a1 = read64(end);
        b1 = read64(end + 8);
        take(a1, b1, LAST[2 * pair], LAST[2 * pair + 1], sum_a, sum_b);
    }
    over_stripes(sum_a, sum_b);
    u64 h = fold((acc_a + sum_a) ^ MERGE[2 * pair], (acc_b + sum_b) ^ MERGE[2 * pair + 1]);
    h += __shfl_xor_sync(ALL, h, 1);
    h += __shfl_xor_sync(ALL, h, 2);
    return avalanche(h + n * P64_1);
}

/* XXH3_64 of n bytes by all 32 lanes together; lane 0 has the result. */
__device__ u64 hash(const u8 *p, u32 n, u32 lane) {
    if (n <= SHORT_BYTES)
        return lane == 0 ? hash_short(p, n) : 0;
    if (((u64)p & 15) == 0)
        return hash_long<16>(p, n, lane);
    if (((u64)p & 7) == 0)
        return hash_long<8>(p, n, lane);
    return hash_long<1>(p, n, lane);
}

/* --- kernels; blockDim.x is THREADS --- */

#define THREADS 256
/* Four of them on a processor: no more registers than that leaves. */
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 4)

/* hashes: blocks rows of pitch words; row b gets the hashes of block b's chunks. most: chunks of the longest.
 */
KERNEL mkv_chunks(const u64 *pointers, const u64 *lengths, u32 blocks, u32 most, u32 pitch, u64 *hashes) {
    const u32 lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
    for (u64 item = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; item < (u64)blocks * most;
         item += warps) {
        const u32 block = (u32)(item / most), chunk = (u32)(item % most);
        const u64 length = lengths[block], start = (u64)chunk * CHUNK_BYTES;
        if (start >= length)
            continue;
        const u32 n = length - start < CHUNK_BYTES ? (u32)(length - start) : CHUNK_BYTES;
        const u64 h = hash((const u8 *)(pointers[block] + start), n, lane);
        if (lane == 0)
            hashes[(u64)block * pitch + chunk] = h;
    }
}

/* checksums: one for each block. With expected (0: without): verdicts[b] is 1 if it agrees, else 0. */
KERNEL mkv_verdicts(const u64 *lengths, u32 blocks, u32 pitch, u64 *hashes, u64 *checksums,
                    const u64 *expected, u8 *verdicts) {
    const u32 lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
    for (u32 block = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; block < blocks; block += warps) {
        const u64 length = lengths[block];
        const u32 chunks = (u32)((length + CHUNK_BYTES - 1) / CHUNK_BYTES);
        u64 *row = hashes + (u64)block * pitch;
        if (lane == 0)
            row[chunks] = length;
        __syncwarp(); /* the other lanes see it */
        const u64 h = hash((const u8 *)row, 8 * (chunks + 1), lane);
        if (lane == 0) {
            checksums[block] = h;
            if (expected)
                verdicts[block] = h == expected[block];
        }
    }
}
