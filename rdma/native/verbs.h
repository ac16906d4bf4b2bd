/* verbs.h: the verbs fabric's channel, one RC queue pair per rail. */
#ifndef MKV_VERBS_H
#define MKV_VERBS_H

#include "fabric.h"

/* Whether this core has verbs at all: 1, or 0 (noverbs.c). */
int mkv_verbs_built(void);

/* What pyverbs made and Python proved (mkv_verbs_prove), one per rail. */
struct mkv_verbs_rail {
    uint64_t qp;       /* struct ibv_qp * */
    uint32_t sq_depth; /* max_send_wr of the queue pair; its CQ holds at least as many */
    uint32_t max_sge;
    uint64_t max_msg; /* longest message: port_attr.max_msg_sz, or less to test segmentation */
};

/* 0 if `ptr` really is the ibv_qp that Python holds: readable memory, and its number, type and the handle of
 * its PD as pyverbs reports them. -EFAULT: not readable; -EINVAL: something else lies there. */
int mkv_verbs_prove(uint64_t ptr, uint32_t qp_num, uint32_t qp_type, uint32_t pd_handle);

/* A channel over connected queue pairs; `depth` READs at once. They stay Python's: close them only after
 * mkv_verbs_channel_free. NULL with errno. */
struct mkv_channel *mkv_verbs_channel_new(const struct mkv_verbs_rail *rails, uint32_t nrails, uint32_t depth,
                                          const struct mkv_table *local, const struct mkv_table *remote);
void mkv_verbs_channel_free(struct mkv_channel *ch);

#endif
