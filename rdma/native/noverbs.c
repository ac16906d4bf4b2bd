/* noverbs.c: stands in for verbs.c and bare.c in a core that was built without <infiniband/verbs.h>
 * (MEMKV_WITHOUT=verbs). rdma/_pv.py asks mkv_verbs_built first, so that nothing else here is called.
 */
#include <errno.h>
#include <stddef.h>

#include "bare.h"
#include "verbs.h"

int mkv_verbs_built(void) {
    return 0;
}

int mkv_verbs_prove(uint64_t ptr, uint32_t qp_num, uint32_t qp_type, uint32_t pd_handle) {
    (void)ptr, (void)qp_num, (void)qp_type, (void)pd_handle;
    return -ENOSYS;
}

struct mkv_channel *mkv_verbs_channel_new(const struct mkv_verbs_rail *rails, uint32_t nrails, uint32_t depth,
                                          const struct mkv_table *local, const struct mkv_table *remote) {
    (void)rails, (void)nrails, (void)depth, (void)local, (void)remote;
    errno = ENOSYS;
    return NULL;
}

void mkv_verbs_channel_free(struct mkv_channel *ch) {
    (void)ch;
}

int64_t mkv_bare_reads(const struct mkv_bare *b) {
    (void)b;
    return -ENOSYS;
}

int mkv_bare_latency(const struct mkv_bare *b, uint64_t *out) {
    (void)b, (void)out;
    return -ENOSYS;
}
