// Memory and threads for one call. Whatever a call needs is reserved before its team of threads starts to compute, so a
// call that finds no memory has changed nothing.

#pragma once

#include <omp.h>
#include <pthread.h>
#include <stdlib.h>

enum { DONE = 0, NO_MEMORY = 1, NO_THREADS = 2 };  // what the exported functions return

enum { MUCH = 1 << 16 };  // from this many operations on, a second thread saves time

static long threads = 1;                // of a team; set once, by use_threads
static _Thread_local long started = 1;  // the largest team that the calling thread has had: OpenMP keeps its threads

// Memory in whole cache lines of 64 bytes. NULL if the system has none.
static void* reserve(long bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

static void* wait_for(void* lock) {
    pthread_mutex_lock(lock);
    pthread_mutex_unlock(lock);
    return NULL;
}

// Whether the system can start `count` more threads. OpenMP ends the process where it cannot, so this starts as many
// threads that only wait for each other, and ends them again.
static int can_start(long count) {
    pthread_t* others = malloc(count * sizeof(pthread_t));
    if (others == NULL) return 0;
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    long made = 0;
    pthread_mutex_lock(&lock);
    while (made < count && pthread_create(others + made, NULL, wait_for, &lock) == 0) made++;
    pthread_mutex_unlock(&lock);
    for (long i = 0; i < made; i++) pthread_join(others[i], NULL);
    free(others);
    return made == count;
}

// How many threads the caller's team may have; 0 if the system cannot start them.
static long whole_team(void) {
    if (started < threads && can_start(threads - 1)) started = threads;
    return started < threads ? 0 : threads;
}

// The same for a call of this many operations.
static long team_for(long operations) { return operations > MUCH ? whole_team() : 1; }
