/* job.h: a batch under way, and who drives it.
 *
 *   submit(job) ─► step, step, … ─► done          blocking caller:   mkv_run(jobs, n)    on its own thread
 *                   │  posts, polls, decides      everybody else:    mkv_loop            one C thread,
 *                   └─ never blocks                                  done list + eventfd for reap()
 *
 * A job owns its channel from start to end. It sets `done` only when no device can write into its memory any
 * more (every READ completed, flushed, or its channel declared `undrained`, which obliges the owner to
 * destroy the queue pair before anything is handed back).
 */
#ifndef MKV_JOB_H
#define MKV_JOB_H

#include "clock.h"
#include "fabric.h"

#define MKV_DRAIN_NS 2000000000ull /* how long flushes may take before the queue pair has to be destroyed */

struct mkv_job {
    /* Makes what progress can be made without waiting: 1 if there was any, 0 if not. */
    int (*step)(struct mkv_job *job);
    struct mkv_channel *ch;
    uint64_t deadline_ns; /* absolute, mkv_now_ns; the job ends itself then */
    uint64_t wake_ns;     /* 0, or when step wants to run again though nothing completes */
    int32_t done;         /* set last (release), by step */
    int32_t rc;           /* 0, or a negative errno of the whole batch; per-key statuses say the rest */
    int32_t undrained;    /* the device kept READs: destroy the channel before touching the buffers */
    int32_t armed;        /* the driver's note */
    uint64_t broken_ns;   /* when the channel was found broken */
    uint64_t started_ns;
    uint64_t ended_ns;
    uint64_t ticket;
    struct mkv_job *next; /* the driver's lists */
};

/* Whether the job has to end early: its deadline has passed (then its channel is broken here, so that all
 * READs under way are flushed) or its channel broke by itself. The job goes on polling until `busy` is 0 or
 * `undrained` is set. */
static inline int mkv_job_must_end(struct mkv_job *job, uint64_t now) {
    struct mkv_channel *ch = job->ch;
    if (now >= job->deadline_ns && !ch->broken && ch->busy)
        ch->ops->abort(ch);
    if (!ch->broken)
        return now >= job->deadline_ns;
    if (!job->broken_ns)
        job->broken_ns = now;
    if (ch->busy && now > job->broken_ns + MKV_DRAIN_NS)
        job->undrained = 1;
    return 1;
}

static inline void mkv_job_finish(struct mkv_job *job, int32_t rc) {
    job->rc = rc;
    job->ended_ns = mkv_now_ns();
    __atomic_store_n(&job->done, 1, __ATOMIC_RELEASE);
}

#endif
