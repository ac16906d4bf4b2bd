/* readjob.h: the plainest job: a list of READs, each with its outcome. */
#ifndef MKV_READJOB_H
#define MKV_READJOB_H

#include "job.h"

struct mkv_readjob {
    struct mkv_job job;
    const struct mkv_read *reads;
    struct mkv_done *outcome; /* outcome[i] is that of reads[i], whatever their cookies */
    uint32_t n;
    uint32_t posted;
    uint32_t finished;
};

void mkv_readjob_init(struct mkv_readjob *rj, struct mkv_channel *ch, const struct mkv_read *reads,
                      struct mkv_done *outcome, uint32_t n, uint64_t timeout_ns);

#endif
