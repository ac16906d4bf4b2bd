/* fabric.h: the interface that every fabric implements and every batch job uses.
 *
 *   job (job.h)  ──post, flush──►  channel  ──linked work requests──►  rail 0: one RC queue pair
 *                ◄──── poll ─────           ──────────────────────►  rail 1: …          (verbs.c)
 *                                           ──framed requests─────►  socket 0, 1, …     (tcp.c)
 *
 * A channel carries one-sided READs from one remote domain into local regions. It belongs to one job at a
 * time and is not locked. Regions are named by small ids through tables, so that a descriptor is the same for
 * every rail: the rail's own (iova, key) is looked up when the work request is built.
 *
 * Other extension modules include this file and call through `ops`: nothing here needs linking.
 */
#ifndef MKV_FABRIC_H
#define MKV_FABRIC_H

#include <errno.h>
#include <stdint.h>

#define MKV_MAX_RAILS 4
#define MKV_MAX_SEG   4

/* Access rights of a region. Nothing is ever open to remote writes or atomics. */
#define MKV_LOCAL_WRITE 1u /* READs may land here */
#define MKV_REMOTE_READ 2u /* the other side may READ from here */

/* A registered span of memory, ours or the other side's. Immutable once it is in a table, but for `state`. */
struct mkv_region {
    uint64_t base;   /* local address; 0 for a remote region */
    uint64_t length; /* bytes */
    uint64_t secret; /* tcp: the random key that a READ must show */
    uint32_t id;     /* its place in the table */
    uint32_t access; /* MKV_LOCAL_WRITE | MKV_REMOTE_READ */
    uint32_t sends;  /* tcp: responses under way from it (atomic) */
    uint32_t dead;   /* tcp: withdrawn; no new response may start (atomic) */
    uint32_t nrails;
    uint32_t spare;
    struct mkv_rail_key {
        uint64_t iova; /* what the device calls offset 0: the address, or 0 for a dma-buf */
        uint32_t lkey;
        uint32_t rkey;
    } rail[MKV_MAX_RAILS];
};

/* Regions by id. Entries are set and cleared by the control plane while jobs run; a region's struct lives
 * as long as the table, so that a job that has just loaded the pointer may still look at it. */
struct mkv_table {
    struct mkv_region **slot; /* capacity pointers, lazily zeroed memory */
    uint32_t capacity;
    uint32_t spare;
};

static inline struct mkv_region *mkv_table_get(const struct mkv_table *t, uint32_t id) {
    return id < t->capacity ? __atomic_load_n(&t->slot[id], __ATOMIC_ACQUIRE) : 0;
}

struct mkv_seg { /* where a part of a READ lands, 16 B */
    uint64_t offset;
    uint32_t region; /* id in the channel's local table */
    uint32_t length;
};

struct mkv_read { /* one READ: a remote span into up to four local spans, in order; 96 B */
    uint64_t cookie;
    uint64_t offset; /* in the remote region */
    uint32_t region; /* id in the channel's remote table */
    uint32_t nseg;
    uint64_t spare;
    struct mkv_seg seg[MKV_MAX_SEG];
};

struct mkv_done { /* what became of one READ */
    uint64_t cookie;
    uint64_t posted_ns; /* taken before its first work request was posted */
    uint64_t done_ns;   /* taken after its completion was seen */
    uint64_t sample_ns; /* tcp: the responder's own time from first to last byte; UINT64_MAX: not known */
    int32_t status;     /* 0, or a negative errno: -EIO, -ECANCELED (flushed), -EACCES, -EHOSTUNREACH */
    uint32_t vendor;    /* verbs: ibv_wc_status << 16 | vendor_err's low half */
};

struct mkv_channel;

struct mkv_channel_ops {
    /* Bounds-checks a READ against both tables and queues it. 0; -EAGAIN: `depth` READs are under way;
     * -ERANGE: out of bounds (nothing is queued, the channel stays good); -EACCES: a local region that
     * may not be written; -ENOENT: no such region; -EPIPE: the channel is broken. */
    int (*post)(struct mkv_channel *ch, const struct mkv_read *r);
    /* Hands what is queued to the wire, as far as the windows allow. */
    void (*flush)(struct mkv_channel *ch);
    /* Collects up to max completions, oldest first on each rail; refills the wire from the queue. */
    int (*poll)(struct mkv_channel *ch, struct mkv_done *out, int max);
    /* Asks for `fd` to become readable at the next completion. 1: poll again first, something may be there.
     */
    int (*arm)(struct mkv_channel *ch);
    /* Breaks the channel. Every READ under way still completes through poll, flushed; only then can no
     * device write its destination any more. */
    void (*abort)(struct mkv_channel *ch);
};

/* What a driver has learned of its waits, and the one under way; see drive.c. */
struct mkv_waits {
    uint64_t least, most, budget; /* ns of spinning */
    uint64_t since, until;        /* of the wait; since: 0 if there is none */
    uint32_t vain;                /* waits that ended asleep */
    uint32_t patient;             /* this one spins for more than the least */
};

struct mkv_channel { /* what every fabric's channel starts with */
    const struct mkv_channel_ops *ops;
    const struct mkv_table *local;
    const struct mkv_table *remote;
    uint32_t depth;  /* READs that may be queued and under way together */
    uint32_t busy;   /* READs queued and under way now */
    int32_t fd;      /* becomes readable as armed; for poll(2) or an event loop, never read from outside */
    int32_t broken;  /* 0, or the negative errno that broke it */
    uint64_t window; /* bytes that may be on the wire at once (at least one READ always may) */
    uint64_t wire_bytes;    /* bytes on the wire now */
    uint64_t read_bytes;    /* bytes READ so far */
    uint64_t reads;         /* READs completed so far */
    uint64_t doorbells;     /* posts to the device, or send calls */
    uint64_t sleeps;        /* waits on fd */
    struct mkv_waits waits; /* of the thread that has it; of the first channel, if it has several */
};

#endif
