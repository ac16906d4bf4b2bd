/* checksum.h: the checksum of a block, and the ways in which this machine can compute it.
 *
 * mkv_checksum itself is declared in store.h; what stands here is for checksum*.c and for the tests, which
 * hold every code path against every other. The definition is in docs/layout.md, "Checksum".
 */
#ifndef MKV_CHECKSUM_H
#define MKV_CHECKSUM_H

#include <stdint.h>

/* cdef */
/* Code paths: the portable one (on x86-64 that is SSE2, on arm64 NEON) and AVX2. */
enum { MKV_CHECKSUM_PORTABLE = 0, MKV_CHECKSUM_AVX2 = 1 };
/* Whether this machine can take the path. This function can't fail. */
int mkv_checksum_can(int path);
/* The checksum by that path, which the machine must be able to take. This function can't fail. */
uint64_t mkv_checksum_by(int path, const void *data, uint64_t length);
/* end cdef */

uint64_t mkv_checksum_portable(const void *data, uint64_t length);
#if defined(__x86_64__)
uint64_t mkv_checksum_avx2(const void *data, uint64_t length);
#endif

#endif
