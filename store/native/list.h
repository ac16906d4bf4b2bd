/* list.h: doubly linked lists of extents. An extent is in one list at a time: it has one pair of links. */
#ifndef MKV_LIST_H
#define MKV_LIST_H

#include "ns.h"

static inline void mkv_list_push_head(struct mkv_list *l, struct mkv_extent *e) {
    e->prev = NULL;
    e->next = l->head;
    *(l->head ? &l->head->prev : &l->tail) = e;
    l->head = e;
    l->count++;
}

static inline void mkv_list_push_tail(struct mkv_list *l, struct mkv_extent *e) {
    e->next = NULL;
    e->prev = l->tail;
    *(l->tail ? &l->tail->next : &l->head) = e;
    l->tail = e;
    l->count++;
}

static inline void mkv_list_unlink(struct mkv_list *l, struct mkv_extent *e) {
    *(e->prev ? &e->prev->next : &l->head) = e->next;
    *(e->next ? &e->next->prev : &l->tail) = e->prev;
    e->prev = e->next = NULL;
    l->count--;
}

#endif
