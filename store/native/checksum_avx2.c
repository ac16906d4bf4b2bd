/* checksum_avx2.c: the checksum compiled for AVX2; checksum.c calls it only where the processor has it. */
#if defined(__x86_64__)
#pragma GCC target("avx2")
#define XXH_VECTOR    2 /* XXH_AVX2: said outright, so that a compiler that ignores the pragma fails loudly */
#define CHECKSUM_NAME mkv_checksum_avx2
#include "checksum_body.h"
#else
typedef int mkv_no_avx2; /* a translation unit may not be empty */
#endif
