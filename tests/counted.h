// Put before the C code by a test: counts what it takes of the system (memory and threads), and refuses it when asked to.

#include <pthread.h>
#include <stdlib.h>

static long refused = -1;
long taken, held;  // how often something was asked for; how many pieces of memory are not yet given back

void refuse(long number) { refused = number, taken = 0; }  // -1: nothing

static int is_refused(void) { return taken++ == refused; }
static void* counted(void* memory) { return held += memory != NULL, memory; }
static void* counted_malloc(size_t bytes) { return is_refused() ? NULL : counted(malloc(bytes)); }
static void* counted_aligned_alloc(size_t alignment, size_t bytes) {
    return is_refused() ? NULL : counted(aligned_alloc(alignment, bytes));
}
static void counted_free(void* memory) { held -= memory != NULL, free(memory); }
static int counted_pthread_create(pthread_t* made, const pthread_attr_t* how, void* (*start)(void*), void* argument) {
    return is_refused() ? 11 : pthread_create(made, how, start, argument);
}

#define malloc counted_malloc
#define aligned_alloc counted_aligned_alloc
#define free counted_free
#define pthread_create counted_pthread_create
