/* hostcopy.h: streams and events without a GPU, for tests: what libcuda does asynchronously, a thread does.
 *
 * A stream carries out copies and records events in order. It can be slowed down, held, and made to fail: at
 * the call (the copy is refused) or when it runs (the stream is lost: nothing runs on it any more and its
 * events report the error, as after a fault on a GPU).
 */
#ifndef MKV_HOSTCOPY_H
#define MKV_HOSTCOPY_H

#include "copier.h"

struct mkv_hoststream;
struct mkv_hostevent;

struct mkv_hoststream *mkv_hoststream_new(void);
void mkv_hoststream_free(struct mkv_hoststream *s);
void mkv_hoststream_delay(struct mkv_hoststream *s, uint64_t ns_per_copy);
/* Nonzero: copies are taken, but none is begun. One that is under way goes on. */
void mkv_hoststream_hold(struct mkv_hoststream *s, int held);
/* The copy after `good` more is refused with `rc`, and no other. */
void mkv_hoststream_refuse(struct mkv_hoststream *s, uint64_t good, int rc);
/* The copy after `good` more loses the stream; rc 0: it works again. */
void mkv_hoststream_lose(struct mkv_hoststream *s, uint64_t good, int rc);
/* Copies taken and copies done so far. */
void mkv_hoststream_counts(struct mkv_hoststream *s, uint64_t *taken, uint64_t *done);

struct mkv_hostevent *mkv_hostevent_new(void);
void mkv_hostevent_free(struct mkv_hostevent *e);

void mkv_copy_host(struct mkv_copy_driver *out);

#endif
