/* checksum.c: the checksum of a block by the best code path that this machine has. */
#define CHECKSUM_NAME mkv_checksum_portable
#include "checksum_body.h"

int mkv_checksum_can(int path) {
#if defined(__x86_64__)
    if (path == MKV_CHECKSUM_AVX2)
        return __builtin_cpu_supports("avx2") != 0;
#endif
    return path == MKV_CHECKSUM_PORTABLE;
}

uint64_t mkv_checksum_by(int path, const void *data, uint64_t length) {
#if defined(__x86_64__)
    if (path == MKV_CHECKSUM_AVX2)
        return mkv_checksum_avx2(data, length);
#endif
    (void)path;
    return mkv_checksum_portable(data, length);
}

uint64_t mkv_checksum(const void *data, uint64_t length) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) /* two instructions: the answer was found when the program started */
        return mkv_checksum_avx2(data, length);
#endif
    return mkv_checksum_portable(data, length);
}
