// Memory that kernels get is full of NaN, so that what they read before they write it shows.
#include <stdlib.h>
#ifdef __SSE__
#include <mm_malloc.h>  // declares posix_memalign, too
#endif
#include <string.h>
static inline int poisoned(void** memory, size_t alignment, size_t bytes) {
    const int failed = posix_memalign(memory, alignment, bytes);
    if (!failed) memset(*memory, 0xff, bytes);
    return failed;
}
#define posix_memalign poisoned
#define FUSE_MOST_KEPT 0  // each call has new memory
