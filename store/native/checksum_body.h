/* checksum_body.h: the one body of the checksum, compiled once for each instruction set.
 *
 * The file that includes it has set the target and defines CHECKSUM_NAME. xxhash's functions are inlined
 * (XXH_INLINE_ALL), so that every copy is compiled for the target of its file and no library is needed.
 *
 *   result = XXH3_64( h_0 ‖ h_1 ‖ … ‖ h_{n-1} ‖ length )     with h_i = XXH3_64(chunk i)
 *
 * Two levels, so that chunks can be hashed by many threads, or by a GPU, and only the short list of their
 * hashes is serial.
 */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "checksum.h"
#include "store.h"

#define HASHES_AT_ONCE 32 /* chunk hashes that are fed into the outer hash together */

static inline uint64_t little_endian(uint64_t x) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(x);
#else
    return x;
#endif
}

uint64_t CHECKSUM_NAME(const void *data, uint64_t length) {
    const uint8_t *p = data;
    uint64_t hashes[HASHES_AT_ONCE + 1];
    uint64_t left = length;
    unsigned n = 0;
    XXH3_state_t outer;
    int streamed = 0; /* blocks of up to 512 KiB need no streaming state */

    while (left) {
        uint64_t chunk = left < MKV_CHUNK_BYTES ? left : MKV_CHUNK_BYTES;
        hashes[n++] = little_endian(XXH3_64bits(p, chunk));
        p += chunk;
        left -= chunk;
        if (n == HASHES_AT_ONCE && left) {
            if (!streamed)
                XXH3_64bits_reset(&outer);
            streamed = 1;
            XXH3_64bits_update(&outer, hashes, sizeof hashes[0] * n);
            n = 0;
        }
    }
    hashes[n++] = little_endian(length);
    if (!streamed)
        return XXH3_64bits(hashes, sizeof hashes[0] * n);
    XXH3_64bits_update(&outer, hashes, sizeof hashes[0] * n);
    return XXH3_64bits_digest(&outer);
}
