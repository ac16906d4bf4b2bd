/* cache.h: where blocks were when last seen, so that a get costs one round trip instead of two.
 *
 * Four-way sets of slots in the index's own format (layout.h). Entries are hints: many threads read and write
 * them without a lock, word by word, and a torn or outdated one only costs a READ that fails its checks.
 */
#ifndef MKV_CACHE_H
#define MKV_CACHE_H

#include "layout.h"

#define MKV_CACHE_WAYS 4

struct mkv_cache;

/* Room for about `entries` locations, 32 bytes each. NULL if there is no memory. */
struct mkv_cache *mkv_cache_new(uint64_t entries);
void mkv_cache_free(struct mkv_cache *c);
void mkv_cache_clear(struct mkv_cache *c);
int mkv_cache_get(const struct mkv_cache *c, const uint8_t key[16], struct mkv_slot *out); /* 1 if known */
void mkv_cache_put(struct mkv_cache *c, const struct mkv_slot *slot);
void mkv_cache_drop(struct mkv_cache *c, const uint8_t key[16]);

#endif
