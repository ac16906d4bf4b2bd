/* table.c: the tables of a namespace: one in force, maybe a larger one in preparation, old ones still read.
 *
 *   prepare   an empty table, twice the size; Python registers and announces it
 *   switch    every entry is copied, in steps between which the lock is free; meanwhile changes go to both
 *             tables; then the version in force changes in the epoch lines of all tables
 *   drop      when every session reads the new one
 *
 * An old table is frozen: it stays whole, gets no new blocks, and what is deleted from the new one stays in
 * it as a slot whose live line will not agree. Its epoch line goes on ticking, for readers look at it, and it
 * tells them of the table in force.
 */
#include "ns.h"

#include <errno.h>
#include <sched.h>

#include "arena.h"

/* When the next table is due. Without displacements the first insertion that has to wait came, in eight runs
 * each, at 0.75 of 8 thousand slots, 0.69 of a quarter million, 0.66 of 8 million at the earliest. */
#define GROW_AT(slots) ((slots) / 8 * 5)
/* Between which a switch lets go of the lock: about a millisecond. */
#define BUCKETS_AT_ONCE 1024u

int mkv_table_wanted(const struct mkv_ns *ns) {
    uint64_t slots = ns->index->buckets * MKV_BUCKET_SLOTS;
    return !ns->pending && (ns->pressure || ns->index->entries > GROW_AT(slots));
}

/* --- the entries: to the table in force, and to the one that is being filled --- */

int mkv_ns_room(struct mkv_ns *ns, const uint8_t key[16]) {
    int rc = mkv_index_room(ns->index, key);
    int wanted = mkv_table_wanted(ns);
    if (rc == -EAGAIN || rc == -ENOSPC)
        ns->pressure = 1;
    if (!wanted && mkv_table_wanted(ns))
        mkv_arena_signal(ns->arena);
    return rc;
}

void mkv_ns_insert(struct mkv_ns *ns, const struct mkv_slot *entry) {
    (void)mkv_index_insert(ns->index, entry); /* there was room, and the lock was held since */
    if (ns->growing && mkv_index_insert(ns->growing, entry))
        ns->growing_failed = 1;
}

void mkv_ns_remove(struct mkv_ns *ns, const uint8_t key[16]) {
    (void)mkv_index_remove(ns->index, key);
    if (ns->growing)
        (void)mkv_index_remove(ns->growing, key); /* may not have been copied yet */
}

void mkv_ns_change(struct mkv_ns *ns, const struct mkv_slot *entry) {
    (void)mkv_index_change(ns->index, entry);
    if (ns->growing)
        (void)mkv_index_change(ns->growing, entry); /* likewise */
}

/* While a table is being filled, moved copies of the one in force stay: the entry itself may have moved from
 * a bucket that has not been copied yet to one that has, and then its copy is the one that is found. */
void mkv_tables_tick(struct mkv_ns *ns) {
    for (int i = 0; i < MKV_MAX_TABLES; i++) {
        struct mkv_index *ix = ns->table[i];
        if (!ix)
            continue;
        int keep = ix == ns->index ? ns->growing != NULL : ix != ns->growing;
        (void)mkv_index_tick(ix, ns->epoch, ns->index->version, keep);
    }
}

/* --- growing --- */

static struct mkv_span span(const struct mkv_index *ix) {
    return (struct mkv_span){.id = ix->version,
                             .address = (uint64_t)mkv_index_base(ix),
                             .bytes = mkv_index_bytes(ix),
                             .buckets = ix->buckets};
}

int mkv_ns_table(struct mkv_ns *ns, struct mkv_span *out) {
    pthread_mutex_lock(&ns->lock);
    *out = span(ns->index);
    pthread_mutex_unlock(&ns->lock);
    return 0;
}

/* Asked again before the switch, it answers with the same table. -EBUSY: too many old tables are still there.
 */
