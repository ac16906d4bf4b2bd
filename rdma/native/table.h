/* table.h: making and filling region tables (fabric.h says what they are). */
#ifndef MKV_TABLE_H
#define MKV_TABLE_H

#include "fabric.h"

/* A table for ids below capacity; the memory is only touched where ids are used. NULL with errno. */
struct mkv_table *mkv_table_new(uint32_t capacity);
void mkv_table_free(struct mkv_table *t); /* when no job, channel or responder uses it any more */
/* Copies *region into the table under region->id. -EEXIST; -ERANGE; -ENOMEM. */
int mkv_table_set(struct mkv_table *t, const struct mkv_region *region);
/* Takes an entry out; its memory stays until the table goes, so that whoever has just loaded it may look. */
int mkv_table_clear(struct mkv_table *t, uint32_t id);
struct mkv_region *mkv_table_at(const struct mkv_table *t, uint32_t id);

#endif
