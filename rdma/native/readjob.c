/* readjob.c: posts a list of READs as the channel takes them, and notes each one's outcome. */
#include "readjob.h"

static int refuse(struct mkv_readjob *rj, uint32_t i, int status) {
    uint64_t now = mkv_now_ns();
    rj->outcome[i] = (struct mkv_done){.cookie = rj->reads[i].cookie,
                                       .posted_ns = now,
                                       .done_ns = now,
                                       .sample_ns = UINT64_MAX,
                                       .status = status};
    rj->finished++;
    return 1;
}

static int step(struct mkv_job *job) {
    struct mkv_readjob *rj = (struct mkv_readjob *)job;
    struct mkv_channel *ch = job->ch;
    struct mkv_done done[32];
    int progress = 0, queued = 0, n;
    uint64_t now = mkv_now_ns();
    int end = mkv_job_must_end(job, now);
    while (rj->posted < rj->n && !end) {
        struct mkv_read r = rj->reads[rj->posted];
        r.cookie = rj->posted;
        int rc = ch->ops->post(ch, &r);
        if (rc == -EAGAIN || rc == -EPIPE)
            break;
        if (rc)
            progress |= refuse(rj, rj->posted, rc);
        else
            queued = 1;
        rj->posted++;
    }
    if (queued)
        ch->ops->flush(ch);
    while ((n = ch->ops->poll(ch, done, 32)) > 0) {
        progress = 1;
        for (int i = 0; i < n; i++) {
            uint32_t k = (uint32_t)done[i].cookie;
            done[i].cookie = rj->reads[k].cookie;
            rj->outcome[k] = done[i];
        }
        rj->finished += (uint32_t)n;
    }
    if (end || ch->broken) {
        int why = now >= job->deadline_ns ? -ETIMEDOUT : ch->broken;
        while (rj->posted < rj->n)
            progress |= refuse(rj, rj->posted++, why);
        if (ch->busy && !job->undrained)
            return progress;
        mkv_job_finish(job, why);
        return 1;
    }
    if (rj->finished == rj->n) {
        mkv_job_finish(job, 0);
        return 1;
    }
    return progress | queued;
}

void mkv_readjob_init(struct mkv_readjob *rj, struct mkv_channel *ch, const struct mkv_read *reads,
                      struct mkv_done *outcome, uint32_t n, uint64_t timeout_ns) {
    uint64_t now = mkv_now_ns();
    *rj = (struct mkv_readjob){
        .job = {.step = step, .ch = ch, .deadline_ns = now + timeout_ns, .started_ns = now},
        .reads = reads,
        .outcome = outcome,
        .n = n};
}