int mkv_ns_table_prepare(struct mkv_ns *ns, struct mkv_span *out) {
    int rc = 0;
    pthread_mutex_lock(&ns->lock);
    if (!ns->pending) {
        int place = 0;
        while (place < MKV_MAX_TABLES && ns->table[place])
            place++;
        if (place == MKV_MAX_TABLES) {
            rc = -EBUSY;
        } else {
            struct mkv_index *ix =
                mkv_index_new(2 * ns->index->buckets, ns->salt, ns->versions + 1, ns->arena->incarnation);
            rc = ix ? 0 : -errno;
            if (ix) {
                ns->versions++;
                ns->table[place] = ns->pending = ix;
                mkv_index_tick(ix, ns->epoch, ns->index->version, 1);
            }
        }
    }
    if (!rc)
        *out = span(ns->pending);
    pthread_mutex_unlock(&ns->lock);
    return rc;
}

/* Copies what the bucket holds; of moved copies the entries, wherever they are (see mkv_tables_tick). */
static void copy_bucket(struct mkv_ns *ns, const struct mkv_bucket *b) {
    for (unsigned i = 0; i < MKV_BUCKET_SLOTS; i++) {
        struct mkv_slot entry = b->slot[i];
        if (!entry.location)
            continue;
        if (entry.location & MKV_LOCATION_MOVED && !mkv_index_find(ns->index, entry.key, &entry))
            continue;
        int rc = mkv_index_insert(ns->growing, &entry);
        if (rc && rc != -EEXIST)
            ns->growing_failed = 1;
    }
}

/* -ENOENT: that version is not the one prepared; -EBUSY: it is being switched to already; -ENOSPC: even the
 * new table has no room (drop it, for it is half filled, and prepare another). */
int mkv_ns_table_switch(struct mkv_ns *ns, uint64_t version) {
    pthread_mutex_lock(&ns->lock);
    int rc = !ns->pending || ns->pending->version != version ? -ENOENT : ns->growing ? -EBUSY : 0;
    if (rc) {
        pthread_mutex_unlock(&ns->lock);
        return rc;
    }
    ns->growing = ns->pending;
    ns->growing_failed = 0;
    for (uint64_t b = 0; b < ns->index->buckets && !ns->growing_failed; b++) {
        copy_bucket(ns, &ns->index->bucket[b]);
        if (b % BUCKETS_AT_ONCE == BUCKETS_AT_ONCE - 1) {
            pthread_mutex_unlock(&ns->lock);
            sched_yield(); /* a mutex is not fair by itself */
            pthread_mutex_lock(&ns->lock);
        }
    }
    if (ns->growing_failed) {
        rc = -ENOSPC;
    } else {
        ns->n.displacements += ns->index->displacements;
        ns->index = ns->pending;
        ns->pending = NULL;
        ns->pressure = 0;
        ns->n.grows++;
        for (int i = 0; i < MKV_MAX_TABLES; i++)
            if (ns->table[i])
                (void)mkv_index_tick(ns->table[i], ns->epoch, version, 1);
    }
    ns->growing = NULL;
    pthread_mutex_unlock(&ns->lock);
    return rc;
}

/* Also drops a table that was prepared and shall not be switched to. -EBUSY: it is in force, or being filled.
 */
int mkv_ns_table_drop(struct mkv_ns *ns, uint64_t version) {
    struct mkv_index *gone = NULL;
    int rc = -ENOENT;
    pthread_mutex_lock(&ns->lock);
    for (int i = 0; i < MKV_MAX_TABLES; i++) {
        struct mkv_index *ix = ns->table[i];
        if (!ix || ix->version != version)
            continue;
        rc = ix == ns->index || ix == ns->growing ? -EBUSY : 0;
        if (!rc) {
            gone = ix;
            ns->table[i] = NULL;
            if (ix == ns->pending)
                ns->pending = NULL;
        }
    }
    pthread_mutex_unlock(&ns->lock);
    mkv_index_free(gone);
    return rc;
}
