/* drive.h: who drives jobs: the caller's own thread, or one C thread for many. */
#ifndef MKV_DRIVE_H
#define MKV_DRIVE_H

#include "job.h"

/* How long to spin before sleeping on the channels, when a machine has more than one CPU. */
void mkv_set_spin_ns(uint64_t ns);
uint64_t mkv_spin_ns(void);

/* Runs jobs to their end on this thread. */
void mkv_run(struct mkv_job **jobs, uint32_t n);
void mkv_run_one(struct mkv_job *job);

/* A thread that drives whatever is submitted; finished jobs are collected by reap, and the eventfd becomes
 * readable. */
struct mkv_loop;
struct mkv_loop *mkv_loop_new(void);
int mkv_loop_eventfd(const struct mkv_loop *loop);
void mkv_loop_submit(struct mkv_loop *loop, struct mkv_job *job);
/* Up to max finished jobs, oldest first; clears the eventfd when none is left. */
uint32_t mkv_loop_reap(struct mkv_loop *loop, struct mkv_job **out, uint32_t max);
/* Waits for the jobs under way (their deadlines bound it) and ends the thread. */
void mkv_loop_free(struct mkv_loop *loop);

#endif
