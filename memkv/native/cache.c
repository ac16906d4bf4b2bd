/* cache.c: the location cache of cache.h. */
#include <stdlib.h>
#include <string.h>

#include "cache.h"

struct words { /* a slot as what is loaded and stored at once */
    uint64_t w[4];
};

struct mkv_cache {
    uint64_t sets; /* a power of two */
    uint32_t turn; /* whose turn it is to be replaced */
    struct words *slot;
};

struct mkv_cache *mkv_cache_new(uint64_t entries) {
    struct mkv_cache *c = calloc(1, sizeof *c);
    if (!c)
        return 0;
    c->sets = 1;
    while (c->sets * MKV_CACHE_WAYS < entries)
        c->sets *= 2;
    c->slot = calloc(c->sets * MKV_CACHE_WAYS, sizeof *c->slot);
    if (!c->slot) {
        free(c);
        return 0;
    }
    return c;
}

void mkv_cache_free(struct mkv_cache *c) {
    if (c)
        free(c->slot);
    free(c);
}

static struct words *set_of(const struct mkv_cache *c, const uint64_t key[2]) {
    return &c->slot[(mkv_mix64(key[0] ^ mkv_mix64(key[1])) & (c->sets - 1)) * MKV_CACHE_WAYS];
}

static int holds(const struct words *s, const uint64_t key[2]) {
    return __atomic_load_n(&s->w[0], __ATOMIC_RELAXED) == key[0] &&
           __atomic_load_n(&s->w[1], __ATOMIC_RELAXED) == key[1];
}

int mkv_cache_get(const struct mkv_cache *c, const uint8_t key[16], struct mkv_slot *out) {
    uint64_t k[2];
    memcpy(k, key, 16);
    struct words *s = set_of(c, k);
    for (int i = 0; i < MKV_CACHE_WAYS; i++, s++) {
        struct words copy = {{k[0], k[1], __atomic_load_n(&s->w[2], __ATOMIC_RELAXED),
                              __atomic_load_n(&s->w[3], __ATOMIC_ACQUIRE)}};
        if (copy.w[3] && holds(s, k)) {
            memcpy(out, &copy, sizeof *out);
            return 1;
        }
    }
    return 0;
}

void mkv_cache_put(struct mkv_cache *c, const struct mkv_slot *slot) {
    struct words copy, *s, *into = 0;
    memcpy(&copy, slot, sizeof copy);
    s = set_of(c, copy.w);
    for (int i = 0; i < MKV_CACHE_WAYS && !into; i++)
        if (holds(&s[i], copy.w))
            into = &s[i];
    for (int i = 0; i < MKV_CACHE_WAYS && !into; i++)
        if (!__atomic_load_n(&s[i].w[3], __ATOMIC_RELAXED))
            into = &s[i];
    if (!into)
        into = &s[__atomic_fetch_add(&c->turn, 1, __ATOMIC_RELAXED) % MKV_CACHE_WAYS];
    __atomic_store_n(&into->w[3], 0, __ATOMIC_RELAXED);
    for (int i = 0; i < 3; i++)
        __atomic_store_n(&into->w[i], copy.w[i], __ATOMIC_RELEASE);
    __atomic_store_n(&into->w[3], copy.w[3], __ATOMIC_RELEASE);
}

void mkv_cache_drop(struct mkv_cache *c, const uint8_t key[16]) {
    uint64_t k[2];
    memcpy(k, key, 16);
    struct words *s = set_of(c, k);
    for (int i = 0; i < MKV_CACHE_WAYS; i++)
        if (holds(&s[i], k))
            __atomic_store_n(&s[i].w[3], 0, __ATOMIC_RELEASE);
}

void mkv_cache_clear(struct mkv_cache *c) {
    for (uint64_t i = 0; i < c->sets * MKV_CACHE_WAYS; i++)
        __atomic_store_n(&c->slot[i].w[3], 0, __ATOMIC_RELEASE);
}
